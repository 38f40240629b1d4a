"""The device that a name stands for, and what the processor can."""

from __future__ import annotations

import torch

from dfengine.errors import UsageError


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
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available() or count == 0:
            raise UsageError(f"device {device}: torch finds no CUDA GPU on this machine")
        if (resolved.index or 0) >= count:
            raise UsageError(f"device {device}: this machine has {count} GPU{'s' if count > 1 else ''}, counted from 0")
    return resolved
