"""What is timed and compiled for the op `upsample_bilinear` (bench/kernels.py, bench/kernels_check.py).

Shapes are those before each up-convolution of the segmentation net at 256 pixels; results go into a buffer twice as
wide, as for a concatenation.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from bench.kernels.one_step import DTYPES
from dfengine.kernels import resample

SHAPES = [(1, 128, 128, 64), (1, 32, 32, 256), (8, 64, 64, 128)]


def cases(device: str):
    """

    make() returns fresh tensors (x, y, joined), y a slice of joined; rivals maps a name to a function of those,
    "kernel" being the op. Outputs are touched beforehand, so that no page fault is timed.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            batch, height, width, channels = shape
            x = torch.randn(shape, generator=generator).to(device, dtype)
            joined = torch.zeros((batch, 2 * height, 2 * width, 2 * channels), dtype=dtype, device=device)
            return x, joined[..., :channels], joined

        x, y, _ = make()
        yield Case(shape, dtype, x.nbytes + y.nbytes, make, {"kernel": kernel, "torch": torch_composition})


def kernel(x, y, joined) -> None:
    resample.UPSAMPLE(x, y)


def torch_composition(x, y, joined) -> None:
    """What the op replaces in torch eager: the upsampling, and the copy of its result into the concatenation."""
    planes = F.interpolate(x.movedim(-1, 1), scale_factor=2, mode="bilinear", align_corners=True)
    y.copy_(planes.movedim(1, -1))


def compilations(triton_kernel=None):
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    triton_kernel = triton_kernel or resample.upsample_bilinear_kernel
    for configuration, dtype, channels in itertools.product(resample.CONFIGURATIONS, FLOAT_TYPES, (64, 16)):
        values, warps = configuration["VALUES"], configuration["num_warps"]
        constants = {"PIXELS": values // channels, "CHANNELS": channels}
        types = dict.fromkeys(("x", "y"), "*" + TRITON_TYPES[dtype]) | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in triton_kernel.arg_names}
        label = f"{TRITON_TYPES[dtype]} C={channels} VALUES={values} warps={warps}"
        yield label, triton_kernel, signature, constants, {"num_warps": warps}
