"""group_norm_apply: scale, offset, activation and resampling, the last stage of GroupNorm at inference.

    y = resample(act(x scale + offset))        act: none, gelu (erf form), silu, relu
                                               resample: "none", "down" (mean of 2x2 activated values; even sizes),
                                               "up" (nearest, twice the size)

scale and offset come from group_norm_merge; both None stand for 1 and 0. Two sources x and x2 stand for their
concatenation along the channels, C = C1 + C2, which is written nowhere. With neither scale nor x2 it is the pooling or
the enlarging of a skip path.

Shapes: x (N, H, W, C1), x2 (N, H, W, C2) or None; scale, offset (N, C) -> y (N, H', W', C).
Layouts: x, x2, y are channels-last, and may be channel slices of wider buffers (kernels/slices.py).
Types: x, x2, y share float32, float16 or bfloat16; scale and offset are float32 (the reference takes float64 for all).
Arithmetic is float32.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/group_norm_stages.cu), cpu
(csrc/cpu/group_norm_stages.cpp). Results depend on neither batch nor threads; tolerances: DESIGN, Numerics.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.group_norm_moments import (
    TYPES,
    can_run,
    can_run_on_gpu,
    check_small,
    precise,
    thread_block,
    type_name,
    vector_size,
)
from dfengine.kernels.registry import Op
from dfengine.kernels.slices import pixel_stride
from dfengine.kernels.triton_import import tl, triton

ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3}
RESAMPLES = {"none": 0, "down": 1, "up": 2}
"""Codes of csrc: Activation, Resample."""


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
    """Return resample(act(cat(x, x2) scale + offset)), in `y` where it is given.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    shape = _result_shape(x, x2, act, resample)
    y = torch.empty(shape, dtype=x.dtype, device=x.device) if y is None else y
    _check(x, x2, scale, offset, y, shape)
    _apply(x, x2, scale, offset, act, resample, y, backend or "")
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


def _check(x, x2, scale, offset, y, shape) -> None:
    """Raise ValueError for tensors that are wrong whatever the backend; `shape` is that of the result."""
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
            check_small(name, tensor, (shape[0], shape[3]), x)


@registry.custom_op("group_norm_apply", mutates=("y",))
def _apply(
    x: Tensor, x2: Tensor | None, scale: Tensor | None, offset: Tensor | None, act: str, resample: str, y: Tensor,
    backend: str,
) -> None:  # fmt: skip
    OP(x, x2, scale, offset, act, resample, y, backend=backend)


def reference(x, x2, scale, offset, act, resample) -> Tensor:
    """y in torch, in float64 for float64 and else in float32, rounded once."""
    z = (x if x2 is None else torch.cat((x, x2), dim=3)).to(precise(x))
    if scale is not None:
        z = torch.addcmul(offset[:, None, None], z, scale[:, None, None])
    z = z if act == "none" else getattr(F, act)(z)
    if resample == "down":
        z = F.avg_pool2d(z.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    elif resample == "up":
        z = z.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    return z.to(x.dtype)


def _run_reference(x, x2, scale, offset, act, resample, y) -> None:
    y.copy_(reference(x, x2, scale, offset, act, resample))


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


CONFIGURATIONS = tuple(
    dict(PIXELS=pixels, CHANNELS=channels, num_warps=warps)
    for pixels, channels, warps in ((32, 64, 4), (16, 128, 4), (8, 64, 4), (64, 64, 8))
)
"""Launch configurations, each tested; the first is used until they have been timed on a device."""


def _items(x: Tensor, resample: str) -> int:
    """Pixels of a sample for which threads are started: of y where it is pooled, else of x."""
    pixels = x.shape[1] * x.shape[2]
    return pixels // 4 if resample == "down" else pixels


def _run_triton(x, x2, scale, offset, act, resample, y, configuration=None) -> None:
    batch, height, width, channels = x.shape
    options = dict(configuration or CONFIGURATIONS[0])
    channels2, stride2 = (0, 0) if x2 is None else (x2.shape[3], pixel_stride("x2", x2))
    items = _items(x, resample)
    blocks = sum(triton.cdiv(count, options["CHANNELS"]) for count in (channels, channels2))
    triton_import.launch(apply_kernel, (triton.cdiv(items, options["PIXELS"]), blocks, batch))(
        x, x2, scale, offset, y, height * width, y.shape[1] * y.shape[2], items, width, channels, channels2,
        pixel_stride("x", x), stride2, pixel_stride("y", y), ACT=act, RESAMPLE=resample, **options,
    )  # fmt: skip


PIXELS_OF_A_THREAD = 4


def _run_cuda(x, x2, scale, offset, act, resample, y) -> None:
    batch, height, width, channels = x.shape
    channels2, stride2 = (0, 0) if x2 is None else (x2.shape[3], pixel_stride("x2", x2))
    vector, items = vector_size(x, x2, y), _items(x, resample)
    vectors = (channels + channels2) // vector
    block = thread_block(vectors)
    grid = (-(-items // (block[1] * PIXELS_OF_A_THREAD)), -(-vectors // block[0]), batch)
    sizes = (height * width, y.shape[1] * y.shape[2], items, width, channels, channels2)
    strides = (pixel_stride("x", x), stride2, pixel_stride("y", y))
    cuda_launch.launch(
        "group_norm_stages", f"group_norm_apply_{type_name(x)}_{vector}", grid, block,
        (
            x, x2, scale, offset, y, *map(np.int64, (*sizes, *strides)),
            np.int32(ACTIVATIONS[act]), np.int32(RESAMPLES[resample]), np.int32(PIXELS_OF_A_THREAD),
        ),
    )  # fmt: skip


STREAM_BYTES = 24 * 2**20
"""Results larger than this bypass the caches; smaller ones are likely read from them by the next op."""


def _run_cpu(x, x2, scale, offset, act, resample, y, level="") -> None:
    sources = [
        (0, 0, 0) if source is None else (source.data_ptr(), source.shape[3], pixel_stride("x", source))
        for source in (x, x2)
    ]
    native.module.group_norm_apply(
        sources, TYPES[x.dtype], ACTIVATIONS[act], RESAMPLES[resample], tuple(x.shape[:3]), native.address(scale),
        native.address(offset), y.data_ptr(), pixel_stride("y", y), stream=y.nbytes > STREAM_BYTES,
        threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


OP = Op("group_norm_apply")
OP.register("triton", _run_triton, triton_import.available, can_run_on_gpu, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, can_run_on_gpu)
OP.register("cpu", _run_cpu, registry.cpu_available("group_norm_apply"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
