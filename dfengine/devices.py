"""The device that a name stands for, its make, and what the processor can."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from dfengine.errors import UsageError
from dfengine.wording import counted


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AVX512_BF16 or AMX)."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def resolve_device(device: str) -> torch.device:
    """The device called `device` ("auto", "cpu", "cuda", "cuda:N"). Raises `UsageError` where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}") from None
    if resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    if resolved.type == "cpu":
        if resolved.index:
            raise UsageError(f"device {device}: all processors are one device, cpu")
        return torch.device("cpu")
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or count == 0:
            raise UsageError(f"device {device}: torch finds no CUDA GPU on this machine")
        if (resolved.index or 0) >= count:
            raise UsageError(f"device {device}: this machine has {counted(count, 'GPU')}, counted from 0")
    return resolved


def hardware_name(device: str | torch.device) -> str:
    """The make of a device: a GPU's name; a processor's with family, model and its number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text).group(1)
        family, model = (re.search(rf"^{key}\s*:\s*(\d+)", text, re.M).group(1) for key in ("cpu family", "model"))
        return f"{name} family {family} model {model}, {os.cpu_count()} cores"
    except (OSError, AttributeError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
