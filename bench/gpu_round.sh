#!/usr/bin/env bash
# One round on a machine with a GPU: what cannot be checked elsewhere, in commands that each end in time.
#
#   bench/gpu_round.sh --stage STAGE [--minutes M] [--out DIR] [--again]
#
# With a quarter of an hour of a GPU in all, its start counted: `--stage first` (6.5 minutes), at once `--stage second` (5.5), and give it back.
#   first        tests, then kernels but for torch.compile
#   second       throughput without torch.compile, profile, then throughput beside it
#   tests        those of bench/gpu_tests.py, in parallel; the Triton kernels' while the extension is built
#   kernels      every op whose tests are green timed, conv2d first, then again beside torch.compile
#   throughput   detection and one evaluation of the U-Net beside the rivals, with the quickest kernels for each
#   profile      every op with its time; Nsight Compute on the five longest, and on conv2d's kernels at its three largest layers
#   tactics      the quickest kernels for the full model (dfengine tune)
#   sanitize     conv2d's CUDA tiles under compute-sanitizer
#   check        offline compilation for sm_80, 86, 89 and 90
#   train        one run of $PRESET (default diff-fastener-small, 14 MiB in half precision) at ${SIZE:-128} pixels, its metrics and its weights,
#                on ${DATA:-$DFENGINE_DATA/rail_eclip}; without DFENGINE_DATA on build/gpu-data/rail_eclip, for a machine that gets this tree alone
#   all          all but train, without a limit
# A command ends within M minutes (default 9), the build included; what was measured by then is kept and left out next time, but with --again.
# Results lie in build/gpu-round/<digest of the sources, the GPU and torch's version>, and are copied into DIR (default $OUT) all the while: at
# most eight files, all but the most important in more.tar.gz. Put back into that folder they are gone on with on another machine.
# An op is timed once its own tests have passed, throughput and profile once the engine's have; rows say what else was red, and are then no
# ground for a claim. Environment: PYTHON (3.11 or later, with torch, triton, pytest and hypothesis; python3), PRESET (diff-fastener), PRECISION
# (bfloat16). dfengine runs from this checkout. Its extension is built where pybind11, cmake and setuptools are, else one in dfengine/ is taken.
set -uo pipefail
SECONDS=0
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

usage() { echo "usage: $(sed -n '4s/^# *//p' bench/gpu_round.sh)" >&2; exit 2; }
stage='' minutes='' out="${OUT:-}" again=no
while [ $# -gt 0 ]; do
    case "$1" in
        --again) again=yes; shift; continue ;;
        --stage) stage="${2:-}" ;;
        --minutes) minutes="${2:-}" ;;
        --out) out="${2:-}" ;;
        *) usage ;;
    esac
    [ $# -ge 2 ] || usage
    shift 2
done
case "$stage" in
    first) default=6.5 ;;
    second) default=5.5 ;;
    all) default=1440 ;;
    tests | kernels | throughput | profile | tactics | sanitize | check | train) default=9 ;;
    *) usage ;;
