"""conv2d: the dilated convolution with all that stands around it, as one implicit GEMM.

    v      = cat(x, x2) along the channels                  x2 may be absent; the concatenation is never stored
    p      = resample(prologue_act(scale v + offset))       scale, offset: a value for each sample and channel, or none
    acc    = sum over taps (i, j) and channels c of p[h + d (i - r), w + d (j - r), c] weight[i, j, c, o]
    y      = act(acc + bias) + residual_resample(residual)
    moments[n, t, :, o] = (mean, sum of squared differences from it) of the written y[n, tile t, o]

`scale v + offset` is a GroupNorm, folded; resample is "none", "down" (mean of 2 x 2 values, after the activation) or
"up" (nearest, x2), and H, W are the sizes after it. Taps outside the image are 0: the padding comes after the
prologue. r = (K - 1) / 2 and d is the dilation, so that H and W are kept; the stride is 1. The residual comes after
the activation, as at the end of a residual block (act none); "down" is the 2 x 2 mean of a (2H, 2W) residual, "up"
reads an (H/2, W/2) one twice in each direction.

Shapes: x (N, H0, W0, C1), x2 (N, H0, W0, C2), C1 + C2 = C; weight a ConvWeight; bias (O,) or (N, O), the latter with
the time embedding folded in; scale, offset (N, C); residual and y (N, H, W, O) (residual before its resampling);
moments (N, T, 2, O), tile t being the pixels [t tile_pixels, (t + 1) tile_pixels) of a sample in row order, the last
one shorter: T = ceil(H W / tile_pixels), see `tile_counts`.
Layouts: x, x2, residual and y are channels-last and may be channel slices of wider buffers: strides
(H W P, W P, P, 1) with P >= the number of channels. The others are contiguous.
Types: x, x2, residual, y and weight share float32, float16 or bfloat16 (the reference also float64); the others are
float32 (float64). Products are summed in float32; the prologue is computed in float32 and rounded once, to x's dtype.

Compiled backends serve 1x1 and 3x3 kernels with dilation 1 or 2; the reference every odd one.
Backends: reference (any device), triton (GPU; CPU through the interpreter).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.kernels import registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.triton_import import tl, triton

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3, "sigmoid": 4}
PROLOGUE_ACTIVATIONS = ("none", "gelu", "silu", "relu")
RESAMPLES = {"none": 0, "down": 1, "up": 2}


@dataclass(frozen=True, eq=False)
class ConvWeight:
    """A weight packed once for the GEMM.

    packed: (KH, KW, C, O), contiguous, of the activations' dtype. prepacked: what other backends make of it on first
    use, by backend; the weight must not change afterwards.
    """

    packed: Tensor
    dilation: int = 1
    prepacked: dict[str, object] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.packed.ndim != 4 or self.packed.numel() == 0 or not self.packed.is_contiguous():
            raise ValueError(f"weight: expected contiguous (KH, KW, C, O), got {tuple(self.packed.shape)}")
        if self.packed.shape[0] % 2 == 0 or self.packed.shape[1] % 2 == 0:
            raise ValueError(f"weight: a kernel of {self.kernel[0]} x {self.kernel[1]} has no centre")
        if self.dilation < 1:
            raise ValueError(f"weight: dilation {self.dilation} is below 1")

    @classmethod
    def pack(cls, weight: Tensor, dilation: int = 1, dtype: torch.dtype | None = None) -> ConvWeight:
        """From torch's (O, C, KH, KW), in `dtype` (by default the weight's own)."""
        return cls(weight.detach().permute(2, 3, 1, 0).to(dtype or weight.dtype).contiguous(), dilation)

    @property
    def kernel(self) -> tuple[int, int]:
        return tuple(self.packed.shape[:2])

    @property
    def inputs(self) -> int:
        return self.packed.shape[2]

    @property
    def outputs(self) -> int:
        return self.packed.shape[3]


def conv2d(
    x: Tensor,
    weight: ConvWeight,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    prologue_act: str = "none",
    resample: str = "none",
    residual: Tensor | None = None,
    residual_resample: str = "none",
    act: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Return a new y (N, H, W, O), written by the chosen backend.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    y = torch.empty(output_shape(x, weight, resample), dtype=x.dtype, device=x.device)
    conv2d_into(
        x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, backend=backend
    )
    return y


def dilated_conv_gelu(x: Tensor, weight: ConvWeight, bias: Tensor | None = None, **options) -> Tensor:
    """gelu(conv(x) + bias): `conv2d` with act="gelu", and its other options."""
    return conv2d(x, weight, bias, act="gelu", **options)


def conv2d_into(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y,
    moments=None, tile_pixels=0, *, backend=None,
) -> None:  # fmt: skip
    """As `conv2d`, into given outputs, every element of which is written: y, and moments of tiles of `tile_pixels`."""
    before = (bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments, tile_pixels)
    _check(x, x2, weight, *before)
    torch.ops.dfengine.conv2d(x, x2, weight.packed, weight.dilation, *before, backend or "")


@torch.library.custom_op("dfengine::conv2d", mutates_args=("y", "moments"))
def _conv2d(
    x: Tensor,
    x2: Tensor | None,
    packed: Tensor,
    dilation: int,
    bias: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    prologue_act: str,
    resample: str,
    residual: Tensor | None,
    residual_resample: str,
    act: str,
    y: Tensor,
    moments: Tensor | None,
    tile_pixels: int,
    backend: str,
) -> None:
    """What a backend keeps in ConvWeight.prepacked is lost here: the engine calls OP."""
    OP(
        x, x2, ConvWeight(packed, dilation), bias, scale, offset, prologue_act, resample, residual, residual_resample,
        act, y, moments, tile_pixels, backend=backend,
    )  # fmt: skip


@_conv2d.register_fake
def _(x, x2, packed, dilation, *rest) -> None:
    return None


def output_shape(x: Tensor, weight: ConvWeight, resample: str) -> tuple[int, int, int, int]:
    """(N, H, W, O)."""
    return (x.shape[0], *_resampled(x.shape[1:3], resample), weight.outputs)


def tile_counts(pixels: int, tile_pixels: int) -> list[int]:
    """The number of pixels in each tile of a sample of `pixels` = H W pixels."""
    return [min(tile_pixels, pixels - start) for start in range(0, pixels, tile_pixels)]


def pixel_stride(name: str, tensor: Tensor) -> int:
    """P of a tensor with strides (H W P, W P, P, 1), P >= C. Raises ValueError for another layout."""
    batch, height, width, channels = tensor.shape
    pixels = (height * width, width, 1)
    steps = zip((width, height, batch), tensor.stride()[2::-1], pixels[::-1], strict=True)
    pitch = next((stride // k for size, stride, k in steps if size > 1), channels)
    wanted = (*(pitch * k for k in pixels), 1)
    differs = any(n > 1 and s != w for n, s, w in zip(tensor.shape, tensor.stride(), wanted, strict=True))
    if pitch < channels or differs:
        raise ValueError(f"{name}: strides {tensor.stride()} of {tuple(tensor.shape)} are not those of a channel slice")
    return pitch


def _resampled(size, resample: str) -> tuple[int, int]:
    if resample == "down":
        return size[0] // 2, size[1] // 2
    return (2 * size[0], 2 * size[1]) if resample == "up" else tuple(size)


def _check(
    x,
    x2,
    weight,
    bias,
    scale,
    offset,
    prologue_act,
    resample,
    residual,
    residual_resample,
    act,
    y,
    moments,
    tile_pixels,
) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    for name, value, known in (
        ("prologue_act", prologue_act, PROLOGUE_ACTIVATIONS),
        ("resample", resample, RESAMPLES),
        ("residual_resample", residual_resample, RESAMPLES),
        ("act", act, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x: expected (N, H, W, C), none of them 0, got {tuple(x.shape)}")
    batch, height, width = x.shape[:3]
    channels = x.shape[3] + (0 if x2 is None else x2.shape[-1])
    if channels != weight.inputs:
        raise ValueError(f"x: {channels} channels for a weight of {weight.inputs}")
    if resample == "down" and (height % 2 or width % 2):
        raise ValueError(f"x: {height} x {width} pixels have no 2 x 2 means")
    shape = output_shape(x, weight, resample)
    size = shape[1:3]
    if residual_resample == "up" and (size[0] % 2 or size[1] % 2):
        raise ValueError(f"residual: {size[0]} x {size[1]} pixels are not twice a whole number")
    of_residual = _resampled(size, {"down": "up", "up": "down", "none": "none"}[residual_resample])
    if (scale is None) != (offset is None):
        raise ValueError("scale and offset come together")
    if moments is not None and tile_pixels < 1:
        raise ValueError(f"tile_pixels: {tile_pixels} is below 1")
    tiles = 0 if moments is None else -(-size[0] * size[1] // tile_pixels)
    precise = torch.promote_types(x.dtype, torch.float32)
    activations = dict(
        x=(x, tuple(x.shape)),
        x2=(x2, (batch, height, width, channels - x.shape[3])),
        residual=(residual, (batch, *of_residual, weight.outputs)),
        y=(y, shape),
    )
    small = dict(
        bias=(bias, (weight.outputs,) if bias is not None and bias.ndim == 1 else (batch, weight.outputs)),
        scale=(scale, (batch, channels)),
        offset=(offset, (batch, channels)),
        moments=(moments, (batch, tiles, 2, weight.outputs)),
    )
    for name, (tensor, wanted) in (activations | small).items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != (x.dtype if name in activations else precise):
            raise ValueError(f"{name}: {tensor.dtype} beside an x of {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, x on {x.device}")
        if name in activations:
            pixel_stride(name, tensor)
        elif not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")
    if weight.packed.dtype != x.dtype or weight.packed.device != x.device:
        raise ValueError(f"weight: {weight.packed.dtype} on {weight.packed.device}, x {x.dtype} on {x.device}")


def can_run(x, x2, weight, *rest) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if x.dtype not in TYPES:
        raise CannotRunError(f"x: {x.dtype} is none of float32, float16, bfloat16")
    if weight.kernel not in ((1, 1), (3, 3)):
        raise CannotRunError(f"a kernel of {weight.kernel[0]} x {weight.kernel[1]} is neither 1 x 1 nor 3 x 3")
    if weight.dilation not in (1, 2):
        raise CannotRunError(f"dilation {weight.dilation} is neither 1 nor 2")


def _activated(z: Tensor, act: str) -> Tensor:
    if act == "none":
        return z
    return torch.sigmoid(z) if act == "sigmoid" else getattr(F, act)(z)


def _resample(p: Tensor, resample: str) -> Tensor:
    if resample == "down":
        batch, height, width, channels = p.shape
        return p.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(dim=(2, 4))
    return p.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) if resample == "up" else p


def reference(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act
) -> Tensor:  # fmt: skip
    """y of the module's formula in torch, in float64 for float64 and else in float32; a matrix product for each tap."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    p = (x if x2 is None else torch.cat((x, x2), dim=3)).to(dtype)
    if scale is not None:
        p = torch.addcmul(offset[:, None, None], p, scale[:, None, None])
    p = _resample(_activated(p, prologue_act), resample)
    height, width = p.shape[1:3]
    d, (rows, columns) = weight.dilation, weight.kernel
    margin_y, margin_x = d * (rows - 1) // 2, d * (columns - 1) // 2
    p = F.pad(p, (0, 0, margin_x, margin_x, margin_y, margin_y))
    taps = weight.packed.to(dtype)
    z = torch.zeros((p.shape[0], height, width, weight.outputs), dtype=dtype, device=x.device)
    for i in range(rows):
        for j in range(columns):
            z += p[:, d * i : d * i + height, d * j : d * j + width] @ taps[i, j]
    if bias is not None:
        z += bias.view(-1, 1, 1, weight.outputs)
    y = _activated(z, act)
    if residual is not None:
        y = y + _resample(residual.to(dtype), residual_resample)
    return y.to(x.dtype)


