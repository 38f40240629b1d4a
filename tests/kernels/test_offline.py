"""Kernels compile for sm_89 and sm_90, CUDA C++ for sm_80 and sm_86 too (or for the one that it is for), without a GPU,
and do not spill."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfengine.kernels import conv2d_cuda
from dfengine.kernels.cuda_launch import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
MAX_REGISTERS = {
    "channel_attention": 128,
    "conv2d": 255,
    "conv2d_wgmma": 255,
    "group_norm_apply": 128,
    "group_norm_merge": 128,
    "group_norm_moments": 128,
    "group_norm_stages": 128,
    "ingest": 96,
    "max_pool": 64,
    "one_step": 80,
    "reverse_step": 96,
    "score": 64,
    "upsample_bilinear": 96,
}
"""Registers a thread, in the first configuration; by the stem in bench/kernels or csrc/cuda."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compile_and_do_not_spill(tmp_path):
    pytest.importorskip("triton")
    report = tmp_path / "check.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "bench/kernels_check.py", "--quick", "--json", report]
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(report.read_text())
    for op, bound in MAX_REGISTERS.items():
        files = dict(triton=ROOT / "bench" / "kernels" / f"{op}.py", cuda=ROOT / "csrc" / "cuda" / f"{op}.cu")
        assert any(file.is_file() for file in files.values())
        for backend, file in files.items():
            if not file.is_file() or (backend == "cuda" and not shutil.which("nvcc")):
                continue
            mine = [row for row in rows if (row["op"], row["backend"]) == (op, backend)]
            wanted = {89, 90} if backend == "triton" else {"90a"} if op in ARCHITECTURES else {80, 86, 89, 90}
            assert {row["architecture"] for row in mine} == wanted
            assert max(row["registers"] for row in mine) <= bound
            assert all(row["local"] == row["stack"] == 0 for row in mine)
    if not shutil.which("nvcc"):
        return
    for tile in conv2d_cuda.TILES:
        mine = [row for row in rows if re.fullmatch(f"conv2d_(b?float16|half_sums)_{tile.name}", row["kernel"])]
        assert len(mine) >= 8, "two types, four architectures"
        for row in mine:
            # Shared memory of 100 KB holds fewer of two tiles.
            small = row["architecture"] in (86, 89)
            assert row["blocks"] >= ({"64x64": 3, "128x128w4": 1}.get(tile.name, tile.blocks) if small else tile.blocks)
            assert row["loop"]["HMMA"] >= row["loop"]["LDSM"] > 0 and row["wrong"] == []
    for tile in conv2d_cuda.WGMMA_TILES:
        mine = [row for row in rows if re.fullmatch(f"conv2d_b?float16_{tile.name}", row["kernel"])]
        assert len(mine) == 2 and all(row["blocks"] == tile.blocks and row["wrong"] == [] for row in mine)
        assert all(row["loop"]["HGMMA"] == row["loop"]["LDSM"] > 0 for row in mine)
