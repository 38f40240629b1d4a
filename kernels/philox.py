"""The noise of ingest and reverse_step, in torch and in Triton: Philox4x32-10 and the normals that its words give.

The formulas, with key and counter, are in kernels/ingest.py; csrc/common/philox.h is the same in C++ and CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dfengine.kernels.triton_import import tl, triton

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(counter: Sequence[torch.Tensor | int], key: Sequence[int]) -> list[torch.Tensor]:
    """Philox4x32-10 of four counter words (int64 tensors or ints below 2^32, broadcast together) under two key words.

    Returns four int64 tensors of words in [0, 2^32). The 64-bit products wrap in int64, which keeps their bits.
    """
    x = list(torch.broadcast_tensors(*(torch.as_tensor(word, dtype=torch.int64) for word in _on_one_device(counter))))
    k = list(key)
    for _ in range(10):
        p, q = x[0] * MULTIPLIERS[0], x[2] * MULTIPLIERS[1]
        x = [((q >> 32) & WORD) ^ x[1] ^ k[0], q & WORD, ((p >> 32) & WORD) ^ x[3] ^ k[1], p & WORD]
        k = [(word + increment) & WORD for word, increment in zip(k, KEY_INCREMENTS, strict=True)]
    return x


def _on_one_device(words):
    device = next((word.device for word in words if isinstance(word, torch.Tensor)), None)
    return [torch.as_tensor(word, device=device) for word in words]


def philox_normal(
    seed: int,
    draw: int,
    step: int,
    scale: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normals (H, W, C) of the formula, in float32 or float64 arithmetic.

    seed: in [0, 2^64); draw: in [0, 2^32), another one gives independent noise; step: in [0, 2^31), place in a chain;
    scale: 0 or 1. Raises ValueError outside these ranges.
    """
    check_noise(seed, draw, step, scale + 1)
    height, width, channels = shape
    pixel = torch.arange(height * width, dtype=torch.int64, device=device)[:, None]
    group = torch.arange((channels + 3) // 4, dtype=torch.int64, device=device)[None, :]
    words = philox((pixel, group, 2 * step + scale, draw), (seed & WORD, seed >> 32))
    u = [((word >> 9).to(dtype) + 0.5) * 2.0**-23 for word in words]
    parts = []
    for u_radius, u_angle in ((u[0], u[1]), (u[2], u[3])):
        radius = torch.sqrt(-2.0 * torch.log(u_radius))
        angle = (2.0 * torch.pi) * u_angle
        parts += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(parts, dim=-1).reshape(height, width, -1)[..., :channels].contiguous()


def check_noise(seed: int, draw: int, step: int, scales: int) -> None:
    """Raise ValueError for noise that the counter has no room for."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is outside [0, 2^64)")
    if not 0 <= draw < 2**32:
        raise ValueError(f"draw {draw} is outside [0, 2^32)")
    if not 0 <= step < 2**31:
        raise ValueError(f"step {step} is outside [0, 2^31)")
    if not 1 <= scales <= 2:
        raise ValueError(f"{scales} scales: the noise counter has room for 1 or 2")


def signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word: one argument type, hence one compilation, for every seed."""
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def _multiply_high(a, b: tl.constexpr):
    return tl.umulhi(a, tl.full(a.shape, b, tl.uint32))


@triton.jit
def _philox_words(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 blocks of one shape; tl.philox treats its seed differently between releases."""
    for _ in tl.static_range(10):
        high_0 = _multiply_high(c0, 0xD2511F53)
        high_2 = _multiply_high(c2, 0xCD9E8D57)
        low_0 = c0 * 0xD2511F53
        low_2 = c2 * 0xCD9E8D57
        c0 = high_2 ^ c1 ^ k0
        c1 = low_2
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _box_muller(radius_word, angle_word):
    """Two normals; the angle as in csrc/common/philox.h: tl.cos would carry a reduction for any argument."""
    radius = tl.sqrt(-2.0 * tl.log(_uniform(radius_word)))
    quarters = 4.0 * _uniform(angle_word)
    quadrant = (quarters + 0.5).to(tl.int32)
    x = (quarters - quadrant.to(tl.float32)) * 1.57079633
    q = x * x
    s = x + x * q * (-1.66666667e-1 + q * (8.33333333e-3 + q * (-1.98412698e-4 + q * 2.75573192e-6)))
    c = 1.0 + q * (-0.5 + q * (4.16666667e-2 + q * (-1.38888889e-3 + q * (2.48015873e-5 + q * -2.75573192e-7))))
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def normals(pixel, group, step_scale, draw, key_0, key_1):
    zero = tl.zeros(pixel.shape, tl.uint32)
    w0, w1, w2, w3 = _philox_words(
        pixel.to(tl.uint32),
        zero + group.to(tl.uint32),
        zero + step_scale.to(tl.uint32),
        zero + draw.to(tl.uint32),
        zero + key_0.to(tl.uint32),
        zero + key_1.to(tl.uint32),
    )
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3
