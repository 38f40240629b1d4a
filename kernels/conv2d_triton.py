"""The Triton kernel of conv2d (kernels/conv2d.py) and its launch configurations.

An implicit GEMM: rows are pixels, columns are outputs, and the sum runs over the taps of the kernel and the channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dfengine.kernels.registry import CannotRunError
from dfengine.kernels.triton_import import tl, triton


@triton.jit
def _gelu(z, EXACT: tl.constexpr):
    """z Phi(z). EXACT: erfc by Abramowitz and Stegun 7.1.26 as in csrc/common/activation.h, to 3e-7. Else a polynomial
    for Phi(|z|) - 1/2, within 1.6e-5 and half the cost: no exponential, no division."""
    if EXACT:
        magnitude = tl.abs(z)
        t = 1.0 / (1.0 + 0.231641888 * magnitude)
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576014 + t * 0.530702714))))
        return tl.where(z > 0.0, z, 0.0) - magnitude * tail * tl.exp2(-0.72134752 * z * z)
    a = tl.minimum(tl.abs(z), 4.5, propagate_nan=tl.PropagateNan.ALL)
    s = a * a - 10.125
    phi = 9.23607324e-9 + s * (-5.928118e-10 + s * (4.27647709e-11 + s * -1.46249907e-12))
    phi = -3.87724504e-5 + s * (2.73715409e-6 + s * (-1.72352074e-7 + s * phi))
    phi = 0.156906322 + s * (-7.62315514e-3 + s * (5.32949809e-4 + s * phi))
    return tl.maximum(z, 0.0) - a * (0.5 - a * phi)


@triton.jit
def _activate(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    if ACT == "gelu":
        z = _gelu(z, EXACT)
    elif ACT == "silu":
        z = z / (1.0 + tl.exp2(-1.44269504 * z))
    elif ACT == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACT == "sigmoid":
        z = 1.0 / (1.0 + tl.exp2(-1.44269504 * z))
    return z


@triton.jit
def _e4m3(p, WIDEN: tl.constexpr):
    """p, float32, in e4m3; or rounded to its values, where the interpreter, which carries wrongly, would round."""
    p = tl.clamp(p, -448.0, 448.0)
    if WIDEN:
        bits = p.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (p + 24576.0) - 24576.0  # to a multiple of 2^-9
        return tl.where(tl.abs(p) < 0.015625, small, normal)
    return p.to(tl.float8e4nv)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies bfloat16 wrongly
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if b.dtype == tl.float8e4nv:  # tensor cores of sm_90 keep few digits of a sum: each block has its own
        return tl.dot(a, b, acc, max_num_imprecise_acc=b.shape[0])
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _read(pointers, mask, scale, offset, PROLOGUE: tl.constexpr, EXACT: tl.constexpr):
    v = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        v = v * scale + offset
    return _activate(v, PROLOGUE, EXACT)


@triton.jit
def _accumulate(
    acc, x, pitch, width_in, pixel, h, w, taps, scale, offset, weight, columns, in_columns, per_step,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    RESAMPLE: tl.constexpr, PROLOGUE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, EXACT: tl.constexpr, EIGHT: tl.constexpr,
):  # fmt: skip
    """acc + the part of one source: `x` is its sample, `weight` its first row of the ROWS a tap has, `scale` likewise.
    EIGHT: the product is in e4m3, of per_step times what is read; a tap's weight then is (OUTPUTS, ROWS).

    One loop over taps and blocks of channels, so that it is pipelined across taps. h, w: coordinates of the tile's
    pixels; bit i of `taps`: whether tap i is inside the image.
    """
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    ZOOM: tl.constexpr = 2 if RESAMPLE == "down" else 1
    channel = tl.arange(0, BLOCK_K)
    here = pixel * pitch
    if RESAMPLE == "down":
        here = 2 * (h * width_in + w) * pitch
    at = channel[:, None] + columns[None, :] * ROWS if EIGHT else channel[:, None] * OUTPUTS + columns[None, :]
    for k in range(K * K * CHUNKS):
        tap = k // CHUNKS
        c = (k - tap * CHUNKS) * BLOCK_K
        dy = (tap // K - K // 2) * DILATION
        dx = (tap % K - K // 2) * DILATION
        known = (c + channel < CHANNELS) | (CHANNELS % BLOCK_K == 0)
        live = (((taps >> tap) & 1) != 0)[:, None]
        if RESAMPLE == "up":
            there = (((h + dy) >> 1) * width_in + ((w + dx) >> 1)) * pitch
            pointers = x + c + (there[:, None] + channel[None, :])
        else:
            pointers = x + (ZOOM * (dy * width_in + dx) * pitch + c) + (here[:, None] + channel[None, :])
        mask = live & known[None, :]
        if RESAMPLE != "down" and scale is None and PROLOGUE == "none" and not EIGHT:
            a = tl.load(pointers, mask=mask, other=0.0)
        else:
            gain = scale
            shift = offset
            if scale is not None:
                gain = tl.load(scale + c + channel, mask=known, other=0.0)[None, :]
                shift = tl.load(offset + c + channel, mask=known, other=0.0)[None, :]
            p = _read(pointers, mask, gain, shift, PROLOGUE, EXACT)
            if RESAMPLE == "down":
                below = pointers + width_in * pitch
                p += _read(pointers + pitch, mask, gain, shift, PROLOGUE, EXACT)
                p += _read(below, mask, gain, shift, PROLOGUE, EXACT)
                p += _read(below + pitch, mask, gain, shift, PROLOGUE, EXACT)
                p *= 0.25
            p = tl.where(live, p, 0.0)
            a = _e4m3(p * per_step, WIDEN) if EIGHT else p.to(x.dtype.element_ty)
        first = tap * (ROWS * OUTPUTS) + c if EIGHT else (tap * ROWS + c) * OUTPUTS
        b = tl.load(weight + first + at, mask=known[:, None] & in_columns[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION, WIDEN)
    return acc


@triton.jit
def _accumulate_pairs(
    acc, x, pitch, width, h, w, taps, weight, columns, in_columns,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """As `_accumulate` where blocks of channels would be mostly empty: blocks of (tap, channel) pairs, gathered."""
    here = (h * width + w) * pitch
    for start in range(0, K * K * CHANNELS, BLOCK_K):
        pair = start + tl.arange(0, BLOCK_K)
        known = pair < K * K * CHANNELS
        tap = pair // CHANNELS
        ahead = ((tap // K - K // 2) * DILATION * width + (tap % K - K // 2) * DILATION) * pitch + pair - tap * CHANNELS
        live = ((taps[:, None] >> tap[None, :]) & 1) != 0
        a = tl.load(x + (here[:, None] + ahead[None, :]), mask=live & known[None, :], other=0.0)
        at = pair[:, None] * OUTPUTS + columns[None, :]
        b = tl.load(weight + at, mask=known[:, None] & in_columns[None, :], other=0.0)
        acc = _dot(a, b, acc, PRECISION, WIDEN)
    return acc


@triton.jit
def _finish(
    acc, first, bias, residual, y, moments, pixel, h, w, width, inside, count, pitch_residual, pitch_y,
    OUTPUTS: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """From sums to outputs `first`.. of y and moments, by at most 32 columns at a time: a whole tile would not fit in
    the registers beside its residual. WHOLE: no tile has columns past OUTPUTS."""
    if COLUMNS > 32:
        left, right = acc.reshape(acc.shape[0], 2, COLUMNS // 2).permute(0, 2, 1).split()
        _finish(
            left, first, bias, residual, y, moments, pixel, h, w, width, inside, count, pitch_residual, pitch_y,
            OUTPUTS, RESIDUAL, ACT, EXACT, WHOLE, COLUMNS // 2,
        )  # fmt: skip
        _finish(
            right, first + COLUMNS // 2, bias, residual, y, moments, pixel, h, w, width, inside, count, pitch_residual,
            pitch_y, OUTPUTS, RESIDUAL, ACT, EXACT, WHOLE, COLUMNS // 2,
        )  # fmt: skip
    else:
        columns = first + tl.arange(0, COLUMNS)
        in_columns = (columns < OUTPUTS) | WHOLE
        mask = inside[:, None] & in_columns[None, :]
        if bias is not None:
            acc += tl.load(bias + columns, mask=in_columns, other=0.0)[None, :]
        acc = _activate(acc, ACT, EXACT)
        if RESIDUAL == "none":
            pointers = residual + ((pixel * pitch_residual)[:, None] + columns[None, :])
            acc += tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        elif RESIDUAL == "up":
            at = ((h >> 1) * (width >> 1) + (w >> 1)) * pitch_residual
            acc += tl.load(residual + (at[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
        elif RESIDUAL == "down":
            at = (4 * h * width + 2 * w) * pitch_residual
            pointers = residual + (at[:, None] + columns[None, :])
            below = pointers + 2 * width * pitch_residual
            total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(pointers + pitch_residual, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(below, mask=mask, other=0.0).to(tl.float32)
            total += tl.load(below + pitch_residual, mask=mask, other=0.0).to(tl.float32)
            acc += 0.25 * total
        written = acc.to(y.dtype.element_ty)
        tl.store(y + ((pixel * pitch_y)[:, None] + columns[None, :]), written, mask=mask)
        if moments is not None:
            values = tl.where(inside[:, None], written.to(tl.float32), 0.0)
            mean = tl.sum(values, axis=0) / count
            centred = tl.where(inside[:, None], values - mean[None, :], 0.0)
            tl.store(moments + columns, mean, mask=in_columns)
            tl.store(moments + OUTPUTS + columns, tl.sum(centred * centred, axis=0), mask=in_columns)


@triton.jit(do_not_specialize=["samples"])  # a batch of 16 runs the code of a batch of 2
def conv2d_kernel(
    x, x2, weight, bias, scale, offset, residual, y, moments, unit, per_step,
    samples, tiles, height, width, height_in, width_in, pitch, pitch2, pitch_residual, pitch_y, pitch_bias,
    C1: tl.constexpr, C2: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    RESAMPLE: tl.constexpr, PROLOGUE: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M consecutive pixels of one sample, BLOCK_N outputs. GROUP_M tiles of pixels follow each other
    with the same outputs, so that their common rows of x and the weight are found in the L2 cache. unit: what 1 of a
    sum means, of each output, where the product is in e4m3; else None."""
    BLOCKS_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    EIGHT: tl.constexpr = unit is not None
    group = tl.program_id(0) // (GROUP_M * BLOCKS_N)
    within = tl.program_id(0) - group * (GROUP_M * BLOCKS_N)
    members = tl.minimum(tiles * samples - group * GROUP_M, GROUP_M)
    row = group * GROUP_M + within % members
    columns = (within // members) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = (columns < OUTPUTS) | (OUTPUTS % BLOCK_N == 0)
    n = (row // tiles).to(tl.int64)
    tile = row % tiles

    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < height * width
    h = pixel // width
    w = pixel - h * width
    taps = tl.zeros((BLOCK_M,), tl.int32)
    for tap in tl.static_range(K * K):
        y_tap = h + (tap // K - K // 2) * DILATION
        x_tap = w + (tap % K - K // 2) * DILATION
        live = inside & (y_tap >= 0) & (y_tap < height) & (x_tap >= 0) & (x_tap < width)
        taps |= live.to(tl.int32) << tap

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x += n * height_in * width_in * pitch
    if scale is not None:
        scale += n * (C1 + C2)
        offset += n * (C1 + C2)
    if C1 < 16 and x2 is None and RESAMPLE == "none" and scale is None and PROLOGUE == "none" and not EIGHT:
        acc = _accumulate_pairs(
            acc, x, pitch, width, h, w, taps, weight, columns, in_columns, C1, OUTPUTS, K, DILATION, BLOCK_K, PRECISION,
            WIDEN,
        )  # fmt: skip
    else:
        acc = _accumulate(
            acc, x, pitch, width_in, pixel, h, w, taps, scale, offset, weight, columns, in_columns, per_step, C1,
            C1 + C2, OUTPUTS, K, DILATION, RESAMPLE, PROLOGUE, BLOCK_K, PRECISION, WIDEN, EXACT, EIGHT,
        )  # fmt: skip
    if x2 is not None:
        x2 += n * height_in * width_in * pitch2
        if scale is not None:
            scale += C1
            offset += C1
        acc = _accumulate(
            acc, x2, pitch2, width_in, pixel, h, w, taps, scale, offset, weight + C1 * (1 if EIGHT else OUTPUTS),
            columns, in_columns, per_step, C2, C1 + C2, OUTPUTS, K, DILATION, RESAMPLE, PROLOGUE, BLOCK_K, PRECISION,
            WIDEN, EXACT, EIGHT,
        )  # fmt: skip
    if EIGHT:
        acc *= tl.load(unit + columns, mask=in_columns, other=0.0)[None, :]

    if bias is not None:
        bias += n * pitch_bias
    if RESIDUAL == "none":
        residual += n * height * width * pitch_residual
    elif RESIDUAL == "up":
        residual += n * (height // 2) * (width // 2) * pitch_residual
    elif RESIDUAL == "down":
        residual += n * 4 * height * width * pitch_residual
    y += n * height * width * pitch_y
    if moments is not None:
        moments += (n * tiles + tile) * (2 * OUTPUTS)
    count = tl.minimum(height * width - tile * BLOCK_M, BLOCK_M)
    first = (within // members) * BLOCK_N
    _finish(
        acc, first, bias, residual, y, moments, pixel, h, w, width, inside, count, pitch_residual, pitch_y, OUTPUTS,
        RESIDUAL, ACT, EXACT, OUTPUTS % BLOCK_N == 0, BLOCK_N,
    )  # fmt: skip


def _configuration(m, n, k, stages, warps=4, group=8) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, num_warps=warps, num_stages=stages)


HALF_CONFIGURATIONS = (
    _configuration(128, 128, 64, 3),
    _configuration(128, 128, 32, 4),
    _configuration(128, 64, 64, 3),
    _configuration(64, 128, 64, 3),
    _configuration(64, 64, 64, 4),
    _configuration(64, 32, 128, 4),
    _configuration(128, 16, 64, 3),
    _configuration(64, 16, 128, 4),
)
SINGLE_CONFIGURATIONS = (
    _configuration(64, 64, 32, 3),
    _configuration(64, 32, 32, 3),
    _configuration(128, 16, 32, 3),
    _configuration(64, 16, 32, 3),
)
CONFIGURATIONS = HALF_CONFIGURATIONS + SINGLE_CONFIGURATIONS
"""Launch configurations for 16-bit types and for float32, the larger tiles first; each runs every type."""
ENOUGH_PROGRAMS = 132
"""A program for each multiprocessor of an H100: below it, a smaller tile is taken."""


def fitting_configurations(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tile_pixels: int = 0, capability: int = 9
) -> list[dict[str, int]]:
    """The launch configurations whose tile is less than half empty for a y of `shape` (N, H, W, O).

    tile_pixels: where not 0, only those with BLOCK_M = tile_pixels; raises CannotRunError where none is.
    capability: the major one of the device: below 9, shared memory holds only one of the widest and deepest tiles.
    """
    _, height, width, outputs = shape
    known = SINGLE_CONFIGURATIONS if dtype == torch.float32 else HALF_CONFIGURATIONS
    known = [c for c in known if c["BLOCK_M"] == tile_pixels or not tile_pixels]
    known = [c for c in known if capability >= 9 or c != HALF_CONFIGURATIONS[0]]
    if not known:
        raise CannotRunError(f"no launch configuration has tiles of {tile_pixels} pixels")
    rows = max(height * width, min(c["BLOCK_M"] for c in known))
    columns = max(outputs, min(c["BLOCK_N"] for c in known))
    return [c for c in known if c["BLOCK_M"] < 2 * rows and c["BLOCK_N"] < 2 * columns]


def configuration_for(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tile_pixels: int = 0, capability: int = 9
) -> dict[str, int]:
    """The launch configuration for a y of `shape` (N, H, W, O): not yet timed on a device.

    Of the `fitting_configurations` the first that makes enough programs, else the one that makes most.
    """
    batch, height, width, outputs = shape
    fitting = fitting_configurations(shape, dtype, tile_pixels, capability)

    def programs(c: dict[str, int]) -> int:
        return batch * -(-height * width // c["BLOCK_M"]) * -(-outputs // c["BLOCK_N"])

    return next((c for c in fitting if programs(c) >= ENOUGH_PROGRAMS), max(fitting, key=programs))


def launch_options(
    configuration: dict, channels: Sequence[int], resample: str, scaled: bool, eight_bits: bool = False
) -> dict[str, int | str]:
    """`configuration` as these arguments bear it; `channels` of each source. Its BLOCK_M stays, whatever the others.

    BLOCK_K: what the channels fill. The widest tile has no registers left for the addresses of deep blocks beside two
    sources or a prologue, and none at all for both, or for sums beside sums (eight_bits); "down" stages four reads of x
    for each block.
    """
    options = {"PRECISION": "ieee", **configuration}
    while options["BLOCK_K"] > 32 and any(c % options["BLOCK_K"] for c in channels):
        options["BLOCK_K"] //= 2
    if min(channels) >= 16:
        options["BLOCK_K"] = min(options["BLOCK_K"], 1 << (max(channels) - 1).bit_length())
    extras = (len(channels) == 2) + scaled
    if options["BLOCK_N"] * options["BLOCK_M"] > 8192:
        if extras or resample != "none":
            options["BLOCK_K"] = min(options["BLOCK_K"], 32)
        if extras == 2 or eight_bits:
            options["BLOCK_N"] //= 2
    if resample == "down":
        options["BLOCK_K"] = min(options["BLOCK_K"], 32)
        options["num_stages"] = 2
    if eight_bits:  # an instruction takes 32 of them
        options["BLOCK_K"] = max(options["BLOCK_K"], 32)
    return options
