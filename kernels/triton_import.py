"""Triton, or an empty stand-in where it is not installed, so that kernel files can be imported everywhere."""

from __future__ import annotations

import os

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
