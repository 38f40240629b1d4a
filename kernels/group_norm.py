"""group_norm: GroupNorm of channels-last activations with the activation that follows it, and the gradient of both.

    u = x + shift                                shift: one value for each sample and channel, or none
    xhat = (u - mean) rstd                       rstd = (variance + eps)^(-1/2); both over a group's pixels and channels
    y = act(z), z = weight xhat + bias           act: none, gelu (erf form), silu, relu

    dz = dy act'(z)          dbias = sum dz          dweight = sum dz xhat          over samples and pixels
    dx = rstd (weight dz - (A + xhat B) / count)     A, B = sums of weight dz and of weight dz xhat over the group,
    dshift = sum dx over the pixels                  count = its number of values

Shapes: x, y, dy, dx (N, H, W, C), contiguous: the memory of an (N, C, H, W) channels-last tensor; weight, bias,
dweight, dbias (C,); shift, dshift (N, C); mean, rstd (N, groups). Group g holds the C / groups channels from
g C / groups on.
Types: x, y, dy, dx share float32, float16 or bfloat16 (the reference also float64); the others are float32 (float64).
Arithmetic is float32; variances are centred: means and squared differences of tiles are merged in float64.

A sample's y, dx and dshift depend on that sample alone; dweight and dbias are sums of a part for each sample, in their
order. Results are the same bits whatever the number of threads (DESIGN section 3, Numerics).
Backends: reference (any device), cpu (csrc/cpu/group_norm.cpp); of the forward pass also triton and cuda, which run the
ops group_norm_moments, group_norm_merge and group_norm_apply one after the other.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine import native
from dfengine.kernels import (
    cuda_launch,
    group_norm_apply,
    group_norm_merge,
    group_norm_moments,
    registry,
    triton_import,
)
from dfengine.kernels.group_norm_apply import ACTIVATIONS
from dfengine.kernels.group_norm_moments import TYPES
from dfengine.kernels.registry import CannotRunError, Op


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    act: str = "none",
    shift: Tensor | None = None,
) -> Tensor:
    """act(GroupNorm(x + shift)), differentiable once in all tensors: x (N, C, H, W), weight, bias (C,), shift (N, C).

    Returns a channels-last tensor of x's dtype; an x of another layout is copied first. Not a torch custom op, whose
    dispatch would add about 45 us to a forward and backward pass (Intel Xeon with AMX); without a gradient to come, not
    an autograd function either.
    Raises ValueError for arguments that no backend accepts.
    """
    return group_norm_with_statistics(x, weight, bias, groups, eps, act, shift)[0]


def group_norm_with_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    act: str = "none",
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `group_norm`, with mean and rstd (N, groups) of the groups, which are not differentiated."""
    _check(x, weight, bias, groups, act, shift)
    if registry.recorded((x, weight, bias, shift)):
        return _GroupNorm.apply(x, weight, bias, shift, groups, eps, act)
    _, _, y, mean, rstd = _forward(x, weight, bias, shift, groups, eps, act)
    return y, mean, rstd


