"""What is timed and compiled for the op `one_step`, guided (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from dfengine.kernels import one_step

A, B, WEIGHT = one_step.coefficients([0.6588, 0.1951])
SHAPES = [(1, 256, 256, 3), (8, 256, 256, 3), (16, 256, 256, 3)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def cases(device: str):
    """

    make() returns fresh tensors (x_t, eps, x_0, pair, reconstruction); rivals maps a name to a function of those,
    "kernel" being the op. Outputs are touched beforehand, so that no page fault is timed.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            x_t, eps = (torch.randn((2, *shape), generator=generator).to(device, dtype) for _ in range(2))
            x_0 = torch.rand(shape, generator=generator).to(device, dtype)
            pair = torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=dtype, device=device)
            return x_t, eps, x_0, pair, torch.zeros(shape, device=device)

        yield Case(shape, dtype, sum(t.nbytes for t in make()), make, {"kernel": kernel, "torch": torch_composition})


def kernel(x_t, eps, x_0, pair, reconstruction) -> None:
    one_step.OP(x_t, eps, x_0, A, B, WEIGHT, 1.0, 0.0, pair, reconstruction)


def torch_composition(x_t, eps, x_0, pair, reconstruction) -> None:
    """What the op replaces in torch eager, with guidance as one lerp already."""
    small, big = ((x_t[s].float() - B[s] * eps[s].float()) / A[s] for s in (0, 1))
    r = torch.lerp(small, big.clamp_(-1, 1), WEIGHT).clamp_(-1, 1)
    torch.cat((x_0, r.to(x_0.dtype)), dim=-1, out=pair)
    torch.clamp(r, 0, 1, out=reconstruction)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    floats = ["from_x_s", "from_x_b", "from_eps_s", "from_eps_b", "weight", "unit_gain", "unit_offset"]
    integers = ["pixels", "x_t_stride", "eps_stride", "x_0_stride", "pair_stride"]
    kinds = [(dtype, dtype) for dtype in FLOAT_TYPES] + [
        (torch.float32, torch.float16),
        (torch.float32, torch.bfloat16),
    ]
    for configuration, (image, dtype), scales, packed in itertools.product(
        one_step.CONFIGURATIONS, kinds, (2, 1), (True, False)
    ):
        block, warps = configuration["BLOCK"], configuration["num_warps"]
        constants = {"CHANNELS": 3, "SCALES": scales, "UNIT": True, "PACKED": packed, "BLOCK": block}
        types = dict.fromkeys(("x_t", "x_0"), "*" + TRITON_TYPES[image])
        types |= dict.fromkeys(("eps", "pair"), "*" + TRITON_TYPES[dtype]) | {"reconstruction": "*fp32"}
        types |= dict.fromkeys(floats, "fp32") | dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
        signature = {name: types[name] for name in one_step.one_step_kernel.arg_names}
        kind = f"{TRITON_TYPES[image]}-{TRITON_TYPES[dtype]} S={scales} {'packed' if packed else 'sliced'}"
        label = f"{kind} BLOCK={block} warps={warps}"
        yield label, one_step.one_step_kernel, signature, constants, {"num_warps": warps}
