#!/usr/bin/env bash
# Trains the demo's checkpoint, which is also what `dfengine train` starts from, on two CPU cores in about an hour and writes
# it into the package: first on scenes of moderate variety, then on every kind of scene.
#     bench/demo_checkpoint.sh [WORK_FOLDER]
# The seconds of a --minutes budget differ from machine to machine, so another run gives other weights of the same kind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-build/demo-checkpoint}
bin=.venv/bin
export OMP_NUM_THREADS=1
common="--preset diff-fastener-tiny --synthesis structural --precision bfloat16 --threads 1 --seed 0"

$bin/dfengine fasteners "$work/moderate" --train 1200 --test-good 0 --per-defect 0 --seed 0
$bin/torchrun --standalone --nproc-per-node 2 -m dfengine train "$work/moderate" --out "$work/moderate.safetensors" \
    $common --minutes 36 --workers 1 --decoy 0.25 --denoiser-share 0.25 --denoiser-every 8 --inference-t-share 0.75
$bin/dfengine fasteners "$work/all" --train 1500 --test-good 0 --per-defect 0 --seed 7000 --variety 1
$bin/dfengine train "$work/all" --out "$work/all.safetensors" --init "$work/moderate.safetensors" \
    $common --steps 5600 --workers 0 --denoiser-share 0.1 --denoiser-every 8 --inference-t-share 0.75 --keep last
$bin/dfengine fasteners "$work/normals" --train 300 --test-good 0 --per-defect 0 --seed 7001 --variety 1
$bin/dfengine calibrate "$work/all.safetensors" "$work/normals" --false-alarm-rate 0.01 --half --precision float32 \
    --out dfengine/assets/fastener-tiny.safetensors
