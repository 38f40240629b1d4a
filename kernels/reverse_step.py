"""reverse_step: one step of the reverse chain (mode "iterative"), from x_t to x_{t-1}, in one pass.

    x0_hat  = (x_t - b eps) / a                 a = sqrt(abar_t), b = sqrt(1 - abar_t)
    x_{t-1} = from_x0 clamp(x0_hat, -1, 1) + from_xt x_t + sigma eps'

a draw from the posterior q(x_{t-1} | x_t, x0_hat), DF Table 3 row 1; `coefficients` gives its numbers. eps' is standard
normal, the same for every image of the batch: the noise of kernels/ingest.py for (seed; draw, step, scale 1), step = t.
The last step, t = 0, adds nothing: it is `one_step` with one scale.

Shapes: x_t, eps and out (N, H, W, C), each may be a channel slice (kernels/slices.py); out may be x_t itself.
Types: x_t and out share one, eps has another: float32, float16 or bfloat16, where they are not the same the first is
float32 (the reference also float64). Arithmetic is float32, rounded once. Not-a-number stays what it is.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/reverse_step.cu), cpu
(csrc/cpu/reverse_step.cpp).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.ingest import MAX_IMAGES
from dfengine.kernels.one_step import TYPES, _clamped
from dfengine.kernels.philox import WORD, check_noise, normals, philox_normal, signed
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import pixel_stride
from dfengine.kernels.triton_import import tl, triton


def coefficients(alpha_bar: float, alpha_bar_before: float, beta: float) -> tuple[float, float, float, float, float]:
    """(a, b, from_x0, from_xt, sigma) of step t > 0 from abar_t, abar_{t-1} and beta_t."""
    alpha_bar, alpha_bar_before, beta = float(alpha_bar), float(alpha_bar_before), float(beta)
    remaining, remaining_before = 1.0 - alpha_bar, 1.0 - alpha_bar_before
    return (
        math.sqrt(alpha_bar),
        math.sqrt(remaining),
        math.sqrt(alpha_bar_before) * beta / remaining,
        math.sqrt(1.0 - beta) * remaining_before / remaining,
        math.sqrt(beta * remaining_before / remaining),
    )


def reference(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    a: float,
    b: float,
    from_x0: float,
    from_xt: float,
    sigma: float,
    seed: int,
    draw: int,
    step: int,
) -> torch.Tensor:
    """x_{t-1} of the module's formula in torch; float64 throughout for x_t in float64, else float32, rounded once."""
    compute = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    noise = philox_normal(seed, draw, step, 1, tuple(x_t.shape[1:]), compute, x_t.device)
    x = x_t.to(compute)
    x0_hat = ((x - b * eps.to(compute)) / a).clamp(-1, 1)
    return (from_x0 * x0_hat + from_xt * x + sigma * noise).to(x_t.dtype)


