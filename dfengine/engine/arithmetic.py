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
    with _SWITCHES, torch.cuda.device(device), float32_products(precision):
        yield


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within, torch's float32 matrix products and convolutions on a GPU are TF32 where `precision` is "tf32", else
    exact; the switches are put back as they were, whichever of torch's two ways set them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches, name, value = (matmul, cudnn), "allow_tf32", precision == "tf32"
    try:
        before = [getattr(switch, name) for switch in switches]
    except RuntimeError:  # the user took the newer way, of torch 2.9; the two must not be mixed
        switches, name, value = (matmul, cudnn.conv), "fp32_precision", "tf32" if value else "ieee"
        before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, value)
        yield
    finally:
        for switch, own in zip(switches, before, strict=True):
            setattr(switch, name, own)
