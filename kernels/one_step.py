"""one_step: noise predictions become the reconstruction and the input of the segmentation net, in one pass.

    x0_hat[s] = (x_t[s] - b[s] * eps[s]) / a[s]      DF Eq. 5: a = sqrt(abar_t), b = sqrt(1 - abar_t)

    one scale:            r = clamp(x0_hat[0], -1, 1)
    two scales (guided):  r = clamp(lerp(x0_hat[0], clamp(x0_hat[1], -1, 1), weight), -1, 1)

    pair = cat(x_0, r)
    reconstruction = clamp((r - offset) / gain, 0, 1)

The guided form is norm-guidance (DF 3.3; docs/method.md) with scale s first and weight = w (1 - abar_s):
`coefficients` gives its numbers. `gain, offset` are those of `ingest`, so that the reconstruction is in unit pixels.

Shapes: x_t, eps (S, N, H, W, C), S = 1 or 2; x_0 (N, H, W, C); pair (N, H, W, 2 C); each may be a channel slice
(kernels/slices.py). reconstruction (N, H, W, C), contiguous, or None.
Types: x_t and x_0 share one, eps and pair another: float32, float16 or bfloat16, where they are not the same the first
is float32 (the reference also float64). reconstruction is float32 (float64). Arithmetic is float32; r is rounded once.
Not-a-number stays what it is.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/one_step.cu), cpu
(csrc/cpu/one_step.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES, pixel_stride
from dfengine.kernels.triton_import import tl, triton


def coefficients(alpha_bar: Sequence[float], guidance: float = 1.0) -> tuple[list[float], list[float], float]:
    """(a, b, weight) for the cumulative products abar_t of one scale, or of two, the smaller first."""
    a = [math.sqrt(value) for value in alpha_bar]
    b = [math.sqrt(1.0 - value) for value in alpha_bar]
    return a, b, float(guidance * (1.0 - alpha_bar[0]))


def reference(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    x_0: torch.Tensor,
    a: Sequence[float],
    b: Sequence[float],
    weight: float = 0.0,
    gain: float = 1.0,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pair, reconstruction) of the module's formula in torch; float64 throughout for eps in float64, else float32."""
    compute = torch.float64 if eps.dtype == torch.float64 else torch.float32
    x0_hat = [(x.to(compute) - b_s * e.to(compute)) / a_s for x, e, a_s, b_s in zip(x_t, eps, a, b, strict=True)]
    r = x0_hat[0] if len(x0_hat) == 1 else torch.lerp(x0_hat[0], x0_hat[1].clamp(-1, 1), weight)
    r = r.clamp(-1, 1)
    return torch.cat((x_0.to(compute), r), dim=-1).to(eps.dtype), ((r - offset) / gain).clamp(0, 1)