def _check(x, weight, bias, groups, act, shift) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, C, H, W), got {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    if act not in ACTIVATIONS:
        raise ValueError(f"act: {act!r} is none of {', '.join(ACTIVATIONS)}")
    shapes = dict(weight=(weight, (channels,)), bias=(bias, (channels,)), shift=(shift, (batch, channels)))
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
    if x.numel() == 0:
        raise ValueError(f"x: {tuple(x.shape)} holds nothing")


def _forward(x, weight, bias, shift, groups, eps, act) -> tuple[Tensor, list[Tensor | None], Tensor, Tensor, Tensor]:
    """(x as (N, H, W, C), [weight, bias, shift] as the kernels take them, y (N, C, H, W), mean, rstd)."""
    pixels = x.permute(0, 2, 3, 1).contiguous().resolve_neg()
    dtype = group_norm_moments.precise(x)
    small = [None if t is None else t.to(dtype).contiguous().resolve_neg() for t in (weight, bias, shift)]
    y = torch.empty_like(pixels)
    mean, rstd = (pixels.new_empty((x.shape[0], groups), dtype=dtype) for _ in range(2))
    OP(pixels, *small, groups, eps, act, y, mean, rstd)
    return pixels, small, y.permute(0, 3, 1, 2), mean, rstd


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shift, groups, eps, act):
        pixels, small, y, mean, rstd = _forward(x, weight, bias, shift, groups, eps, act)
        ctx.save_for_backward(pixels, *small, mean, rstd)
        ctx.act, ctx.types = act, [None if t is None else t.dtype for t in (weight, bias, shift)]
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, _mean, _rstd):
        if dy is None:
            return (None,) * 7
        pixels, weight, bias, shift, mean, rstd = ctx.saved_tensors
        dy = dy.permute(0, 2, 3, 1).to(pixels.dtype).contiguous().resolve_neg()
        dx = torch.empty_like(pixels)
        small = [None if t is None else torch.empty_like(t) for t in (weight, bias, shift)]
        BACKWARD(dy, pixels, weight, bias, shift, mean, rstd, ctx.act, dx, *small)
        small = [None if t is None else t.to(dtype) for t, dtype in zip(small, ctx.types, strict=True)]
        return dx.permute(0, 3, 1, 2), *small, None, None, None


