"""What is timed and compiled for the stages of group_norm at inference (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from bench.kernels import Case
from dfengine.kernels import group_norm_stages as stages

SHAPES = [(1, 256, 256, 128), (1, 64, 64, 256), (1, 8, 8, 512)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
TRITON_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
GROUPS = 32


def cases(device: str):
    """Yield (shape, dtype, bytes moved at least, make, rivals, op).

    moments reads x; merge reads the moments (and is all latency); apply with GELU reads x and writes y, also where it
    pools or enlarges. Rivals in torch: var_mean; the same merge as tensor operations; multiply-add, GELU, resampling.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        batch, height, width, channels = shape
        tile = stages.default_tile_pixels(height * width)
        tiles = -(-height * width // tile)

        def make_x(shape=shape, dtype=dtype):
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)

        def make_moments(make_x=make_x, size=(batch, tiles, 2, channels), tile=tile):
            return make_x(), tile, torch.zeros(size, device=device)

        def make_apply(resample, make_x=make_x, batch=batch, channels=channels):
            x = make_x()
            scale, offset = torch.ones((batch, channels), device=device), torch.zeros((batch, channels), device=device)
            y = torch.zeros_like(stages.reference_apply(x, None, None, None, "none", resample))
            return x, None, scale, offset, "gelu", resample, y

        x_bytes = make_x().nbytes
        yield Case(
            shape,
            dtype,
            x_bytes,
            make_moments,
            {"kernel": stages.MOMENTS, "torch": torch_moments},
            stages.MOMENTS.name,
        )
        for resample, share in (("none", 1.0), ("down", 0.25), ("up", 4.0)):
            if resample == "up" and height == 256:
                continue  # no network enlarges its largest activation

            def make(make_apply=make_apply, resample=resample):
                return make_apply(resample)

            rivals = {"kernel": stages.APPLY, "torch": torch_apply}
            yield Case(shape, dtype, int(x_bytes * (1 + share)), make, rivals, f"{stages.APPLY.name} {resample}")
        if dtype == torch.float32:

            def make_merge(size=(batch, tiles, 2, channels), tile=tile, pixels=height * width):
                small = [torch.ones(size[3], device=device) for _ in range(2)]
                results = [torch.zeros((size[0], size[3]), device=device) for _ in range(2)]
                counts = stages.tile_counts(pixels, tile, device)
                return torch.ones(size, device=device), counts, None, None, *small, None, GROUPS, 1e-5, *results

            moved = batch * tiles * 2 * channels * 4
            rivals = {"kernel": stages.MERGE, "torch": stages.MERGE.implementations["reference"].run}
            yield Case(shape, dtype, moved, make_merge, rivals, stages.MERGE.name)


def torch_moments(x, tile_pixels, moments) -> None:
    tiles = x.view(x.shape[0], -1, tile_pixels, x.shape[3])
    torch.var_mean(tiles, dim=2, correction=0)


def torch_apply(x, x2, scale, offset, act, resample, y) -> None:
    z = F.gelu(torch.addcmul(offset.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None]))
    z = z.permute(0, 3, 1, 2)
    if resample == "down":
        F.avg_pool2d(z, 2)
    elif resample == "up":
        F.interpolate(z, scale_factor=2)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    for options, dtype in itertools.product(stages.MOMENTS_CONFIGURATIONS, TRITON_TYPES):
        types = {"x": "*" + TRITON_TYPES[dtype], "moments": "*fp32"}
        yield described("moments", stages.moments_kernel, types, options, TRITON_TYPES[dtype])
    floats = ("moments", "moments2", "weight", "bias", "shift", "scale", "offset", "mean", "rstd")
    for options, (size, tiles), sources in itertools.product(
        stages.MERGE_CONFIGURATIONS, ((4, 1024), (16, 64), (32, 4)), (1, 2)
    ):
        options = dict(options)
        options |= stages.merge_blocks(size, tiles, options.pop("VALUES"))
        types = dict.fromkeys(floats, "*fp32") | {"counts": "*i32", "counts2": "*i32", "eps": "fp32"}
        if sources == 1:
            types |= dict.fromkeys(("moments2", "counts2", "shift", "mean", "rstd"))
        yield described("merge", stages.merge_kernel, types, options, f"sources={sources}")
    for options, dtype, resample, sources in itertools.product(
        stages.APPLY_CONFIGURATIONS, TRITON_TYPES, stages.RESAMPLES, (1, 2)
    ):
        types = dict.fromkeys(("x", "x2", "y"), "*" + TRITON_TYPES[dtype]) | {"scale": "*fp32", "offset": "*fp32"}
        if sources == 1:
            types["x2"] = None
        constants = dict(options, ACT="gelu", RESAMPLE=resample)
        label = f"{TRITON_TYPES[dtype]} {resample} sources={sources}"
        yield described("apply", stages.apply_kernel, types, constants, label)


def described(stage, kernel, types, constants, label):
    """One compilation; `types` of None stand for absent tensors, arguments without a type are int32."""
    constants = dict(constants)
    warps = constants.pop("num_warps")
    sizes = " ".join(f"{name[:8]}={value}" for name, value in constants.items() if isinstance(value, int))
    constants |= {name: None for name, kind in types.items() if kind is None}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names
    }  # fmt: skip
    return f"{stage} {label} {sizes} warps={warps}", kernel, signature, constants, {"num_warps": warps}
