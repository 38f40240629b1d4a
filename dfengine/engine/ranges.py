"""NVTX ranges around calls, for Nsight Systems and Nsight Compute. Without them a call is what it was: they wrap it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import torch

from dfengine.errors import DfengineError

ENVIRONMENT = "DFENGINE_NVTX"
"""Set to anything but 0, it names the ops of every program that is bound from then on."""


def ranges_wanted() -> bool:
    """Whether the environment asks for ranges in every program."""
    return os.environ.get(ENVIRONMENT, "0") not in ("", "0")


@cache
def _range_functions() -> tuple[Callable[[str], object], Callable[[], object]]:
    """(push, pop), of the package nvtx or else of torch; both in the default domain, so that filters are the same."""
    try:
        import nvtx
    except ImportError:
        if not torch.cuda.is_available():
            raise DfengineError("NVTX ranges need the package nvtx, or torch with CUDA") from None
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    return nvtx.push_range, nvtx.pop_range


def named_range(name: str, call: Callable[[], None]) -> Callable[[], None]:
    """`call` in a range called `name`. Raises DfengineError where there is no NVTX."""
    push, pop = _range_functions()

    def named() -> None:
        push(name)
        try:
            call()
        finally:
            pop()

    return named
