"""The numeric contract of an op (DESIGN section 3): what it wrote against its reference in float64, on the very inputs
that it read. An error is at most twice that of the same in torch, at the same dtypes, plus `FLOOR`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dfengine.engine.execute import Executor
from dfengine.engine.program import Constant, Op, Value
from dfengine.kernels import OPS, group_norm_moments
from dfengine.kernels.conv_weight import ConvWeight

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of an op's error beside the largest value of the output, by its dtype."""
MEAN_FLOOR, SPREAD_FLOOR = 2e-6, 1e-5
"""Of the moments of tiles: of means beside the largest value they are of, of sums of squares beside the largest."""


def contents(op: Op, executor: Executor, placed: Op | None = None) -> dict[str, Any]:
    """The arguments of an op in the first step of its loop: copies of what its buffers hold, and its constants.

    placed: the op of the executor's program whose buffers are meant, where `op` is that of a twin.
    """
    values = (placed or op).arguments
    return {
        name: executor.tensor(values[name]).clone() if isinstance(values[name], Value) else _content(argument)
        for name, argument in zip(op.arguments, op.at(0), strict=True)
    }


def _content(argument: Any) -> Any:
    return argument.content if isinstance(argument, Constant) else argument


def _is_input(value: Value) -> bool:
    return value.buffer.role == "input"


def _exact(argument: Any) -> Any:
    """In float64; the program's inputs keep their dtypes, which say what they are."""
    if isinstance(argument, ConvWeight):
        return argument if argument.quantization else ConvWeight(argument.taps().double(), argument.dilation)
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument


def _through(run: Callable[..., None], op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What `run` writes, by name; into new tensors."""
    given = {n: torch.empty_like(a) if n in op.writes and a is not None else a for n, a in arguments.items()}
    run(*given.values())
    return {name: given[name] for name in op.writes if given[name] is not None}


def exact_outputs(op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What the op's reference writes for `contents` in float64, by name."""
    as_read = {name for name, value in op.arguments.items() if isinstance(value, Value) and _is_input(value)}
    exact = {name: a if name in as_read else _exact(a) for name, a in arguments.items()}
    return _through(OPS[op.kernel].implementations["reference"].run, op, exact)


def torch_outputs(op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """At the arguments' own dtypes, by torch's library where it has the op: it rounds elsewhere than the reference."""
    known = OPS[op.kernel].implementations
    quantized = any(isinstance(a, ConvWeight) and a.quantization for a in arguments.values())
    return _through(known["reference" if quantized or "library" not in known else "library"].run, op, arguments)


def judged(
    op: Op, written: dict[str, Tensor], exact: dict[str, Tensor], plain: dict[str, Tensor], arguments: dict[str, Any]
) -> Iterator[tuple[str, float, float]]:
    """(output, error, allowed) of what the op wrote."""
    for name, got in written.items():
        if name == "workspace":
            continue
        if name == "moments":
            x = written.get("y", arguments.get("x"))  # those of what was written, as it was rounded
            yield from _judged_moments(got, x, arguments["tile_pixels"])
        elif got.dtype == torch.bool:
            wanted = written["pred_score"] > arguments["threshold"]
            yield name, float((got != wanted).sum()), 0.0
        else:
            error, torch_error = (distance(of, exact[name]) for of in (got, plain[name]))
            yield name, error, 2 * torch_error + FLOOR[got.dtype] * largest(exact[name])


def _judged_moments(got: Tensor, x: Tensor, tile_pixels: int) -> Iterator[tuple[str, float, float]]:
    exact, plain = (group_norm_moments.reference(of, tile_pixels) for of in (x.double(), x))
    floors = MEAN_FLOOR * largest(x), SPREAD_FLOOR * largest(exact[:, :, 1]) + 1e-9
    for part, (name, floor) in enumerate(zip(("means", "spreads"), floors, strict=True)):
        error, torch_error = (distance(of[:, :, part], exact[:, :, part]) for of in (got, plain))
        yield f"moments, {name}", error, 2 * torch_error + floor


def distance(result: Tensor, exact: Tensor) -> float:
    """The largest where `exact` is finite, which it is unless the op read what is not: then an op before is to blame.
    Not a number where only `result` holds none."""
    return torch.where(exact.isfinite(), (result.double() - exact).abs(), 0.0).max().item()


def largest(exact: Tensor) -> float:
    """The largest finite absolute value."""
    return torch.where(exact.isfinite(), exact.abs(), 0.0).max().item()
