"""What is timed and compiled for the op `conv2d` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import TRITON_TYPES, Case
from bench.kernels._conv2d_sass import cuda_launches, read_sass  # noqa: F401 (for bench/kernels_check.py)
from dfengine.kernels import conv2d, conv2d_cuda, group_norm_apply, group_norm_moments
from dfengine.kernels.conv2d_triton import (
    HALF_CONFIGURATIONS,
    SINGLE_CONFIGURATIONS,
    configuration_for,
    conv2d_kernel,
    launch_options,
)

# (N, H, W), channels of each source, outputs, kernel, dilation: of the U-Net at 256 (two scales of one image), the
# middle with DACM, decoder blocks that read a skip, a 1x1 skip, the first and last convs, and the segmentation net.
SHAPES = [
    ((2, 256, 256), (128,), 128, 3, 1),
    ((2, 64, 64), (256,), 256, 3, 1),
    ((2, 8, 8), (512,), 512, 3, 2),
    ((2, 256, 256), (128, 128), 128, 3, 1),
    ((2, 64, 64), (256, 128), 256, 1, 1),
    ((2, 256, 256), (3,), 128, 3, 1),
    ((2, 256, 256), (128,), 3, 3, 1),
    ((1, 256, 256), (6,), 64, 3, 1),
    ((1, 256, 256), (64,), 1, 3, 1),
]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16, torch.bfloat16)}
BATCHES = (8, 1, 32)
"""On a GPU, instead of those above, in this order; bfloat16 with the first only, last of all."""
HALF_BLOCKS = SHAPES[:4]
"""Timed on a GPU with everything that stands around a convolution of a residual block."""


def cases(device: str):
    """Of the shape of y; on a CPU only where the op has its own backend.

    make() returns fresh tensors; rivals: "torch" is channels-last F.conv2d with its bias, then GELU; "chain" has a
    normalisation and GELU before both, "kernel chain" the same as a prologue; "applied chain" is the op
    group_norm_apply, then "torch". On a GPU "cuda 128x128", and so on, is "kernel" in the CUDA kernel's tiles, "cuda
    128x128 chain" likewise, and "cuda 128x64 half sums" sums in float16; cuDNN chooses its algorithm by timing.

    Half blocks, on a GPU: prologue, convolution, a bias for each sample, a residual and moments. "torch" is all of it
    in torch, "applied" group_norm_apply, torch's convolution and sum, and group_norm_moments; "cuda ..." as above, in
    the tiles that leave moments.
    """
    if device == "cpu":
        if not conv2d.OP.status("cpu").get("cpu"):
            yield from (convolution(device, *shape, dtype) for shape in SHAPES for dtype in DTYPES[device])
        return
    torch.backends.cudnn.benchmark = True
    half, other = DTYPES[device]
    for batch, dtype in (*((batch, half) for batch in BATCHES), (BATCHES[0], other)):
        for (_, height, width), *layer in SHAPES:
            if ((2, height, width), *layer) in HALF_BLOCKS:
                yield half_block(device, (batch, height, width), *layer, dtype)
            yield convolution(device, (batch, height, width), *layer, dtype)


def _maker(device, size, sources, outputs, k, d, dtype):
    @cache
    def generator() -> torch.Generator:  # made on the device when the first case is
        return torch.Generator(device).manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator(), device=device).to(dtype)

    def make() -> Tensors:
        xs = [normal(*size, c) for c in sources]
        full = normal(outputs, sum(sources), k, k) * (k * k * sum(sources)) ** -0.5
        scale, offset = (normal(size[0], sum(sources), dtype=torch.float32) for _ in range(2))
        joined = torch.cat(xs, dim=3).permute(0, 3, 1, 2)
        return Tensors(xs, joined, full, d, normal(outputs, dtype=torch.float32), scale, offset)

    return make, normal


def _numbers(size, sources, outputs, kernel_size, dilation, dtype) -> tuple[int, int, str]:
    """(bytes that must move, FLOP, label)."""
    pixels, channels = size[0] * size[1] * size[2], sum(sources)
    moved = (pixels * (outputs + channels) + outputs * channels * kernel_size**2) * dtype.itemsize
    label = f"{'+'.join(map(str, sources))} to {outputs}, {kernel_size}x{kernel_size}, dilation {dilation}"
    return moved, 2 * pixels * outputs * channels * kernel_size**2, label


def convolution(device: str, size, sources, outputs: int, kernel_size: int, dilation: int, dtype) -> Case:
    make, _ = _maker(device, size, sources, outputs, kernel_size, dilation, dtype)
    rivals = {"kernel": kernel, "torch": torch_conv, "kernel chain": kernel_chain, "chain": torch_chain}
    rivals["applied chain"] = applied_chain
    if device == "cuda":
        rivals |= cuda_rivals((*size, outputs), dtype, kernel_size, dilation)
    moved, flops, label = _numbers(size, sources, outputs, kernel_size, dilation, dtype)
    return Case((*size, outputs), dtype, moved, lambda: (make(),), rivals, label, flops)


def half_block(device: str, size, sources, outputs: int, kernel_size: int, dilation: int, dtype) -> Case:
    make, normal = _maker(device, size, sources, outputs, kernel_size, dilation, dtype)
    shape, reach = (*size, outputs), dilation * (kernel_size // 2)
    pixels = conv2d.moment_tile(shape, dtype, sources, reach, device) or 16

    def make_all() -> tuple[Tensors]:
        case = make()
        case.bias = normal(size[0], outputs, dtype=torch.float32)
        case.residual, case.tile_pixels = normal(*shape), pixels
        return (case,)

    rivals = {"kernel": kernel_block, "torch": torch_block, "applied": applied_block}
    if device == "cuda":
        rivals |= cuda_block_rivals(shape, dtype, kernel_size, dilation)
    moved, flops, label = _numbers(size, sources, outputs, kernel_size, dilation, dtype)
    residual_bytes = size[0] * size[1] * size[2] * outputs * dtype.itemsize
    return Case(shape, dtype, moved + residual_bytes, make_all, rivals, f"{label}, half block", flops)


class Tensors:
    """The tensors of one case, in the form each rival wants, and an output."""

    def __init__(self, xs, joined, full, dilation, bias, scale, offset) -> None:
        self.x, self.x2 = xs[0], xs[1] if len(xs) == 2 else None
        self.joined, self.bias, self.scale, self.offset = joined, bias, scale, offset
        self.residual, self.tile_pixels, self.moments_of = None, 0, {}  # of half blocks
        self.weight = conv2d.ConvWeight.pack(full, dilation)
        self.full, self.half_bias = full.to(memory_format=torch.channels_last), bias.to(full.dtype)
        self.applied = torch.zeros_like(joined, memory_format=torch.channels_last)
        self.y = torch.zeros(conv2d.output_shape(self.x, self.weight, "none"), dtype=full.dtype, device=full.device)
        if full.device.type == "cpu":
            kernel(self)  # packs the weight
        else:  # before the calls are captured in a graph
            for tile in conv2d_cuda.tiles_on(full.device, full.dtype):
                conv2d_cuda.prepacked(self.weight, tuple(x.shape[3] for x in xs), tile)

    def moments(self, pixels: int) -> Tensor:
        """Of tiles of so many pixels, the same in every call: those that were captured in a graph keep their place."""
        if pixels not in self.moments_of:
            batch, height, width, outputs = self.y.shape
            tiles = -(-height * width // pixels)
            self.moments_of[pixels] = torch.zeros((batch, tiles, 2, outputs), device=self.y.device)
        return self.moments_of[pixels]


def kernel(case: Tensors) -> None:
    conv2d.OP(
        case.x, case.x2, case.weight, case.bias, None, None, "none", "none", None, "none", "gelu", case.y, None, 0
    )


def kernel_chain(case: Tensors) -> None:
    conv2d.OP(
        case.x, case.x2, case.weight, case.bias, case.scale, case.offset, "gelu", "none", None, "none", "gelu", case.y,
        None, 0,
    )  # fmt: skip


def torch_conv(case: Tensors) -> None:
    d = case.weight.dilation
    padding = d * (case.weight.kernel[0] // 2)
    F.gelu(F.conv2d(case.joined, case.full, case.half_bias, padding=padding, dilation=d))


def torch_chain(case: Tensors) -> None:
    """What the prologue replaces: x again through memory, normalised and activated, before the same convolution."""
    d = case.weight.dilation
    padding = d * (case.weight.kernel[0] // 2)
    scale, offset = (t[:, :, None, None].to(case.joined.dtype) for t in (case.scale, case.offset))
    activated = F.gelu(torch.addcmul(offset, case.joined, scale))
    F.gelu(F.conv2d(activated, case.full, case.half_bias, padding=padding, dilation=d))


def applied_chain(case: Tensors) -> None:
    """What the prologue replaces, by this engine's own pass instead of torch's."""
    applied = case.applied.permute(0, 2, 3, 1)
    group_norm_apply.OP(case.x, case.x2, case.scale, case.offset, "gelu", "none", applied)
    d = case.weight.dilation
    padding = d * (case.weight.kernel[0] // 2)
    F.gelu(F.conv2d(case.applied, case.full, case.half_bias, padding=padding, dilation=d))


def kernel_block(case: Tensors) -> None:
    conv2d.OP(
        case.x, case.x2, case.weight, case.bias, case.scale, case.offset, "gelu", "none", case.residual, "none", "none",
        case.y, case.moments(case.tile_pixels), case.tile_pixels,
    )  # fmt: skip


def _plain(case: Tensors, activated: Tensor) -> Tensor:
    """Convolution, bias and residual, channels-last."""
    d = case.weight.dilation
    y = F.conv2d(activated, case.full, None, padding=d * (case.weight.kernel[0] // 2), dilation=d)
    return y + case.bias.to(y.dtype)[:, :, None, None] + case.residual.permute(0, 3, 1, 2)


def torch_block(case: Tensors) -> None:
    scale, offset = (t[:, :, None, None].to(case.joined.dtype) for t in (case.scale, case.offset))
    y = _plain(case, F.gelu(torch.addcmul(offset, case.joined, scale)))
    torch.var_mean(y.float(), dim=(2, 3))


def applied_block(case: Tensors) -> None:
    group_norm_apply.OP(case.x, case.x2, case.scale, case.offset, "gelu", "none", case.applied.permute(0, 2, 3, 1))
    y = _plain(case, case.applied).permute(0, 2, 3, 1).contiguous()
    group_norm_moments.OP(y, case.tile_pixels, case.moments(case.tile_pixels))


def cuda_block_rivals(shape, dtype, kernel_size: int, dilation: int) -> dict:
    """The half block in each of the CUDA kernel's tiles that leaves moments, in the shape with the longest run of
    them; {} where it is not available."""
    if conv2d.OP.status("cuda")["cuda"]:
        return {}
    reach = dilation * (kernel_size // 2)
    if reach == 0:
        shape = (shape[0], 1, shape[1] * shape[2], shape[3])
    run = conv2d.OP.implementations["cuda"].run
    rivals = {}
    for tile in conv2d_cuda.tiles_on(torch.device("cuda"), dtype):
        places = conv2d_cuda.shapes_of(tile, reach, conv2d_cuda.capability_of(torch.device("cuda")))
        runs = {place: conv2d_cuda.moment_tile(shape, (), reach, place) for place in places}
        if not any(runs.values()):
            continue
        place = max(runs, key=runs.get)

        def call(case: Tensors, place=place, pixels=runs[place]) -> None:
            run(
                case.x, case.x2, case.weight, case.bias, case.scale, case.offset, "gelu", "none", case.residual, "none",
                "none", case.y, case.moments(pixels), pixels, placement=place,
            )  # fmt: skip

        rivals[f"cuda {tile.name} {place.width} wide, moments of {runs[place]}"] = call
    return rivals


def cuda_rivals(shape, dtype, kernel_size: int, dilation: int) -> dict:
    """The CUDA kernel in each tile that is legal here, without and with a prologue; {} where it is not available."""
    if conv2d.OP.status("cuda")["cuda"]:
        return {}
    reach = dilation * (kernel_size // 2)
    if reach == 0:
        shape = (shape[0], 1, shape[1] * shape[2], shape[3])
    capability = conv2d_cuda.capability_of(torch.device("cuda"))
    run = conv2d.OP.implementations["cuda"].run

    def rival(place, chain: bool, half_sums: bool = False):
        def call(case: Tensors) -> None:
            prologue = (case.scale, case.offset, "gelu") if chain else (None, None, "none")
            run(
                case.x, case.x2, case.weight, case.bias, *prologue, "none", None, "none", "gelu", case.y, None, 0,
                placement=place, half_sums=half_sums,
            )  # fmt: skip

        return call

    rivals = {}
    tiles = conv2d_cuda.tiles_on(torch.device("cuda"), dtype)
    for place in conv2d_cuda.placements(shape[1:3], reach, capability, tiles=tiles):
        name = f"cuda {place.tile.name}"
        rivals |= {name: rival(place, False), f"{name} chain": rival(place, True)}
        if dtype == torch.float16 and place.tile.name == "128x64":
            rivals[f"{name} half sums"] = rival(place, False, True)
    return rivals


def compilations():
    """Yield (label, kernel, signature, constants, options): every configuration and type, and the shapes above.

    The first is what the quick check of the tests compiles.
    """
    for configuration in HALF_CONFIGURATIONS:
        for dtype in (torch.float16, torch.bfloat16):
            yield compilation(configuration, dtype, (128,), 128, residual="none")
    for configuration in SINGLE_CONFIGURATIONS:
        for precision in ("ieee", "tf32"):
            yield compilation({**configuration, "PRECISION": precision}, torch.float32, (128,), 128, residual="none")
    for size, sources, outputs, kernel_size, dilation in SHAPES:
        chosen = configuration_for((*size, outputs), torch.float16)
        yield compilation(chosen, torch.float16, sources, outputs, kernel_size, dilation)
    widest = HALF_CONFIGURATIONS[0]
    for sources in ((128,), (128, 128)):
        for resample in conv2d.RESAMPLES:
            changes = dict(resample=resample, prologue="gelu", residual=resample)
            yield compilation(widest, torch.float16, sources, 128, **changes)
    for configuration in HALF_CONFIGURATIONS:
        for dtype in (torch.float16, torch.bfloat16):
            changes = dict(prologue="gelu", residual="none", eight_bits=True)
            yield compilation(configuration, dtype, (128,), 128, **changes)
            yield compilation(configuration, dtype, (128, 128), 128, **changes)
    for resample in ("up", "down"):
        yield compilation(
            widest, torch.float16, (128,), 128, resample=resample, prologue="gelu", residual=resample, eight_bits=True
        )


def compilation(
    configuration, dtype, sources, outputs, kernel_size=3, dilation=1, resample="none", prologue="none", residual="",
    eight_bits=False,
):  # fmt: skip
    scaled = prologue != "none"
    options = launch_options(configuration, sources, resample, scaled, eight_bits)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    constants = dict(
        C1=sources[0], C2=sum(sources[1:]), OUTPUTS=outputs, K=kernel_size, DILATION=dilation, RESAMPLE=resample,
        PROLOGUE=prologue, RESIDUAL=residual, ACT="gelu", WIDEN=False, **options,
    )  # fmt: skip
    constants |= dict.fromkeys(["x2"] if len(sources) == 1 else [])
    constants |= dict.fromkeys([] if scaled else ["scale", "offset"]) | dict.fromkeys([] if residual else ["residual"])
    constants |= dict.fromkeys([] if eight_bits else ["unit", "per_step"])
    activations = ("x", "x2", "weight", "residual", "y")
    types = dict.fromkeys(conv2d_kernel.arg_names, "i32") | dict.fromkeys(activations, "*" + TRITON_TYPES[dtype])
    types |= dict.fromkeys(("bias", "scale", "offset", "moments", "unit"), "*fp32") | {"per_step": "fp32"}
    types |= ({"weight": "*fp8e4nv"} if eight_bits else {}) | dict.fromkeys(constants, "constexpr")
    pitches = dict(pitch=sources[0], pitch2=sources[-1], pitch_residual=outputs, pitch_y=outputs, pitch_bias=outputs)
    whole = {name for name, size in pitches.items() if size % 16 == 0} | {"height", "width", "height_in", "width_in"}
    divisible = [name for name, kind in types.items() if kind.startswith("*") or name in whole]
    label = (
        f"{TRITON_TYPES[dtype]} {options['BLOCK_M']}x{options['BLOCK_N']}x{options['BLOCK_K']} "
        f"{'+'.join(map(str, sources))}-{outputs} {kernel_size}x{kernel_size}"
    )
    label += f"/{dilation}" if dilation > 1 else ""
    label += f" {options['PRECISION']}" if dtype == torch.float32 else ""
    label += f" {prologue} {resample}" if scaled else ""
    label += " fp8" if eight_bits else ""
    signature = {name: types[name] for name in conv2d_kernel.arg_names}
    return label, conv2d_kernel, signature, constants, dict(num_warps=warps, num_stages=stages, divisible=divisible)
