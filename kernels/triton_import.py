"""Triton, or an empty stand-in where it is not installed, so that kernel files can be imported everywhere; and how its
kernels are launched, or compiled ahead of their first launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import ContextVar
from functools import partial

from dfengine.kernels.registry import CannotRunError

try:
    import triton
    import triton.language as tl

    MISSING = ""
except ImportError as error:
    MISSING = f"triton cannot be imported ({error})"
    tl = None

    class triton:  # noqa: N801  (stands for the module)
        """Leaves kernels as plain functions; nothing launches them, since `available` raises first."""

        @staticmethod
        def jit(function=None, **options):
            return function if function is not None else lambda decorated: decorated


INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in the interpreter: triton reads the variable when it decorates them, so it is read once."""


def available(device: str) -> None:
    """Raise CannotRunError with the reason where Triton kernels do not run on `device` ("cpu" or "cuda")."""
    if MISSING:
        raise CannotRunError(MISSING)
    if device == "cpu" and not INTERPRETED:
        raise CannotRunError("triton needs a GPU (or TRITON_INTERPRET=1)")


_COMPILING: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel, grid) -> Callable[..., object]:
    """`kernel[grid]`, a function of the kernel's arguments; within `compile_ahead` it compiles for them alone."""
    return partial(kernel.run, grid=grid, warmup=_COMPILING.get())


def compile_ahead(calls: Iterable[Callable[[], None]], threads: int) -> None:
    """Compiles what the `launch`es of these calls need and is not compiled yet, several kernels at a time where this
    Triton can (from 3.6 on), one after the other where it cannot. What else the calls do, they do; no kernel runs.

    What cannot be compiled raises when it is launched, not here.
    """
    calls = list(calls)
    if MISSING or not calls:
        return
    mode = getattr(triton, "AsyncCompileMode", None)
    token = _COMPILING.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, mode(pool, ignore_errors=True) if mode else nullcontext():
            for call in calls:
                with suppress(Exception):
                    call()
    finally:
        _COMPILING.reset(token)
