"""Triton, or an empty stand-in where it is not installed, so that kernel files can be imported everywhere; and how its
kernels are launched, or compiled ahead of their first launch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import ContextVar, copy_context
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


_COMPILING: ContextVar[set | None] = ContextVar("compiling", default=None)
"""Within `compile_ahead` the kernels that were asked for."""


def launch(kernel, grid) -> Callable[..., object]:
    """`kernel[grid]`, a function of the kernel's arguments; within `compile_ahead` it compiles for them alone."""
    compiling = _COMPILING.get()
    if compiling is not None:
        compiling.add(kernel)
    return partial(kernel.run, grid=grid, warmup=compiling is not None)


def compile_ahead(calls: Iterable[Callable[[], None]], threads: int) -> None:
    """Compiles what the `launch`es of these calls need and is not compiled yet, several kernels at a time where this
    Triton can (from 3.6 on), one after the other where it cannot. What else the calls do, they do; no kernel runs.

    What cannot be compiled is tried again, and raises, when it is launched.
    """
    if not MISSING:
        copy_context().run(_compile_ahead, list(calls), threads)  # what an interrupt leaves set ends with the context


def _compile_ahead(calls: list[Callable[[], None]], threads: int) -> None:
    kernels: set = set()
    _COMPILING.set(kernels)
    mode, pool = getattr(triton, "AsyncCompileMode", None), ThreadPoolExecutor(threads)
    try:
        with mode(pool, ignore_errors=True) if mode else nullcontext():
            try:
                for call in calls:
                    with suppress(Exception):
                        call()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # of an interrupt: the mode waits for all that is left
                raise
    finally:
        pool.shutdown(cancel_futures=True)
        for kernel in kernels if mode else ():
            _forget_failures(kernel)


def _forget_failures(kernel) -> None:
    """Takes what failed, or was not begun, from the places of a kernel's compiled forms."""
    for cache, *_ in getattr(kernel, "device_caches", {}).values():
        for key in [key for key, form in cache.items() if isinstance(form, triton.FutureKernel) and not form.kernel]:
            del cache[key]
