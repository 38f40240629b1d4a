"""Kernels are compiled ahead of their launches, several at a time, and none runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfengine.kernels import resample, triton_import

ROOT = Path(__file__).resolve().parents[2]

WITH_THE_COMPILER = """
import sys
from functools import partial
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Device:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 89, 32)


driver.set_active(Device())
from dfengine.kernels import resample, triton_import

x, y = torch.zeros(1, 8, 8, 16), torch.full((1, 4, 4, 16), torch.nan)
run = resample.MAX_POOL.implementations["triton"].run
calls = [partial(run, x, y, configuration=c) for c in resample.CONFIGURATIONS]
calls += [calls[0], partial(run, x, y, configuration={**resample.CONFIGURATIONS[0], "num_warps": 3}), lambda: 1 / 0]
triton_import.compile_ahead(calls, threads=2)
assert y.isnan().all()
cubins = list(Path(sys.argv[1]).rglob("*.cubin"))
assert len(cubins) == len(resample.CONFIGURATIONS), cubins

from triton.runtime import _async_compile

kernel, compiled = resample.max_pool_kernel, []
compile_honestly = kernel.compile
full = False


def compile_counted(*args, **options):
    compiled.append(1)
    if full:
        raise OSError("no space left")
    return compile_honestly(*args, **options)


kernel.compile = compile_counted


def compile_only(calls):
    before = len(compiled)
    triton_import.compile_ahead(calls, threads=1)
    assert _async_compile.active_mode.get() is None
    return len(compiled) - before


assert compile_only(calls[:3]) == 0  # nothing is compiled anew
narrow = partial(run, x[..., :4].contiguous(), y[..., :4].contiguous())
full = True
assert compile_only([narrow]) == 1
full = False
assert compile_only([narrow]) == 1 and compile_only([narrow]) == 0  # what failed is tried again


def interrupted():
    run(x, y[:, :, :, :8], configuration=resample.CONFIGURATIONS[0])
    raise KeyboardInterrupt


try:
    compile_only([interrupted])
except KeyboardInterrupt:
    print("interrupted")
x, y = x[..., :8].contiguous(), y[..., :8].contiguous()
assert compile_only([partial(run, x, y)]) == 1
try:
    calls[4]()
except Exception as error:
    print("raised when launched:", type(error).__name__)
"""


def test_it_compiles_what_is_launched_later(tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITH_THE_COMPILER, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("interrupted\nraised when launched: ")


@pytest.mark.skipif(bool(triton_import.MISSING) or not triton_import.INTERPRETED, reason="needs Triton's interpreter")
def test_no_kernel_runs_until_it_is_launched():
    x, y = torch.ones(1, 4, 4, 16), torch.full((1, 2, 2, 16), torch.nan)
    run = resample.MAX_POOL.implementations["triton"].run
    triton_import.compile_ahead([lambda: run(x, y)], threads=1)
    assert y.isnan().all()
    run(x, y)
    assert (y == 1).all()