def one_step(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    x_0: torch.Tensor,
    a: Sequence[float],
    b: Sequence[float],
    weight: float = 0.0,
    gain: float = 1.0,
    offset: float = 0.0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new tensors (pair (N, H, W, 2 C) of eps's type, reconstruction (N, H, W, C)), from the chosen backend.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    precise = torch.promote_types(eps.dtype, torch.float32)
    pair = torch.empty((*x_0.shape[:-1], 2 * x_0.shape[-1]), dtype=eps.dtype, device=eps.device)
    reconstruction = torch.empty(x_0.shape, dtype=precise, device=eps.device)
    one_step_into(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction, backend=backend)
    return pair, reconstruction


def one_step_into(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction=None, backend=None) -> None:
    """As `one_step`, into a given pair and, where it is not None, reconstruction; every element is written."""
    _check(x_t, eps, x_0, a, b, gain, pair, reconstruction)
    floats = list(a), list(b), weight, gain, offset
    _one_step(x_t, eps, x_0, *floats, pair, reconstruction, backend or "")


@registry.custom_op("one_step", mutates=("pair", "reconstruction"))
def _one_step(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    x_0: torch.Tensor,
    a: list[float],
    b: list[float],
    weight: float,
    gain: float,
    offset: float,
    pair: torch.Tensor,
    reconstruction: torch.Tensor | None,
    backend: str,
) -> None:
    OP(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction, backend=backend)


def _check(x_t, eps, x_0, a, b, gain, pair, reconstruction) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    if x_0.ndim != 4:
        raise ValueError(f"x_0: expected (N, H, W, C), got {tuple(x_0.shape)}")
    if len(a) not in (1, 2) or len(b) != len(a):
        raise ValueError(f"a and b: expected one or two numbers each, got {len(a)} and {len(b)}")
    if gain == 0 or 0 in a:
        raise ValueError(f"division by zero: gain {gain}, a {list(a)}")
    if x_0.dtype not in (eps.dtype, torch.float32):
        raise ValueError(f"x_0: expected {eps.dtype} or float32, got {x_0.dtype}")
    *image, channels = x_0.shape
    precise = torch.promote_types(eps.dtype, torch.float32)
    wanted = dict(
        x_t=(x_t, (len(a), *image, channels), x_0.dtype),
        eps=(eps, (len(a), *image, channels), eps.dtype),
        x_0=(x_0, (*image, channels), x_0.dtype),
        pair=(pair, (*image, 2 * channels), eps.dtype),
        reconstruction=(reconstruction, (*image, channels), precise),
    )
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.device != eps.device:
            raise ValueError(f"{name}: on {tensor.device}, eps on {eps.device}")
        pixel_stride(name, tensor)
    if reconstruction is not None and not reconstruction.is_contiguous():
        raise ValueError("reconstruction: not contiguous")


def can_run(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if eps.dtype not in TYPES:
        raise CannotRunError(f"eps: {eps.dtype} is none of float32, float16, bfloat16")


def _run_reference(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction) -> None:
    result = reference(x_t, eps, x_0, a, b, weight, gain, offset)
    pair.copy_(result[0])
    if reconstruction is not None:
        reconstruction.copy_(result[1])


def _numbers(a, b, weight, gain, offset) -> tuple[list[float], list[float], float, float, float]:
    """What the kernels multiply with: x_t and eps in x0_hat, the weight, and r on its way to unit pixels."""
    return [1 / a_s for a_s in a], [b_s / a_s for a_s, b_s in zip(a, b, strict=True)], weight, 1 / gain, -offset / gain


def _layout(x_t, eps, x_0, pair) -> tuple[int, int, list[int]]:
    """(pixels, channels, pixel strides of the four)."""
    named = dict(x_t=x_t, eps=eps, x_0=x_0, pair=pair)
    channels = x_0.shape[-1]
    return x_0.numel() // max(channels, 1), channels, [pixel_stride(name, tensor) for name, tensor in named.items()]


@triton.jit
def _clamped(value, low, high):
    """Not-a-number passes both comparisons, which are false, as it is."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def one_step_kernel(
    x_t, eps, x_0, pair, reconstruction, from_x_s, from_x_b, from_eps_s, from_eps_b, weight, unit_gain, unit_offset,
    pixels, x_t_stride, eps_stride, x_0_stride, pair_stride,
    CHANNELS: tl.constexpr, SCALES: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: BLOCK of the pixels * CHANNELS values. PACKED: x_t, eps and x_0 have no gaps between pixels."""
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = value < pixels * CHANNELS
    pixel = (value // CHANNELS).to(tl.int64)
    channel = value % CHANNELS
    if PACKED:
        x_at, eps_at, x_0_at = value, value, value
    else:
        x_at, eps_at, x_0_at = (
            pixel * x_t_stride + channel,
            pixel * eps_stride + channel,
            pixel * x_0_stride + channel,
        )
    x_s = tl.load(x_t + x_at, mask=inside, other=0).to(tl.float32)
    e_s = tl.load(eps + eps_at, mask=inside, other=0).to(tl.float32)
    r = from_x_s * x_s - from_eps_s * e_s
    if SCALES == 2:
        second = pixels * tl.full((), 1, tl.int64)  # of 1 comes as a constant, which has no `to`
        x_b = tl.load(x_t + second * x_t_stride + x_at, mask=inside, other=0).to(tl.float32)
        e_b = tl.load(eps + second * eps_stride + eps_at, mask=inside, other=0).to(tl.float32)
        r += weight * (_clamped(from_x_b * x_b - from_eps_b * e_b, -1.0, 1.0) - r)
    r = _clamped(r, -1.0, 1.0)
    image = tl.load(x_0 + x_0_at, mask=inside, other=0)
    to = pair + pixel * pair_stride + channel
    tl.store(to, image.to(pair.dtype.element_ty), mask=inside)
    tl.store(to + CHANNELS, r.to(pair.dtype.element_ty), mask=inside)
    if UNIT:
        tl.store(reconstruction + value, _clamped(unit_gain * r + unit_offset, 0.0, 1.0), mask=inside)


CONFIGURATIONS = tuple(dict(BLOCK=block, num_warps=warps) for block, warps in ((512, 4), (1024, 4), (1024, 8)))
"""Launch configurations, each tested; the first is used until they have been timed on a device."""


def _run_triton(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction, configuration=None) -> None:
    if x_0.numel() == 0:
        return
    pixels, channels, strides = _layout(x_t, eps, x_0, pair)
    options = dict(configuration or CONFIGURATIONS[0])
    from_x, from_eps, *rest = _numbers(a, b, weight, gain, offset)
    triton_import.launch(one_step_kernel, (triton.cdiv(pixels * channels, options["BLOCK"]),))(
        x_t, eps, x_0, pair, pair if reconstruction is None else reconstruction,
        from_x[0], from_x[-1], from_eps[0], from_eps[-1], *rest, pixels, *strides,
        CHANNELS=channels, SCALES=len(a), UNIT=reconstruction is not None,
        PACKED=all(stride == channels for stride in strides[:3]), **options,
    )  # fmt: skip


def _can_run_triton(x_t, eps, x_0, *args) -> None:
    can_run(x_t, eps, x_0, *args)
    if x_0.numel() >= 2**31 - 2**16:
        raise CannotRunError("more than 2^31 - 2^16 values")


def _run_cuda(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction) -> None:
    if x_0.numel() == 0:
        return
    pixels, channels, strides = _layout(x_t, eps, x_0, pair)
    from_x, from_eps, *rest = _numbers(a, b, weight, gain, offset)
    types = "_".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x_0, eps))
    run_pixels = 16 // eps.element_size()
    tensors = [tensor for tensor in (x_t, eps, x_0, pair, reconstruction) if tensor is not None]
    packed = strides == [channels, channels, channels, 2 * channels] and all(t.data_ptr() % 16 == 0 for t in tensors)
    if not packed or channels not in (1, 3) or pixels % run_pixels:
        run_pixels = 0
    threads = pixels // run_pixels if run_pixels else pixels * channels
    floats = (from_x[0], from_x[-1], from_eps[0], from_eps[-1], *rest)
    cuda_launch.launch(
        "one_step", f"one_step_{types}", (-(-threads // 128), 1, 1), (128, 1, 1),
        (
            x_t, eps, x_0, pair, reconstruction, *map(np.float32, floats), np.int32(len(a)),
            *map(np.int64, (pixels, channels, *strides)), np.int32(run_pixels),
        ),
    )  # fmt: skip


STREAM_BYTES = 24 * 2**20
"""Outputs larger than this bypass the caches; smaller ones are likely read from them by the next op."""


def _run_cpu(x_t, eps, x_0, a, b, weight, gain, offset, pair, reconstruction, level="") -> None:
    pixels, channels, strides = _layout(x_t, eps, x_0, pair)
    unit, written = 0, pair.nbytes
    if reconstruction is not None:
        unit, written = reconstruction.data_ptr(), pair.nbytes + reconstruction.nbytes
    native.module.one_step(
        x_t.data_ptr(), eps.data_ptr(), x_0.data_ptr(), pair.data_ptr(), unit, TYPES[x_0.dtype], TYPES[eps.dtype],
        pixels, channels, strides, *_numbers(a, b, weight, gain, offset), threads=torch.get_num_threads(),
        stream=written > STREAM_BYTES, level=level,
    )  # fmt: skip


OP = Op("one_step")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, can_run)
OP.register("cpu", _run_cpu, registry.cpu_available("one_step"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
