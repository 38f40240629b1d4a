"""What is timed and compiled for the op `reverse_step` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from dfengine.kernels import ingest, reverse_step

NUMBERS = reverse_step.coefficients(0.1951, 0.1967, 0.0081)
SHAPES = [(1, 256, 256, 3), (8, 256, 256, 3), (16, 256, 256, 3)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def cases(device: str):
    """

    make() returns fresh tensors (x_t, eps, out); rivals maps a name to a function of those, "kernel" being the op.
    Outputs are touched beforehand, so that no page fault is timed.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            x_t, eps = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
            return x_t, eps, torch.zeros_like(x_t)

        yield Case(shape, dtype, sum(t.nbytes for t in make()), make, {"kernel": kernel, "torch": torch_composition})


def kernel(x_t, eps, out) -> None:
    reverse_step.OP(x_t, eps, *NUMBERS, 1, 0, 400, out)


def torch_composition(x_t, eps, out) -> None:
    """What the op replaces in torch eager, with one draw of torch's normals."""
    a, b, from_x0, from_xt, sigma = NUMBERS
    x = x_t.float()
    x0_hat = ((x - b * eps.float()) / a).clamp_(-1, 1)
    out.copy_(from_x0 * x0_hat + from_xt * x + sigma * torch.randn(x_t.shape[1:], device=x_t.device))


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    floats = ["from_x", "from_eps", "from_x0", "from_xt", "sigma"]
    integers = ["key_0", "key_1", "draw", "step", "batch", "size", "x_t_stride", "eps_stride", "out_stride"]
    kinds = [(dtype, dtype) for dtype in FLOAT_TYPES]
    kinds += [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
    for configuration, (image, dtype), channels in itertools.product(reverse_step.CONFIGURATIONS, kinds, (1, 3)):
        block, warps = configuration["BLOCK"], configuration["num_warps"]
        constants = {"CHANNELS": channels, "IMAGES": ingest.MAX_IMAGES, "BLOCK": block}
        types = {"x_t": "*" + TRITON_TYPES[image], "eps": "*" + TRITON_TYPES[dtype], "out": "*" + TRITON_TYPES[image]}
        types |= dict.fromkeys(floats, "fp32") | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
        signature = {name: types[name] for name in reverse_step.reverse_step_kernel.arg_names}
        label = f"{TRITON_TYPES[image]}-{TRITON_TYPES[dtype]} C={channels} BLOCK={block} warps={warps}"
        yield label, reverse_step.reverse_step_kernel, signature, constants, {"num_warps": warps}
