"""Mixed precision of the training step: which dtype autocast uses, and loss scaling for float16."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from dfengine.devices import cpu_has_bfloat16
from dfengine.errors import UsageError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """`name`: "float32", "bfloat16" or "float16". `autocast()` is the context of forward passes, `scaler` for the loss.

    Raises `UsageError` for float16 on CPU, where it is neither fast nor safe.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "float16" and device.type == "cpu":
            raise UsageError("float16 training needs a CUDA device; on CPU use float32 or bfloat16")
        self.name = name
        self.device = device
        self.dtype = _DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def choose_precision(name: str, device: torch.device, step: Callable[[Precision], None]) -> Precision:
    """The precision called `name`; "auto" is bfloat16 on CUDA where supported (else float16), and on CPU bfloat16
    where the processor has it and the training step `step(precision)` is faster in it, else float32."""
    if name != "auto":
        return Precision(name, device)
    if device.type == "cuda":
        return Precision("bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16", device)
    if not cpu_has_bfloat16():
        return Precision("float32", device)
    candidates = [Precision("float32", device), Precision("bfloat16", device)]
    for precision in candidates:
        step(precision)
    best = {precision.name: float("inf") for precision in candidates}
    for _ in range(3):
        for precision in candidates:
            start = time.perf_counter()
            step(precision)
            best[precision.name] = min(best[precision.name], time.perf_counter() - start)
    return min(candidates, key=lambda precision: best[precision.name])
