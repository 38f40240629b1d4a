"""conv2d on the CPU: packing of the weight and the launcher of csrc/cpu/conv2d.cpp (formula: kernels/conv2d.py).

The GEMM takes a block of output channels at a time and reads its weights in order: (blocks, K K C', B), with C' the
padded channels and B the outputs of a block; where it multiplies bfloat16, channels come in pairs:
(blocks, K K C' / 2, B, 2), and bytes in fours. Up to four outputs of float32 are one block of 1, 2 or 4:
(K K C' / 16, B, 16). A product is how it multiplies: float32 vectors (every type, every
processor), pairs of bfloat16 (AVX512_BF16) or tiles of them (AMX-BF16), and for a quantized weight fours of bytes
(AVX512_VNNI) or tiles of them (AMX-INT8).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine import native
from dfengine.kernels import registry
from dfengine.kernels.conv2d import ACTIVATIONS, OP, RESAMPLES, can_run
from dfengine.kernels.conv_weight import ConvWeight
from dfengine.kernels.registry import CannotRunError
from dfengine.kernels.slices import TYPES, pixel_stride

PRODUCTS = {"float32": 0, "pairs": 1, "tiles": 2, "fours": 3, "byte_tiles": 4}
"""Codes of csrc/cpu/product.h."""
BYTE_PRODUCTS = ("byte_tiles", "fours")
"""Those of bytes, the quickest first."""
PER_WORD = {"float32": 1, "pairs": 2, "tiles": 2, "fours": 4, "byte_tiles": 4}
"""Channels in 32 bits of the band."""


@functools.cache
def byte_products() -> tuple[str, ...]:
    """Those of `BYTE_PRODUCTS` that this processor has."""
    if not hasattr(native.module, "product_supported"):  # missing, or built without this op
        return ()
    return tuple(name for name in BYTE_PRODUCTS if native.module.product_supported(PRODUCTS[name]))


def padded_channels(channels: int, product: str, kernel: int) -> int:
    """Channels of a pixel in the band: whole words, and many times eight where that costs little; for the tiles whole
    cache lines, so that none of their rows lies in two, where a quarter more is enough; a 1x1 kernel may read x where
    it is."""
    word = PER_WORD[product]
    if channels <= 16:
        return -(-channels // word) * word
    line = 16 * word
    whole = -(-channels // line) * line
    if product.endswith("tiles") and kernel > 1 and 4 * whole <= 5 * channels:
        return whole
    return -(-channels // 8) * 8


def block_outputs(outputs: int, product: str, level: str, padded: int) -> int:
    """Output channels of a block: 32, or 16 where that leaves fewer idle, and where vectors are short; or up to 4."""
    if product == "float32" and outputs <= 4 and padded % 16 == 0:
        return 1 << (outputs - 1).bit_length()
    wide = product != "float32" or native.module is None or level.startswith("avx512")
    return 32 if wide and (-(-outputs // 16) % 2 == 0 or outputs > 128) else 16


def pack(packed: Tensor, product: str, block: int) -> Tensor:
    """The weight (KH, KW, C, O) in the order of the module's docstring, zeros where there is no channel or output."""
    kernel_height, _, channels, outputs = packed.shape
    padded, blocks, word = padded_channels(channels, product, kernel_height), -(-outputs // block), PER_WORD[product]
    weight = F.pad(packed, (0, blocks * block - outputs, 0, padded - channels))
    weight = weight.reshape(-1, blocks, block).permute(1, 0, 2)
    if block <= 4:
        return weight.to(torch.float32).reshape(-1, 16, block).transpose(1, 2).contiguous()
    if word == 1:
        return weight.to(torch.float32).contiguous()
    return weight.reshape(blocks, -1, word, block).transpose(2, 3).contiguous()


def pack_bytes(weight: ConvWeight, product: str, block: int) -> tuple[Tensor, Tensor]:
    """`pack` of the quantized weight, int8, and its factors, float32 (2, blocks * block): with z what stands for 0, the
    sum s of bytes means factors[0] s + factors[1], for what each byte is more than it means."""
    taps, rounding = weight.taps(), weight.quantization
    meaning = weight.unit * rounding.step
    factors = torch.stack((meaning, -rounding.zero * taps.sum(dim=(0, 1, 2), dtype=torch.float32) * meaning))
    return pack(taps, product, block), F.pad(factors, (0, -weight.outputs % block))


@functools.cache
def best_level() -> str:
    """The instruction set taken here by default."""
    return [name for name, usable in native.cpu_levels().items() if usable][-1]


@functools.cache
def default_product(dtype: torch.dtype) -> str:
    """The product taken here for activations of this dtype."""
    if not hasattr(native.module, "product"):
        return "float32"
    code = native.module.product(TYPES[dtype])
    return next(name for name, known in PRODUCTS.items() if known == code)


@dataclass(frozen=True)
class Prepacked:
    """A weight as the kernel reads it: `pack` or `pack_bytes` of it, channels of a pixel in the band, outputs of a
    block, and how its input becomes bytes."""

    weights: Tensor
    factors: Tensor | None
    padded: int
    block: int
    steps: tuple[float, float]


def prepacked(weight: ConvWeight, product: str, level: str) -> Prepacked:
    """Made once."""
    key = f"cpu {product} {level}"
    if key not in weight.prepacked:
        padded = padded_channels(weight.inputs, product, weight.kernel[0])
        block = block_outputs(weight.outputs, product, level, padded)
        if product in BYTE_PRODUCTS:
            rounding = weight.quantization
            made = Prepacked(*pack_bytes(weight, product, block), padded, block, (1 / rounding.step, rounding.zero))
        else:
            made = Prepacked(pack(weight.taps(), product, block), None, padded, block, (1.0, 0.0))
        weight.prepacked[key] = made
    return weight.prepacked[key]


def _pitch(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return tensor.stride(2) if tensor.shape[2] > 1 else pixel_stride("", tensor)


def _call(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments,
    tile_pixels, level="", product="",
):  # fmt: skip
    level, product = (
        level or best_level(),
        product or (byte_products()[0] if weight.quantization else default_product(x.dtype)),
    )
    form = prepacked(weight, product, level)
    return native.module.Conv2d(
        (*y.shape, x.shape[3], weight.inputs - x.shape[3]), (_pitch(x), _pitch(x2), _pitch(residual), _pitch(y)),
        (
            TYPES[x.dtype], RESAMPLES[resample], RESAMPLES[residual_resample], ACTIVATIONS[prologue_act],
            ACTIVATIONS[act], PRODUCTS[product],
        ),
        weight.packed.shape[0], weight.dilation,
        tuple(map(native.address, (x, x2, residual, y, scale, offset, bias, moments, form.weights, form.factors))),
        form.steps, weight.outputs if bias is not None and bias.ndim == 2 else 0, tile_pixels, form.padded, form.block,
        level,
    )  # fmt: skip


def run_native(*args, level: str = "", product: str = "") -> None:
    """The compiled kernel, at the best instruction set and with the best product unless they are named."""
    _call(*args, level=level, product=product).run(torch.get_num_threads())


def bind(*args, level: str = "", product: str = "") -> native.Bound:
    """The op on these very tensors, as a function to call again and again: about 1 us a call beside the kernel.

    For buffers that stay where they are; what they hold may change, the weight may not.
    """
    return native.Bound(_call(*args, level=level, product=product), args)


def _bind_cpu(x, x2, weight, *rest, **options) -> native.Bound:
    """As `bind`; a disposable weight is then held in one form only."""
    run = bind(x, x2, weight, *rest, **options)
    if weight.disposable:
        weight.release()
    return run


def _can_run(x, x2, weight, *rest) -> None:
    can_run(x, x2, weight, *rest)
    rounding = weight.quantization
    if rounding is None:
        return
    if rounding.format != "int8":
        raise CannotRunError(f"a product in {rounding.format} needs a GPU")
    if x.dtype != torch.bfloat16:
        raise CannotRunError(f"x: {x.dtype}; the products of bytes take bfloat16")
    if 255 * 127 * weight.kernel[0] * weight.kernel[1] * weight.inputs >= 2**31:
        raise CannotRunError(f"weight: sums over {weight.inputs} channels do not fit int32")
    if not byte_products():
        raise CannotRunError("this processor has neither AVX512_VNNI nor AMX-INT8")


def _configurations(x, x2, weight, *_args) -> list[dict]:
    """Every product that serves here, the one taken by default first."""
    if weight.quantization:
        return [{"product": product} for product in byte_products()]
    if x.dtype != torch.bfloat16:
        return [{}]
    whole = [product for product in PRODUCTS if product not in BYTE_PRODUCTS]
    known = sorted(whole, key=lambda product: product != default_product(x.dtype))
    return [{"product": product} for product in known if native.module.product_supported(PRODUCTS[product])]


OP.register("cpu", run_native, registry.cpu_available("Conv2d"), _can_run, _bind_cpu, _configurations)