def reference_moments(y: Tensor, tile_pixels: int) -> Tensor:
    """moments (N, T, 2, O) of y (N, H, W, O), in float64 for float64 and else in float32."""
    values = y.flatten(1, 2).to(torch.promote_types(y.dtype, torch.float32))
    tiles = []
    for tile in values.split(tile_pixels, dim=1):
        mean = tile.mean(dim=1)
        tiles.append(torch.stack((mean, (tile - mean[:, None]).square().sum(dim=1)), dim=1))
    return torch.stack(tiles, dim=1)


def _run_reference(
    x,
    x2,
    weight,
    bias,
    scale,
    offset,
    prologue_act,
    resample,
    residual,
    residual_resample,
    act,
    y,
    moments,
    tile_pixels,
) -> None:
    y.copy_(reference(x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act))
    if moments is not None:
        moments.copy_(reference_moments(y, tile_pixels))


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
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies bfloat16 wrongly
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _read(pointers, mask, scale, offset, PROLOGUE: tl.constexpr, EXACT: tl.constexpr):
    v = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        v = v * scale + offset
    return _activate(v, PROLOGUE, EXACT)


@triton.jit
def _accumulate(
    acc, x, pitch, width_in, h, w, taps, scale, offset, weight, columns, in_columns,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    RESAMPLE: tl.constexpr, PROLOGUE: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """acc + the part of one source: `x` is its sample, `weight` its first row of the ROWS of each tap, `scale` likewise.

    One loop over taps and blocks of channels, so that it is pipelined across taps. h, w: coordinates of the tile's
    pixels; bit i of `taps`: whether tap i is inside the image.
    """
    CHUNKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    ZOOM: tl.constexpr = 2 if RESAMPLE == "down" else 1
    channel = tl.arange(0, BLOCK_K)
    here = ZOOM * (h * width_in + w) * pitch
    at = channel[:, None] * OUTPUTS + columns[None, :]
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
        if RESAMPLE != "down" and scale is None and PROLOGUE == "none":
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
            a = tl.where(live, p, 0.0).to(x.dtype.element_ty)
        b = tl.load(weight + (tap * ROWS + c) * OUTPUTS + at, mask=known[:, None] & in_columns[None, :], other=0.0)
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
def conv2d_kernel(
    x, x2, weight, bias, scale, offset, residual, y, moments,
    samples, tiles, height, width, height_in, width_in, pitch, pitch2, pitch_residual, pitch_y, pitch_bias,
    C1: tl.constexpr, C2: tl.constexpr, OUTPUTS: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr,
    RESAMPLE: tl.constexpr, PROLOGUE: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M consecutive pixels of one sample, BLOCK_N outputs. GROUP_M tiles of pixels follow each other
    with the same outputs, so that their common rows of x and the weight are found in the L2 cache."""
    BLOCKS_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
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
    if C1 < 16 and x2 is None and RESAMPLE == "none" and scale is None and PROLOGUE == "none":
        acc = _accumulate_pairs(
            acc, x, pitch, width, h, w, taps, weight, columns, in_columns, C1, OUTPUTS, K, DILATION, BLOCK_K, PRECISION,
            WIDEN,
        )  # fmt: skip
    else:
        acc = _accumulate(
            acc, x, pitch, width_in, h, w, taps, scale, offset, weight, columns, in_columns, C1, C1 + C2, OUTPUTS, K,
            DILATION, RESAMPLE, PROLOGUE, BLOCK_K, PRECISION, WIDEN, EXACT,
        )  # fmt: skip
    if x2 is not None:
        x2 += n * height_in * width_in * pitch2
        if scale is not None:
            scale += C1
            offset += C1
        acc = _accumulate(
            acc, x2, pitch2, width_in, h, w, taps, scale, offset, weight + C1 * OUTPUTS, columns, in_columns, C2,
            C1 + C2, OUTPUTS, K, DILATION, RESAMPLE, PROLOGUE, BLOCK_K, PRECISION, WIDEN, EXACT,
        )  # fmt: skip

    if bias is not None:
        acc += tl.load(bias + n * pitch_bias + columns, mask=in_columns, other=0.0)[None, :]
    acc = _activate(acc, ACT, EXACT)
    mask = inside[:, None] & in_columns[None, :]
    if RESIDUAL == "none":
        residual += n * height * width * pitch_residual
        acc += tl.load(residual + (pixel[:, None] * pitch_residual + columns[None, :]), mask=mask, other=0.0).to(
            tl.float32
        )
    elif RESIDUAL == "up":
        residual += n * (height // 2) * (width // 2) * pitch_residual
        at = ((h >> 1) * (width >> 1) + (w >> 1)) * pitch_residual
        acc += tl.load(residual + (at[:, None] + columns[None, :]), mask=mask, other=0.0).to(tl.float32)
    elif RESIDUAL == "down":
        residual += n * 4 * height * width * pitch_residual
        pointers = residual + ((4 * h * width + 2 * w) * pitch_residual)[:, None] + columns[None, :]
        below = pointers + 2 * width * pitch_residual
        total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(pointers + pitch_residual, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(below, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(below + pitch_residual, mask=mask, other=0.0).to(tl.float32)
        acc += 0.25 * total
    written = acc.to(y.dtype.element_ty)
    y += n * height * width * pitch_y
    tl.store(y + (pixel[:, None] * pitch_y + columns[None, :]), written, mask=mask)
    if moments is not None:
        values = tl.where(inside[:, None], written.to(tl.float32), 0.0)
        mean = tl.sum(values, axis=0) / tl.minimum(height * width - tile * BLOCK_M, BLOCK_M)
        centred = tl.where(inside[:, None], values - mean[None, :], 0.0)
        moments += (n * tiles + tile) * (2 * OUTPUTS)
        tl.store(moments + columns, mean, mask=in_columns)
        tl.store(moments + OUTPUTS + columns, tl.sum(centred * centred, axis=0), mask=in_columns)


def _configuration(m, n, k, stages, warps=4, group=8) -> dict[str, int]:
    return dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=group, num_warps=warps, num_stages=stages)


HALF_CONFIGURATIONS = (
    _configuration(128, 128, 64, 3),
    _configuration(128, 128, 32, 4),
    _configuration(128, 64, 64, 3),
    _configuration(64, 128, 64, 3),
    _configuration(64, 64, 64, 4),
    _configuration(64, 32, 64, 4),
    _configuration(128, 16, 64, 3),
    _configuration(64, 16, 64, 4),
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


def configuration_for(shape: tuple[int, int, int, int], dtype: torch.dtype, tile_pixels: int = 0) -> dict[str, int]:
    """The launch configuration for a y of `shape` (N, H, W, O): not yet timed on a device.

    The first whose tile is at most half empty in its columns and that makes enough programs, else the one that makes
    most. tile_pixels: where not 0, only those with BLOCK_M = tile_pixels; raises CannotRunError where none is.
    """
    batch, height, width, outputs = shape
    known = SINGLE_CONFIGURATIONS if dtype == torch.float32 else HALF_CONFIGURATIONS
    known = [c for c in known if c["BLOCK_M"] == tile_pixels or not tile_pixels]
    if not known:
        raise CannotRunError(f"no launch configuration has tiles of {tile_pixels} pixels")

    def programs(c: dict[str, int]) -> int:
        return batch * -(-height * width // c["BLOCK_M"]) * -(-outputs // c["BLOCK_N"])

    fitting = [c for c in known if c["BLOCK_N"] < 2 * max(outputs, 16)]
    return next((c for c in fitting if programs(c) >= ENOUGH_PROGRAMS), max(fitting, key=programs))


def moment_tile(shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
    """The tile_pixels to allocate moments for, from the shape (N, H, W, O) of y: the BLOCK_M of `configuration_for`."""
    return configuration_for(shape, dtype)["BLOCK_M"]


def _launch_options(configuration: dict, x: Tensor, x2: Tensor | None, resample: str) -> dict[str, int]:
    """`configuration` with a BLOCK_K that the channels fill; stages are fewer where each holds four reads of x."""
    options = dict(configuration)
    channels = [t.shape[3] for t in (x, x2) if t is not None]
    while options["BLOCK_K"] > 32 and any(c % options["BLOCK_K"] for c in channels):
        options["BLOCK_K"] //= 2
    if min(channels) >= 16:
        options["BLOCK_K"] = min(options["BLOCK_K"], triton.next_power_of_2(max(channels)))
    if resample == "down":
        options["BLOCK_K"] = min(options["BLOCK_K"], 32)
        options["num_stages"] = 2
    return options


def _run_triton(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y,
    moments, tile_pixels, configuration=None,
) -> None:  # fmt: skip
    batch, height, width, outputs = y.shape
    chosen = configuration or configuration_for(tuple(y.shape), x.dtype, tile_pixels if moments is not None else 0)
    if moments is not None and chosen["BLOCK_M"] != tile_pixels:
        raise CannotRunError(f"tile_pixels {tile_pixels} is not the BLOCK_M of {chosen}")
    tiles = triton.cdiv(height * width, chosen["BLOCK_M"])
    pitches = (0 if t is None else pixel_stride("", t) for t in (x, x2, residual, y))
    conv2d_kernel[(batch * tiles * triton.cdiv(outputs, chosen["BLOCK_N"]),)](
        x, x2, weight.packed, bias, scale, offset, residual, y, moments,
        batch, tiles, height, width, *x.shape[1:3], *pitches, 0 if bias is None or bias.ndim == 1 else outputs,
        C1=x.shape[3], C2=0 if x2 is None else x2.shape[3], OUTPUTS=outputs,
        K=weight.kernel[0], DILATION=weight.dilation, RESAMPLE=resample, PROLOGUE=prologue_act,
        RESIDUAL="" if residual is None else residual_resample, ACT=act,
        **{"PRECISION": "ieee", "WIDEN": triton_import.INTERPRETED and x.dtype == torch.bfloat16}
        | _launch_options(chosen, x, x2, resample),
    )  # fmt: skip


def _can_run_triton(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y,
    moments, tile_pixels,
) -> None:  # fmt: skip
    can_run(x, x2, weight)
    for tensor in (x, x2, residual, y):
        if tensor is not None and tensor.shape[1] * tensor.shape[2] * pixel_stride("", tensor) >= 2**31 - 2**24:
            raise CannotRunError("a sample of more than 2^31 - 2^24 values")
    if moments is not None:
        configuration_for(tuple(y.shape), x.dtype, tile_pixels)


OP = Op("conv2d")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton)
OP.register("reference", _run_reference, registry.always, registry.always)
