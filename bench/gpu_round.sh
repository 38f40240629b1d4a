#!/usr/bin/env bash
# One round on a machine with a GPU: what cannot be checked elsewhere, as one command.
#
#   bench/gpu_round.sh --stage {tests,kernels,tactics,throughput,profile,sanitize,check,train,all} [--out DIR] [--again]
#
# tests: facts about the machine, the tests of kernels, engine and everything marked gpu. kernels: every op timed, conv2d first, then all again
# beside torch.compile. tactics: the quickest kernels for the full model (dfengine tune). throughput: detection and one evaluation beside the
# rivals. profile: every op with its time, and Nsight Compute on the five longest and on conv2d's kernels at its three largest layers.
# sanitize: conv2d's CUDA tiles under compute-sanitizer. check: offline compilation for sm_80, 86, 89 and 90.
# train (not part of all): the full model on the data set ${DATA:-$DFENGINE_DATA/rail_eclip} at ${SIZE:-128} pixels, ${STEPS:-13125} steps of
# 16 images, 210,000 as in the papers, in legs: run again, it goes on from the last state; then its metrics and its weights in half precision.
# Each stage ends within ${STAGE_SECONDS:-530} seconds. What a stage wrote into DIR (default build/gpu-round) is kept: run again, it goes on with
# what is missing; --again begins anew, but for train. Nothing is timed before the tests have passed. The Python is ${PYTHON:-python3} (3.11 or later) with torch, triton
# and pytest in it; dfengine runs from this checkout without being installed, with its extension where pybind11 and cmake are there, else
# with one that lies in dfengine/. The CUDA kernels need nvcc for that, or cupy.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '4p' bench/gpu_round.sh | cut -c3- >&2; exit 2; }
stage=all out="${OUT:-build/gpu-round}" again=no
while [ $# -gt 0 ]; do
    case "$1" in
        --stage) [ $# -ge 2 ] || usage; stage="$2"; shift 2 ;;
        --out) [ $# -ge 2 ] || usage; out="$2"; shift 2 ;;
        --again) again=yes; shift ;;
        *) usage ;;
    esac
done
case "$stage" in tests|kernels|tactics|throughput|profile|sanitize|check|train|all) ;; *) usage ;; esac

PYTHON="${PYTHON:-python3}"
PRESET="${PRESET:-diff-fastener}"
PRECISION="${PRECISION:-bfloat16}"
mkdir -p "$out" || exit 1
log="$out/round.log"
export DFENGINE_CACHE="${DFENGINE_CACHE:-$PWD/build/gpu-cache}"
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
if "$PYTHON" -c 'import pybind11' 2>/dev/null && command -v cmake >/dev/null; then
    "$PYTHON" setup.py -q build_ext --build-lib "$layout" --build-temp build/gpu-native >build/gpu-native.log 2>&1 ||
        echo "the extension was not built: build/gpu-native.log" | tee -a "$log"
else
    for built in dfengine/_native*.so; do [ -e "$built" ] && ln -s "$PWD/$built" "$layout/dfengine/"; done
fi

"$PYTHON" - <<'END' | tee -a "$log" || exit 1
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("no CUDA device: nothing here to measure")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)

from dfengine import native
from dfengine.kernels import CannotRunError, cuda_launch

print(native.status())
try:
    cuda_launch.available("cuda")
except CannotRunError as error:
    print("without the CUDA kernels, whose tests skip:", error)
END

