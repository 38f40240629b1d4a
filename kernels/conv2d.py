"""conv2d: the dilated convolution with all that stands around it, as one implicit GEMM.

    v      = cat(x, x2) along the channels                  x2 may be absent; the concatenation is never stored
    p      = resample(prologue_act(scale v + offset))       scale, offset: a value for each sample and channel, or none
    acc    = sum over taps (i, j) and channels c of p[h + d (i - r), w + d (j - r), c] weight[i, j, c, o]
    y      = act(acc + bias) + residual_resample(residual)
    moments[n, t, :, o] = (mean, sum of squared differences from it) of the written y[n, tile t, o]

`scale v + offset` is a GroupNorm, folded; resample is "none", "down" (mean of 2 x 2 values, after the activation) or
"up" (nearest, x2), and H, W are the sizes after it. Taps outside the image are 0: the padding comes after the
prologue. r = (K - 1) / 2 and d is the dilation, so that H and W are kept; the stride is 1. The residual comes after
the activation, as at the end of a residual block (act none); "down" is the 2 x 2 mean of a (2H, 2W) residual, "up"
reads an (H/2, W/2) one twice in each direction.

Shapes: x (N, H0, W0, C1), x2 (N, H0, W0, C2), C1 + C2 = C; weight a ConvWeight; bias (O,) or (N, O), the latter with
the time embedding folded in; scale, offset (N, C); residual and y (N, H, W, O) (residual before its resampling);
moments (N, T, 2, O), tile t being the pixels [t tile_pixels, (t + 1) tile_pixels) of a sample in row order, the last
one shorter: T = ceil(H W / tile_pixels), as of the op group_norm_moments.
Layouts: x, x2, residual and y are channels-last and may be channel slices of wider buffers: strides
(H W P, W P, P, 1) with P >= the number of channels. The others are contiguous.
Types: x, x2, residual, y and weight share float32, float16 or bfloat16 (the reference also float64); the others are
float32 (float64). Products are summed in float32; the prologue is computed in float32 and rounded once, to x's dtype.
With a quantized weight (kernels/conv_weight.py, kernels/quantization.py) p is rounded to eight bits instead, and so is
the weight: int8 on the cpu backend from bfloat16, fp8 on triton from 16-bit types; the others refuse it.

Compiled backends serve 1x1 and 3x3 kernels, on a GPU with dilation 1 or 2; the reference every odd one.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (kernels/conv2d_cuda.py: float16 and
bfloat16, each tile with moments of its own), cpu (kernels/conv2d_cpu.py), library (any device:
kernels/conv2d_library.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.kernels import group_norm_moments, registry, triton_import
from dfengine.kernels.conv2d_triton import configuration_for, conv2d_kernel, fitting_configurations, launch_options
from dfengine.kernels.conv_weight import ConvWeight, whole
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES, pixel_stride, resampled
from dfengine.kernels.triton_import import triton

ACTIVATIONS = {"none": 0, "gelu": 1, "silu": 2, "relu": 3, "sigmoid": 4}
PROLOGUE_ACTIVATIONS = ("none", "gelu", "silu", "relu")
RESAMPLES = {"none": 0, "down": 1, "up": 2}


def conv2d(
    x: Tensor,
    weight: ConvWeight,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    prologue_act: str = "none",
    resample: str = "none",
    residual: Tensor | None = None,
    residual_resample: str = "none",
    act: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Return a new y (N, H, W, O), written by the chosen backend.

    The form in which a backend wants the weight is made in the first call and kept in the ConvWeight, which therefore
    must not change. Where calls are recorded (torch.compile, fake tensors) the recorded op makes it anew in every call.
    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    y = torch.empty(output_shape(x, weight, resample), dtype=x.dtype, device=x.device)
    conv2d_into(
        x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, backend=backend
    )
    return y


def dilated_conv_gelu(x: Tensor, weight: ConvWeight, bias: Tensor | None = None, **options) -> Tensor:
    """gelu(conv(x) + bias): `conv2d` with act="gelu", and its other options."""
    return conv2d(x, weight, bias, act="gelu", **options)


def conv2d_into(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y,
    moments=None, tile_pixels=0, *, backend=None,
) -> None:  # fmt: skip
    """As `conv2d`, into given outputs, every element of which is written: y, and moments of tiles of `tile_pixels`."""
    before = (bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments, tile_pixels)
    _check(x, x2, weight, *before)
    if registry.recorded((x, x2, weight.packed, bias, scale, offset, residual, y, moments)):
        whole(weight)
        _conv2d(x, x2, weight.taps(), weight.dilation, *before, backend or "")
    else:
        OP(x, x2, weight, *before, backend=backend)
        registry.written((y, moments))


@registry.custom_op("conv2d", mutates=("y", "moments"))
def _conv2d(
    x: Tensor,
    x2: Tensor | None,
    packed: Tensor,
    dilation: int,
    bias: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    prologue_act: str,
    resample: str,
    residual: Tensor | None,
    residual_resample: str,
    act: str,
    y: Tensor,
    moments: Tensor | None,
    tile_pixels: int,
    backend: str,
) -> None:
    """What a backend keeps in ConvWeight.prepacked is lost here: only recorded calls come this way."""
    OP(
        x, x2, ConvWeight(packed, dilation), bias, scale, offset, prologue_act, resample, residual, residual_resample,
        act, y, moments, tile_pixels, backend=backend,
    )  # fmt: skip


def output_shape(x: Tensor, weight: ConvWeight, resample: str) -> tuple[int, int, int, int]:
    """(N, H, W, O)."""
    return (x.shape[0], *resampled(x.shape[1:3], resample), weight.outputs)


def moment_tile(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    channels: tuple[int, ...] = (),
    reach: int = 1,
    device: str | torch.device = "cpu",
) -> int:
    """The tile_pixels to allocate moments for, from the shape (N, H, W, O) of y, for the backend that serves on
    `device`.

    Where that is the CUDA kernel: the longest run of pixels that its best tile leaves, 0 where it leaves none
    (kernels/conv2d_cuda.py; channels: of each source, by default one of O; reach: dilation times (K - 1) / 2). Else the
    BLOCK_M of `configuration_for`.
    """
    if torch.device(device).type == "cuda" and dtype != torch.float32 and OP.default("cuda") == "cuda":
        from dfengine.kernels import conv2d_cuda  # which registers with this op

        return conv2d_cuda.moment_tile_on(torch.device(device), shape, channels or shape[3:], reach)
    return configuration_for(shape, dtype)["BLOCK_M"]


def _check(
    x,
    x2,
    weight,
    bias,
    scale,
    offset,
    prologue_act,
    resample,
    residual,
    residual_resample,
    act,
    y,
    moments,
    tile_pixels,
) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    for name, value, known in (
        ("prologue_act", prologue_act, PROLOGUE_ACTIVATIONS),
        ("resample", resample, RESAMPLES),
        ("residual_resample", residual_resample, RESAMPLES),
        ("act", act, ACTIVATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x: expected (N, H, W, C), none of them 0, got {tuple(x.shape)}")
    batch, height, width = x.shape[:3]
    channels = x.shape[3] + (0 if x2 is None else x2.shape[-1])
    if channels != weight.inputs:
        raise ValueError(f"x: {channels} channels for a weight of {weight.inputs}")
    if resample == "down" and (height % 2 or width % 2):
        raise ValueError(f"x: {height} x {width} pixels have no 2 x 2 means")
    shape = output_shape(x, weight, resample)
    size = shape[1:3]
    if residual_resample == "up" and (size[0] % 2 or size[1] % 2):
        raise ValueError(f"residual: {size[0]} x {size[1]} pixels are not twice a whole number")
    of_residual = resampled(size, {"down": "up", "up": "down", "none": "none"}[residual_resample])
    if (scale is None) != (offset is None):
        raise ValueError("scale and offset come together")
    if moments is not None and tile_pixels < 1:
        raise ValueError(f"tile_pixels: {tile_pixels} is below 1")
    tiles = 0 if moments is None else -(-size[0] * size[1] // tile_pixels)
    precise = torch.promote_types(x.dtype, torch.float32)
    activations = dict(
        x=(x, tuple(x.shape)),
        x2=(x2, (batch, height, width, channels - x.shape[3])),
        residual=(residual, (batch, *of_residual, weight.outputs)),
        y=(y, shape),
    )
    small = dict(
        bias=(bias, (weight.outputs,) if bias is not None and bias.ndim == 1 else (batch, weight.outputs)),
        scale=(scale, (batch, channels)),
        offset=(offset, (batch, channels)),
        moments=(moments, (batch, tiles, 2, weight.outputs)),
    )
    for name, (tensor, wanted) in (activations | small).items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: expected {wanted}, got {tuple(tensor.shape)}")
        if tensor.dtype != (x.dtype if name in activations else precise):
            raise ValueError(f"{name}: {tensor.dtype} beside an x of {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, x on {x.device}")
        if name in activations:
            pixel_stride(name, tensor)
        elif not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")
    if (weight.quantization is None and weight.packed.dtype != x.dtype) or weight.device != x.device:
        raise ValueError(f"weight: {weight.packed.dtype} on {weight.device}, x {x.dtype} on {x.device}")


def can_run(x, x2, weight, *rest) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if x.dtype not in TYPES:
        raise CannotRunError(f"x: {x.dtype} is none of float32, float16, bfloat16")
    if weight.kernel not in ((1, 1), (3, 3)):
        raise CannotRunError(f"a kernel of {weight.kernel[0]} x {weight.kernel[1]} is neither 1 x 1 nor 3 x 3")


def _activated(z: Tensor, act: str) -> Tensor:
    if act == "none":
        return z
    return torch.sigmoid(z) if act == "sigmoid" else getattr(F, act)(z)


def _resample(p: Tensor, resample: str) -> Tensor:
    if resample == "down":
        batch, height, width, channels = p.shape
        return p.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(dim=(2, 4))
    return p.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) if resample == "up" else p


def multiplied(x, x2, scale, offset, prologue_act, resample) -> Tensor:
    """p (N, H, W, C) of the module's formula in torch: what the weight multiplies, before any rounding; in float64 for
    float64 and else in float32."""
    p = (x if x2 is None else torch.cat((x, x2), dim=3)).to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        p = torch.addcmul(offset[:, None, None], p, scale[:, None, None])
    return _resample(_activated(p, prologue_act), resample)


def reference(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act
) -> Tensor:  # fmt: skip
    """y of the module's formula in torch, in float64 for float64 and else in float32; a matrix product for each tap."""
    p = multiplied(x, x2, scale, offset, prologue_act, resample)
    dtype, (height, width) = p.dtype, p.shape[1:3]
    d, (rows, columns) = weight.dilation, weight.kernel
    margin_y, margin_x = d * (rows - 1) // 2, d * (columns - 1) // 2
    p = F.pad(p, (0, 0, margin_x, margin_x, margin_y, margin_y))
    taps = weight.taps().to(dtype)
    if weight.quantization is not None:
        p, taps = weight.quantization.input(p), taps * weight.unit
    z = torch.zeros((p.shape[0], height, width, weight.outputs), dtype=dtype, device=x.device)
    for i in range(rows):
        for j in range(columns):
            z += p[:, d * i : d * i + height, d * j : d * j + width] @ taps[i, j]
    if bias is not None:
        z += bias.view(-1, 1, 1, weight.outputs)
    y = _activated(z, act)
    if residual is not None:
        y = y + _resample(residual.to(dtype), residual_resample)
    return y.to(x.dtype)


