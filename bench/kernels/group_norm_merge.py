"""What is timed and compiled for the op `group_norm_merge` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import Case
from bench.kernels.group_norm_moments import SHAPES, described, tiles_of
from dfengine.kernels import group_norm_merge, group_norm_moments

GROUPS = 32


def cases(device: str):
    """Yield a `Case` of each shape: the moments are read, and all is latency. The rival is the same in torch."""
    for shape in SHAPES:

        def make(shape=shape):
            tile, size = tiles_of(shape)
            counts = group_norm_moments.tile_counts(shape[1] * shape[2], tile, device)
            small = [torch.ones(size[3], device=device) for _ in range(2)]
            results = [torch.zeros((size[0], size[3]), device=device) for _ in range(2)]
            return torch.ones(size, device=device), counts, None, None, *small, None, GROUPS, 1e-5, *results

        rivals = {"kernel": group_norm_merge.OP, "torch": group_norm_merge.OP.implementations["reference"].run}
        yield Case(shape, torch.float32, make()[0].nbytes, make, rivals)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration, and block sizes."""
    floats = ("moments", "moments2", "weight", "bias", "shift", "scale", "offset", "mean", "rstd")
    for options, (size, tiles), sources in itertools.product(
        group_norm_merge.CONFIGURATIONS, ((4, 1024), (16, 64), (32, 4)), (1, 2)
    ):
        options = dict(options)
        options |= group_norm_merge.block_sizes(size, tiles, options.pop("VALUES"))
        types = dict.fromkeys(floats, "*fp32") | {"counts": "*i32", "counts2": "*i32", "eps": "fp32"}
        if sources == 1:
            types |= dict.fromkeys(("moments2", "counts2", "shift", "mean", "rstd"))
        yield described(group_norm_merge.merge_kernel, types, options, f"sources={sources}")
