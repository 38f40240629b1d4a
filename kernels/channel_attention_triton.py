"""The Triton kernels of channel_attention (kernels/channel_attention.py) and their launch configurations.

`sample_kernel` is all of it for small images; pool, gate, maps and apply follow each other for larger ones.
"""

from __future__ import annotations

from dfengine.kernels.triton_import import tl, triton


@triton.jit
def _tile(rows, at, mask):
    return tl.load(rows + at, mask=mask, other=0).to(tl.float32)


@triton.jit
def _pooled(tile, mask, AXIS: tl.constexpr):
    """Sum and maximum along an axis; tl.max passes over not-a-number, which the sum carries."""
    return tl.sum(tile, axis=AXIS), tl.max(tl.where(mask, tile, float("-inf")), axis=AXIS)


@triton.jit
def _add_hidden(of_average, of_top, w1, average, top, channel, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr):
    """W1 avg and W1 max (padded to a power of two) with the part of these channels added."""
    r = tl.arange(0, of_average.shape[0])
    mask = (r < HIDDEN)[:, None] & (channel < CHANNELS)[None, :]
    w = tl.load(w1 + r[:, None] * CHANNELS + channel[None, :], mask=mask, other=0)
    of_average += tl.sum(w * average[None, :], axis=1)
    of_top += tl.sum(w * tl.where(channel < CHANNELS, top, 0)[None, :], axis=1)
    return of_average, of_top


@triton.jit
def _gelu(z):
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gate(hidden, w2, channel, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr):
    """The channel gate at `channel`, from gelu(W1 avg) + gelu(W1 max)."""
    r = tl.arange(0, hidden.shape[0])
    mask = (r < HIDDEN)[:, None] & (channel < CHANNELS)[None, :]
    w = tl.load(w2 + r[:, None] * CHANNELS + channel[None, :], mask=mask, other=0)
    return tl.sigmoid(tl.sum(w * hidden[:, None], axis=0))


