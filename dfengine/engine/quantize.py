"""Precisions of eight bits (kernels/quantization.py): which convolutions multiply in them, and what ranges these read.

Those of 3x3 and many channels in the reconstruction network, which has most of the products: that changes maps by less
than half precision does. The segmentation network has none: there the same rounding changes them far more. What is
multiplied stays in memory in half precision, and is rounded by the kernel. Ranges are measured once, in float32 on
normal images, and kept in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dfengine.engine.execute import Executor
from dfengine.engine.measure import place
from dfengine.engine.program import Constant, Program
from dfengine.kernels import CannotRunError
from dfengine.kernels.conv2d import multiplied
from dfengine.kernels.conv_weight import ConvWeight
from dfengine.kernels.quantization import FORMATS, Quantization

LEAST_CHANNELS = 16
"""Of the inputs and of the outputs; the first and the last convolution of a network have fewer."""

Ranges = Mapping[str, tuple[float, float]]
"""(low, high) of what a convolution multiplies, by the name of its weight in the program."""


def quantizations(precision: str, ranges: Ranges | None) -> dict[str, Quantization] | None:
    """What `Lowering` takes for a precision: of eight bits, all of `ranges`; else None. Raises ValueError for a
    precision of eight bits without ranges."""
    if precision not in FORMATS:
        return None
    if not ranges:
        raise ValueError(f"{precision}: without the ranges of what is rounded")
    return {name: Quantization(precision, low, high) for name, (low, high) in ranges.items()}


@torch.inference_mode()
def measured_ranges(executor: Executor, images: Tensor) -> dict[str, tuple[float, float]]:
    """The ranges that `images`, float32 (N, S, S, C) in [0, 1], have in a program for one image, in all steps of its
    loops."""
    ranges: dict[str, tuple[float, float]] = {}
    threshold = torch.full((1,), torch.inf, device=executor.device)
    for image in images.to(executor.device):
        place(executor, {"images": image[None], "threshold": threshold})
        for index, call in executor.steps():
            op = executor.program.ops[index]
            if op.kernel == "conv2d" and _serves(op.arguments["weight"]):
                x, x2, _, _, scale, offset, act, resample, *_ = executor.arguments(op)
                p, name = multiplied(x, x2, scale, offset, act, resample), op.arguments["weight"].name
                low, high = ranges.get(name, (0.0, 1e-6))  # a range holds 0, which pads the image, and is not empty
                ranges[name] = min(low, float(p.min())), max(high, float(p.max()))
            call()
    return ranges


def check_ranges(program: Program, ranges: Ranges) -> None:
    """Raises CannotRunError where `ranges` are not those of the convolutions that are meant to have some."""
    constants = [op.arguments["weight"] for op in program.ops if op.kernel == "conv2d"]
    wanted = {constant.name for constant in constants if _serves(constant)}
    if wanted != set(ranges):
        missing, foreign = len(wanted - set(ranges)), len(set(ranges) - wanted)
        reason = f"{missing} convolutions have none, {foreign} are of no convolution"
        raise CannotRunError(f"the ranges of a precision of eight bits are not of this model: {reason}")


def _serves(constant: Constant) -> bool:
    weight: ConvWeight = constant.content
    large = weight.kernel == (3, 3) and min(weight.inputs, weight.outputs) >= LEAST_CHANNELS
    return large and not constant.name.startswith("segment.")