def _run_reference(
    x,
    x2,
    weight,
    bias,
    scale,
    offset,
    prologue_act,
    resample,
    residual,
    residual_resample,
    act,
    y,
    moments,
    tile_pixels,
) -> None:
    y.copy_(reference(x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act))
    if moments is not None:
        moments.copy_(group_norm_moments.reference(y, tile_pixels))


def _can_run_reference(x, x2, weight, *rest) -> None:
    weight.taps()


def _wanted(x, y, moments, tile_pixels) -> tuple:
    """The arguments of `configuration_for`."""
    capability = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    return tuple(y.shape), x.dtype, tile_pixels if moments is not None else 0, capability


def _triton_configurations(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments,
    tile_pixels,
) -> list[dict]:  # fmt: skip
    return [{"configuration": c} for c in fitting_configurations(*_wanted(x, y, moments, tile_pixels))]


def _run_triton(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y,
    moments, tile_pixels, configuration=None,
) -> None:  # fmt: skip
    batch, height, width, outputs = y.shape
    chosen = configuration or configuration_for(*_wanted(x, y, moments, tile_pixels))
    if moments is not None and chosen["BLOCK_M"] != tile_pixels:
        raise CannotRunError(f"tile_pixels {tile_pixels} is not the BLOCK_M of {chosen}")
    sources = [t.shape[3] for t in (x, x2) if t is not None]
    taps, unit, per_step = _for_triton(weight)
    options = launch_options(chosen, sources, resample, scale is not None, unit is not None)
    tiles = triton.cdiv(height * width, options["BLOCK_M"])
    pitches = (0 if t is None else pixel_stride("", t) for t in (x, x2, residual, y))
    triton_import.launch(conv2d_kernel, (batch * tiles * triton.cdiv(outputs, options["BLOCK_N"]),))(
        x, x2, taps, bias, scale, offset, residual, y, moments, unit, per_step,
        batch, tiles, height, width, *x.shape[1:3], *pitches, 0 if bias is None or bias.ndim == 1 else outputs,
        C1=sources[0], C2=sum(sources[1:]), OUTPUTS=outputs, K=weight.kernel[0], DILATION=weight.dilation,
        RESAMPLE=resample, PROLOGUE=prologue_act, RESIDUAL="" if residual is None else residual_resample, ACT=act,
        WIDEN=triton_import.INTERPRETED and (x.dtype == torch.bfloat16 or unit is not None), **options,
    )  # fmt: skip


