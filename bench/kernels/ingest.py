"""What is timed and compiled for the op `ingest` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from dfengine.kernels import ingest

COEFFICIENTS = dict(gain=2.0, offset=-1.0, a=[0.9, 0.5], b=[0.43, 0.86], seed=1)
SHAPES = [(1, 256, 256, 3), (8, 256, 256, 3), (16, 256, 256, 3)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
TRITON_TYPES = {
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


def cases(device: str):
    """Yield (shape, dtype, bytes moved at least, make, rivals).

    make() returns fresh tensors (images, x_0, x_t); rivals maps a name to a function of those, "kernel" being the op.
    Outputs are touched beforehand, so that no page fault is timed.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
            return (
                images,
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros((2, *shape), dtype=dtype, device=device),
            )

        images, x_0, x_t = make()
        moved = images.nbytes + x_0.nbytes + x_t.nbytes
        yield shape, dtype, moved, make, {"kernel": kernel, "torch": torch_composition}


def kernel(images, x_0, x_t) -> None:
    c = COEFFICIENTS
    backend = ingest.OP.choose(images, x_0, x_t, c["gain"], c["offset"], c["a"], c["b"], c["seed"], 0, 0)
    ingest.OP.implementations[backend].run(images, x_0, x_t, c["gain"], c["offset"], c["a"], c["b"], c["seed"], 0, 0)


def torch_composition(images, x_0, x_t) -> None:
    """What the op replaces in torch eager: conversion, scale and offset, one draw of torch's normals, and q_sample."""
    c = COEFFICIENTS
    pixels = images.to(torch.float32).mul_(c["gain"] / 255).add_(c["offset"])
    x_0.copy_(pixels)
    for scale, (a, b) in enumerate(zip(c["a"], c["b"], strict=True)):
        noise = torch.randn(images.shape[1:], device=images.device)
        torch.add(pixels * a, noise, alpha=b, out=x_t[scale]) if x_t.dtype == pixels.dtype else x_t[scale].copy_(
            torch.add(pixels * a, noise, alpha=b)
        )


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    integers = ["batch", "size", "width", "key_0", "key_1", "draw", "step"]
    strides = ["stride_n", "stride_y", "stride_x", "stride_c"]
    floats = ["gain", "offset", "a_0", "b_0", "a_1", "b_1"]
    for configuration, pixels, output, channels in itertools.product(
        ingest.CONFIGURATIONS, ingest.LEVELS, ingest.OUTPUT_TYPES, (1, 3)
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
