"""conv2d by torch's convolution, cuDNN's or oneDNN's, between passes of other ops (formula: kernels/conv2d.py).

What the library does not do stands around it: norm, activation, resampling and concatenation of what it reads are one
pass of group_norm_apply, the bias of a sample, the activation and the residual passes of torch, the moments one of
group_norm_moments. It serves where no kernel of ours does, and is a tactic where it measures faster.

Unlike our kernels it allocates: what it reads, where that is not x as it lies, and its result, from torch's caches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.kernels import group_norm_apply, group_norm_moments, registry
from dfengine.kernels.conv2d import OP, _activated, _resample, output_shape
from dfengine.kernels.conv_weight import ConvWeight, whole
from dfengine.kernels.registry import CannotRunError
from dfengine.kernels.slices import TYPES


def library_weight(weight: ConvWeight, like: tuple[int, ...]) -> Tensor:
    """(O, C, KH, KW) for the library, made once; on a CPU in oneDNN's order for inputs like `like` (N, C, H, W)."""
    if "library" not in weight.prepacked:
        taps = weight.taps().permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
        if _one_dnn(taps):
            padding = _padding(weight)
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            taps = reorder(taps, padding, [1, 1], [weight.dilation] * 2, 1, like)
        weight.prepacked["library"] = taps
    return weight.prepacked["library"]


def _padding(weight: ConvWeight) -> list[int]:
    return [weight.dilation * (size // 2) for size in weight.kernel]


def _one_dnn(tensor: Tensor) -> bool:
    """Whether torch's oneDNN convolves such tensors, by operators that take weights in its own order."""
    if tensor.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    half = tensor.dtype == torch.bfloat16 and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return tensor.dtype == torch.float32 or half


def convolution(p: Tensor, weight: ConvWeight, bias: Tensor | None = None) -> Tensor:
    """The plain convolution of p (N, H, W, C), not a channel slice, with a bias (O,) of its type: (N, H, W, O)."""
    x = p.permute(0, 3, 1, 2)
    taps = library_weight(weight, tuple(x.shape))
    padding, dilation = _padding(weight), [weight.dilation] * 2
    if taps.is_mkldnn:
        z = torch.ops.mkldnn._convolution_pointwise(x, taps, bias, padding, [1, 1], dilation, 1, "none", [], "")
    else:
        z = F.conv2d(x, taps, bias, 1, padding, dilation)
    return z.permute(0, 2, 3, 1)


def run_library(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments,
    tile_pixels,
) -> None:  # fmt: skip
    plain = x2 is None and scale is None and prologue_act == "none" and resample == "none"
    if plain:
        p = x.contiguous()
    else:
        shape = (*output_shape(x, weight, resample)[:3], weight.inputs)
        p = torch.empty(shape, dtype=x.dtype, device=x.device)
        group_norm_apply.OP.run_unforced(x, x2, scale, offset, prologue_act, resample, p)
    for_library = bias.to(x.dtype) if bias is not None and bias.ndim == 1 else None
    z = convolution(p, weight, for_library)
    if bias is not None and bias.ndim == 2:
        z = z + bias[:, None, None].to(x.dtype)
    z = _activated(z, act)
    if residual is None:
        y.copy_(z)
    else:
        torch.add(z, _resample(residual, residual_resample), out=y)
    if moments is not None:
        group_norm_moments.OP.run_unforced(y, tile_pixels, moments)


def _can_run(x, x2, weight, bias, scale, offset, prologue_act, *rest) -> None:
    if x.dtype not in TYPES:
        raise CannotRunError(f"x: {x.dtype} is none of float32, float16, bfloat16")
    whole(weight)
    if "library" not in weight.prepacked:
        weight.taps()


OP.register("library", run_library, registry.always, _can_run)
