"""A program against its definition: each op against the reference of its kernel, its blocks and maps against the
modules, all in float64 (DESIGN section 3, "Numerics")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfengine.engine.exact import ExactRunner, module_ops, watched
from dfengine.engine.execute import Executor
from dfengine.engine.measure import place, trial_inputs
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.program import Constant, Op, Program, Value
from dfengine.engine.runner import ProgramRunner
from dfengine.kernels import OPS, conv2d_cpu, group_norm_moments
from dfengine.kernels.conv2d import ConvWeight
from dfengine.models import Model

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of an op's error beside the largest value of the output, by its dtype."""
MEAN_FLOOR, SPREAD_FLOOR = 2e-6, 1e-5
"""Of the moments of tiles: of means beside the largest value they are of, of sums of squares beside the largest."""
BLOCK_FLOOR = {"float32": 1e-4, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3}
"""Of a block's error, with those of all ops before it, beside the largest value of its output, by precision."""
SINGLE_MAP, HALF_MAP = 1e-4, 1e-3
"""Of the map in float32; in other precisions beyond twice the error of the modules in that precision."""


@dataclass(frozen=True)
class Check:
    """The largest error of one output. kind: "op" (against the reference, on the inputs that the op read), "block"
    (against the module) or "map"; index, name, kernel, backend: of the op that wrote it."""

    kind: str
    index: int
    name: str
    kernel: str
    backend: str
    output: str
    error: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed  # what is not a number does not

    @property
    def share(self) -> float:
        """Error beside what is allowed; infinite where the error is not a number."""
        if self.agrees:
            return self.error / self.allowed if self.allowed else 0.0
        return self.error / self.allowed if self.error < torch.inf and self.allowed else torch.inf

    def __str__(self) -> str:
        where = {"op": "of its reference", "block": "of the modules", "map": "of the modules"}[self.kind]
        return (
            f"{self.kind} {self.name} ({self.kernel}, {self.backend}): {self.output} is {self.error:.3g} from that "
            f"{where} in float64, allowed {self.allowed:.3g}"
        )


def first_divergence(checks: list[Check]) -> Check | None:
    """The failed check of the earliest op, the op's own before that of the block that it ends."""
    failed = [check for check in checks if not check.agrees]
    return min(failed, key=lambda check: (check.index, check.kind != "op"), default=None)


@torch.inference_mode()
def verify(runner: ProgramRunner, model: Model, batch: int = 2) -> list[Check]:
    """Every check of the runner's program for `batch` trial images. model: another copy of the runner's, left in
    float64.

    An op errs at most by twice the error of the same in torch, at the same dtypes, plus `FLOOR`; a block by twice that
    of the modules at the runner's precision plus `BLOCK_FLOOR`; the map as in `SINGLE_MAP`, `HALF_MAP`.
    """
    executor = runner.executor(batch)
    inputs = trial_inputs(executor)
    kept = {op.name: None for _, ops in module_ops(model, executor.program) for op in ops}
    checks = []
    for op, found in check_ops(executor, runner.twin(model, batch), inputs):
        checks += found
        if op.name in kept:
            kept[op.name] = executor.tensor(op.arguments["y"]).clone()
    anomaly_map = _result(executor, "anomaly_map").clone()
    return checks + _check_modules(runner, model, executor, kept, anomaly_map, inputs["images"])


def _result(executor: Executor, name: str) -> Tensor:
    return next(executor.tensor(Value(b)) for b in executor.program.buffers if b.role == "output" and b.name == name)


# ---- ops ---------------------------------------------------------------------------------------------------------


def check_ops(executor: Executor, twin: Program, inputs: dict[str, Tensor]) -> Iterator[tuple[Op, list[Check]]]:
    """Runs the program op by op and gives each op with its checks, while what it wrote is in place.

    twin: the same program with constants that no backend made its own. Raises ValueError where it is another one.
    """
    place(executor, inputs)
    for index, ((op, call), other) in enumerate(zip(executor.steps(), twin.ops, strict=True)):
        if (op.name, op.kernel, list(op.arguments)) != (other.name, other.kernel, list(other.arguments)):
            raise ValueError(f"op {index} is {op.name}, in the twin {other.name}")
        arguments = {
            name: executor.tensor(value).clone() if isinstance(value, Value) else _content(other.arguments[name])
            for name, value in op.arguments.items()
        }
        written = {n: executor.tensor(op.arguments[n]) for n in op.writes if op.arguments[n] is not None}
        for tensor in written.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)  # what the op does not write cannot pass
        call()
        as_read = {name for name, value in op.arguments.items() if isinstance(value, Value) and _is_input(value)}
        exact = _through_reference(op, {n: a if n in as_read else _exact(a) for n, a in arguments.items()})
        plain = _through_torch(op, arguments)
        backend = executor.backends[op.name]
        yield op, [
            Check("op", index, op.name, op.kernel, backend, output, error, allowed)
            for output, error, allowed in _judged(op, written, exact, plain, arguments)
        ]