deadline=$((SECONDS + ${STAGE_SECONDS:-530}))
failed=0
run() { # name, command...
    local name="$1" left=$((deadline - SECONDS))
    shift
    if [ "$left" -le 5 ]; then
        echo "== $name: no time left, run the stage again" | tee -a "$log"
        failed=1
        return 1
    fi
    echo "== $name" | tee -a "$log"
    # timeout starts no functions.
    [ "$1" != into ] || set -- bash -c 'into "$@"' into "${@:2}"
    timeout --kill-after=10 "$left" "$@" 2>&1 | tee -a "$log" | tail -n 40
    local status="${PIPESTATUS[0]}"
    if [ "$status" -eq 130 ] && [ "$stage" = train ]; then
        echo "== that leg is over: run the stage again" | tee -a "$log"
    elif [ "$status" -ne 0 ]; then
        echo "== $name failed with $status" | tee -a "$log"
        failed=1
    fi
    return "$status"
}
into() { # file, command...: the file is there once the command has ended well
    "${@:2}" >"$1.part" && mv "$1.part" "$1"
}
export -f into
missing() { # file: whether it is still to be written
    [ "$again" = yes ] || [ ! -s "$out/$1" ]
}
wants() { [ "$stage" = "$1" ] || [ "$stage" = all ]; }
begin() { deadline=$((SECONDS + ${STAGE_SECONDS:-530})); }
pytest() { "$PYTHON" -m pytest -q -p no:cacheprovider -o pythonpath= -o addopts="--import-mode=importlib -ra" "$@"; }
export -f pytest
export PYTHON
checkpoint() { # makes the checkpoint that is tuned and profiled
    mkdir -p build
    [ -s "build/$PRESET-redrawn.safetensors" ] || "$PYTHON" bench/redrawn.py "$PRESET" "build/$PRESET-redrawn.safetensors"
}

if wants tests; then
    begin
    rm -f "$out/tests.txt"
    run tests bash -c "pytest tests/kernels tests/engine && pytest -m gpu tests" && echo passed >"$out/tests.txt"
fi
case "$stage" in
    kernels | tactics | throughput | profile | all)
        if [ ! -s "$out/tests.txt" ]; then
            echo "no timing on a red correctness gate: --stage tests has not passed" | tee -a "$log"
            exit 1
        fi ;;
esac
if wants kernels; then
    begin
    [ "$again" = no ] || rm -f "$out"/kernels.json "$out"/kernels-conv2d.json
    mapfile -t ops < <(cd bench/kernels && ls [!_]*.py | sed 's/\.py$//' | grep -vx conv2d)
    time_kernels() { # name, arguments...: goes on with the rows that its file has not got
        run "$1" "$PYTHON" bench/kernels.py "${@:2}" --device cuda --json "$out/$1.json" --resume
    }
    time_kernels kernels-conv2d conv2d --seconds 0.2 --match 8x256x256x128
    time_kernels kernels "${ops[@]}" --seconds 0.3
    time_kernels kernels-conv2d conv2d --seconds 0.2
    time_kernels kernels-conv2d conv2d --seconds 0.2 --compile
    time_kernels kernels "${ops[@]}" --seconds 0.3 --compile
fi
if wants tactics && missing tactics.json; then
    begin
    checkpoint && run tactics "$PYTHON" -m dfengine tune "build/$PRESET-redrawn.safetensors" --device cuda \
        --precision "$PRECISION" --batch 1 --batch 16 --seconds 240 --out "$out/tactics.json"
fi
if wants throughput; then
    begin
    half=(--preset "$PRESET" --precision "$PRECISION" --device cuda --tactics tuned --seconds 8)
    if missing throughput-detect.json; then
        run throughput-detect "$PYTHON" bench/throughput.py --case detect "${half[@]}" --batch 16 1 8 --json "$out/throughput-detect.json"
    fi
    if missing throughput-unet.json; then
        run throughput-unet "$PYTHON" bench/throughput.py --case unet "${half[@]}" --batch 1 16 --rivals eager,autocast,compile \
            --json "$out/throughput-unet.json"
    fi
    if missing throughput-fp8.json && "$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability() < (8, 9))'; then
        run throughput-fp8 "$PYTHON" bench/throughput.py --case detect --preset "$PRESET" --precision fp8 --device cuda --tactics tuned --seconds 8 \
            --batch 16 1 --rivals "" --json "$out/throughput-fp8.json"
    fi
