"""What is timed and compiled for the op `ingest` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import TRITON_TYPES, Case
from dfengine.kernels import ingest

COEFFICIENTS = dict(gain=2.0, offset=-1.0, a=[0.9, 0.5], b=[0.43, 0.86], seed=1)
SHAPES = [(1, 256, 256, 3), (8, 256, 256, 3), (16, 256, 256, 3)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def cases(device: str):
    """Outputs are touched beforehand, so that no page fault is timed."""
    given_or_not = (False, True) if device == "cpu" else (False,)
    for shape, dtype, given in itertools.product(SHAPES, DTYPES[device], given_or_not):
        generator = torch.Generator().manual_seed(0)
        noise = ingest.draw_noise(shape[1:], 2, seed=1) if given else None

        def make(shape=shape, dtype=dtype, generator=generator, noise=noise):
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
            x_0, x_t = (torch.zeros(size, dtype=dtype, device=device) for size in (shape, (2, *shape)))
            return images, x_0, x_t, noise

        moved = sum(tensor.nbytes for tensor in make() if tensor is not None)
        label = "noise given" if given else "noise drawn"
        yield Case(shape, dtype, moved, make, {"kernel": kernel, "torch": torch_composition}, label=label)


def kernel(images, x_0, x_t, noise) -> None:
    c = COEFFICIENTS
    ingest.OP(images, x_0, x_t, c["gain"], c["offset"], c["a"], c["b"], c["seed"], 0, 0, noise)


def torch_composition(images, x_0, x_t, noise) -> None:
    """What the op replaces in torch eager: conversion, scaling, torch's normals unless given, q_sample."""
    c = COEFFICIENTS
    pixels = images.to(torch.float32).mul_(c["gain"] / 255).add_(c["offset"])
    x_0.copy_(pixels)
    for scale, (a, b) in enumerate(zip(c["a"], c["b"], strict=True)):
        normals = torch.randn(images.shape[1:], device=images.device) if noise is None else noise[scale]
        if x_t.dtype == pixels.dtype:
            torch.add(pixels * a, normals, alpha=b, out=x_t[scale])
        else:
            x_t[scale].copy_(torch.add(pixels * a, normals, alpha=b))


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    integers = ["batch", "size", "width", "key_0", "key_1", "draw", "step"]
    strides = ["stride_n", "stride_y", "stride_x", "stride_c"]
    floats = ["gain", "offset", "a_0", "b_0", "a_1", "b_1"]
    for configuration, pixels, output, channels in itertools.product(
        ingest.CONFIGURATIONS, ingest.LEVELS, ingest.TYPES, (1, 3)
    ):
        block, warps = configuration["BLOCK"], configuration["num_warps"]
        constants = {"CHANNELS": channels, "SCALES": 2, "BLOCK": block, "IMAGES": ingest.MAX_IMAGES}
        types = {
            "images": "*" + TRITON_TYPES[pixels],
            "x_0": "*" + TRITON_TYPES[output],
            "x_t": "*" + TRITON_TYPES[output],
        }
        types |= (
            dict.fromkeys(floats, "fp32")
            | dict.fromkeys(integers + strides, "i32")
            | dict.fromkeys(constants, "constexpr")
        )
        signature = {name: types[name] for name in ingest.ingest_kernel.arg_names}
        label = f"{TRITON_TYPES[pixels]}-{TRITON_TYPES[output]} C={channels} BLOCK={block} warps={warps}"
        yield label, ingest.ingest_kernel, signature, constants, {"num_warps": warps}
