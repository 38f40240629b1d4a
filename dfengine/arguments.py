"""Arguments of the public functions: checked, and brought to one type."""

from __future__ import annotations

import os
import reprlib
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from dfengine.errors import ArgumentTypeError, UsageError


def whole_number(name: str, value: Any, least: int = 0, most: int | None = None) -> int:
    """`value` as an int: any integer type, NumPy's included, but no bool.

    Raises `ArgumentTypeError` for another type, `UsageError` outside `least` to `most` (None: without an end).
    """
    expected = "a positive whole number" if least == 1 else f"a whole number from {least}"
    if most is not None:
        power = (most + 1).bit_length() - 1
        expected = f"a whole number from {least} to " + (f"2**{power} - 1" if most + 1 == 1 << power else str(most))
    elif least != 1:
        expected += " up"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentTypeError(f"{name} must be {expected}, not {reprlib.repr(value)}")
    if value < least or (most is not None and value > most):
        raise UsageError(f"{name} must be {expected}, not {int(value)}")
    return int(value)


def real_number(name: str, value: Any) -> float:
    """`value` as a float: any real number, NumPy's included, but no bool. Raises `ArgumentTypeError`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a number, not {reprlib.repr(value)}")
    return float(value)


def path_of(what: str, value: Any) -> Path:
    """`value`, which names `what`, as a Path. Raises `ArgumentTypeError` for what is no text and no path, `UsageError`
    for text that can name no file: an empty one would name the current folder."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentTypeError(f"{what} is named by a path, not by a value of type {type(value).__name__}")
    name = os.fsdecode(value)
    if not name or "\0" in name:
        raise UsageError(f"{what} is named by a path, not by {'an empty text' if not name else repr(name)}")
    return Path(name)
