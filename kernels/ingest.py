"""ingest: pixels of any supported type become model pixels, and each diffusion scale its noised copy, in one pass.

    unit   = pixel / 255 (uint8), pixel / 65535 (uint16), pixel (float32)
    x_0    = gain * unit + offset
    x_t[s] = a[s] * x_0 + b[s] * eps[s]      q_sample, DF Eq. 2: a = sqrt(abar_t), b = sqrt(1 - abar_t)

`gain, offset` is (1, 0) for model pixels in [0, 1] and (2, -1) for [-1, 1]. x_t comes from x_0 before its rounding.

Shapes: images (B, H, W, C), any strides (an NCHW batch is passed as its NHWC view); x_0 (B, H, W, C) and
x_t (S, B, H, W, C), S = 1 or 2, contiguous, so that x_t reads as one channels-last batch of S * B images.
Types: images uint8, uint16 or float32; x_0 and x_t share float32, float16 or bfloat16 (the reference also float64).
Arithmetic is float32.

eps[s] is standard normal, the same for every image of the batch, so that a result depends on neither batch nor place:
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with

    key     = (seed mod 2^32, seed div 2^32)
    counter = (y * W + x, channel div 4, 2 * step + s, draw)

whose four words r_0..r_3 give the channels 4k..4k+3:

    u_i = ((r_i >> 9) + 0.5) * 2^-23                                  in (0, 1), exact in float32
    (n_0, n_1) = sqrt(-2 ln u_0) * (cos, sin)(2 pi u_1)               and (n_2, n_3) likewise from (u_2, u_3)

Every backend draws the same integers; the normals, and with them x_t, agree to rounding (DESIGN section 3, Numerics).
Where the same noise serves call after call it can be drawn before (`draw_noise`) and given as `noise`, float32
(S, H, W, C), contiguous: on a CPU reading it is quicker than drawing it anew for a small batch.

Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/ingest.cu), cpu
(csrc/cpu/ingest.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.philox import WORD, check_noise, normals, philox_normal, signed
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES
from dfengine.kernels.triton_import import tl, triton

LEVELS = {torch.uint8: 255.0, torch.uint16: 65535.0, torch.float32: 1.0}
"""The pixel value that means 1.0, by input type."""

def reference(
    images: torch.Tensor,
    *,
    gain: float,
    offset: float,
    a: Sequence[float],
    b: Sequence[float],
    seed: int,
    draw: int = 0,
    step: int = 0,
    noise: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_0, x_t) of the module's formula in torch; float64 throughout for dtype float64, else float32, rounded once."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x_0 = images.to(compute) / LEVELS[images.dtype] * gain + offset
    shape, device = tuple(images.shape[1:]), images.device
    x_t = [
        a_s * x_0 + b_s * (philox_normal(seed, draw, step, s, shape, compute, device) if noise is None else noise[s])
        for s, (a_s, b_s) in enumerate(zip(a, b, strict=True))
    ]
    return x_0.to(dtype).contiguous(), torch.stack(x_t).to(dtype)


def ingest(
    images: torch.Tensor,
    *,
    gain: float,
    offset: float,
    a: Sequence[float],
    b: Sequence[float],
    seed: int,
    draw: int = 0,
    step: int = 0,
    noise: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new tensors (x_0 (B, H, W, C), x_t (S, B, H, W, C)) of `dtype`, written by the chosen backend.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    x_0 = torch.empty(images.shape, dtype=dtype, device=images.device)
    x_t = torch.empty((len(a), *images.shape), dtype=dtype, device=images.device)
    numbers = dict(gain=gain, offset=offset, a=a, b=b, seed=seed, draw=draw, step=step)
    ingest_into(images, x_0, x_t, **numbers, noise=noise, backend=backend)
    return x_0, x_t


def draw_noise(
    shape: tuple[int, int, int],
    scales: int,
    seed: int,
    draw: int = 0,
    step: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> torch.Tensor:
    """The noise of the module's formula, float32 (scales, H, W, C): what `ingest` makes of a black image."""
    black = torch.zeros((1, *shape), dtype=torch.uint8, device=device)
    numbers = dict(gain=1.0, offset=0.0, a=[0.0] * scales, b=[1.0] * scales, seed=seed, draw=draw, step=step)
    return ingest(black, **numbers, backend=backend)[1][:, 0]


def ingest_into(images, x_0, x_t, *, gain, offset, a, b, seed, draw=0, step=0, noise=None, backend=None) -> None:
    """As `ingest`, into given contiguous outputs, every element of which is written."""
    _check(images, x_0, x_t, a, b, seed, draw, step, noise)
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    numbers = gain, offset, list(a), list(b), signed_seed, draw, step
    _ingest(images, x_0, x_t, *numbers, noise, backend or "")


