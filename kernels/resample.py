"""resample: the two changes of size in the segmentation net, each written straight into a part of a wider buffer.

upsample_bilinear, twice the height and width, corners aligned (as torch with align_corners=True):

    y[i, j] = sum over the four pixels around (s_i, s_j) of their bilinear weights times x
    s_i     = i (h - 1) / (2 h - 1)        for i = 0 .. 2 h - 1, and likewise s_j with the width

max_pool, the largest value of each block of 2 x 2 pixels, whose last row or column is left out where the size is odd:

    y[i, j] = max(x[2 i, 2 j], x[2 i, 2 j + 1], x[2 i + 1, 2 j], x[2 i + 1, 2 j + 1])       NaN where any is NaN

Shapes: x (N, h, w, C); y (N, 2 h, 2 w, C) or (N, h div 2, w div 2, C); each may be a channel slice (kernels/slices.py).
Types: x and y share float32, float16 or bfloat16 (the reference also float64). Interpolation is float32, rounded once;
its whole part and its weights come from the integers i (h - 1) and 2 h - 1, so no coordinate is rounded.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cpu (csrc/cpu/resample.cpp).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from dfengine import native
from dfengine.kernels import registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES, pixel_stride
from dfengine.kernels.triton_import import tl, triton


def reference_upsample(x: torch.Tensor) -> torch.Tensor:
    """`upsample_bilinear` of the module's formula in torch; in float64 for float64, else in float32, rounded once."""
    planes = x.movedim(-1, 1).to(torch.promote_types(x.dtype, torch.float32))
    return F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=True).movedim(1, -1).to(x.dtype)


def reference_max_pool(x: torch.Tensor) -> torch.Tensor:
    """`max_pool` of the module's formula in torch."""
    return F.max_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)