@triton.jit
def sample_kernel(
    x, w1, w2, spatial_weight, spatial_bias, residual, y, height, width, x_stride, residual_stride, y_stride,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, SPATIAL: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program n: sample n, of at most BLOCK_P pixels; no channel gate for HIDDEN 0."""
    n = tl.program_id(0).to(tl.int64)
    pixels = height * width
    pixel = tl.arange(0, BLOCK_P)
    live = pixel < pixels
    x_rows = x + n * pixels * x_stride + (pixel * x_stride)[:, None]
    residual_rows = residual + n * pixels * residual_stride + (pixel * residual_stride)[:, None]
    y_rows = y + n * pixels * y_stride + (pixel * y_stride)[:, None]

    hidden = tl.zeros([BLOCK_R], tl.float32)
    if HIDDEN > 0:
        of_average, of_top = hidden, hidden
        for first in range(0, CHANNELS, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            mask = live[:, None] & (channel < CHANNELS)[None, :]
            total, top = _pooled(_tile(x_rows, channel[None, :], mask), mask, 0)
            of_average, of_top = _add_hidden(of_average, of_top, w1, total / pixels, top, channel, HIDDEN, CHANNELS)
        hidden = _gelu(of_average) + _gelu(of_top)

    s = tl.full([BLOCK_P], 1.0, tl.float32)
    if SPATIAL:
        mean = tl.zeros([BLOCK_P], tl.float32)
        top = tl.full([BLOCK_P], float("-inf"), tl.float32)
        for first in range(0, CHANNELS, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            mask = live[:, None] & (channel < CHANNELS)[None, :]
            u = _tile(x_rows, channel[None, :], mask)
            if HIDDEN > 0:
                u = u * _gate(hidden, w2, channel, HIDDEN, CHANNELS)[None, :]
            part, part_top = _pooled(u, mask, 1)
            mean += part
            top = tl.maximum(top, part_top)
        mean = mean / CHANNELS
        # The convolution as a product with the matrix of the weights from every pixel of the sample to every other.
        other = tl.arange(0, BLOCK_P)
        dy = (other // width)[None, :] - (pixel // width)[:, None] + 3
        dx = (other % width)[None, :] - (pixel % width)[:, None] + 3
        near = (dy >= 0) & (dy < 7) & (dx >= 0) & (dx < 7) & (other < pixels)[None, :]
        tap = spatial_weight + (dy * 7 + dx) * 2
        w_mean = tl.load(tap, mask=near, other=0)
        w_top = tl.load(tap + 1, mask=near, other=0)
        terms = tl.where(near, w_mean * mean[None, :] + w_top * top[None, :], 0)
        s = tl.sigmoid(tl.sum(terms, axis=1) + tl.load(spatial_bias))

    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (channel < CHANNELS)[None, :]
        u = _tile(x_rows, channel[None, :], mask)
        if HIDDEN > 0:
            u = u * _gate(hidden, w2, channel, HIDDEN, CHANNELS)[None, :]
        u = u * s[:, None]
        if RESIDUAL:
            u += _tile(residual_rows, channel[None, :], mask)
        tl.store(y_rows + channel[None, :], u.to(y.dtype.element_ty), mask=mask)


@triton.jit
def pool_kernel(
    x, partials, pixels, tile_pixels, x_stride, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Program (t, k, n): sums and maxima of BLOCK_C channels over tile t of sample n."""
    tile, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < CHANNELS
    rows = x + n * pixels * x_stride + channel[None, :]
    after = tl.minimum((tile + 1) * tile_pixels, pixels)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    top = tl.full([BLOCK_P, BLOCK_C], float("-inf"), tl.float32)
    for first in range(tile * tile_pixels, after, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        mask = (pixel < after)[:, None] & inside[None, :]
        values = _tile(rows, (pixel * x_stride)[:, None], mask)
        total += values
        top = tl.maximum(top, tl.where(mask, values, float("-inf")))
    to = partials + (n * tl.num_programs(0) + tile) * 2 * CHANNELS + channel
    tl.store(to, tl.sum(total, axis=0), mask=inside)
    tl.store(to + CHANNELS, tl.max(top, axis=0), mask=inside)


@triton.jit
def gate_kernel(
    partials, w1, w2, gate, pixels, tiles, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program n: the channel gate of sample n, from the at most BLOCK_T tiles."""
    n = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK_T)
    of_average = tl.zeros([BLOCK_R], tl.float32)
    of_top = of_average
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = (tile < tiles)[:, None] & (channel < CHANNELS)[None, :]
        at = partials + ((n * tiles + tile) * 2 * CHANNELS)[:, None] + channel[None, :]
        total = tl.sum(tl.load(at, mask=mask, other=0), axis=0)
        top = tl.max(tl.load(at + CHANNELS, mask=mask, other=float("-inf")), axis=0)
        of_average, of_top = _add_hidden(of_average, of_top, w1, total / pixels, top, channel, HIDDEN, CHANNELS)
    hidden = _gelu(of_average) + _gelu(of_top)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        tl.store(gate + n * CHANNELS + channel, _gate(hidden, w2, channel, HIDDEN, CHANNELS), mask=channel < CHANNELS)


@triton.jit
def maps_kernel(
    x, gate, maps, pixels, x_stride,
    CHANNELS: tl.constexpr, GATED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, n): mean and maximum over the channels at BLOCK_P pixels of sample n."""
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = pixel < pixels
    rows = x + n * pixels * x_stride + (pixel * x_stride)[:, None]
    mean = tl.zeros([BLOCK_P], tl.float32)
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (channel < CHANNELS)[None, :]
        u = _tile(rows, channel[None, :], mask)
        if GATED:
            u = u * tl.load(gate + n * CHANNELS + channel, mask=channel < CHANNELS, other=0)[None, :]
        part, part_top = _pooled(u, mask, 1)
        mean += part
        top = tl.maximum(top, part_top)
    to = maps + (n * pixels + pixel) * 2
    tl.store(to, mean / CHANNELS, mask=live)
    tl.store(to + 1, top, mask=live)


@triton.jit
def apply_kernel(
    x, gate, maps, spatial_weight, spatial_bias, residual, y, height, width, x_stride, residual_stride, y_stride,
    CHANNELS: tl.constexpr, GATED: tl.constexpr, SPATIAL: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (i, n): y at BLOCK_P pixels of sample n."""
    n = tl.program_id(1).to(tl.int64)
    pixels = height * width
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = pixel < pixels
    s = tl.full([BLOCK_P], 1.0, tl.float32)
    if SPATIAL:
        tap = tl.arange(0, 64)[None, :]
        row = (pixel // width)[:, None] + tap // 7 - 3
        column = (pixel % width)[:, None] + tap % 7 - 3
        near = (tap < 49) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        map_at = maps + (n * pixels + row * width + column) * 2
        z = tl.load(spatial_weight + 2 * tap, mask=tap < 49, other=0) * tl.load(map_at, mask=near, other=0)
        z += tl.load(spatial_weight + 2 * tap + 1, mask=tap < 49, other=0) * tl.load(map_at + 1, mask=near, other=0)
        s = tl.sigmoid(tl.sum(z, axis=1) + tl.load(spatial_bias))
    for first in range(0, CHANNELS, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (channel < CHANNELS)[None, :]
        u = _tile(x + n * pixels * x_stride, (pixel * x_stride)[:, None] + channel[None, :], mask)
        if GATED:
            u = u * tl.load(gate + n * CHANNELS + channel, mask=channel < CHANNELS, other=0)[None, :]
        u = u * s[:, None]
        if RESIDUAL:
            at = (pixel * residual_stride)[:, None] + channel[None, :]
            u += _tile(residual + n * pixels * residual_stride, at, mask)
        to = y + n * pixels * y_stride + (pixel * y_stride)[:, None] + channel[None, :]
        tl.store(to, u.to(y.dtype.element_ty), mask=mask)


CONFIGURATIONS = (
    dict(BLOCK_P=16, BLOCK_C=64, num_warps=4, sample=dict(BLOCK_C=64, num_warps=16)),
    dict(BLOCK_P=32, BLOCK_C=64, num_warps=8, sample=dict(BLOCK_C=32, num_warps=16)),
    dict(BLOCK_P=64, BLOCK_C=64, num_warps=8, sample=dict(BLOCK_C=16, num_warps=8)),
)
"""Launch configurations, each tested; the first is used until they have been timed on a device. `sample` is for small
images, whose one block takes all pixels at once."""
