"""What is timed and compiled for the op `channel_attention` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import copy
import itertools

import torch

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from dfengine.kernels import channel_attention, channel_attention_triton
from dfengine.models.blocks import ChannelAttention, SpatialAttention

SHAPES = [(batch, *image) for image in ((8, 8, 512), (64, 64, 256)) for batch in (1, 8, 16)]
REDUCTION = 16
FLOATS = ("w1", "w2", "spatial_weight", "spatial_bias", "partials", "gate", "maps")
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def cases(device: str):
    """At least moved: x read twice, once to pool it, the residual read, y written, and the weights read."""
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)
        modules = [
            module.to(device).requires_grad_(False)
            for module in (ChannelAttention(shape[-1], REDUCTION), SpatialAttention())
        ]
        w1, w2 = channel_attention.pack_gate(modules[0].mlp[0].weight, modules[0].mlp[2].weight)
        weights = (w1, w2, *channel_attention.pack_spatial(modules[1].conv.weight, modules[1].conv.bias))
        workspace = torch.zeros(channel_attention.workspace_size(shape), device=device)
        gates = [copy.deepcopy(module).to(dtype, memory_format=torch.channels_last) for module in modules]

        def make(shape=shape, dtype=dtype, generator=generator):
            x, residual = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
            return x, residual, torch.zeros_like(x)

        def kernel(x, residual, y, weights=weights, workspace=workspace):
            channel_attention.OP(x, *weights, residual, y, workspace)

        def composition(x, residual, y, gates=gates):
            return torch_composition(x, residual, *gates)

        moved = 4 * make()[0].nbytes + sum(weight.nbytes for weight in weights)
        yield Case(shape, dtype, moved, make, {"kernel": kernel, "torch": composition})


def torch_composition(x, residual, channel, spatial) -> torch.Tensor:
    """What the op replaces in torch eager: the end of a DACM block, channels-last, its weights of x's type."""
    h = x.permute(0, 3, 1, 2)
    h = h * channel(h)
    h = h * spatial(h)
    return residual.permute(0, 3, 1, 2) + h


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    for configuration, dtype in itertools.product(channel_attention_triton.CONFIGURATIONS, FLOAT_TYPES):
        passes = {name: value for name, value in configuration.items() if name != "sample"}
        one_launch = {"BLOCK_P": channel_attention.ONE_LAUNCH_PIXELS, **configuration["sample"]}
        mlp, last = {"HIDDEN": 32, "BLOCK_R": 32}, {"SPATIAL": True, "RESIDUAL": True}
        kernels = {
            "sample": {**mlp, **last, **one_launch},
            "pool": passes,
            "gate": {**mlp, "BLOCK_T": channel_attention.TILES, **passes},
            "maps": {"GATED": True, **passes},
            "apply": {"GATED": True, **last, **passes},
        }
        for name, options in kernels.items():
            kernel = getattr(channel_attention_triton, f"{name}_kernel")
            warps = options["num_warps"]
            constants = {"CHANNELS": 512} | {key: value for key, value in options.items() if key in kernel.arg_names}
            types = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(("x", "residual", "y"), "*" + TRITON_TYPES[dtype])
            types |= dict.fromkeys(constants, "constexpr")
            signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
            divisible = [key for key, kind in signature.items() if kind.startswith("*") or key.endswith("stride")]
            label = f"{name} {TRITON_TYPES[dtype]} {options['BLOCK_P']}x{options['BLOCK_C']} warps={warps}"
            yield label, kernel, signature, constants, {"num_warps": warps, "divisible": divisible}
