"""What is timed for the op `attention` (bench/kernels.py): both noise scales of one image, at the networks' levels."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import Case
from dfengine.kernels import attention

SHAPES = [(2, 32, 32, 64), (2, 16, 16, 128), (2, 8, 8, 128), (2, 32, 32, 256), (2, 16, 16, 512), (2, 8, 8, 512)]
"""Of y: preset diff-fastener-small, then diff-fastener."""
HEADS = 4
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}


def cases(device: str):
    """make() returns fresh tensors (qkv, y); rivals: "kernel" is the op, "torch" scaled_dot_product_attention."""
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            qkv = torch.randn((*shape[:3], 3 * shape[3]), generator=generator).to(device, dtype)
            return qkv, torch.zeros(shape, dtype=dtype, device=device)

        pixels = shape[1] * shape[2]
        flops = 4 * shape[0] * pixels * pixels * shape[3]
        moved = sum(tensor.nbytes for tensor in make())
        yield Case(shape, dtype, moved, make, {"kernel": kernel, "torch": torch_composition}, flops=flops)


def kernel(qkv, y) -> None:
    attention.OP(qkv, HEADS, y)


def torch_composition(qkv, y) -> None:
    attention.run_library(qkv, HEADS, y)


def compilations():
    """None: it has no Triton kernel."""
    return iter(())
