"""group_norm_moments: the moments of tiles of pixels, the first of the three stages of GroupNorm at inference.

    mean[n, t, c] = sum over the pixels of tile t of x[n, pixel, c] / their number
    M2[n, t, c]   = sum over them of (x[n, pixel, c] - mean[n, t, c])^2

    group_norm_moments -> group_norm_merge (a scale and an offset) -> group_norm_apply (with the activation)

A convolution that leaves the moments of what it writes (kernels/conv2d.py) takes the place of this stage. The three
stages share one file of each kind in csrc, group_norm_stages.*; what they share in Python is here.

Shapes: x (N, H, W, C) -> moments (N, T, 2, C), [..., 0, :] means, [..., 1, :] M2; tiles are `tile_pixels` consecutive
pixels in row-major order, T = ceil(H W / tile_pixels), the last one may be shorter.
Layouts: x is channels-last, and may be a channel slice of a wider buffer (kernels/slices.py).
Types: x is float32, float16 or bfloat16, moments are float32 (the reference takes float64 for both). Arithmetic is
float32.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/group_norm_stages.cu), cpu
(csrc/cpu/group_norm_stages.cpp). Results depend on neither batch nor threads; tolerances: DESIGN, Numerics.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES, pixel_stride
from dfengine.kernels.triton_import import tl, triton


def default_tile_pixels(pixels: int) -> int:
    """Tiles of a sample with so many pixels: at most 256 of them up to 65,536 pixels, of 16 to 256 pixels each."""
    return min(256, max(16, 1 << max(0, -(-pixels // 256) - 1).bit_length()))


def tile_counts(pixels: int, tile_pixels: int, device: torch.device | str = "cpu") -> Tensor:
    """The `counts` of tiles of `tile_pixels` pixels: int32 (T,), the last one what is left; made on the device, since a
    copy from the host would wait for it, and may not stand in a captured graph."""
    first = torch.arange(0, pixels, tile_pixels, dtype=torch.int32, device=device)
    return (pixels - first).clamp(max=tile_pixels)


def moments(
    x: Tensor, tile_pixels: int | None = None, *, out: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Return the moments (N, T, 2, C) of x's tiles, in `out` where it is given.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    _check(x, tile_pixels)
    pixels = x.shape[1] * x.shape[2]
    tile_pixels = default_tile_pixels(pixels) if tile_pixels is None else tile_pixels
    shape = (x.shape[0], -(-pixels // tile_pixels), 2, x.shape[3])
    out = torch.empty(shape, dtype=precise(x), device=x.device) if out is None else out
    check_small("out", out, shape, x)
    _moments(x, tile_pixels, out, backend or "")
    return out


def _check(x: Tensor, tile_pixels: int | None) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, H, W, C), got {tuple(x.shape)}")
    pixel_stride("x", x)
    if x.numel() == 0:
        raise ValueError(f"x: {tuple(x.shape)} holds nothing")
    if tile_pixels is not None and tile_pixels < 1:
        raise ValueError(f"tile_pixels: {tile_pixels} is below 1")


def precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_small(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """A parameter or statistic: contiguous, of float32, or float64 beside float64 activations."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != precise(like) or tensor.device != like.device or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {precise(like)} on {like.device}, got {tensor.dtype} on {tensor.device}"
        )


@registry.custom_op("group_norm_moments", mutates=("moments",))
def _moments(x: Tensor, tile_pixels: int, moments: Tensor, backend: str) -> None:
    OP(x, tile_pixels, moments, backend=backend)


def reference(x: Tensor, tile_pixels: int) -> Tensor:
    """The moments (N, T, 2, C) in torch, in float64 for float64 and else in float32."""
    u = x.to(precise(x)).reshape(x.shape[0], -1, x.shape[3])
    full = u.shape[1] // tile_pixels * tile_pixels
    parts = [u[:, :full].reshape(u.shape[0], -1, tile_pixels, u.shape[2]), u[:, None, full:]]
    results = []
    for part in parts:
        if part.numel():
            mean = part.mean(dim=2, keepdim=True)
            results.append(torch.stack((mean[:, :, 0], (part - mean).square().sum(dim=2)), dim=2))
    return torch.cat(results, dim=1)


def _run_reference(x, tile_pixels, moments) -> None:
    moments.copy_(reference(x, tile_pixels))


def can_run(first: Tensor, *_args, **_kwargs) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if first.dtype not in TYPES:
        raise CannotRunError(f"{first.dtype} is none of float32, float16, bfloat16")


def can_run_on_gpu(first: Tensor, *args, **_kwargs) -> None:
    """As can_run, for the kernels on a GPU: 32 bits number the values from the first of a sample to its last one."""
    can_run(first)
    if first.shape[0] > 65535:
        raise CannotRunError(f"a batch of {first.shape[0]}, more than 65,535")
    for tensor in (first, *args):
        if not isinstance(tensor, Tensor) or tensor.ndim != 4:
            continue
        if tensor.shape[1] * tensor.shape[2] * pixel_stride("tensor", tensor) >= 2**31 - 2**20:
            raise CannotRunError("a sample spans 2^31 values or more")


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


CONFIGURATIONS = tuple(
    dict(PIXELS=pixels, CHANNELS=channels, num_warps=warps)
    for pixels, channels, warps in ((64, 64, 4), (32, 64, 4), (64, 128, 8), (16, 128, 4))
)
"""Launch configurations, each tested; the first is used until they have been timed on a device."""


def _run_triton(x, tile_pixels, moments, configuration=None) -> None:
    batch, height, width, channels = x.shape
    options = dict(configuration or CONFIGURATIONS[0])
    tiles = moments.shape[1]
    triton_import.launch(moments_kernel, (tiles, triton.cdiv(channels, options["CHANNELS"]), batch))(
        x, moments, height * width, channels, pixel_stride("x", x), tile_pixels, tiles, **options
    )


def type_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def vector_size(*tensors: Tensor | None) -> int:
    """Channels that a thread takes: 16 bytes where every tensor allows it, else one."""
    present = [tensor for tensor in tensors if tensor is not None]
    size = 16 // present[0].element_size()
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[3] % size == 0 and pixel_stride("tensor", tensor) % size == 0
        for tensor in present
    )
    return size if aligned else 1


def thread_block(vectors: int) -> tuple[int, int, int]:
    """256 threads: up to 32 along the vectors of a pixel, the rest along pixels."""
    x = min(32, power_of_2(vectors))
    return x, 256 // x, 1


def power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def _run_cuda(x, tile_pixels, moments) -> None:
    batch, height, width, channels = x.shape
    vector, tiles = vector_size(x), moments.shape[1]
    block = thread_block(channels // vector)
    grid = (tiles, -(-channels // (block[0] * vector)), batch)
    cuda_launch.launch(
        "group_norm_stages", f"group_norm_moments_{type_name(x)}_{vector}", grid, block,
        (x, moments, *map(np.int64, (height * width, channels, pixel_stride("x", x), tile_pixels, tiles))),
        shared=block[0] * block[1] * vector * 8,
    )  # fmt: skip


def _run_cpu(x, tile_pixels, moments, level="") -> None:
    batch, height, width, channels = x.shape
    native.module.group_norm_moments(
        x.data_ptr(), TYPES[x.dtype], (batch, height * width, channels), pixel_stride("x", x), tile_pixels,
        moments.data_ptr(), threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


OP = Op("group_norm_moments")
OP.register("triton", _run_triton, triton_import.available, can_run_on_gpu, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, can_run_on_gpu)
OP.register("cpu", _run_cpu, registry.cpu_available("group_norm_moments"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
