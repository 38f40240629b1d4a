"""What is timed for the op `attention` (bench/kernels.py); nothing is compiled for a GPU, where it is torch's.

Shapes are those of a U-Net at 256 pixels, four heads, two scales of one image: of base 32 and of base 128.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from bench.kernels import Case
from dfengine.kernels import attention

SHAPES = [(2, 32, 32, 64), (2, 16, 16, 128), (2, 8, 8, 128), (2, 32, 32, 256), (2, 16, 16, 512), (2, 8, 8, 512)]
HEADS = 4


def cases(device: str) -> Iterator[Case]:
    """Of the shape of y; where the op has a kernel of its own.

    make() returns fresh tensors (qkv, y); rivals: "torch" is `scaled_dot_product_attention` alone, whose result is a
    tensor of its own, "library" the backend, which copies that into y.
    """
    if attention.OP.default(device) in ("library", "reference"):
        return
    for shape, dtype in itertools.product(SHAPES, (torch.float32, torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            qkv = torch.randn((*shape[:3], 3 * shape[3]), generator=generator).to(device, dtype)
            return qkv, torch.zeros(shape, dtype=dtype, device=device)

        batch, height, width, channels = shape
        flops = 4 * batch * (height * width) ** 2 * channels
        rivals = {"kernel": kernel, "torch": torch_composition, "library": library}
        yield Case(shape, dtype, sum(t.nbytes for t in make()), make, rivals, f"{HEADS} heads", flops)


def kernel(qkv, y) -> None:
    attention.OP(qkv, HEADS, y)


def library(qkv, y) -> None:
    attention.OP(qkv, HEADS, y, backend="library")


def torch_composition(qkv, y) -> None:
    """q, k and v (N, heads, pixels, channels of a head), as views."""
    batch, height, width, channels = y.shape
    parts = qkv.view(batch, height * width, HEADS, 3, channels // HEADS).transpose(1, 2)
    F.scaled_dot_product_attention(*parts.unbind(dim=3))


def compilations() -> Iterator[tuple]:
    """None."""
    return iter(())
