"""Products of eight bits: how a convolution's input and weight are rounded (not an op: kernels/conv2d.py reads it).

int8: the input is one of 256 values from `low` to `high`, evenly spaced, one of which is 0; a weight is one of 255,
evenly spaced about 0, with a scale for each output. Sums are exact.

fp8: both are e4m3 (four bits of exponent, three of mantissa; up to 448) after a scale, of the whole input and of each
output of the weight, that brings the largest value to 448. Sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("int8", "fp8")
LARGEST = {"int8": 127, "fp8": 448}
"""Of a weight, in the format."""


def is_range(low: float, high: float) -> bool:
    """Whether a range holds 0, and float32 its steps and their reciprocals."""
    return -1e30 < low <= 0 <= high < 1e30 and high - low > 1e-12


@dataclass(frozen=True)
class Quantization:
    """How the input of a convolution, after normalisation, activation and resampling, is rounded.

    format: of `FORMATS`. low, high: the range that it is expected in; what is beyond becomes the nearest end.
    Raises ValueError for another format, and for what is no range (`is_range`).
    """

    format: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: {self.format!r} is none of {', '.join(FORMATS)}")
        if not is_range(self.low, self.high):
            raise ValueError(f"range: {self.low} to {self.high} is no range around 0")

    @property
    def step(self) -> float:
        """What 1 of the rounded input means."""
        if self.format == "int8":
            return (self.high - self.low) / 255
        return max(self.high, -self.low) / LARGEST["fp8"]

    @property
    def zero(self) -> int:
        """The rounded input that means 0."""
        return round(-self.low / self.step) if self.format == "int8" else 0

    def input(self, p: Tensor) -> Tensor:
        """What the rounded input means, in the dtype of p, float32 or float64."""
        if self.format == "int8":
            return (torch.round(p / self.step + self.zero).clamp(0, 255) - self.zero) * self.step
        return _e4m3(p / self.step).to(p.dtype) * self.step

    def weight(self, taps: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded weight, int8 or float8_e4m3fn (KH, KW, C, O), and what 1 of it means, float32 (O,)."""
        largest = taps.abs().amax(dim=(0, 1, 2)).float()
        scale = torch.where(largest > 0, largest, 1.0) / LARGEST[self.format]
        scaled = taps.float() / scale
        return (torch.round(scaled).to(torch.int8) if self.format == "int8" else _e4m3(scaled)), scale


def _e4m3(scaled: Tensor) -> Tensor:
    return scaled.float().clamp(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)
