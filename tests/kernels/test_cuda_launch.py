"""kernels/cuda_launch.py beside a stand-in for cupy and the device: what reaches the driver, and how often."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine.kernels import CannotRunError, cuda_launch


class Function:
    def __init__(self):
        self.launches, self.asked, self.carved = [], [], []

    def __setattr__(self, name, value):
        lists = dict(max_dynamic_shared_size_bytes="asked", preferred_shared_memory_carveout="carved")
        if name in lists:
            getattr(self, lists[name]).append(value)
        else:
            object.__setattr__(self, name, value)

    def __call__(self, grid, block, values, shared_mem):
        self.launches.append((grid, block, values, shared_mem))


def test_more_shared_memory_is_asked_for_once(monkeypatch):
    """Beyond 48 KiB; and beyond 16 KiB a multiprocessor is asked for all of it, once."""
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
    sizes, carved = (1024, 16 * 1024, 48 * 1024, 60_000, 60_000, 50_000, 70_000, 60_000), [0, 0, 1, 1, 1, 1, 1, 1]
    for shared, wanted in zip(sizes, carved, strict=True):
        cuda_launch.launch("conv2d", "conv2d_float16_64x64", (1, 2, 3), (128, 1, 1), (x, None, np.int32(5)), shared)
        assert function.carved == [100] * wanted
    assert function.asked == [60_000, 70_000]
    assert tuple(launch[3] for launch in function.launches) == sizes
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


@pytest.fixture
def machine(monkeypatch):
    """machine(architectures, cupy): an extension with kernels for these, None for none, on an RTX 4090, whose number is
    1; and whether cupy is there."""
    current = []

    @contextlib.contextmanager
    def made_current(device):
        current.append(device if isinstance(device, int) else device.index)
        yield
        current.pop()

    def cuda_kernel_runs(kernel):
        assert current[-1] == 1, "another device was asked"
        return kernel != "conv2d_float16_wgmma_128x256" and (8, 9) in architectures_of["extension"]

    def make(architectures, cupy):
        architectures_of["extension"] = architectures
        names = ["conv2d_float16_wgmma_128x256", "score_sums"]
        kernels = dict(cuda_launch=None, cuda_kernels=lambda: names, cuda_kernel_runs=cuda_kernel_runs)
        monkeypatch.setattr(native, "module", SimpleNamespace(**({} if architectures is None else kernels)))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: cupy or None)
        monkeypatch.setitem(sys.modules, "cupy", None)  # whose import then fails

    architectures_of = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {1: (8, 9)}[device])
    monkeypatch.setattr(torch.cuda, "device", made_current)
    for cached in (cuda_launch._in_extension, cuda_launch._extension_serves):
        monkeypatch.setattr(cuda_launch, cached.__name__, cached.__wrapped__)
    return make


class OnTheDevice(torch.Tensor):
    device = torch.device("cuda", 1)


LACKING = [
    ([(9, 0)], "has no code for compute capability 8.9"),
    (None, "was built without nvcc"),
]


@pytest.mark.parametrize("architectures, reason", LACKING)
def test_without_code_for_the_device_and_without_cupy_the_backend_is_absent(architectures, reason, machine):
    machine(architectures, cupy=False)
    with pytest.raises(CannotRunError, match=f"{reason}, and cupy is not installed"):
        cuda_launch.available("cuda")
    assert reason in cuda_launch.refusal("score_sums", torch.device("cuda", 1))
    machine(architectures, cupy=True)
    cuda_launch.available("cuda")
    assert cuda_launch.refusal("score_sums", torch.device("cuda", 1)) == ""


@pytest.mark.parametrize("architectures, reason", LACKING)
def test_a_launch_without_a_way_says_so(architectures, reason, machine):
    """As a CannotRunError, which the search for tactics takes for a refusal; also where cupy is there and broken."""
    machine(architectures, cupy=True)
    x = torch.zeros(4).as_subclass(OnTheDevice)
    with pytest.raises(CannotRunError, match=f"{reason}, and cupy cannot be imported"):
        cuda_launch.launch("score", "score_sums", (1, 1, 1), (128, 1, 1), (x,))


def test_a_kernel_without_code_is_refused_where_others_have_it(machine):
    """wgmma, say, for a device that is not of sm_90a."""
    machine([(8, 0), (8, 9)], cupy=False)
    cuda_launch.available("cuda")
    for device in (torch.device("cuda"), torch.device("cuda", 1)):
        assert cuda_launch.refusal("score_sums", device) == ""
        refused = cuda_launch.refusal("conv2d_float16_wgmma_128x256", device)
        assert refused.startswith("conv2d_float16_wgmma_128x256: ") and refused.endswith("cupy is not installed")


def test_without_an_extension_the_reason_is_why_it_is_missing(machine, monkeypatch):
    machine(None, cupy=False)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "no C++ compiler")
    with pytest.raises(CannotRunError, match="not available: no C\\+\\+ compiler, and cupy is not installed"):
        cuda_launch.available("cuda")
