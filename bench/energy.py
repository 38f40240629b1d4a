"""Energy of calls on a GPU, by the counter that NVML reads (Volta and later)."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

LIBRARY = "libnvidia-ml.so.1"
SECONDS = 2.0
"""Of calls; the counter moves every tenth of a second or so."""


def counter(uuid: str) -> Callable[[], float] | None:
    """A function that gives the joules that the GPU of this UUID has taken since its driver was loaded; None where
    there is no NVML, or it does not count them."""
    try:
        nvml = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()

    def read() -> bool:
        return nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) == 0

    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)) or not read():
        return None

    def joules() -> float:
        if not read():
            raise RuntimeError("NVML no longer counts energy")
        return millijoules.value / 1e3

    return joules


def joules_per_call(call: Callable[[], object], device: str = "cuda") -> float | None:
    """The mean over calls one after the other for `SECONDS`, all that the GPU takes meanwhile included; None where it
    is not counted."""
    if torch.device(device).type != "cuda":
        return None
    joules = counter(str(torch.cuda.get_device_properties(device).uuid))
    if joules is None:
        return None
    call()
    torch.cuda.synchronize(device)
    calls, before, end = 0, joules(), time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        call()
        torch.cuda.synchronize(device)
        calls += 1
    return (joules() - before) / calls
