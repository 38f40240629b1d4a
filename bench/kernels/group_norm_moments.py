"""What is timed and compiled for the op `group_norm_moments` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from dfengine.kernels import group_norm_moments

SHAPES = [(1, 256, 256, 128), (1, 64, 64, 256), (1, 8, 8, 512)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def tiles_of(shape: tuple[int, int, int, int]) -> tuple[int, tuple[int, int, int, int]]:
    """The default tile_pixels and the shape of the moments for activations of `shape`."""
    batch, height, width, channels = shape
    tile = group_norm_moments.default_tile_pixels(height * width)
    return tile, (batch, -(-height * width // tile), 2, channels)


def random(shape, dtype, device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def cases(device: str):
    """Yield a `Case` of each shape and type: x is read."""
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):

        def make(shape=shape, dtype=dtype):
            tile, size = tiles_of(shape)
            return random(shape, dtype, device), tile, torch.zeros(size, device=device)

        rivals = {"kernel": group_norm_moments.OP, "torch": torch_composition}
        yield Case(shape, dtype, make()[0].nbytes, make, rivals)


def torch_composition(x, tile_pixels, moments) -> None:
    tiles = x.view(x.shape[0], -1, tile_pixels, x.shape[3])
    torch.var_mean(tiles, dim=2, correction=0)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    for options, dtype in itertools.product(group_norm_moments.CONFIGURATIONS, FLOAT_TYPES):
        types = {"x": "*" + TRITON_TYPES[dtype], "moments": "*fp32"}
        yield described(group_norm_moments.moments_kernel, types, options, TRITON_TYPES[dtype])


def described(kernel, types, constants, label):
    """One compilation; `types` of None stand for absent tensors, arguments without a type are int32."""
    constants = dict(constants)
    warps = constants.pop("num_warps")
    sizes = " ".join(f"{name[:8]}={value}" for name, value in constants.items() if isinstance(value, int))
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    return f"{label} {sizes} warps={warps}", kernel, signature, constants, {"num_warps": warps}
