"""GroupNorm at inference in three ops: tile moments -> merge into a scale and an offset -> apply with the activation.

    group_norm_moments   mean_t, M2_t       of each channel over the pixels of tile t; M2 = sum (x - mean_t)^2
    group_norm_merge     mean, variance     of a group, over the tiles of its channels, of x + shift
                         scale  = weight rstd                        rstd = (variance + eps)^(-1/2)
                         offset = bias - (mean - shift) scale        so that z = x scale + offset
    group_norm_apply     y = resample(act(x scale + offset))

A convolution that leaves the moments of what it writes (kernels/conv2d.py) takes the place of the first stage. `shift`
is what it left out, its bias or the folded time bias: the norm takes it in. Two sources stand for their concatenation
along the channels, C = C1 + C2, which is written nowhere; a group may straddle the border.

moments:  x (N, H, W, C) -> moments (N, T, 2, C), [..., 0, :] means, [..., 1, :] M2; tiles are `tile_pixels` consecutive
          pixels in row-major order, T = ceil(H W / tile_pixels), the last one may be shorter.
merge:    moments, counts (T,) int32 pixels of each tile, and those of a second source or None; weight, bias (C,);
          shift (N, C), (1, C) or None -> scale, offset (N, C), and mean, rstd (N, groups) where wanted. Tiles are
          merged in a fixed order (Chan, Golub and LeVeque 1979).
apply:    x, x2 or None, scale, offset (N, C) or both None for 1 and 0; act: none, gelu (erf form), silu, relu;
          resample: "none", "down" (mean of 2x2 activated values; even sizes), "up" (nearest, twice the size)
          -> y (N, H', W', C). With neither scale nor x2 it is the pooling or the enlarging of a skip path.
Layouts:  x, x2, y are channels-last, and may be channel slices of wider buffers: strides (H W P, W P, P, 1), P >= C.
Types:    x, x2, y share float32, float16 or bfloat16; the others are float32 (the reference takes float64 for all).
          Arithmetic is float32.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/group_norm_stages.cu),
          cpu (csrc/cpu/group_norm_stages.cpp). Results depend on neither batch nor threads; tolerances: DESIGN,
          Numerics.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.triton_import import tl, triton

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3}
RESAMPLES = {"none": 0, "down": 1, "up": 2}
"""Codes of csrc: FloatType, Activation, Resample."""


def default_tile_pixels(pixels: int) -> int:
    """Tiles of a sample with so many pixels: at most 256 of them up to 65,536 pixels, of 16 to 256 pixels each."""
    return min(256, max(16, 1 << max(0, -(-pixels // 256) - 1).bit_length()))


def tile_counts(pixels: int, tile_pixels: int, device: torch.device | str = "cpu") -> Tensor:
    """The `counts` of tiles of `tile_pixels` pixels: int32 (T,), the last one what is left."""
    first = torch.arange(0, pixels, tile_pixels, dtype=torch.int32)
    return (pixels - first).clamp(max=tile_pixels).to(device)


def moments(
    x: Tensor, tile_pixels: int | None = None, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return the moments (N, T, 2, C) of x's tiles, in `out` where it is given.

    This and the next two raise ValueError for arguments that no backend accepts, CannotRunError when the forced backend
    does not serve them.
    """
    pixel_stride("x", x)
    pixels = x.shape[1] * x.shape[2]
    tile_pixels = default_tile_pixels(pixels) if tile_pixels is None else tile_pixels
    if tile_pixels < 1 or x.numel() == 0:
        raise ValueError(f"x: {tuple(x.shape)} in tiles of {tile_pixels} pixels holds nothing")
    shape = (x.shape[0], -(-pixels // tile_pixels), 2, x.shape[3])
    out = torch.empty(shape, dtype=_precise(x), device=x.device) if out is None else out
    _check_small("out", out, shape, x)
    torch.ops.dfengine.group_norm_moments(x, tile_pixels, out, backend or "")
    return out


def merge(
    moments: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    shift: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    *,
    out: tuple[Tensor, Tensor] | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (scale, offset), in `out` where it is given.

    second: (moments2, counts2) of the second source; statistics: (mean, rstd) to be written as well.
    """
    batch, channels = moments.shape[0], weight.shape[0]
    widths = 0
    for name, source in (("moments", (moments, counts)), ("second", second)):
        if source is None:
            continue
        tiles, count = source
        if tiles.ndim != 4 or tiles.shape[0] != batch or tiles.shape[2] != 2:
            raise ValueError(f"{name}: expected ({batch}, T, 2, C), got {tuple(tiles.shape)}")
        _check_small(name, tiles, tuple(tiles.shape), moments)
        if count.dtype != torch.int32 or tuple(count.shape) != (tiles.shape[1],) or not count.is_contiguous():
            raise ValueError(f"{name}: counts must be int32 ({tiles.shape[1]},)")
        widths += tiles.shape[3]
    if widths != channels:
        raise ValueError(f"moments of {widths} channels, weight of {channels}")
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    _check_small("weight", weight, (channels,), moments)
    _check_small("bias", bias, (channels,), moments)
    if shift is not None:
        _check_small("shift", shift, (1 if shift.shape[0] == 1 else batch, channels), moments)
    scale, offset = out or (
        torch.empty((batch, channels), dtype=moments.dtype, device=moments.device) for _ in range(2)
    )
    mean, rstd = statistics or (None, None)
    for name, value, width in (
        ("scale", scale, channels),
        ("offset", offset, channels),
        ("mean", mean, groups),
        ("rstd", rstd, groups),
    ):
        if value is not None:
            _check_small(name, value, (batch, width), moments)
    torch.ops.dfengine.group_norm_merge(
        moments,
        counts,
        *(second or (None, None)),
        weight,
        bias,
        shift,
        groups,
        eps,
        scale,
        offset,
        mean,
        rstd,
        backend or "",
    )
    return scale, offset


def apply(
    x: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    *,
    act: str = "none",
    resample: str = "none",
    x2: Tensor | None = None,
    y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return resample(act(cat(x, x2) scale + offset)), in `y` where it is given."""
    shape = _result_shape(x, x2, act, resample)
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if y is None else y
    if tuple(y.shape) != shape:
        raise ValueError(f"y: expected {shape}, got {tuple(y.shape)}")
    for name, tensor in (("x", x), ("x2", x2), ("y", y)):
        if tensor is not None:
            pixel_stride(name, tensor)
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise ValueError(f"{name}: {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    if (scale is None) != (offset is None):
        raise ValueError("scale and offset: give both or neither")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None:
            _check_small(name, tensor, (shape[0], shape[3]), x)
    torch.ops.dfengine.group_norm_apply(x, x2, scale, offset, act, resample, y, backend or "")
    return y


def _result_shape(x: Tensor, x2: Tensor | None, act: str, resample: str) -> tuple[int, int, int, int]:
    if act not in ACTIVATIONS:
        raise ValueError(f"act: {act!r} is none of {', '.join(ACTIVATIONS)}")
    if resample not in RESAMPLES:
        raise ValueError(f"resample: {resample!r} is none of {', '.join(RESAMPLES)}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x: expected (N, H, W, C), got {tuple(x.shape)}")
    if x2 is not None and (x2.ndim != 4 or x2.shape[:3] != x.shape[:3]):
        raise ValueError(f"x2: expected {tuple(x.shape[:3])} and channels, got {tuple(x2.shape)}")
    batch, height, width, channels = x.shape
    if resample == "down":
        if height % 2 or width % 2:
            raise ValueError(f"x: {height} x {width} pixels do not pool by 2x2")
        height, width = height // 2, width // 2
    elif resample == "up":
        height, width = 2 * height, 2 * width
    return batch, height, width, channels + (0 if x2 is None else x2.shape[3])


def pixel_stride(name: str, x: Tensor) -> int:
    """Elements from one pixel of x (N, H, W, C) to the next: C, or more in a channel slice of a wider buffer.

    Raises ValueError for other layouts. Strides along sizes of 1 mean nothing.
    """
    if x.ndim != 4:
        raise ValueError(f"{name}: expected (N, H, W, C), got {tuple(x.shape)}")
    height, width, channels = x.shape[1:]
    steps = zip(x.shape, x.stride(), (height * width, width, 1), strict=False)
    outer = [(stride, pixels) for size, stride, pixels in steps if size > 1]
    found = outer[-1][0] // outer[-1][1] if outer else channels
    if found < channels or (channels > 1 and x.stride(3) != 1) or any(s != found * pixels for s, pixels in outer):
        raise ValueError(f"{name}: strides {x.stride()} are not those of a channel slice of a channels-last buffer")
    return found


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_small(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A parameter or statistic: contiguous, of float32, or float64 beside float64 activations."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != _precise(like) or tensor.device != like.device or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {_precise(like)} on {like.device}, got {tensor.dtype} on {tensor.device}"
        )


@torch.library.custom_op("dfengine::group_norm_moments", mutates_args=("moments",))
def _moments(x: Tensor, tile_pixels: int, moments: Tensor, backend: str) -> None:
    MOMENTS(x, tile_pixels, moments, backend=backend)


@torch.library.custom_op("dfengine::group_norm_merge", mutates_args=("scale", "offset", "mean", "rstd"))
def _merge(
    moments: Tensor, counts: Tensor, moments2: Tensor | None, counts2: Tensor | None, weight: Tensor, bias: Tensor,
    shift: Tensor | None, groups: int, eps: float, scale: Tensor, offset: Tensor, mean: Tensor | None,
    rstd: Tensor | None, backend: str,
) -> None:  # fmt: skip
    MERGE(
        moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean, rstd, backend=backend
    )


@torch.library.custom_op("dfengine::group_norm_apply", mutates_args=("y",))
def _apply(
    x: Tensor, x2: Tensor | None, scale: Tensor | None, offset: Tensor | None, act: str, resample: str, y: Tensor,
    backend: str,
) -> None:  # fmt: skip
    APPLY(x, x2, scale, offset, act, resample, y, backend=backend)


@_moments.register_fake
@_merge.register_fake
@_apply.register_fake
def _(*_args) -> None:
    return None


def reference_moments(x: Tensor, tile_pixels: int) -> Tensor:
    """The moments (N, T, 2, C) in torch, in float64 for float64 and else in float32."""
    u = x.to(_precise(x)).reshape(x.shape[0], -1, x.shape[3])
    full = u.shape[1] // tile_pixels * tile_pixels
    parts = [u[:, :full].reshape(u.shape[0], -1, tile_pixels, u.shape[2]), u[:, None, full:]]
    results = []
    for part in parts:
        if part.numel():
            mean = part.mean(dim=2, keepdim=True)
            results.append(torch.stack((mean[:, :, 0], (part - mean).square().sum(dim=2)), dim=2))
    return torch.cat(results, dim=1)


def reference_merge(moments, counts, moments2, counts2, weight, bias, shift, groups, eps) -> tuple[Tensor, ...]:
    """(scale, offset, mean, rstd) in torch, in the moments' dtype."""
    means, squares = [], []
    for tiles, count in ((moments, counts), (moments2, counts2)):
        if tiles is not None:
            sizes = count.to(tiles.dtype)[:, None]
            pixels = sizes.sum()
            means.append((tiles[:, :, 0] * sizes).sum(dim=1) / pixels)
            squares.append((tiles[:, :, 1] + sizes * (tiles[:, :, 0] - means[-1][:, None]).square()).sum(dim=1))
    mean, m2 = torch.cat(means, dim=1), torch.cat(squares, dim=1)
    moved = torch.zeros_like(mean) if shift is None else shift.expand_as(mean)
    by_group = (mean.shape[0], groups, -1)
    u = (mean + moved).view(by_group)
    group_mean = u.mean(dim=2)
    group_m2 = (m2.view(by_group) + pixels * (u - group_mean[..., None]).square()).sum(dim=2)
    rstd = torch.rsqrt(group_m2 / (pixels * u.shape[2]) + eps)
    scale = rstd.repeat_interleave(u.shape[2], dim=1) * weight
    return scale, bias - (group_mean.repeat_interleave(u.shape[2], dim=1) - moved) * scale, group_mean, rstd


def reference_apply(x, x2, scale, offset, act, resample) -> Tensor:
    """y in torch, in float64 for float64 and else in float32, rounded once."""
    z = (x if x2 is None else torch.cat((x, x2), dim=3)).to(_precise(x))
    if scale is not None:
        z = torch.addcmul(offset[:, None, None], z, scale[:, None, None])
    z = z if act == "none" else getattr(F, act)(z)
    if resample == "down":
        z = F.avg_pool2d(z.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    elif resample == "up":
        z = z.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return z.to(x.dtype)


def _run_reference_moments(x, tile_pixels, moments) -> None:
    moments.copy_(reference_moments(x, tile_pixels))


def _run_reference_merge(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None
) -> None:
    results = reference_merge(moments, counts, moments2, counts2, weight, bias, shift, groups, eps)
    for output, value in zip((scale, offset, mean, rstd), results, strict=True):
        if output is not None:
            output.copy_(value)


def _run_reference_apply(x, x2, scale, offset, act, resample, y) -> None:
    y.copy_(reference_apply(x, x2, scale, offset, act, resample))


def can_run(first: Tensor, *_args, **_kwargs) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if first.dtype not in TYPES:
        raise CannotRunError(f"{first.dtype} is none of float32, float16, bfloat16")


def can_run_on_gpu(first: Tensor, *args, **_kwargs) -> None:
    """As can_run, for the kernels on a GPU, which number the elements of a sample in 32 bits."""
    can_run(first)
    if first.shape[0] > 65535:
        raise CannotRunError(f"a batch of {first.shape[0]}, more than 65,535")
    for tensor in (first, *args):
        if isinstance(tensor, Tensor) and tensor.ndim == 4 and tensor.numel() // tensor.shape[0] >= 2**31 - 2**20:
            raise CannotRunError("a sample of 2^31 elements or more")


def _can_run_merge_triton(moments, counts, moments2, counts2, weight, bias, shift, groups, *args, **_kwargs) -> None:
    can_run_on_gpu(moments, moments2)
    can_merge_groups_of(weight.shape[0] // groups)


def can_merge_groups_of(channels: int) -> None:
    if channels > 1024:
        raise CannotRunError(f"{channels} channels in a group, more than 1,024")


@triton.jit
def _chan(count, mean, m2, more, more_mean, more_m2):
    """Moments of `count` values and those of `more` values together; either may be none."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    d = more_mean - mean
    return total, mean + d * share, m2 + more_m2 + d * d * (count * share)


@triton.jit
def moments_kernel(
    x, moments, pixels, channels, pixel_stride, tile_pixels, tiles, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Program (i, j, n): tile i of sample n for CHANNELS channels, PIXELS pixels at a time, each read once."""
    n = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) * tile_pixels
    last = tl.minimum(first + tile_pixels, pixels)
    source = x + n * pixels * pixel_stride + channel[None, :]
    live = channel < channels
    count = tl.zeros((CHANNELS,), tl.float32)
    mean, m2 = count, count
    for start in range(first, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = (pixel < last)[:, None] & live[None, :]
        u = tl.load(source + pixel[:, None] * pixel_stride, mask=mask, other=0.0).to(tl.float32)
        size = tl.minimum(last - start, PIXELS).to(tl.float32)
        block_mean = tl.sum(u, axis=0) / size
        d = tl.where(mask, u - block_mean[None, :], 0.0)
        count, mean, m2 = _chan(count, mean, m2, size, block_mean, tl.sum(d * d, axis=0))
    to = moments + (n * tiles + tl.program_id(0)) * 2 * channels + channel
    tl.store(to, mean, mask=live)
    tl.store(to + channels, m2, mask=live)


@triton.jit
def _merged(moments, counts, tiles, channels, n, channel, live, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """(pixels, mean, M2) of `channel`s of one source over its tiles; all 0 where not `live`."""
    count = tl.zeros((CHANNELS,), tl.float32)
    mean, m2 = count, count
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < tiles
        size = tl.load(counts + tile, mask=inside, other=0).to(tl.float32)
        mask = inside[:, None] & live[None, :]
        at = moments + (n * tiles + tile)[:, None] * 2 * channels + channel[None, :]
        tile_mean = tl.load(at, mask=mask, other=0.0)
        tile_m2 = tl.load(at + channels, mask=mask, other=0.0)
        total = tl.sum(size, axis=0)
        block_mean = tl.sum(tile_mean * size[:, None], axis=0) / total
        d = tile_mean - block_mean[None, :]
        block_m2 = tl.sum(tile_m2 + d * d * size[:, None], axis=0)
        count, mean, m2 = _chan(count, mean, m2, total, block_mean, block_m2)
    return count, mean, m2


@triton.jit
def merge_kernel(
    moments, counts, moments2, counts2, weight, bias, shift, scale, offset, mean, rstd,
    tiles, tiles2, channels, channels2, shift_stride, eps,
    SIZE: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (g, n): the SIZE channels of group g of sample n, TILES tiles at a time."""
    n = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * SIZE
    lane = tl.arange(0, CHANNELS)
    channel = first + lane
    live = lane < SIZE
    mine = live & (channel < channels)
    own_tiles = tl.where(first < channels, tiles, 0)
    pixels, centre, m2 = _merged(moments, counts, own_tiles, channels, n, channel, mine, TILES, CHANNELS)
    width = channels
    if moments2 is not None:
        width = channels + channels2
        theirs = live & (channel >= channels)
        tiles2 = tl.where(first + SIZE > channels, tiles2, 0)
        pixels2, centre2, m22 = _merged(
            moments2, counts2, tiles2, channels2, n, channel - channels, theirs, TILES, CHANNELS
        )
        pixels, centre, m2 = tl.maximum(pixels, pixels2), centre + centre2, m2 + m22
    moved = tl.zeros((CHANNELS,), tl.float32)
    if shift is not None:
        moved = tl.load(shift + n * shift_stride + channel, mask=live, other=0.0)
    group_mean = tl.sum(tl.where(live, centre + moved, 0.0), axis=0) / SIZE
    d = tl.where(live, centre + moved - group_mean, 0.0)
    size = tl.max(pixels, axis=0)
    group_rstd = 1.0 / tl.sqrt(tl.sum(m2 + size * d * d, axis=0) / (size * SIZE) + eps)
    factor = group_rstd * tl.load(weight + channel, mask=live, other=0.0)
    base = tl.load(bias + channel, mask=live, other=0.0)
    tl.store(scale + n * width + channel, factor, mask=live)
    tl.store(offset + n * width + channel, base - (group_mean - moved) * factor, mask=live)
    if mean is not None:
        at = n * tl.num_programs(0) + tl.program_id(0)
        tl.store(mean + at, group_mean)
        tl.store(rstd + at, group_rstd)


@triton.jit
def _gelu_deficit(magnitude):
    """min(m, 6) Phi(-m), as in csrc/common/activation.h: the polynomial approximates log2 Phi(-m)."""
    m = tl.where(magnitude > 6.0, 6.0, magnitude)
    tail = m * (-0.0534121022 + m * (0.00808071531 + m * (-0.000769219419 + m * 3.30927869e-05)))
    return m * tl.exp2(-0.999993086 + m * (-1.15120173 + m * (-0.458770961 + tail)))


@triton.jit
def _activated(z, ACT: tl.constexpr):
    if ACT == "gelu":
        z = tl.where(z > 0, z, 0.0) - _gelu_deficit(tl.abs(z))
    elif ACT == "silu":
        e = tl.exp(-tl.abs(z))
        z = z * tl.where(z > 0, 1.0, e) / (1.0 + e)
    elif ACT == "relu":
        z = tl.where(z < 0, 0.0, z)
    return z


@triton.jit
def _apply_source(
    x, scale, offset, y, block, start, width, channels, pixel_stride, y_stride, items,
    ACT: tl.constexpr, RESAMPLE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Channels `block` of one source; scale, offset and y point at its first channel, x and y at the sample."""
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    a = tl.full((CHANNELS,), 1.0, tl.float32)
    b = tl.zeros((CHANNELS,), tl.float32)
    if scale is not None:
        a = tl.load(scale + channel, mask=live, other=0.0)
        b = tl.load(offset + channel, mask=live, other=0.0)
    item = start + tl.arange(0, PIXELS)
    mask = (item < items)[:, None] & live[None, :]
    if RESAMPLE == "down":
        pixel = item // (width // 2) * (2 * width) + item % (width // 2) * 2
        result = tl.zeros((PIXELS, CHANNELS), tl.float32)
        for corner in tl.static_range(4):
            at = (pixel + corner // 2 * width + corner % 2)[:, None] * pixel_stride + channel[None, :]
            u = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            result += _activated(u * a[None, :] + b[None, :], ACT)
        result *= 0.25
    else:
        u = tl.load(x + item[:, None] * pixel_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        result = _activated(u * a[None, :] + b[None, :], ACT)
    result = result.to(y.dtype.element_ty)
    if RESAMPLE == "up":
        pixel = item // width * (4 * width) + item % width * 2
        for corner in tl.static_range(4):
            at = (pixel + corner // 2 * (2 * width) + corner % 2)[:, None] * y_stride + channel[None, :]
            tl.store(y + at, result, mask=mask)
    else:
        tl.store(y + item[:, None] * y_stride + channel[None, :], result, mask=mask)


@triton.jit
def apply_kernel(
    x, x2, scale, offset, y, pixels, y_pixels, items, width, channels, channels2, pixel_stride, pixel_stride2, y_stride,
    ACT: tl.constexpr, RESAMPLE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (i, j, n): PIXELS pixels of sample n (of y where it is pooled, else of x), CHANNELS of a source."""
    n = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * PIXELS
    block = tl.program_id(1)
    x += n * pixels * pixel_stride
    y += n * y_pixels * y_stride
    if scale is not None:
        scale += n * (channels + channels2)
        offset += n * (channels + channels2)
    blocks = tl.cdiv(channels, CHANNELS)
    if x2 is None:
        _apply_source(
            x, scale, offset, y, block, start, width, channels, pixel_stride, y_stride, items,
            ACT, RESAMPLE, PIXELS, CHANNELS,
        )  # fmt: skip
    elif block < blocks:
        _apply_source(
            x, scale, offset, y, block, start, width, channels, pixel_stride, y_stride, items,
            ACT, RESAMPLE, PIXELS, CHANNELS,
        )  # fmt: skip
    else:
        x2 += n * pixels * pixel_stride2
        if scale is not None:
            scale += channels
            offset += channels
        _apply_source(
            x2, scale, offset, y + channels, block - blocks, start, width, channels2, pixel_stride2, y_stride, items,
            ACT, RESAMPLE, PIXELS, CHANNELS,
        )  # fmt: skip


MOMENTS_CONFIGURATIONS = tuple(
    dict(PIXELS=pixels, CHANNELS=channels, num_warps=warps)
    for pixels, channels, warps in ((64, 64, 4), (32, 64, 4), (64, 128, 8), (16, 128, 4))
)
MERGE_CONFIGURATIONS = tuple(dict(VALUES=values, num_warps=warps) for values, warps in ((2048, 4), (4096, 8), (512, 1)))
APPLY_CONFIGURATIONS = tuple(
    dict(PIXELS=pixels, CHANNELS=channels, num_warps=warps)
    for pixels, channels, warps in ((32, 64, 4), (16, 128, 4), (8, 64, 4), (64, 64, 8))
)
"""Launch configurations, each tested; the first is used until they have been timed on a device."""
CONFIGURATIONS = {
    "group_norm_moments": MOMENTS_CONFIGURATIONS,
    "group_norm_merge": MERGE_CONFIGURATIONS,
    "group_norm_apply": APPLY_CONFIGURATIONS,
}


def _run_triton_moments(x, tile_pixels, moments, configuration=None) -> None:
    batch, height, width, channels = x.shape
    options = dict(configuration or MOMENTS_CONFIGURATIONS[0])
    tiles = moments.shape[1]
    moments_kernel[tiles, triton.cdiv(channels, options["CHANNELS"]), batch](
        x, moments, height * width, channels, pixel_stride("x", x), tile_pixels, tiles, **options
    )


def merge_blocks(size: int, tiles: int, values: int) -> dict[str, int]:
    """The block of merge_kernel for groups of `size` channels: `values` values of at most all tiles."""
    channels = triton.next_power_of_2(size)
    return dict(SIZE=size, CHANNELS=channels, TILES=min(triton.next_power_of_2(tiles), max(4, values // channels)))


def _run_triton_merge(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None,
    configuration=None,
) -> None:  # fmt: skip
    options = dict(configuration or MERGE_CONFIGURATIONS[0])
    second = (0, 0) if moments2 is None else (moments2.shape[1], moments2.shape[3])
    blocks = merge_blocks(weight.shape[0] // groups, max(moments.shape[1], second[0]), options.pop("VALUES"))
    merge_kernel[groups, moments.shape[0]](
        moments, counts, moments2, counts2, weight, bias, shift, scale, offset, mean, rstd,
        moments.shape[1], second[0], moments.shape[3], second[1], _shift_stride(shift), eps, **blocks, **options,
    )  # fmt: skip


def _shift_stride(shift: Tensor | None) -> int:
    return 0 if shift is None or shift.shape[0] == 1 else shift.shape[1]


def _items(x: Tensor, resample: str) -> int:
    """Pixels of a sample for which threads are started: of y where it is pooled, else of x."""
    pixels = x.shape[1] * x.shape[2]
    return pixels // 4 if resample == "down" else pixels


def _run_triton_apply(x, x2, scale, offset, act, resample, y, configuration=None) -> None:
    batch, height, width, channels = x.shape
    options = dict(configuration or APPLY_CONFIGURATIONS[0])
    channels2, stride2 = (0, 0) if x2 is None else (x2.shape[3], pixel_stride("x2", x2))
    items = _items(x, resample)
    blocks = sum(triton.cdiv(count, options["CHANNELS"]) for count in (channels, channels2))
    apply_kernel[triton.cdiv(items, options["PIXELS"]), blocks, batch](
        x, x2, scale, offset, y, height * width, y.shape[1] * y.shape[2], items, width, channels, channels2,
        pixel_stride("x", x), stride2, pixel_stride("y", y), ACT=act, RESAMPLE=resample, **options,
    )  # fmt: skip


def _type_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _vector(*tensors: Tensor | None) -> int:
    """Channels that a thread takes: 16 bytes where every tensor allows it, else one."""
    present = [tensor for tensor in tensors if tensor is not None]
    size = 16 // present[0].element_size()
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[3] % size == 0 and pixel_stride("tensor", tensor) % size == 0
        for tensor in present
    )
    return size if aligned else 1


def _block(vectors: int) -> tuple[int, int, int]:
    """256 threads: up to 32 along the vectors of a pixel, the rest along pixels."""
    x = min(32, _power_of_2(vectors))
    return x, 256 // x, 1


def _power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def _run_cuda_moments(x, tile_pixels, moments) -> None:
    batch, height, width, channels = x.shape
    vector, tiles = _vector(x), moments.shape[1]
    block = _block(channels // vector)
    grid = (tiles, -(-channels // (block[0] * vector)), batch)
    cuda_launch.launch(
        "group_norm_stages", f"group_norm_moments_{_type_name(x)}_{vector}", grid, block,
        (x, moments, *map(np.int64, (height * width, channels, pixel_stride("x", x), tile_pixels, tiles))),
        shared=block[0] * block[1] * vector * 8,
    )  # fmt: skip


def _run_cuda_merge(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None
) -> None:
    second = (0, 0) if moments2 is None else (moments2.shape[1], moments2.shape[3])
    size = weight.shape[0] // groups
    x = min(256, _power_of_2(size))
    cuda_launch.launch(
        "group_norm_stages", "group_norm_merge", (groups, moments.shape[0], 1), (x, 256 // x, 1),
        (
            moments, counts, moments2, counts2, weight, bias, shift, scale, offset, mean, rstd,
            *map(np.int64, (moments.shape[1], second[0], moments.shape[3], second[1], _shift_stride(shift))),
            np.int32(size), np.float32(eps),
        ),
        shared=4 * (3 * 256 + 2 * size),
    )  # fmt: skip


PIXELS_OF_A_THREAD = 4


def _run_cuda_apply(x, x2, scale, offset, act, resample, y) -> None:
    batch, height, width, channels = x.shape
    channels2, stride2 = (0, 0) if x2 is None else (x2.shape[3], pixel_stride("x2", x2))
    vector, items = _vector(x, x2, y), _items(x, resample)
    vectors = (channels + channels2) // vector
    block = _block(vectors)
    grid = (-(-items // (block[1] * PIXELS_OF_A_THREAD)), -(-vectors // block[0]), batch)
    sizes = (height * width, y.shape[1] * y.shape[2], items, width, channels, channels2)
    strides = (pixel_stride("x", x), stride2, pixel_stride("y", y))
    cuda_launch.launch(
        "group_norm_stages", f"group_norm_apply_{_type_name(x)}_{vector}", grid, block,
        (
            x, x2, scale, offset, y, *map(np.int64, (*sizes, *strides)),
            np.int32(ACTIVATIONS[act]), np.int32(RESAMPLES[resample]), np.int32(PIXELS_OF_A_THREAD),
        ),
    )  # fmt: skip


STREAM_BYTES = 24 * 2**20
"""Results larger than this bypass the caches; smaller ones are likely read from them by the next op."""


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run_cpu_moments(x, tile_pixels, moments, level="") -> None:
    batch, height, width, channels = x.shape
    native.module.group_norm_moments(
        x.data_ptr(), TYPES[x.dtype], (batch, height * width, channels), pixel_stride("x", x), tile_pixels,
        moments.data_ptr(), threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


def _run_cpu_merge(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None, level=""
) -> None:
    sources = [
        (0, 0, 0, 0) if tiles is None else (tiles.data_ptr(), count.data_ptr(), tiles.shape[1], tiles.shape[3])
        for tiles, count in ((moments, counts), (moments2, counts2))
    ]
    native.module.group_norm_merge(
        sources, moments.shape[0], groups, weight.data_ptr(), bias.data_ptr(), _address(shift), _shift_stride(shift),
        eps, scale.data_ptr(), offset.data_ptr(), _address(mean), _address(rstd), threads=torch.get_num_threads(),
        level=level,
    )  # fmt: skip


def _run_cpu_apply(x, x2, scale, offset, act, resample, y, level="") -> None:
    sources = [
        (0, 0, 0) if source is None else (source.data_ptr(), source.shape[3], pixel_stride("x", source))
        for source in (x, x2)
    ]
    native.module.group_norm_apply(
        sources, TYPES[x.dtype], ACTIVATIONS[act], RESAMPLES[resample], tuple(x.shape[:3]), _address(scale),
        _address(offset), y.data_ptr(), pixel_stride("y", y), stream=y.nbytes > STREAM_BYTES,
        threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


MOMENTS = Op("group_norm_moments")
MOMENTS.register("triton", _run_triton_moments, triton_import.available, can_run_on_gpu)
MOMENTS.register("cuda", _run_cuda_moments, cuda_launch.available, can_run_on_gpu)
MOMENTS.register("cpu", _run_cpu_moments, registry.cpu_available("group_norm_moments"), can_run)
MOMENTS.register("reference", _run_reference_moments, registry.always, registry.always)

MERGE = Op("group_norm_merge")
MERGE.register("triton", _run_triton_merge, triton_import.available, _can_run_merge_triton)
MERGE.register("cuda", _run_cuda_merge, cuda_launch.available, can_run_on_gpu)
MERGE.register("cpu", _run_cpu_merge, registry.cpu_available("group_norm_merge"), can_run)
MERGE.register("reference", _run_reference_merge, registry.always, registry.always)

APPLY = Op("group_norm_apply")
APPLY.register("triton", _run_triton_apply, triton_import.available, can_run_on_gpu)
APPLY.register("cuda", _run_cuda_apply, cuda_launch.available, can_run_on_gpu)
APPLY.register("cpu", _run_cpu_apply, registry.cpu_available("group_norm_apply"), can_run)
APPLY.register("reference", _run_reference_apply, registry.always, registry.always)
