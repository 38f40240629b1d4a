"""What float32 means on a device while a model is lowered, tuned, captured or run there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SWITCHES = threading.RLock()


@contextmanager
def float32_arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """On a GPU, makes it the current one and float32 products exact unless `precision` is "tf32": torch's default for
    convolutions is TF32. Its switches are the process's: one thread at a time is within, whatever its detector, which
    also keeps the captures of CUDA graphs apart."""
    if device.type != "cuda":
        yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    with _SWITCHES, torch.cuda.device(device):
        before = [switch.allow_tf32 for switch in switches]
        try:
            for switch in switches:
                switch.allow_tf32 = precision == "tf32"
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value
