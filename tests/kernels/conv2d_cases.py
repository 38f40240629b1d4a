"""Calls of conv2d, their results through torch's own operations, and the contract between: for the tests of each of its
kernels."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.kernels import CannotRunError, conv2d, conv2d_cuda, cuda_launch, group_norm_moments
from dfengine.kernels.quantization import Quantization
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A call; `size` (N, H, W) is that of y."""

    size: tuple[int, int, int]
    sources: tuple[int, ...]
    outputs: int
    kernel: int = 3
    dilation: int = 1
    scaled: bool = False
    prologue: str = "none"
    resample: str = "none"
    residual: str | None = None
    act: str = "none"
    bias: str = "sample"
    aligned: bool = False  # whether pixels of the 16-bit types start at multiples of 16 bytes


EVERY_TILE = [
    # two sources that fill no block, a prologue, a residual, more than one tile of 64 pixels, a part of the outputs
    Case((1, 5, 13), (20, 36), 24, 3, 2, True, "gelu", "none", "none", "none"),
    # a tile full of outputs (the number is that of the tile)
    Case((1, 7, 5), (32,), 0, 3, 1, act="gelu"),
]
FEATURES = [
    Case((1, 1, 1), (3,), 3, act="gelu"),
    Case((3, 5, 3), (6,), 5, 3, 2, act="relu", bias="channel"),
    Case((2, 6, 7), (18,), 1, 1, act="sigmoid", bias="none"),
    Case((2, 6, 4), (16, 8), 20, 1, scaled=True, residual="none"),
    Case((1, 4, 6), (5,), 7, 3, 2, True, "gelu", "down", "down"),
    Case((2, 6, 8), (17,), 9, 3, 1, True, "silu", "up", "up", "silu"),
    Case((2, 3, 5), (4, 20), 6, 3, 2, False, "relu", "down", "none", "gelu"),
    Case((1, 6, 4), (33,), 6, 3, 2, False, "none", "up", "down", "relu"),
    Case((1, 4, 4), (7,), 17, 3, 1, True, "relu", "none", "up", "sigmoid"),
]
BESIDE = [
    # wider than the rows of a tile, so that all but the first begin at a column past 0: two samples of two sources
    # through every loader, and every residual
    Case((2, 6, 20), (40, 24), 24, 3, 1, True, "gelu", "up", "up", aligned=True),
    Case((2, 6, 20), (20, 12), 24, 3, 1, True, "silu", "up", "down"),
    Case((2, 6, 20), (72, 8), 24, 3, 1, True, "gelu", "none", "down", aligned=True),
    Case((2, 6, 20), (9, 7), 21, 3, 1, False, "relu", "down", "up", "gelu"),
]


