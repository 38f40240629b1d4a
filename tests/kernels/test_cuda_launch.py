"""kernels/cuda_launch.py beside a stand-in for cupy and the device: what reaches the driver, and how often."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
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
