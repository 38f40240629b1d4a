"""Channel slices: how activations lie in memory, and the codes of their types.

An activation (..., H, W, C) is channels-last, and may be a slice of the channels of a wider buffer, so that a producer
writes straight into what a later op reads as one tensor. Its pixels then follow each other at a distance of P >= C
values, the pixel stride, which with the shape says where every value is.
"""

from __future__ import annotations

import torch

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Codes of csrc/common/convert.h: FloatType; what the compiled backends serve."""


def resampled(size: tuple[int, int], resample: str) -> tuple[int, int]:
    """The size (H, W) after "none", "down" (2 x 2 mean) or "up" (nearest, x2)."""
    if resample == "down":
        return size[0] // 2, size[1] // 2
    return (2 * size[0], 2 * size[1]) if resample == "up" else (size[0], size[1])


def pixel_stride(name: str, tensor: torch.Tensor) -> int:
    """The pixel stride of a channel slice (..., H, W, C). Raises ValueError, naming it `name`, where it is not one."""
    *pixels, channels = tensor.shape
    *strides, step = tensor.stride()
    found, inner = None, 1
    for size, stride in zip(reversed(pixels), reversed(strides), strict=True):
        if size > 1:  # the strides of other dimensions mean nothing
            if found is None:
                found = stride // inner
            if stride != found * inner:
                found = -1
            inner *= size
    found = max(channels, 1) if found is None else found
    if found < channels or (channels > 1 and step != 1):
        raise ValueError(f"{name}: strides {tuple(tensor.stride())} are not those of a channel slice")
    return found
