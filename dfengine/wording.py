"""Counts in sentences."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`number` and what is counted: "1 image", "2 images", "0 images". plural: where it is not `noun` with an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