fi
if wants profile; then
    begin
    plan=("build/$PRESET-redrawn.safetensors" --device cuda --precision "$PRECISION" --batch 16)
    if checkpoint && missing plan.json; then
        run plan into "$out/plan.json" "$PYTHON" -m dfengine info --plan --json "${plan[@]}"
    fi
    if missing ncu.csv && command -v ncu >/dev/null && [ -s "$out/plan.json" ]; then
        mapfile -t ranges < <("$PYTHON" -c '
import json, sys
ops = sorted(json.load(open(sys.argv[1]))["ops"], key=lambda op: -op["us"])[:5]
for op in ops:
    print("--nvtx-include", op["kernel"] + " " + op["name"] + "/", sep="\n")
' "$out/plan.json")
        run ncu into "$out/ncu.csv" ncu --csv --page raw --set basic --nvtx "${ranges[@]}" --profile-from-start off \
            --clock-control none "$PYTHON" -m dfengine profile "${plan[@]}" --iterations 1
    fi
    for layer in "128 to 128, 3x3, dilation 1 8x256x256x128" "128+128 to 128, 3x3, dilation 1 8x256x256x128" "256 to 256, 3x3, dilation 1 8x64x64x256"; do
        file="ncu-conv2d-${layer%%,*}.csv" file="${file// /-}"
        if missing "$file" && command -v ncu >/dev/null; then
            run "ncu $layer" into "$out/$file" ncu --csv --page raw --set detailed --kernel-name regex:conv2d \
                --clock-control none "$PYTHON" bench/kernels.py conv2d --device cuda --once --match "conv2d $layer float16"
        fi
    done
fi
if wants sanitize && ! command -v compute-sanitizer >/dev/null; then
    echo "== sanitize: compute-sanitizer was not found" | tee -a "$log"
    [ "$stage" = all ] || failed=1
elif wants sanitize; then
    begin
    for tool in memcheck racecheck; do
        if missing "$tool.txt"; then
            run "$tool" into "$out/$tool.txt" compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m pytest -q -p no:cacheprovider \
                -o pythonpath= -o addopts="--import-mode=importlib -ra" -o timeout=0 tests/kernels/test_conv2d_{cuda,wgmma}.py -k every_tile
            if ! grep -q "[0-9] passed" "$out/$tool.txt" 2>/dev/null; then # all skipped, perhaps
                rm -f "$out/$tool.txt"
                failed=1
            fi
        fi
    done
fi
if [ "$stage" = train ]; then
    begin
    data="${DATA:-${DFENGINE_DATA:?names the folder of real images}/rail_eclip}" size="${SIZE:-128}"
    name="$(basename "$data")-$PRESET-$size" resume=()
    trained="build/gpu-train/$name.safetensors"
    mkdir -p build/gpu-train
    [ -e "${trained%.safetensors}.run/state.safetensors" ] && resume=(--resume)
    leg=$(((deadline - SECONDS - 120) / 60)) # minutes; two are left for the checkpoint and its metrics
    [ "$leg" -ge 1 ] || leg=1
    # shellcheck disable=SC2086
    run "train $name" "$PYTHON" -m dfengine train "$data" --out "$trained" --preset "$PRESET" --image-size "$size" --steps "${STEPS:-13125}" \
        --device cuda --precision "$PRECISION" --leg-minutes "$leg" ${TRAIN_OPTIONS:-} "${resume[@]}"
    cp "${trained%.safetensors}.run/log.csv" "$out/$name-log.csv" 2>/dev/null
    if [ -s "$trained" ]; then
        run "evaluate $name" "$PYTHON" -m dfengine evaluate "$trained" "$data" --out "build/gpu-train/$name-evaluation" --device cuda &&
            cp "build/gpu-train/$name-evaluation/metrics.json" "$out/$name-metrics.json"
        run "halve $name" "$PYTHON" -m dfengine calibrate "$trained" "$data" --false-alarm-rate 0.1 --half --device cuda --out "$out/$name-half.safetensors"
    fi
fi
if wants check && missing kernels_check.json; then
    begin
    run check "$PYTHON" bench/kernels_check.py --json "$out/kernels_check.json"
fi
exit "$failed"