@registry.custom_op("ingest", mutates=("x_0", "x_t"))
def _ingest(
    images: torch.Tensor,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    gain: float,
    offset: float,
    a: list[float],
    b: list[float],
    seed: int,
    draw: int,
    step: int,
    noise: torch.Tensor | None,
    backend: str,
) -> None:
    OP(images, x_0, x_t, gain, offset, a, b, seed % 2**64, draw, step, noise, backend=backend)


def _check(images, x_0, x_t, a, b, seed, draw, step, noise) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    check_noise(seed, draw, step, len(a))
    if images.ndim != 4:
        raise ValueError(f"images: expected (B, H, W, C), got {tuple(images.shape)}")
    if images.dtype not in LEVELS:
        raise ValueError(f"images: {images.dtype} is none of uint8, uint16, float32")
    if images.shape[1] * images.shape[2] >= 2**31:
        raise ValueError(f"images: {images.shape[1]} x {images.shape[2]} pixels are too many")
    if len(b) != len(a):
        raise ValueError(f"a and b differ in length: {len(a)} and {len(b)}")
    for name, output, shape in (("x_0", x_0, images.shape), ("x_t", x_t, (len(a), *images.shape))):
        if tuple(output.shape) != tuple(shape):
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(output.shape)}")
        if output.dtype != x_0.dtype:
            raise ValueError(f"{name}: {output.dtype} differs from x_0's {x_0.dtype}")
        if not output.is_contiguous():
            raise ValueError(f"{name}: not contiguous")
        if output.device != images.device:
            raise ValueError(f"{name}: on {output.device}, images on {images.device}")
    if noise is not None:
        shape = (len(a), *images.shape[1:])
        if tuple(noise.shape) != shape or noise.dtype != torch.float32 or not noise.is_contiguous():
            raise ValueError(f"noise: expected {shape}, float32, contiguous; got {tuple(noise.shape)}, {noise.dtype}")


def can_run(images, x_0, x_t, *numbers) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if x_0.dtype not in TYPES:
        raise CannotRunError(f"output {x_0.dtype} is none of float32, float16, bfloat16")


def _can_run_drawing(images, x_0, x_t, gain, offset, a, b, seed, draw, step, noise=None) -> None:
    can_run(images, x_0, x_t)
    if noise is not None:
        raise CannotRunError("draws its own noise, which is quicker on a GPU than reading it")


def _run_reference(images, x_0, x_t, gain, offset, a, b, seed, draw, step, noise=None) -> None:
    numbers = dict(gain=gain, offset=offset, a=a, b=b, seed=seed, draw=draw, step=step)
    result = reference(images, **numbers, noise=noise, dtype=x_0.dtype)
    x_0.copy_(result[0])
    x_t.copy_(result[1])