esac
minutes="${minutes:-$default}"
[[ $minutes =~ ^[0-9]{1,4}(\.[0-9])?$ ]] || usage
tenths="${minutes/./}" && [[ $minutes == *.* ]] || tenths="${minutes}0"
deadline=$((10#$tenths * 6 - 15)) # what ends late is killed within ten seconds

PYTHON="${PYTHON:-python3}"
PRECISION="${PRECISION:-bfloat16}"
state=build/gpu-round
mkdir -p "$state/layout/dfengine" ${out:+"$out"} || exit
export PYTHONSAFEPATH=1 PYTHONPATH="$PWD/$state/layout:$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
digest() { # files and folders...
    find "$@" -type f -not -path '*/.*' -not -path '*/__pycache__/*' -not -name '*.so' -not -name '_native_missing.txt' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c 1-12
}

facts="$("$PYTHON" - <<'END'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("no CUDA device: nothing here to measure")
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("%d%d-real" % torch.cuda.get_device_capability())
print(sys.executable, sys.version.split()[0])
END
)" || exit 1
mapfile -t facts <<<"$facts"
key="$({ digest dfengine kernels csrc tests bench/*.py bench/kernels CMakeLists.txt; echo "${facts[0]}"; } | sha256sum | cut -c 1-12)"
results="$state/$key" log="$state/$key/round.log" noted="$state/$key/tests.jsonl"
mkdir -p "$results" || exit
export DFENGINE_CACHE="$PWD/$results/cache"
[ ! -s "$results/tactics.json" ] || export DFENGINE_TACTICS="$PWD/$results/tactics.json"

important=(round.log tests.jsonl kernels-conv2d.json kernels.json throughput-detect.json throughput-unet.json plan.json)
[ "$stage" != train ] || important=(round.log train-half.safetensors train-metrics.json train-log.csv "${important[@]}")
deliver() { # seven files and an archive of all else, of 16 MiB each
    local plain packed="$state/more.$BASHPID.tar.gz"
    [ -n "$out" ] || return 0
    mapfile -t plain < <(cd "$results" && find "${important[@]}" -maxdepth 0 -size -16777216c 2>/dev/null | head -n 7)
    [ ${#plain[@]} -eq 0 ] || (cd "$results" && tar -cf - "${plain[@]}") | tar -xf - -C "$out"
    tar -czf "$packed" -C "$results" "${plain[@]/#/--exclude=./}" . 2>/dev/null
    mv "$packed" "$out/more.tar.gz"
}
(while sleep 20 && kill -0 $$; do deliver; done) >/dev/null 2>&1 &
delivering=$!
builder=''
leave() {
    kill "$delivering" $builder 2>/dev/null
    wait "$delivering" 2>/dev/null
    deliver
}
trap leave EXIT
trap 'exit 143' TERM HUP INT

say() { echo "$*" | tee -a "$log"; }
say "== $(date -u +%FT%TZ) --stage $stage, $minutes minutes: ${facts[0]}, $(git rev-parse --short HEAD 2>/dev/null || echo "no commit"), results in $results"

# dfengine.kernels lies outside dfengine/, so the checkout is laid out as it installs, in a folder of links; the extension is moved there whole.
find "$state/layout" -type l -delete
for entry in dfengine/*; do
    case "$entry" in dfengine/kernels | *.so | *_native_missing.txt) ;; *) ln -s "$PWD/$entry" "$state/layout/dfengine/" ;; esac
done
ln -s "$PWD/kernels" "$state/layout/dfengine/kernels"
build_key="$(digest csrc CMakeLists.txt setup.py dfengine/sources.py) ${facts[1]} ${facts[2]}"
is_built() { [ "$(cat "$state/built" 2>/dev/null)" = "$build_key" ]; }
build() {
    local built
    ! is_built || return 0
    rm -f "$state/layout/dfengine"/_native* "$state/built"
    if ! { "$PYTHON" -c 'import pybind11, setuptools' && command -v cmake >/dev/null; } 2>/dev/null; then
        for built in dfengine/_native*.so; do [ ! -e "$built" ] || ln -s "$PWD/$built" "$state/layout/dfengine/"; done
        return
    fi
    rm -rf "$state/native"
    DFENGINE_CUDA_ARCHITECTURES="${facts[1]}" timeout --kill-after=10 $(((deadline - SECONDS) * 6 / 10)) \
        "$PYTHON" setup.py build_ext --build-lib "$state/native" --build-temp "$state/native-work" >"$results/native.log" 2>&1
    grep "^dfengine: building without" "$results/native.log" | tee -a "$log"
    if mv "$state"/native/dfengine/_native*.so "$state/layout/dfengine/" 2>/dev/null; then
        echo "$build_key" >"$state/built"
    else
        say "the extension was not built: native.log"
    fi
}

failed=0
run() { # name, command...: within $part percent of the time that is left
    local name="$1" left=$(((deadline - SECONDS) * ${part:-100} / 100)) status
    shift
    if [ "$left" -le 5 ]; then
        say "== $name: no time left"
        failed=1
        return 124
    fi
    say "== $name: at most $left s"
    timeout --kill-after=10 "$left" "$@" 2>&1 | tee -a "$log" | tail -n 40
    status="${PIPESTATUS[0]}"
    say "== $name: $([ "$status" -eq 0 ] || echo "failed with $status, ")after $SECONDS s in all"
    [ "$status" -eq 0 ] || failed=1
    return "$status"
}
is_done() { [ "$again" = no ] && grep -qxF "$1, ${PRESET:-} $PRECISION ${SIZE:-} ${DATA:-}" "$results/done" 2>/dev/null; }
once() { # name, command...: what has not ended well before with these settings
    is_done "$1" && return
    run "$@" && echo "$1, ${PRESET:-} $PRECISION ${SIZE:-} ${DATA:-}" >>"$results/done"
}
into() { # file, command...: a command that writes to its output, for run
    into=(bash -c 'o="$1"; shift; "$@" >"$o.part" && mv "$o.part" "$o"' into "$@")
}
is_green() { [[ " ${green[*]} " == *" $1 "* ]]; }
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -o pythonpath= -o "addopts=--import-mode=importlib -ra")

tests() {
    [ "$again" = no ] || rm -f "$noted"
    local of=(-p bench.gpu_tests --noted "$noted" --continue-on-collection-errors tests) workers
    workers=$(($(nproc) < 12 ? $(nproc) : 12))
    if [ "$workers" -gt 1 ] && "$PYTHON" -c 'import xdist' 2>/dev/null; then # in the order given, so that ops are whole before others begin
        # A kernel that hangs is ended with its process, which is replaced.
        of+=(-n "$workers" --dist load --maxschedchunk 2 --max-worker-restart 99 -o timeout=60 -o timeout_method=thread)
    fi
    if ! is_built; then # meanwhile, what needs no extension
        build &
        builder=$!
        part=50 run "tests of the Triton kernels" env OMP_NUM_THREADS=1 "${pytest[@]}" "${of[@]}" --triton-only
        wait "$builder"
        builder=''
        of+=(--new-only)
    fi
    failed=0 # what failed beside the build is in the notes
    part="$1" run tests env OMP_NUM_THREADS=1 "${pytest[@]}" "${of[@]}"
    "$PYTHON" bench/gpu_tests.py "$noted" | tee -a "$log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
}
gate() { # which names are green, and what the rows say of the others
    local found red
    found="$("$PYTHON" bench/gpu_tests.py "$noted")"
    mapfile -t green < <(sed -n 's/^\([^ ]*\): green: .*/\1/p' <<<"$found")
    mapfile -t red < <(sed -n 's/^\([^ ]*\): red: .*/\1/p' <<<"$found")
    note="${red[*]:+no claim, tests not green: ${red[*]}}"
    if [ ${#green[@]} -eq 0 ]; then
        say "no timing on a red correctness gate: --stage tests has not passed"
        exit 1
    fi
}
engine_gate() {
    gate
    is_green engine && return
    say "no timing of the engine, whose tests have not passed"
    failed=1
    return 1
}
time_kernels() { # name of the file, arguments...: goes on with the rows that it has not got
    run "$1 ${*:2}" "$PYTHON" bench/kernels.py "${@:2}" --device cuda --note "$note" --json "$results/$1.json" --resume
}
kernels() { # once without torch.compile and, but for "quick", once beside it
    local ops=() conv2d=(conv2d --seconds 0.2) op compile
    gate
    [ "$again" = no ] || rm -f "$results"/kernels.json "$results"/kernels-conv2d.json
    for op in $(cd bench/kernels && ls [!_]*.py); do
        op="${op%.py}"
        if ! is_green "$op"; then
            say "$op is not timed: its tests have not passed"
            failed=1
        elif [ "$op" != conv2d ]; then
            ops+=("$op")
        fi
    done
    is_green conv2d:cuda || conv2d+=(--without cuda)
    is_green conv2d:wgmma || conv2d+=(--without wgmma)
    ! is_green conv2d || part=50 time_kernels kernels-conv2d "${conv2d[@]}" --match 8x256x256x128
    for compile in "" --compile; do
        [ "$1 $compile" != "quick --compile" ] || break
        if [ ${#ops[@]} -gt 0 ]; then
            time_kernels kernels "${ops[@]}" --seconds 0.2 $compile
            if [ $? -eq 1 ]; then # the GPU may be lost to a process after the first error
                for op in "${ops[@]}"; do time_kernels kernels "$op" --seconds 0.2 $compile || [ $? -eq 1 ] || break; done
            fi
        fi
        ! is_green conv2d || time_kernels kernels-conv2d "${conv2d[@]}" $compile
    done
}
throughput() { # "quick": without torch.compile; else beside all rivals, and in fp8
    engine_gate || return
    local rivals half=(--preset "${PRESET:-diff-fastener}" --device cuda --tactics tuned --tuning-seconds 40 --seconds 5 --add --note "$note") case name
    for case in detect unet; do
        name="throughput-$case" rivals=()
        if [ "$1" = quick ]; then
            is_done "$name" && continue # its rows would take the place of fuller ones
            name+=" quick" rivals=(--rivals eager,autocast)
        fi
        [ "$1 $case" != "full unet" ] || rivals=(--rivals eager,autocast,compile)
        part=60 once "$name" "$PYTHON" bench/throughput.py --case "$case" "${half[@]}" --precision "$PRECISION" --batch 16 1 "${rivals[@]}" \
            --json "$results/throughput-$case.json"
    done
    if [ "$1" = full ] && [[ ! ${facts[1]} =~ ^(7.|80|86|87)-real$ ]]; then
        once throughput-fp8 "$PYTHON" bench/throughput.py --case detect "${half[@]}" --precision fp8 --batch 16 1 --rivals "" \
            --json "$results/throughput-fp8.json"
    fi
}
checkpoint() { # makes the one that is tuned and profiled
    redrawn="$state/${PRESET:-diff-fastener}-redrawn.safetensors"
    [ -s "$redrawn" ] || run redrawn "$PYTHON" bench/redrawn.py "${PRESET:-diff-fastener}" "$redrawn"
}
profile() {
    local forced=() layer file ranges plan
    if engine_gate && checkpoint; then
        # The engine runs modules where no tactic was measured.
        [ -n "${DFENGINE_TACTICS:-}" ] || [ -n "$(ls "$DFENGINE_CACHE/tactics" 2>/dev/null)" ] || forced=(DFENGINE_BACKEND=triton)
        plan=("$redrawn" --device cuda --precision "$PRECISION" --batch 16)
        into "$results/plan.json" env "${forced[@]}" "$PYTHON" -m dfengine info --plan --json "${plan[@]}"
        part=50 once plan "${into[@]}"
        if command -v ncu >/dev/null && [ -s "$results/plan.json" ]; then
            mapfile -t ranges < <("$PYTHON" -c '
import json, sys
ops = sorted(json.load(open(sys.argv[1]))["ops"], key=lambda op: -op["us"])[:5]
for op in ops:
    print("--nvtx-include", op["kernel"] + " " + op["name"] + "/", sep="\n")
' "$results/plan.json")
            into "$results/ncu.csv" ncu --csv --page raw --set basic --nvtx "${ranges[@]}" --profile-from-start off --clock-control none \
                env "${forced[@]}" "$PYTHON" -m dfengine profile "${plan[@]}" --iterations 1
            part=50 once ncu "${into[@]}"
        fi
    fi
    is_green conv2d && command -v ncu >/dev/null || return
    for layer in "128 to 128, 3x3, dilation 1 8x256x256x128" "128+128 to 128, 3x3, dilation 1 8x256x256x128" "256 to 256, 3x3, dilation 1 8x64x64x256"; do
        file="ncu-conv2d-${layer%%,*}.csv"
        into "$results/${file//[ +]/-}" ncu --csv --page raw --set detailed --kernel-name regex:conv2d --clock-control none \
            "$PYTHON" bench/kernels.py conv2d --device cuda --once --match "conv2d $layer float16"
        part=50 once "ncu $layer" "${into[@]}"
    done
}
tactics() {
    engine_gate && checkpoint || return
    once tactics "$PYTHON" -m dfengine tune "$redrawn" --device cuda --precision "$PRECISION" --batch 1 --batch 16 \
        --seconds $(((deadline - SECONDS) / 3)) --out "$results/tactics.json"
}
sanitize() {
    local tool
    if ! command -v compute-sanitizer >/dev/null; then
        say "== sanitize: compute-sanitizer was not found"
        [ "$stage" = all ] || failed=1
        return
    fi
    for tool in memcheck racecheck; do # a run in which all tests skip shows nothing
        once "$tool" bash -o pipefail -c '"$@" | tee /dev/stderr | grep "[0-9] passed" >/dev/null' sanitize compute-sanitizer --tool "$tool" \
            --error-exitcode 9 "${pytest[@]}" -o timeout=0 tests/kernels/test_conv2d_{cuda,wgmma}.py -k every_tile
    done
}
check() { once check "$PYTHON" bench/kernels_check.py --json "$results/kernels_check.json"; }
train() { # two minutes are left for the checkpoint and its metrics
    local data="${DATA:-${DFENGINE_DATA:-build/gpu-data}/rail_eclip}" trained="$state/train.safetensors" leg=$(((deadline - SECONDS - 120) / 60))
    if [ ! -d "$data" ]; then
        say "$data: no such folder of images"
        exit 1
    fi
    if ! is_done train; then
        rm -rf "$trained" "${trained%.safetensors}.run"
    fi
    once train "$PYTHON" -m dfengine train "$data" --out "$trained" --preset "${PRESET:-diff-fastener-small}" --image-size "${SIZE:-128}" \
        --minutes $((leg > 1 ? leg : 1)) --device cuda --precision "$PRECISION" || return
    cp "${trained%.safetensors}.run/log.csv" "$results/train-log.csv"
    once halve "$PYTHON" -m dfengine calibrate "$trained" "$data" --false-alarm-rate 0.1 --half --device cuda --out "$results/train-half.safetensors"
    once evaluate "$PYTHON" -m dfengine evaluate "$trained" "$data" --out "$state/train-evaluation" --device cuda &&
        cp "$state/train-evaluation/metrics.json" "$results/train-metrics.json"
}

case "$stage" in first | tests | all) ;; *) build ;; esac
case "$stage" in
    first) tests 65; kernels quick ;;
    second) throughput quick; profile; throughput full ;;
    all) tests 100; kernels full; tactics; throughput full; profile; sanitize; check ;;
    tests) tests 100 ;;
    kernels | throughput) "$stage" full ;;
    *) "$stage" ;;
esac
exit "$failed"
