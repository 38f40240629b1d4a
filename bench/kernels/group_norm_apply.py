"""What is timed and compiled for the op `group_norm_apply` with GELU (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from bench.kernels.group_norm_moments import DTYPES, SHAPES, described, random
from dfengine.kernels import group_norm_apply


def cases(device: str):
    """Yield a `Case` of each shape, type and resampling: x is read, y written, also where it pools or enlarges."""
    shares = {"none": 1.0, "down": 0.25, "up": 4.0}
    for shape, dtype, resample in itertools.product(SHAPES, DTYPES[device], shares):
        if resample == "up" and shape[1] == 256:
            continue  # no network enlarges its largest activation

        def make(shape=shape, dtype=dtype, resample=resample):
            x = random(shape, dtype, device)
            scale, offset = (fill((shape[0], shape[3]), device=device) for fill in (torch.ones, torch.zeros))
            y = torch.zeros_like(group_norm_apply.reference(x, None, None, None, "none", resample))
            return x, None, scale, offset, "gelu", resample, y

        rivals = {"kernel": group_norm_apply.OP, "torch": torch_composition}
        yield Case(shape, dtype, int(make()[0].nbytes * (1 + shares[resample])), make, rivals, resample)


def torch_composition(x, x2, scale, offset, act, resample, y) -> None:
    z = F.gelu(torch.addcmul(offset.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None]))
    z = z.permute(0, 3, 1, 2)
    if resample == "down":
        F.avg_pool2d(z, 2)
    elif resample == "up":
        F.interpolate(z, scale_factor=2)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    for options, dtype, resample, sources in itertools.product(
        group_norm_apply.CONFIGURATIONS, FLOAT_TYPES, group_norm_apply.RESAMPLES, (1, 2)
    ):
        types = dict.fromkeys(("x", "x2", "y"), "*" + TRITON_TYPES[dtype]) | {"scale": "*fp32", "offset": "*fp32"}
        if sources == 1:
            types["x2"] = None
        constants = dict(options, ACT="gelu", RESAMPLE=resample)
        label = f"{TRITON_TYPES[dtype]} {resample} sources={sources}"
        yield described(group_norm_apply.apply_kernel, types, constants, label)