def upsample_bilinear(x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Return a new contiguous (N, 2 h, 2 w, C), written by the chosen backend.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    _check("upsample_bilinear", x)
    return _upsample_bilinear(x, backend or "")


def max_pool(x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    """Return a new contiguous (N, h div 2, w div 2, C); otherwise as `upsample_bilinear`."""
    _check("max_pool", x)
    return _max_pool(x, backend or "")


def upsample_bilinear_into(x: torch.Tensor, y: torch.Tensor, backend: str | None = None) -> None:
    """As `upsample_bilinear`, into a given y, every element of which is written."""
    _check("upsample_bilinear", x, y)
    UPSAMPLE(x, y, backend=backend)


def max_pool_into(x: torch.Tensor, y: torch.Tensor, backend: str | None = None) -> None:
    """As `max_pool`, into a given y, every element of which is written."""
    _check("max_pool", x, y)
    MAX_POOL(x, y, backend=backend)


def _resized(op: str, x: torch.Tensor) -> tuple[int, int, int, int]:
    """The shape of y."""
    batch, height, width, channels = x.shape
    return (
        (batch, 2 * height, 2 * width, channels) if op == UPSAMPLE.name else (batch, height // 2, width // 2, channels)
    )


def _new_y(op: str, x: torch.Tensor, *_backend: str) -> torch.Tensor:
    return x.new_empty(_resized(op, x))


@registry.custom_op("upsample_bilinear", fake=partial(_new_y, "upsample_bilinear"))
def _upsample_bilinear(x: torch.Tensor, backend: str) -> torch.Tensor:
    y = _new_y("upsample_bilinear", x)
    UPSAMPLE(x, y, backend=backend)
    return y


@registry.custom_op("max_pool", fake=partial(_new_y, "max_pool"))
def _max_pool(x: torch.Tensor, backend: str) -> torch.Tensor:
    y = _new_y("max_pool", x)
    MAX_POOL(x, y, backend=backend)
    return y


def _check(op: str, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, H, W, C), got {tuple(x.shape)}")
    least = 1 if op == UPSAMPLE.name else 2
    if min(x.shape[1:3]) < least:
        raise ValueError(f"x: {x.shape[1]} x {x.shape[2]} pixels are fewer than {least} x {least}")
    pixel_stride("x", x)
    if y is None:
        return
    if tuple(y.shape) != _resized(op, x):
        raise ValueError(f"y: expected {_resized(op, x)}, got {tuple(y.shape)}")
    if y.dtype != x.dtype:
        raise ValueError(f"y: expected {x.dtype}, got {y.dtype}")
    if y.device != x.device:
        raise ValueError(f"y: on {y.device}, x on {x.device}")
    pixel_stride("y", y)


def can_run(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if x.dtype not in TYPES:
        raise CannotRunError(f"x: {x.dtype} is none of float32, float16, bfloat16")


def _run_reference_upsample(x, y) -> None:
    y.copy_(reference_upsample(x))


def _run_reference_max_pool(x, y) -> None:
    y.copy_(reference_max_pool(x))


@triton.jit
def _pixels_and_channels(channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The output pixels (PIXELS, 1) and channels (1, CHANNELS) of a program, and whether these exist."""
    pixel = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return pixel, channel, channel < channels


@triton.jit
def _around(i, size):
    """Of output row (or column) i: the input rows before and after, and the weight of the latter.

    No method of `size` is called: a size of 1 comes as a constant.
    """
    place = i * (size - 1)
    whole = place // (2 * size - 1)
    weight = (place - whole * (2 * size - 1)).to(tl.float32) / (2.0 * size - 1.0)
    return whole, tl.minimum(whole + 1, size - 1), weight


@triton.jit
def upsample_bilinear_kernel(
    x, y, batch, height, width, channels, x_stride, y_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program (i, j): PIXELS of the output pixels of all images, CHANNELS of their channels."""
    pixel, channel, live = _pixels_and_channels(channels, PIXELS, CHANNELS)
    live = live & (pixel < batch * 4 * height * width)
    n = pixel // (4 * height * width)
    row = pixel // (2 * width) - n * (2 * height)
    above, below, down = _around(row, height)
    left, right, across = _around(pixel % (2 * width), width)
    above = ((n * height + above) * width).to(tl.int64)
    below = ((n * height + below) * width).to(tl.int64)
    v00 = tl.load(x + (above + left) * x_stride + channel, mask=live, other=0).to(tl.float32)
    v01 = tl.load(x + (above + right) * x_stride + channel, mask=live, other=0).to(tl.float32)
    v10 = tl.load(x + (below + left) * x_stride + channel, mask=live, other=0).to(tl.float32)
    v11 = tl.load(x + (below + right) * x_stride + channel, mask=live, other=0).to(tl.float32)
    v0 = v00 * (1.0 - across) + v01 * across
    v1 = v10 * (1.0 - across) + v11 * across
    value = v0 * (1.0 - down) + v1 * down
    tl.store(y + pixel.to(tl.int64) * y_stride + channel, value.to(y.dtype.element_ty), mask=live)


@triton.jit
def _larger(a, b):
    """The larger, or whichever is not a number."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def max_pool_kernel(
    x, y, batch, height, width, channels, x_stride, y_stride, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program (i, j): PIXELS of the output pixels of all images, CHANNELS of their channels."""
    pixel, channel, live = _pixels_and_channels(channels, PIXELS, CHANNELS)
    to_height, to_width = height // 2, width // 2
    live = live & (pixel < batch * to_height * to_width)
    n = pixel // (to_height * to_width)
    row = pixel // to_width - n * to_height
    first = ((n * height + 2 * row) * width + 2 * (pixel % to_width)).to(tl.int64)
    below = first + width
    v00 = tl.load(x + first * x_stride + channel, mask=live, other=0).to(tl.float32)
    v01 = tl.load(x + (first + 1) * x_stride + channel, mask=live, other=0).to(tl.float32)
    v10 = tl.load(x + below * x_stride + channel, mask=live, other=0).to(tl.float32)
    v11 = tl.load(x + (below + 1) * x_stride + channel, mask=live, other=0).to(tl.float32)
    value = _larger(_larger(_larger(v00, v01), v10), v11)
    tl.store(y + pixel.to(tl.int64) * y_stride + channel, value.to(y.dtype.element_ty), mask=live)


CONFIGURATIONS = tuple(dict(VALUES=values, num_warps=warps) for values, warps in ((512, 4), (1024, 8), (256, 2)))
"""Launch configurations, each tested; VALUES are those of a program. The first is used until they have been timed."""
MAX_CHANNELS = 128
"""Channels of a program: a run of them that is read at once."""


def _run_triton(kernel, x, y, configuration) -> None:
    if y.numel() == 0:
        return
    options = dict(configuration or CONFIGURATIONS[0])
    values, channels = options.pop("VALUES"), x.shape[-1]
    width = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    pixels = values // width
    grid = (triton.cdiv(y.numel() // channels, pixels), triton.cdiv(channels, width))
    strides = pixel_stride("x", x), pixel_stride("y", y)
    triton_import.launch(kernel, grid)(x, y, *x.shape, *strides, PIXELS=pixels, CHANNELS=width, **options)


def _run_triton_upsample(x, y, configuration=None) -> None:
    _run_triton(upsample_bilinear_kernel, x, y, configuration)


def _run_triton_max_pool(x, y, configuration=None) -> None:
    _run_triton(max_pool_kernel, x, y, configuration)


def _can_run_triton(x, y) -> None:
    can_run(x, y)
    batch, height, width, _ = (max(sizes) for sizes in zip(x.shape, y.shape, strict=True))
    if batch * height * width >= 2**31 - 2**16 or max(height, width) >= 2**15:
        raise CannotRunError("more than 2^31 - 2^16 pixels, or 2^15 in a row or column")


STREAM_BYTES = 3 * 2**20
"""An upsampled result larger than this bypasses the caches: two to three times as fast into a channel slice."""


def _layout(x, y) -> tuple:
    strides = pixel_stride("x", x), pixel_stride("y", y)
    return x.data_ptr(), y.data_ptr(), TYPES[x.dtype], tuple(x.shape), strides


def _run_cpu_upsample(x, y, level="") -> None:
    stream = y.nbytes > STREAM_BYTES
    native.module.upsample_bilinear(*_layout(x, y), threads=torch.get_num_threads(), stream=stream, level=level)


def _run_cpu_max_pool(x, y, level="") -> None:
    native.module.max_pool(*_layout(x, y), threads=torch.get_num_threads(), level=level)


UPSAMPLE = Op("upsample_bilinear")
UPSAMPLE.register(
    "triton", _run_triton_upsample, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS
)
UPSAMPLE.register("cpu", _run_cpu_upsample, registry.cpu_available("upsample_bilinear"), can_run)
UPSAMPLE.register("reference", _run_reference_upsample, registry.always, registry.always)

MAX_POOL = Op("max_pool")
MAX_POOL.register(
    "triton", _run_triton_max_pool, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS
)
MAX_POOL.register("cpu", _run_cpu_max_pool, registry.cpu_available("max_pool"), can_run)
MAX_POOL.register("reference", _run_reference_max_pool, registry.always, registry.always)