def _for_triton(weight: ConvWeight) -> tuple[Tensor, Tensor | None, float | None]:
    """The weight as the kernel reads it; for a quantized one what 1 of a sum means, and the steps of a unit of x."""
    if weight.quantization is None:
        return weight.taps(), None, None
    if "triton" not in weight.prepacked:
        step = weight.quantization.step
        weight.prepacked["triton"] = weight.taps().transpose(2, 3).contiguous(), weight.unit * step, 1 / step
    return weight.prepacked["triton"]


def _can_run_fp8(x, weight) -> None:
    if weight.quantization.format != "fp8" or x.dtype == torch.float32:
        whole(weight)
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        raise CannotRunError("weight: in fp8, which needs compute capability 8.9")


def _can_run_triton(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y,
    moments, tile_pixels,
) -> None:  # fmt: skip
    can_run(x, x2, weight)
    if weight.quantization is not None:
        _can_run_fp8(x, weight)
    if "triton" not in weight.prepacked:
        weight.taps()
    if weight.dilation not in (1, 2):
        raise CannotRunError(f"dilation {weight.dilation} is neither 1 nor 2")
    for tensor in (x, x2, residual, y):
        if tensor is not None and tensor.shape[1] * tensor.shape[2] * pixel_stride("", tensor) >= 2**31 - 2**24:
            raise CannotRunError("a sample of more than 2^31 - 2^24 values")
    if moments is not None:
        configuration_for(tuple(y.shape), x.dtype, tile_pixels)


OP = Op("conv2d")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton, configurations=_triton_configurations)
OP.register("reference", _run_reference, registry.always, _can_run_reference)