def _content(argument: Any) -> Any:
    return argument.content if isinstance(argument, Constant) else argument


def _is_input(value: Value) -> bool:
    return value.buffer.role == "input"


def _exact(argument: Any) -> Any:
    """In float64; the program's inputs keep their dtypes, which say what they are."""
    if isinstance(argument, ConvWeight):
        return ConvWeight(argument.taps().double(), argument.dilation)
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument


def _through(run: Callable[..., None], op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What `run` writes, by name; into new tensors."""
    given = {n: torch.empty_like(a) if n in op.writes and a is not None else a for n, a in arguments.items()}
    run(*given.values())
    return {name: given[name] for name in op.writes if given[name] is not None}


def _through_reference(op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
    return _through(OPS[op.kernel].implementations["reference"].run, op, arguments)


def _through_torch(op: Op, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """At the arguments' own dtypes: torch's convolution rounds what it reads, which the reference does not."""
    if op.kernel == "conv2d":
        return _through(conv2d_cpu.run_library, op, arguments)
    return _through_reference(op, arguments)


def _judged(
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
            error, torch_error = (_distance(of, exact[name]) for of in (got, plain[name]))
            yield name, error, 2 * torch_error + FLOOR[got.dtype] * _largest(exact[name])


def _judged_moments(got: Tensor, x: Tensor, tile_pixels: int) -> Iterator[tuple[str, float, float]]:
    exact, plain = (group_norm_moments.reference(of, tile_pixels) for of in (x.double(), x))
    floors = MEAN_FLOOR * _largest(x), SPREAD_FLOOR * _largest(exact[:, :, 1]) + 1e-9
    for part, (name, floor) in enumerate(zip(("means", "spreads"), floors, strict=True)):
        error, torch_error = (_distance(of[:, :, part], exact[:, :, part]) for of in (got, plain))
        yield f"moments, {name}", error, 2 * torch_error + floor


def _distance(result: Tensor, exact: Tensor) -> float:
    """The largest where `exact` is finite, which it is unless the op read what is not: then an op before is to blame.
    Not a number where only `result` holds none."""
    return torch.where(exact.isfinite(), (result.double() - exact).abs(), 0.0).max().item()


def _largest(exact: Tensor) -> float:
    return torch.where(exact.isfinite(), exact.abs(), 0.0).max().item()


# ---- modules -----------------------------------------------------------------------------------------------------


def _check_modules(
    runner: ProgramRunner,
    model: Model,
    executor: Executor,
    kept: dict[str, Tensor],
    anomaly_map: Tensor,
    images: Tensor,
) -> list[Check]:
    """Blocks, by what the ops `kept` wrote, and the map, against the modules in float64."""
    program, precision, backends = executor.program, runner.precision, executor.backends
    plain: dict[tuple[str, int], Tensor] = {}
    found: dict[str, list[tuple[float, float, float]]] = {}

    def keep(op: Op, first: int, output: Tensor) -> None:
        plain[op.name, first] = output.clone()

    def compare(op: Op, first: int, exact: Tensor) -> None:
        got = kept[op.name][first : first + len(exact)]
        errors = _distance(got, exact), _distance(plain.pop((op.name, first)), exact)
        found.setdefault(op.name, []).append((*errors, _largest(exact)))

    runners = (ModuleRunner, dict(precision=precision), keep), (ExactRunner, {}, compare)
    maps = []
    for kind, options, take in runners:
        modules = kind(model, runner.device, seed=runner.seed, **options)
        with watched(module_ops(model, program), take):
            maps.append(modules.run(images).anomaly_map)
    checks = []
    for index, op in enumerate(program.ops):
        if op.name in found:
            # By torch, whose largest value is not a number where one of them is not.
            error, torch_error, scale = torch.tensor(found[op.name], dtype=torch.float64).amax(dim=0).tolist()
            allowed = 2 * torch_error + BLOCK_FLOOR[precision] * scale
            checks.append(Check("block", index, op.name, op.kernel, backends[op.name], "y", error, allowed))
    last = program.ops[-1]
    error, torch_error = (_distance(of, maps[1]) for of in (anomaly_map, maps[0]))
    allowed = SINGLE_MAP if precision == "float32" else 2 * torch_error + HALF_MAP
    return [
        *checks,
        Check("map", len(program.ops), last.name, last.kernel, backends[last.name], "anomaly_map", error, allowed),
    ]