def slice_of_wider(values: Tensor, aligned: bool = False) -> Tensor:
    """The same values as a channel slice of a buffer of NaN."""
    before, after = 8, -values.shape[3] % 8 if aligned else 3
    wide = torch.full((*values.shape[:3], before + values.shape[3] + after), NAN, dtype=values.dtype)
    view = wide[..., before : before + values.shape[3]]
    view.copy_(values)
    return view


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple:
    """The arguments of `run` up to `act`; activations are off-centre, around -2.3, and channel slices."""
    g = torch.Generator().manual_seed(seed)

    def scaled_size(size, resample):
        return {"none": size, "down": (2 * size[0], 2 * size[1]), "up": (size[0] // 2, size[1] // 2)}[resample]

    batch, size = case.size[0], case.size[1:]
    sizes = [(batch, *scaled_size(size, case.resample), c) for c in case.sources]
    xs = [slice_of_wider((torch.randn(size, generator=g) - 2.3).to(dtype), case.aligned) for size in sizes]
    channels = sum(case.sources)
    weight = torch.randn((case.outputs, channels, case.kernel, case.kernel), generator=g)
    weight = conv2d.ConvWeight.pack(weight / (channels * case.kernel**2) ** 0.5, case.dilation, dtype)
    precise = torch.promote_types(dtype, torch.float32)
    shape = {"sample": (batch, case.outputs), "channel": (case.outputs,), "none": None}[case.bias]
    bias = None if shape is None else torch.randn(shape, generator=g).to(precise)
    scale, offset = ((0.5 + torch.randn((batch, channels), generator=g)).to(precise) for _ in range(2))
    residual = None
    if case.residual is not None:
        residual = torch.randn((batch, *scaled_size(size, case.residual), case.outputs), generator=g)
        residual = slice_of_wider((residual - 2.3).to(dtype), case.aligned)
    scale, offset = (scale, offset) if case.scaled else (None, None)
    x2 = xs[1] if len(xs) == 2 else None
    names = case.prologue, case.resample, residual, case.residual or "none", case.act
    return (xs[0], x2, weight, bias, scale, offset, *names)


def require_cuda(tile: conv2d_cuda.Tile = conv2d_cuda.TILES[0]) -> None:
    """Skips with the reason where there is a GPU that does not run the CUDA kernel of this tile."""
    if not launchers.GPU:
        return
    try:
        cuda_launch.available("cuda")
    except CannotRunError as error:
        pytest.skip(str(error))
    device = torch.device("cuda")
    capability = conv2d_cuda.capability_of(device)
    if capability < (8, 0) or (tile.warpgroups and capability not in conv2d_cuda.WGMMA_DEVICES):
        pytest.skip(f"the device, of compute capability {capability[0]}.{capability[1]}, has no such tensor cores")
    if refused := cuda_launch.refusal(f"conv2d_float16_{tile.name}", device):
        pytest.skip(refused)


def moment_pixels(launcher, arguments: tuple, tile_pixels: int) -> int:
    """A tile_pixels that the implementation has: of Triton and CUDA, that of its tile."""
    if launcher.backend == "triton":
        return launcher.options["configuration"]["BLOCK_M"]
    if launcher.backend != "cuda":
        return tile_pixels
    x, _, weight, *_, resample, residual, residual_resample, _ = arguments
    y = torch.empty(conv2d.output_shape(x, weight, resample), device="meta")
    reach, shape = conv2d_cuda.geometry(weight, resample, residual, residual_resample, y)
    place = launcher.options.get("placement")
    return conv2d_cuda.moment_tile(shape, (weight.inputs,), reach, place)


def run_into_nan(
    launcher, arguments: tuple, tile_pixels: int = 0, aligned: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(y, moments); y is written into a slice, around which nothing may be written."""
    x, _, weight, *_ = arguments
    shape = conv2d.output_shape(x, weight, arguments[7])
    before, after = (8, 8 + -shape[3] % 8) if aligned else (4, 5)
    wide = torch.full((*shape[:3], before + shape[3] + after), NAN, dtype=x.dtype, device=launcher.device)
    y = wide[..., before : before + shape[3]]
    moments = None
    if tile_pixels:
        tiles = -(-shape[1] * shape[2] // tile_pixels)
        moments = torch.full((shape[0], tiles, 2, shape[3]), NAN, device=launcher.device)
    arguments = tuple(on(value, launcher.device) for value in arguments)
    conv2d._check(*arguments, y, moments, tile_pixels)
    launcher.run(conv2d.OP, *arguments, y, moments, tile_pixels)
    assert wide[..., :before].isnan().all() and wide[..., before + shape[3] :].isnan().all(), "written beside the slice"
    return y.cpu(), None if moments is None else moments.cpu()


def on(value, device: str):
    """An argument on `device`; a channel slice stays one."""
    if isinstance(value, conv2d.ConvWeight):
        unit = None if value.unit is None else value.unit.to(device)
        return conv2d.ConvWeight(value.packed.to(device), value.dilation, quantization=value.quantization, unit=unit)
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    if value.ndim < 4:
        return value.to(device)
    wide = torch.full((*value.shape[:3], conv2d.pixel_stride("", value)), NAN, dtype=value.dtype, device=device)
    wide[..., : value.shape[3]] = value.to(device)
    return wide[..., : value.shape[3]]


def quantized(arguments: tuple, format: str, share: float = 0.8) -> tuple:
    """The arguments with the weight in eight bits, and its input in `share` of its range: what is beyond is cut off."""
    x, x2, weight, _, scale, offset, prologue, resample, *_ = arguments
    p = conv2d.multiplied(x, x2, scale, offset, prologue, resample)
    low, high = min(float(p.min()), 0.0) * share, max(float(p.max()), 1e-3) * share
    taps = weight.packed.permute(3, 2, 0, 1)
    rounded = conv2d.ConvWeight.pack(taps, weight.dilation, quantization=Quantization(format, low, high))
    return (*arguments[:2], rounded, *arguments[3:])


def through_torch(arguments: tuple, dtype: torch.dtype) -> Tensor:
    """y by torch's operations in `dtype`, on (N, C, H, W)."""
    x, x2, weight, bias, scale, offset, prologue, resample, residual, residual_resample, act = arguments

    def activated(z, name):
        return z if name == "none" else (z.sigmoid() if name == "sigmoid" else getattr(F, name)(z))

    def resampled(z, name):
        if name == "none":
            return z
        return F.avg_pool2d(z, 2) if name == "down" else F.interpolate(z, scale_factor=2, mode="nearest")

    p = (x if x2 is None else torch.cat((x, x2), dim=3)).permute(0, 3, 1, 2).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    if scale is not None:
        p = (p.to(precise) * scale.to(precise)[:, :, None, None] + offset.to(precise)[:, :, None, None]).to(dtype)
    p = resampled(activated(p, prologue), resample)
    taps = weight.packed.to(dtype)
    if weight.quantization is not None:
        p, taps = weight.quantization.input(p.to(precise)).to(dtype), (taps.to(precise) * weight.unit).to(dtype)
    taps = taps.permute(3, 2, 0, 1)
    padding = weight.dilation * (weight.kernel[0] // 2)
    z = F.conv2d(p, taps, padding=padding, dilation=weight.dilation)
    if bias is not None:
        z = z + bias.to(dtype).view(-1, weight.outputs, 1, 1)
    y = activated(z, act)
    if residual is not None:
        y = y + resampled(residual.permute(0, 3, 1, 2).to(dtype), residual_resample)
    return y.permute(0, 2, 3, 1)


def check_contract(
    launcher, case: Case, dtype: torch.dtype, tile_pixels: int = 7, seed: int = 0, format: str = ""
) -> tuple[Tensor, Tensor | None]:
    """Raises where y or the moments are not right; returns both. format: of a quantized weight."""
    arguments = make(case, dtype, seed)
    if format:
        arguments = quantized(arguments, format)
    tile = moment_pixels(launcher, arguments, tile_pixels)
    y, moments = run_into_nan(launcher, arguments, tile, case.aligned)
    assert_numeric_contract(y, through_torch(arguments, torch.float64), through_torch(arguments, dtype))
    if moments is not None:
        check_moments(y, moments, tile)
    return y, moments


def check_moments(y: Tensor, moments: Tensor, tile_pixels: int) -> None:
    mean, spread = group_norm_moments.reference(y.double(), tile_pixels).unbind(dim=2)
    assert torch.isfinite(moments).all()
    assert (moments[:, :, 0] - mean).abs().max() <= 2e-6 * y.abs().max()
    assert (moments[:, :, 1] - spread).abs().max() <= 1e-5 * spread.max() + 1e-9
