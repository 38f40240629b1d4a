"""attention: self-attention over the pixels of an activation, from queries, keys and values in one tensor.

    y[n, p, h] = sum over pixels p' of softmax_p'(q[n, p, h] . k[n, p', h] / sqrt(D)) v[n, p', h]

Shapes: qkv (N, H, W, 3 C), whose channels hold, for each of `heads` heads in turn, D = C / heads queries, keys and
values (the public weights' order); y (N, H, W, C). Both contiguous.
Types: qkv and y share float32, float16 or bfloat16 (float64 too).

The product is torch's `scaled_dot_product_attention`, whose fused paths need 4-D tensors with a contiguous last
dimension: q, k and v are views of qkv that have it. The norm before it and both projections are `conv2d`s, whose
layouts these are, so nothing is copied but torch's result into y.
Backends: reference (any device).
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


def reference(qkv: Tensor, heads: int) -> Tensor:
    """y of the module's formula."""
    batch, height, width, channels = qkv.shape
    parts = qkv.view(batch, height * width, heads, 3, channels // (3 * heads)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(*parts.unbind(dim=3))
    return attended.transpose(1, 2).reshape(batch, height, width, channels // 3)


def _run_reference(qkv: Tensor, heads: int, y: Tensor) -> None:
    y.copy_(reference(qkv, heads))


OP = Op("attention")
OP.register("reference", _run_reference, registry.always, registry.always)
