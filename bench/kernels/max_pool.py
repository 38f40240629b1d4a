"""What is timed and compiled for the op `max_pool` (bench/kernels.py, bench/kernels_check.py).

Shapes are those after levels of the segmentation net's encoder at 256 pixels.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from bench.kernels import Case, upsample_bilinear
from bench.kernels.one_step import DTYPES
from dfengine.kernels import resample

SHAPES = [(1, 256, 256, 64), (1, 64, 64, 256), (8, 128, 128, 128)]


def cases(device: str):
    """

    make() returns fresh tensors (x, y); rivals maps a name to a function of those, "kernel" being the op. Outputs are
    touched beforehand, so that no page fault is timed.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            return x, torch.zeros(resample._resized("max_pool", x), dtype=dtype, device=device)

        yield Case(shape, dtype, sum(t.nbytes for t in make()), make, {"kernel": kernel, "torch": torch_composition})


def kernel(x, y) -> None:
    resample.MAX_POOL(x, y)


def torch_composition(x, y) -> None:
    """What the op replaces in torch eager; on a CPU its result is a tensor of its own."""
    F.max_pool2d(x.movedim(-1, 1), 2)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    return upsample_bilinear.compilations(resample.max_pool_kernel)
