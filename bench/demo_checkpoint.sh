#!/usr/bin/env bash
# Trains the demo's checkpoint on two CPU cores in about 40 minutes and writes it into the package.
#     bench/demo_checkpoint.sh [WORK_FOLDER]
# The seconds of a --minutes budget differ from machine to machine, so another run gives other weights of the same kind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=${1:-build/demo-checkpoint}
bin=.venv/bin
export OMP_NUM_THREADS=1

$bin/dfengine fasteners "$work/fasteners" --train 1200 --test-good 0 --per-defect 0 --seed 0
$bin/torchrun --standalone --nproc-per-node 2 -m dfengine.cli train "$work/fasteners" --out "$work/fastener.safetensors" \
    --preset diff-fastener-tiny --minutes 36 --synthesis structural --decoy 0.25 --denoiser-share 0.25 \
    --denoiser-every 8 --inference-t-share 0.75 --precision bfloat16 --threads 1 --workers 1 --seed 0
$bin/dfengine fasteners "$work/normals" --train 300 --test-good 0 --per-defect 0 --seed 1
$bin/dfengine calibrate "$work/fastener.safetensors" "$work/normals" --false-alarm-rate 0.01 --half \
    --out dfengine/assets/fastener-tiny.safetensors
