#!/usr/bin/env bash
# One round on a machine with a GPU: what cannot be checked elsewhere, as one command.
#
#   bench/gpu_round.sh --stage {tests,sanitize,check,bench,all}
#
# tests: the kernel tests on the device (pytest -m gpu and tests/kernels); sanitize: the tiles of conv2d in CUDA C++ under compute-sanitizer's
# memcheck and racecheck, where it is installed; check: offline compilation for sm_89 and sm_90; bench: kernel timings.
# Results (JSON, logs) go under ${OUT:-bench/results}. The Python is ${PYTHON:-python3} (3.11 or later) with torch, triton and pytest
# in it; dfengine runs from this checkout without being installed, with its extension where pybind11, cmake and a compiler are there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stage=all
while [ $# -gt 0 ]; do
    case "$1" in
        --stage) stage="${2:?--stage needs a value}"; shift 2 ;;
        *) echo "usage: bench/gpu_round.sh --stage {tests,sanitize,check,bench,all}" >&2; exit 2 ;;
    esac
done
case "$stage" in tests|sanitize|check|bench|all) ;; *) echo "unknown stage $stage" >&2; exit 2 ;; esac

PYTHON="${PYTHON:-python3}"
OUT="${OUT:-bench/results}"
mkdir -p "$OUT"
unset TRITON_INTERPRET

# dfengine.kernels lies outside dfengine/, so the checkout is laid out as it installs, in a folder of links.
layout="$(mktemp -d)"
trap 'rm -rf "$layout"' EXIT
mkdir "$layout/dfengine"
for entry in dfengine/*; do
    case "$entry" in *.so | *_native_missing.txt) ;; *) ln -s "$PWD/$entry" "$layout/dfengine/" ;; esac
done
ln -s "$PWD/kernels" "$layout/dfengine/kernels"
export PYTHONSAFEPATH=1 PYTHONPATH="$layout:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if "$PYTHON" -c 'import pybind11' 2>/dev/null; then
    "$PYTHON" setup.py -q build_ext --build-lib "$layout" --build-temp "$layout/build" >"$OUT/native_build.log" 2>&1 ||
        echo "the extension was not built: $OUT/native_build.log"
fi

failed=0
run() { # name, command...
    local name="$1"
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$OUT/$name.log"
    local status="${PIPESTATUS[0]}"
    if [ "$status" -ne 0 ]; then
        echo "== $name failed with $status"
        failed=1
    fi
}

"$PYTHON" - <<'EOF' || exit 1
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("no CUDA device: nothing here to measure")
print(torch.cuda.get_device_name(), "torch", torch.__version__)
EOF

if [ "$stage" = tests ] || [ "$stage" = all ]; then
    run tests "$PYTHON" -m pytest -q -p no:cacheprovider -o pythonpath= -o addopts="--import-mode=importlib -ra" tests/kernels
    run tests_gpu "$PYTHON" -m pytest -q -p no:cacheprovider -o pythonpath= -o addopts="--import-mode=importlib -ra" -m gpu tests
fi
if [ "$stage" = sanitize ] || [ "$stage" = all ]; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            run "sanitize_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" -m pytest -q -p no:cacheprovider -o pythonpath= \
                -o addopts="--import-mode=importlib -ra" -o timeout=0 tests/kernels/test_conv2d_cuda.py -k every_tile
        done
    else
        echo "compute-sanitizer was not found: not run"
    fi
fi
if [ "$stage" = check ] || [ "$stage" = all ]; then
    run check "$PYTHON" bench/kernels_check.py --json "$OUT/kernels_check.json"
fi
if [ "$stage" = bench ] || [ "$stage" = all ]; then
    if [ "$failed" -ne 0 ]; then
        echo "no timing on a red correctness gate"
    else
        run bench "$PYTHON" bench/kernels.py --device cuda --out "$OUT"
    fi
fi
exit "$failed"
