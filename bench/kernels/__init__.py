"""What bench/kernels.py times and bench/kernels_check.py compiles: one module for each op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

TRITON_TYPES = {
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
"""Triton's names of types, for the signatures of `compilations`."""
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of activations."""


class Case(NamedTuple):
    """One timed case of an op.

    moved: bytes that must be read and written at least; make() returns fresh arguments; rivals maps a name to a
    function of those, "kernel" being the op and "torch" the eager composition that it replaces; label: what shape and
    dtype do not say; flops: of the matrix products in it, 2 for each multiply and add.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    moved: int
    make: Callable[[], tuple]
    rivals: dict[str, Callable[..., Any]]
    label: str = ""
    flops: int = 0