@triton.jit
def _channel(
    pixels, x_0, x_t0, x_t1, at, mask, gain, offset, a_0, b_0, a_1, b_1, noise_0, noise_1, SCALES: tl.constexpr
):
    """One channel of a block of pixels: `pixels` are pointers, `at` offsets into each output."""
    x = gain * tl.load(pixels, mask=mask, other=0).to(tl.float32) + offset
    tl.store(x_0 + at, x.to(x_0.dtype.element_ty), mask=mask)
    tl.store(x_t0 + at, (a_0 * x + b_0 * noise_0).to(x_0.dtype.element_ty), mask=mask)
    if SCALES == 2:
        tl.store(x_t1 + at, (a_1 * x + b_1 * noise_1).to(x_0.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["key_0", "key_1", "draw", "step", "batch"])
def ingest_kernel(
    images, x_0, x_t, gain, offset, a_0, b_0, a_1, b_1, key_0, key_1, draw, step, batch, size, width,
    stride_n, stride_y, stride_x, stride_c,
    CHANNELS: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j, k): BLOCK of the `size` = H * W pixels, IMAGES images and their one noise, channels 4k..4k+3."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(2)
    inside = pixel < size
    n0, n1, n2, n3 = normals(pixel, group, 2 * step, draw, key_0, key_1)
    m0, m1, m2, m3 = n0, n1, n2, n3
    if SCALES == 2:
        m0, m1, m2, m3 = normals(pixel, group, 2 * step + 1, draw, key_0, key_1)
    channel = 4 * group
    source = (pixel // width).to(tl.int64) * stride_y + (pixel % width).to(tl.int64) * stride_x + channel * stride_c
    target = pixel.to(tl.int64) * CHANNELS + channel
    x_t1 = x_t + batch.to(tl.int64) * size * CHANNELS
    for i in range(IMAGES):
        n = (tl.program_id(1) * IMAGES + i).to(tl.int64)
        from_n = images + n * stride_n + source
        at = n * size * CHANNELS + target
        live = inside & (n < batch)
        _channel(from_n, x_0, x_t, x_t1, at, live, gain, offset, a_0, b_0, a_1, b_1, n0, m0, SCALES)
        if CHANNELS > 1:
            mask = live & (channel + 1 < CHANNELS)
            _channel(from_n + stride_c, x_0, x_t, x_t1, at + 1, mask, gain, offset, a_0, b_0, a_1, b_1, n1, m1, SCALES)
        if CHANNELS > 2:
            mask = live & (channel + 2 < CHANNELS)
            _channel(
                from_n + 2 * stride_c, x_0, x_t, x_t1, at + 2, mask, gain, offset, a_0, b_0, a_1, b_1, n2, m2, SCALES
            )
        if CHANNELS > 3:
            mask = live & (channel + 3 < CHANNELS)
            _channel(
                from_n + 3 * stride_c, x_0, x_t, x_t1, at + 3, mask, gain, offset, a_0, b_0, a_1, b_1, n3, m3, SCALES
            )


CONFIGURATIONS = tuple(dict(BLOCK=block, num_warps=warps) for block, warps in ((128, 4), (256, 4), (512, 4)))
"""Launch configurations, each tested; the first is used until they have been timed on a device."""
MAX_IMAGES = 8
"""Images a program serves with one draw of noise: more would leave a GPU idle at small sizes."""


def _run_triton(images, x_0, x_t, gain, offset, a, b, seed, draw, step, noise=None, configuration=None) -> None:
    batch, height, width, channels = images.shape
    if images.numel() == 0:
        return
    options = dict(configuration or CONFIGURATIONS[0])
    per_program = min(batch, MAX_IMAGES)
    grid = (triton.cdiv(height * width, options["BLOCK"]), triton.cdiv(batch, per_program), triton.cdiv(channels, 4))
    triton_import.launch(ingest_kernel, grid)(
        images, x_0, x_t, gain / LEVELS[images.dtype], offset, a[0], b[0], a[-1], b[-1],
        signed(seed & WORD), signed(seed >> 32), signed(draw), step, batch, height * width, width, *images.stride(),
        CHANNELS=channels, SCALES=len(a), IMAGES=per_program, **options,
    )  # fmt: skip


def _can_run_triton(images, *args) -> None:
    _can_run_drawing(images, *args)
    if images.shape[1] * images.shape[2] >= 2**31 - 2**16:
        raise CannotRunError("more than 2^31 - 2^16 pixels an image")


def _run_cuda(images, x_0, x_t, gain, offset, a, b, seed, draw, step, noise=None) -> None:
    batch, height, width, channels = images.shape
    if images.numel() == 0:
        return
    types = "_".join(str(tensor.dtype).removeprefix("torch.") for tensor in (images, x_0))
    per_thread, threads = min(batch, MAX_IMAGES), 128
    grid = (-(-height * width // threads), -(-batch // per_thread), -(-channels // 4))
    floats = (gain / LEVELS[images.dtype], offset, a[0], b[0], a[-1], b[-1])
    cuda_launch.launch(
        "ingest", f"ingest_{types}", grid, (threads, 1, 1),
        (
            images, x_0, x_t, *map(np.float32, floats), *map(np.uint32, (seed & WORD, seed >> 32, draw, step)),
            np.int32(len(a)), *map(np.int64, (*images.shape, *images.stride())), np.int32(per_thread),
        ),
    )  # fmt: skip


PIXEL_CODES = {torch.uint8: 0, torch.uint16: 1, torch.float32: 2}
STREAM_BYTES = 24 * 2**20
"""Outputs larger than this bypass the caches; smaller ones are likely read from them by the next op."""


def _run_cpu(images, x_0, x_t, gain, offset, a, b, seed, draw, step, noise=None, level="") -> None:
    native.module.ingest(
        images.data_ptr(), PIXEL_CODES[images.dtype], tuple(images.shape), tuple(images.stride()),
        x_0.data_ptr(), x_t.data_ptr(),
        TYPES[x_0.dtype], gain / LEVELS[images.dtype], offset, a, b, seed, draw, step,
        0 if noise is None else noise.data_ptr(), threads=torch.get_num_threads(),
        stream=(x_0.nbytes + x_t.nbytes) > STREAM_BYTES, level=level,
    )  # fmt: skip


OP = Op("ingest")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, _can_run_drawing)
OP.register("cpu", _run_cpu, registry.cpu_available("ingest"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