def reverse_step(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    a: float,
    b: float,
    from_x0: float,
    from_xt: float,
    sigma: float,
    seed: int,
    draw: int,
    step: int,
    backend: str | None = None,
) -> torch.Tensor:
    """Return x_{t-1}, a new contiguous tensor of x_t's type, written by the chosen backend.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    _check(x_t, eps, a, seed, draw, step)
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    return _reverse_step(x_t, eps, a, b, from_x0, from_xt, sigma, signed_seed, draw, step, backend or "")


@registry.custom_op("reverse_step", fake=lambda x_t, *_: x_t.new_empty(x_t.shape))
def _reverse_step(
    x_t: torch.Tensor,
    eps: torch.Tensor,
    a: float,
    b: float,
    from_x0: float,
    from_xt: float,
    sigma: float,
    seed: int,
    draw: int,
    step: int,
    backend: str,
) -> torch.Tensor:
    out = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    OP(x_t, eps, a, b, from_x0, from_xt, sigma, seed % 2**64, draw, step, out, backend=backend)
    return out


def _check(x_t, eps, a, seed, draw, step) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    check_noise(seed, draw, step, 2)
    if x_t.ndim != 4:
        raise ValueError(f"x_t: expected (N, H, W, C), got {tuple(x_t.shape)}")
    if x_t.shape[1] * x_t.shape[2] >= 2**31:
        raise ValueError(f"x_t: {x_t.shape[1]} x {x_t.shape[2]} pixels are too many")
    if eps.shape != x_t.shape:
        raise ValueError(f"eps: expected {tuple(x_t.shape)}, got {tuple(eps.shape)}")
    if x_t.dtype not in (eps.dtype, torch.float32):
        raise ValueError(f"x_t: expected {eps.dtype} or float32, got {x_t.dtype}")
    if eps.device != x_t.device:
        raise ValueError(f"eps: on {eps.device}, x_t on {x_t.device}")
    if a == 0:
        raise ValueError("a: is 0, and divides")
    for name, tensor in (("x_t", x_t), ("eps", eps)):
        pixel_stride(name, tensor)


def can_run(x_t, eps, *args) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if eps.dtype not in TYPES:
        raise CannotRunError(f"eps: {eps.dtype} is none of float32, float16, bfloat16")


def _run_reference(x_t, eps, a, b, from_x0, from_xt, sigma, seed, draw, step, out) -> None:
    out.copy_(reference(x_t, eps, a, b, from_x0, from_xt, sigma, seed, draw, step))


def _strides(x_t, eps, out) -> list[int]:
    return [pixel_stride(name, tensor) for name, tensor in dict(x_t=x_t, eps=eps, out=out).items()]


@triton.jit
def _channel(x_t, eps, out, mask, from_x, from_eps, from_x0, from_xt, sigma, noise):
    """One channel of a block of pixels, by pointers."""
    x = tl.load(x_t, mask=mask, other=0).to(tl.float32)
    e = tl.load(eps, mask=mask, other=0).to(tl.float32)
    result = from_x0 * _clamped(from_x * x - from_eps * e, -1.0, 1.0) + from_xt * x + sigma * noise
    tl.store(out, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["key_0", "key_1", "draw", "step", "batch"])
def reverse_step_kernel(
    x_t, eps, out, from_x, from_eps, from_x0, from_xt, sigma, key_0, key_1, draw, step, batch, size,
    x_t_stride, eps_stride, out_stride, CHANNELS: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (i, j, k): BLOCK of the `size` = H * W pixels, IMAGES images and their one noise, channels 4k..4k+3."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(2)
    inside = pixel < size
    n0, n1, n2, n3 = normals(pixel, group, 2 * step + 1, draw, key_0, key_1)
    c = 4 * group
    for i in range(IMAGES):
        n = tl.program_id(1) * IMAGES + i
        at = n.to(tl.int64) * size + pixel
        live = inside & (n < batch)
        x, e, to = x_t + at * x_t_stride + c, eps + at * eps_stride + c, out + at * out_stride + c
        _channel(x, e, to, live, from_x, from_eps, from_x0, from_xt, sigma, n0)
        if CHANNELS > 1:
            mask = live & (c + 1 < CHANNELS)
            _channel(x + 1, e + 1, to + 1, mask, from_x, from_eps, from_x0, from_xt, sigma, n1)
        if CHANNELS > 2:
            mask = live & (c + 2 < CHANNELS)
            _channel(x + 2, e + 2, to + 2, mask, from_x, from_eps, from_x0, from_xt, sigma, n2)
        if CHANNELS > 3:
            mask = live & (c + 3 < CHANNELS)
            _channel(x + 3, e + 3, to + 3, mask, from_x, from_eps, from_x0, from_xt, sigma, n3)


CONFIGURATIONS = tuple(dict(BLOCK=block, num_warps=warps) for block, warps in ((128, 4), (256, 4), (512, 4)))
"""Launch configurations, each tested; the first is used until they have been timed on a device."""


def _run_triton(x_t, eps, a, b, from_x0, from_xt, sigma, seed, draw, step, out, configuration=None) -> None:
    batch, height, width, channels = x_t.shape
    if x_t.numel() == 0:
        return
    options = dict(configuration or CONFIGURATIONS[0])
    per_program = min(batch, MAX_IMAGES)
    grid = (triton.cdiv(height * width, options["BLOCK"]), triton.cdiv(batch, per_program), triton.cdiv(channels, 4))
    words = (signed(word) for word in (seed & WORD, seed >> 32, draw))
    triton_import.launch(reverse_step_kernel, grid)(
        x_t, eps, out, 1 / a, b / a, from_x0, from_xt, sigma, *words, step, batch, height * width,
        *_strides(x_t, eps, out), CHANNELS=channels, IMAGES=per_program, **options,
    )  # fmt: skip


def _can_run_triton(x_t, *args) -> None:
    can_run(x_t, *args)
    if x_t.shape[1] * x_t.shape[2] >= 2**31 - 2**16:
        raise CannotRunError("more than 2^31 - 2^16 pixels an image")


def _run_cuda(x_t, eps, a, b, from_x0, from_xt, sigma, seed, draw, step, out) -> None:
    batch, height, width, channels = x_t.shape
    if x_t.numel() == 0:
        return
    types = "_".join(str(tensor.dtype).removeprefix("torch.") for tensor in (x_t, eps))
    per_thread, threads = min(batch, MAX_IMAGES), 128
    grid = (-(-height * width // threads), -(-batch // per_thread), -(-channels // 4))
    cuda_launch.launch(
        "reverse_step", f"reverse_step_{types}", grid, (threads, 1, 1),
        (
            x_t, eps, out, *map(np.float32, (1 / a, b / a, from_x0, from_xt, sigma)),
            *map(np.uint32, (seed & WORD, seed >> 32, draw, step)),
            *map(np.int64, (batch, height * width, channels, *_strides(x_t, eps, out))), np.int32(per_thread),
        ),
    )  # fmt: skip


def _run_cpu(x_t, eps, a, b, from_x0, from_xt, sigma, seed, draw, step, out, level="") -> None:
    batch, height, width, channels = x_t.shape
    native.module.reverse_step(
        x_t.data_ptr(), eps.data_ptr(), out.data_ptr(), TYPES[x_t.dtype], TYPES[eps.dtype],
        (batch, height * width, channels), _strides(x_t, eps, out), (1 / a, b / a, from_x0, from_xt, sigma),
        seed, draw, step, threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


OP = Op("reverse_step")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, can_run)
OP.register("cpu", _run_cpu, registry.cpu_available("reverse_step"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
