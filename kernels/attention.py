"""attention: self-attention over the pixels of an activation, from queries, keys and values in one tensor.

    y[n, p, h] = sum over pixels p' of softmax_p'(q[n, p, h] . k[n, p', h] / sqrt(D)) v[n, p', h]

Shapes: qkv (N, H, W, 3 C), whose channels hold, for each of `heads` heads in turn, D = C / heads queries, keys and
values (the public weights' order), contiguous; y (N, H, W, C), which may be a channel slice (kernels/slices.py).
Types: qkv and y share float32, float16 or bfloat16 (float64 too, by torch). Scores, their exponentials and all sums are
float32; for a product with values in bfloat16 the exponentials are rounded to it, and their sum is that of the rounded.

The norm before it and both projections are `conv2d`s, whose layouts these are, so nothing is copied between them.
Backends: cpu (attention_cpu), library (any device: torch's `scaled_dot_product_attention`, whose fused paths need 4-D
tensors with a contiguous last dimension, which q, k and v are as views of qkv; its result is copied into y), reference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.kernels import registry
from dfengine.kernels.registry import Op


def attention(qkv: Tensor, heads: int, backend: str | None = None) -> Tensor:
    """Return a new y (N, H, W, C). Raises ValueError where the shapes do not fit."""
    _check(qkv, heads)
    y = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
    OP(qkv, heads, y, backend=backend)
    return y


def _check(qkv: Tensor, heads: int) -> None:
    if qkv.ndim != 4:
        raise ValueError(f"qkv: expected (N, H, W, 3 C), got {tuple(qkv.shape)}")
    if heads < 1 or qkv.shape[3] % (3 * heads):
        raise ValueError(f"qkv: {qkv.shape[3]} channels do not divide into q, k and v of {heads} heads")
    if not qkv.is_contiguous():
        raise ValueError("qkv: not contiguous")


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v (N, heads, pixels, D): views."""
    batch, height, width, channels = qkv.shape
    parts = qkv.view(batch, height * width, heads, 3, channels // (3 * heads)).transpose(1, 2)
    return parts.unbind(dim=3)


def _merged(attended: Tensor, qkv: Tensor) -> Tensor:
    """(N, H, W, C) of (N, heads, pixels, D)."""
    return attended.transpose(1, 2).reshape(*qkv.shape[:3], qkv.shape[3] // 3)


def reference(qkv: Tensor, heads: int) -> Tensor:
    """y of the module's formula, in float64 for float64 and else in float32, rounded once; a sample at a time, whose
    scores of all pairs of pixels it holds."""
    attended = []
    for q, k, v in zip(*_heads(qkv.to(torch.promote_types(qkv.dtype, torch.float32)), heads), strict=True):
        scores = q @ k.mT * q.shape[2] ** -0.5
        attended.append(torch.softmax(scores, dim=2) @ v)
    return _merged(torch.stack(attended), qkv).to(qkv.dtype)


def _run_reference(qkv: Tensor, heads: int, y: Tensor) -> None:
    y.copy_(reference(qkv, heads))


def run_library(qkv: Tensor, heads: int, y: Tensor) -> None:
    y.copy_(_merged(F.scaled_dot_product_attention(*_heads(qkv, heads)), qkv))


OP = Op("attention")
OP.register("library", run_library, registry.always, registry.always)
OP.register("reference", _run_reference, registry.always, registry.always)
