"""kernels/cuda_launch.py beside a stand-in for cupy and the device: what reaches the driver, and how often."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dfengine.kernels import cuda_launch


class Function:
    def __init__(self):
        self.launches, self.asked = [], []

    def __setattr__(self, name, value):
        if name == "max_dynamic_shared_size_bytes":
            self.asked.append(value)
        else:
            object.__setattr__(self, name, value)

    def __call__(self, grid, block, values, shared_mem):
        self.launches.append((grid, block, values, shared_mem))


def test_more_shared_memory_is_asked_for_once(monkeypatch):
    function, looked_up = Function(), []
    module = SimpleNamespace(get_function=lambda name: looked_up.append(name) or function)
    stream = SimpleNamespace(ExternalStream=lambda number: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=lambda **options: module, cuda=stream))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(cuda_launch, "_in_extension", lambda kernel, device: False)
    monkeypatch.setattr(cuda_launch, "_allowed", {})
    for cached in (cuda_launch._compiled, cuda_launch._function):
        monkeypatch.setattr(cuda_launch, cached.__name__, cached.__wrapped__)
    x = torch.zeros(4)
    for shared in (1024, 48 * 1024, 60_000, 60_000, 50_000, 70_000, 60_000):
        cuda_launch.launch("conv2d", "conv2d_float16_64x64", (1, 2, 3), (128, 1, 1), (x, None, np.int32(5)), shared)
    assert function.asked == [60_000, 70_000]
    assert [launch[3] for launch in function.launches] == [1024, 48 * 1024, 60_000, 60_000, 50_000, 70_000, 60_000]
    grid, block, values, _ = function.launches[0]
    assert (grid, block) == ((1, 2, 3), (128, 1, 1)) and values == (x.data_ptr(), 0, 5)
    assert set(looked_up) == {"conv2d_float16_64x64"}


def test_what_does_not_compile_is_a_runtime_error(monkeypatch):
    """As which the search for tactics leaves it out."""

    class CompileException(Exception):
        pass

    def refuse(name):
        raise CompileException("conv2d.cu(1): error")

    monkeypatch.setattr(cuda_launch, "_compiled", lambda op, device: SimpleNamespace(get_function=refuse))
    with pytest.raises(RuntimeError, match=r"NVRTC refuses conv2d.cu: conv2d.cu\(1\): error"):
        cuda_launch._function.__wrapped__("conv2d", "conv2d_float16_64x64", 0)


class Nvrtc:
    """Stands in for cupy.cuda.nvrtc; refuses sources with `refused` in them."""

    NVRTCError = type("NVRTCError", (RuntimeError,), {})

    def __init__(self):
        self.compiled, self.open = [], 0

    def getVersion(self):
        return 13, 0

    def createProgram(self, source, name, headers, include_names):
        self.open += 1
        return SimpleNamespace(source=source, name=name)

    def compileProgram(self, program, options):
        self.compiled.append((program.name, options))
        if "refused" in program.source:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")

    def getCUBIN(self, program):
        return b"code of " + program.name.encode()

    def getProgramLog(self, program):
        return f"{program.name}(1): error"

    def destroyProgram(self, program):
        self.open -= 1


def test_files_of_one_architecture_are_compiled_for_it_once(monkeypatch, tmp_path):
    nvrtc, modules = Nvrtc(), []
    cupy = SimpleNamespace(RawModule=lambda **options: modules.append(options))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=nvrtc))
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        cuda_launch._compiled.__wrapped__("conv2d_wgmma", 0)
    assert nvrtc.compiled == [("conv2d_wgmma.cu", (*cuda_launch.compile_options(), "-arch=sm_90a"))]
    assert modules[0] == modules[1] and nvrtc.open == 0
    (path,) = (tmp_path / "cache").iterdir()
    assert modules[0] == {"path": str(path)} and path.read_bytes() == b"code of conv2d_wgmma.cu"
    cuda_launch._compiled.__wrapped__("score", 0)
    assert modules[2]["options"] == cuda_launch.compile_options() and len(nvrtc.compiled) == 1
    with pytest.raises(RuntimeError, match=r"refuses conv2d_wgmma.cu: conv2d_wgmma.cu\(1\): error"):
        cuda_launch._cubin("conv2d_wgmma", "refused", ("-arch=sm_90a",))
    assert nvrtc.open == 0 and len(list((tmp_path / "cache").iterdir())) == 1


def test_a_kernel_runs_where_it_is_compiled_in_or_cupy_compiles_it(monkeypatch):
    device = torch.device("cuda", 0)
    for found, compiled_in in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found or None)
        monkeypatch.setattr(cuda_launch, "_in_extension", lambda kernel, index, there=compiled_in: there and index == 0)
        assert cuda_launch.runs("conv2d_float16_wgmma_128x256", device) == (found or compiled_in)
