"""attention on the CPU: the launcher of csrc/cpu/attention.cpp (formula: kernels/attention.py).

A product is how it multiplies, as for conv2d (kernels/conv2d_cpu.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfengine import native
from dfengine.kernels import registry
from dfengine.kernels.attention import OP
from dfengine.kernels.conv2d_cpu import PRODUCTS, default_product
from dfengine.kernels.registry import CannotRunError
from dfengine.kernels.slices import TYPES, pixel_stride

MOST_CHANNELS = 1024
"""Of a head: more are not tested."""


def _call(qkv: Tensor, heads: int, y: Tensor, level: str, product: str):
    batch, height, width, channels = y.shape
    return native.module.Attention(
        (batch, height * width, heads, channels // heads), (pixel_stride("qkv", qkv), pixel_stride("y", y)),
        TYPES[qkv.dtype], PRODUCTS[product or default_product(qkv.dtype)], qkv.data_ptr(), y.data_ptr(), level,
    )  # fmt: skip


def run_native(qkv: Tensor, heads: int, y: Tensor, level: str = "", product: str = "") -> None:
    """The compiled kernel, at the best instruction set and with the best product unless they are named."""
    _call(qkv, heads, y, level, product).run(torch.get_num_threads())


def bind(qkv: Tensor, heads: int, y: Tensor, level: str = "", product: str = "") -> native.Bound:
    """The op on these very tensors, as a function to call again and again."""
    return native.Bound(_call(qkv, heads, y, level, product), (qkv, y))


def _can_run(qkv: Tensor, heads: int, y: Tensor) -> None:
    if qkv.dtype not in TYPES:
        raise CannotRunError(f"qkv: {qkv.dtype} is none of float32, float16, bfloat16")
    depth = y.shape[3] // heads
    if not 1 <= depth <= MOST_CHANNELS:
        raise CannotRunError(f"{depth} channels of a head: 1 to {MOST_CHANNELS} are served")
    if y.numel() == 0:
        raise CannotRunError("no pixels")


def _configurations(qkv: Tensor, *_args) -> list[dict]:
    """Every product that serves here, the one taken by default first."""
    if qkv.dtype != torch.bfloat16:
        return [{}]
    known = sorted(PRODUCTS, key=lambda product: product != default_product(qkv.dtype))
    return [{"product": product} for product in known if native.module.product_supported(PRODUCTS[product])]


OP.register("cpu", run_native, registry.cpu_available("Attention"), _can_run, bind, _configurations)
