"""group_norm_merge: from the moments of tiles to a scale and an offset, the second stage of GroupNorm at inference.

    mean, variance     of a group, over the tiles of its channels, of x + shift
    rstd   = (variance + eps)^(-1/2)
    scale  = weight rstd
    offset = bias - (mean - shift) scale            so that z = x scale + offset is the norm of x + shift

`shift` is what a convolution left out of its x, its bias or the folded time bias: the norm takes it in. Two sources
stand for their concatenation along the channels, C = C1 + C2, which is written nowhere; a group may straddle the
border. The moments come from group_norm_moments or conv2d; group_norm_apply or the prologue of a conv2d takes scale
and offset.

Shapes: moments (N, T, 2, C1), counts (T,) int32 pixels of each tile, and those of a second source or None, with tiles
of their own; weight, bias (C,); shift (N, C), (1, C) or None -> scale, offset (N, C), and mean, rstd (N, groups) where
wanted. Tiles are merged in a fixed order (Chan, Golub and LeVeque 1979).
Layouts: all are contiguous.
Types: float32 but for counts (the reference takes float64 for all). Arithmetic is float32, in the cpu kernel float64.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/group_norm_stages.cu), cpu
(csrc/cpu/group_norm_stages.cpp). Results depend on neither batch nor threads; tolerances: DESIGN, Numerics.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.group_norm_moments import _chan, can_run, can_run_on_gpu, check_small, power_of_2
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.triton_import import tl, triton


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
    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    size = (moments.shape[0], weight.shape[0])
    scale, offset = out or (torch.empty(size, dtype=moments.dtype, device=moments.device) for _ in range(2))
    second, (mean, rstd) = second or (None, None), statistics or (None, None)
    outputs = (scale, offset, mean, rstd)
    _check(moments, counts, *second, weight, bias, shift, groups, *outputs)
    _merge(moments, counts, *second, weight, bias, shift, groups, eps, *outputs, backend or "")
    return scale, offset


def _check(moments, counts, moments2, counts2, weight, bias, shift, groups, scale, offset, mean, rstd) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    batch, channels = moments.shape[0], weight.shape[0]
    widths = 0
    for name, tiles, count in (("moments", moments, counts), ("second", moments2, counts2)):
        if tiles is None:
            continue
        if tiles.ndim != 4 or tiles.shape[0] != batch or tiles.shape[2] != 2:
            raise ValueError(f"{name}: expected ({batch}, T, 2, C), got {tuple(tiles.shape)}")
        check_small(name, tiles, tuple(tiles.shape), moments)
        if count.dtype != torch.int32 or tuple(count.shape) != (tiles.shape[1],) or not count.is_contiguous():
            raise ValueError(f"{name}: counts must be int32 ({tiles.shape[1]},)")
        widths += tiles.shape[3]
    if widths != channels:
        raise ValueError(f"moments of {widths} channels, weight of {channels}")
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    check_small("weight", weight, (channels,), moments)
    check_small("bias", bias, (channels,), moments)
    if shift is not None:
        check_small("shift", shift, (1 if shift.shape[0] == 1 else batch, channels), moments)
    for name, value, width in (
        ("scale", scale, channels),
        ("offset", offset, channels),
        ("mean", mean, groups),
        ("rstd", rstd, groups),
    ):
        if value is not None:
            check_small(name, value, (batch, width), moments)


@registry.custom_op("group_norm_merge", mutates=("scale", "offset", "mean", "rstd"))
def _merge(
    moments: Tensor, counts: Tensor, moments2: Tensor | None, counts2: Tensor | None, weight: Tensor, bias: Tensor,
    shift: Tensor | None, groups: int, eps: float, scale: Tensor, offset: Tensor, mean: Tensor | None,
    rstd: Tensor | None, backend: str,
) -> None:  # fmt: skip
    OP(moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean, rstd, backend=backend)


def reference(moments, counts, moments2, counts2, weight, bias, shift, groups, eps) -> tuple[Tensor, ...]:
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


def _run_reference(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None
) -> None:
    results = reference(moments, counts, moments2, counts2, weight, bias, shift, groups, eps)
    for output, value in zip((scale, offset, mean, rstd), results, strict=True):
        if output is not None:
            output.copy_(value)


def _can_run_triton(moments, counts, moments2, counts2, weight, bias, shift, groups, *args, **_kwargs) -> None:
    can_run_on_gpu(moments, moments2)
    can_merge_groups_of(weight.shape[0] // groups)


def can_merge_groups_of(channels: int) -> None:
    if channels > 1024:
        raise CannotRunError(f"{channels} channels in a group, more than 1,024")


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


CONFIGURATIONS = tuple(dict(VALUES=values, num_warps=warps) for values, warps in ((2048, 4), (4096, 8), (512, 1)))
"""Launch configurations, each tested; VALUES are those of a block. The first is used until they have been timed."""


def block_sizes(size: int, tiles: int, values: int) -> dict[str, int]:
    """The block of merge_kernel for groups of `size` channels: `values` values of at most all tiles."""
    channels = triton.next_power_of_2(size)
    return dict(SIZE=size, CHANNELS=channels, TILES=min(triton.next_power_of_2(tiles), max(4, values // channels)))


def _run_triton(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None,
    configuration=None,
) -> None:  # fmt: skip
    options = dict(configuration or CONFIGURATIONS[0])
    second = (0, 0) if moments2 is None else (moments2.shape[1], moments2.shape[3])
    blocks = block_sizes(weight.shape[0] // groups, max(moments.shape[1], second[0]), options.pop("VALUES"))
    triton_import.launch(merge_kernel, (groups, moments.shape[0]))(
        moments, counts, moments2, counts2, weight, bias, shift, scale, offset, mean, rstd,
        moments.shape[1], second[0], moments.shape[3], second[1], _shift_stride(shift), eps, **blocks, **options,
    )  # fmt: skip


def _shift_stride(shift: Tensor | None) -> int:
    return 0 if shift is None or shift.shape[0] == 1 else shift.shape[1]


def _run_cuda(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None
) -> None:
    second = (0, 0) if moments2 is None else (moments2.shape[1], moments2.shape[3])
    size = weight.shape[0] // groups
    x = min(256, power_of_2(size))
    cuda_launch.launch(
        "group_norm_stages", "group_norm_merge", (groups, moments.shape[0], 1), (x, 256 // x, 1),
        (
            moments, counts, moments2, counts2, weight, bias, shift, scale, offset, mean, rstd,
            *map(np.int64, (moments.shape[1], second[0], moments.shape[3], second[1], _shift_stride(shift))),
            np.int32(size), np.float32(eps),
        ),
        shared=4 * (3 * 256 + 2 * size),
    )  # fmt: skip


def _cpu_call(
    moments, counts, moments2, counts2, weight, bias, shift, groups, eps, scale, offset, mean=None, rstd=None, level=""
):
    sources = [
        (0, 0, 0, 0) if tiles is None else (tiles.data_ptr(), count.data_ptr(), tiles.shape[1], tiles.shape[3])
        for tiles, count in ((moments, counts), (moments2, counts2))
    ]
    return native.module.GroupNormMerge(
        sources, moments.shape[0], groups, weight.data_ptr(), bias.data_ptr(), native.address(shift),
        _shift_stride(shift), eps, scale.data_ptr(), offset.data_ptr(), native.address(mean), native.address(rstd),
        level,
    )  # fmt: skip


def _run_cpu(*args, **options) -> None:
    _cpu_call(*args, **options).run(torch.get_num_threads())


def _bind_cpu(*args, **options) -> native.Bound:
    return native.Bound(_cpu_call(*args, **options), args)


OP = Op("group_norm_merge")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, can_run_on_gpu)
OP.register("cpu", _run_cpu, registry.cpu_available("GroupNormMerge"), can_run, _bind_cpu)
OP.register("reference", _run_reference, registry.always, registry.always)