def _pixels(x: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + shift, (N, H W, C) in `dtype`."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1]).to(dtype)
    return flat if shift is None else flat + shift[:, None]


def _centred(u: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """(u - mean, the mean that was meant): the rounding of `mean` (N, groups) is found in what is left of it in u."""
    channels, groups = u.shape[2], mean.shape[1]
    centred = u - _by_channel(mean, channels)[:, None]
    left = _by_group(centred.mean(dim=1), groups) * groups / channels
    return centred.sub_(_by_channel(left, channels)[:, None]), mean + left


def _by_channel(values: Tensor, channels: int) -> Tensor:
    """(N, groups) -> (N, C)."""
    return values.repeat_interleave(channels // values.shape[1], dim=1)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group: (N, C) -> (N, groups)."""
    return values.view(values.shape[0], groups, -1).sum(dim=2)


def _activated(z: Tensor, act: str) -> Tensor:
    return z if act == "none" else getattr(F, act)(z)


def _before_activation(dy: Tensor, z: Tensor, act: str) -> Tensor:
    """dy act'(z)."""
    if act == "none":
        return dy
    if act == "relu":
        return dy * (z > 0)
    return getattr(torch.ops.aten, f"{act}_backward")(dy, z)


def reference(x, weight, bias, shift, groups, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of the module's formula in torch, in float64 for float64 and else in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, count = x.shape[-1], x[0].numel() // groups
    u = _pixels(x, shift, dtype)
    centred, mean = _centred(u, _by_group(u.mean(dim=1), groups) * groups / channels)
    rstd = torch.rsqrt(_by_group(centred.square().sum(dim=1), groups) / count + eps)
    z = torch.addcmul(bias, centred, (_by_channel(rstd, channels) * weight)[:, None])
    return _activated(z, act).view(x.shape).to(x.dtype), mean, rstd


def reference_backward(dy, x, weight, bias, shift, mean, rstd, act) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias, dshift) of the module's formula in torch; dshift is None where shift is."""
    channels, groups, dtype = x.shape[-1], mean.shape[1], mean.dtype
    count = x[0].numel() // groups
    centred, spread = _centred(_pixels(x, shift, dtype), mean)[0], _by_channel(rstd, channels)
    scale = spread * weight
    z = None if act == "none" else torch.addcmul(bias, centred, scale[:, None])
    dz = _before_activation(dy.reshape(centred.shape).to(dtype), z, act)
    total, product = dz.sum(dim=1), (dz * centred).sum(dim=1) * spread
    constant = -_by_group(total * weight, groups) * rstd / count
    of_centred = -_by_group(product * weight, groups) * rstd.square() / count
    dx = torch.addcmul(_by_channel(constant, channels)[:, None], dz, scale[:, None])
    dx = dx.addcmul_(centred, _by_channel(of_centred, channels)[:, None])
    dshift = None if shift is None else dx.sum(dim=1)
    return dx.view(x.shape).to(x.dtype), product.sum(dim=0), total.sum(dim=0), dshift


def can_run(x, weight, bias, shift, *rest) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these arguments."""
    if x.dtype not in TYPES:
        raise CannotRunError(f"x: {x.dtype} is none of float32, float16, bfloat16")
    for name, tensor in (("weight", weight), ("bias", bias), ("shift", shift)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise CannotRunError(f"{name}: {tensor.dtype} is not float32")


def _can_run_backward(dy, x, weight, bias, shift, *rest) -> None:
    can_run(x, weight, bias, shift)


def _run_reference(x, weight, bias, shift, groups, eps, act, y, mean, rstd) -> None:
    for output, value in zip((y, mean, rstd), reference(x, weight, bias, shift, groups, eps, act), strict=True):
        output.copy_(value)


def _run_reference_backward(dy, x, weight, bias, shift, mean, rstd, act, dx, dweight, dbias, dshift) -> None:
    results = reference_backward(dy, x, weight, bias, shift, mean, rstd, act)
    for output, value in zip((dx, dweight, dbias, dshift), results, strict=True):
        if output is not None:
            output.copy_(value)


def _shape(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1] * x.shape[2], x.shape[3], groups


def _run_cpu(x, weight, bias, shift, groups, eps, act, y, mean, rstd, level="") -> None:
    native.module.group_norm(
        _shape(x, groups), TYPES[x.dtype], ACTIVATIONS[act], eps, x.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        native.address(shift), mean.data_ptr(), rstd.data_ptr(), y.data_ptr(),
        stream=y.nbytes > group_norm_apply.STREAM_BYTES, threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


def _run_cpu_backward(dy, x, weight, bias, shift, mean, rstd, act, dx, dweight, dbias, dshift, level="") -> None:
    native.module.group_norm_backward(
        _shape(x, mean.shape[1]), TYPES[x.dtype], ACTIVATIONS[act], x.data_ptr(), weight.data_ptr(), bias.data_ptr(),
        native.address(shift), mean.data_ptr(), rstd.data_ptr(), dy.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
        dbias.data_ptr(), native.address(dshift), threads=torch.get_num_threads(), level=level,
    )  # fmt: skip


def _run_stages(backend: str, x, weight, bias, shift, groups, eps, act, y, mean, rstd) -> None:
    pixels, channels = x.shape[1] * x.shape[2], x.shape[3]
    tile = group_norm_moments.default_tile_pixels(pixels)
    counts = group_norm_moments.tile_counts(pixels, tile, x.device)
    moments = torch.empty((x.shape[0], len(counts), 2, channels), device=x.device)
    scale, offset = (torch.empty((x.shape[0], channels), device=x.device) for _ in range(2))
    stages = group_norm_moments, group_norm_merge, group_norm_apply
    run_moments, run_merge, run_apply = (stage.OP.implementations[backend].run for stage in stages)
    run_moments(x, tile, moments)
    run_merge(moments, counts, None, None, weight, bias, shift, groups, eps, scale, offset, mean, rstd)
    run_apply(x, None, scale, offset, act, "none", y)


def _can_run_on_gpu(x, weight, bias, shift, groups, *rest) -> None:
    can_run(x, weight, bias, shift)
    group_norm_moments.can_run_on_gpu(x)


def _can_run_triton(x, weight, bias, shift, groups, *rest) -> None:
    _can_run_on_gpu(x, weight, bias, shift, groups)
    group_norm_merge.can_merge_groups_of(weight.shape[0] // groups)


OP = Op("group_norm")
OP.register("triton", partial(_run_stages, "triton"), triton_import.available, _can_run_triton)
OP.register("cuda", partial(_run_stages, "cuda"), cuda_launch.available, _can_run_on_gpu)
OP.register("cpu", _run_cpu, registry.cpu_available("group_norm"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)

BACKWARD = Op("group_norm_backward")
BACKWARD.register("cpu", _run_cpu_backward, registry.cpu_available("group_norm_backward"), _can_run_backward)
BACKWARD.register("reference", _run_reference_backward, registry.always, registry.always)
