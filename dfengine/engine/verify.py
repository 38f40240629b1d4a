"""A program against its definition: each op against the reference of its kernel, its blocks and maps against the
modules, all in float64 (DESIGN section 3, "Numerics")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dfengine.engine.contract import contents, distance, exact_outputs, judged, largest, torch_outputs
from dfengine.engine.exact import ExactRunner, module_ops, watched
from dfengine.engine.execute import Executor
from dfengine.engine.measure import place, trial_inputs
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.program import Op, Program, Value
from dfengine.engine.runner import ProgramRunner
from dfengine.kernels.quantization import FORMATS
from dfengine.models import Model

BLOCK_FLOOR = {"float32": 1e-4, "tf32": 1e-3, "float16": 1e-3, "bfloat16": 8e-3, "int8": 0.02, "fp8": 0.05}
"""Of a block's error, with those of all ops before it, beside the largest value of its output, by precision."""
SINGLE_MAP, HALF_MAP, EIGHT_BIT_MAP = 1e-4, 1e-3, 0.05
"""Of the map in float32; in other precisions beyond twice the error of the modules in that precision, or for those of
eight bits in the half precision of their buffers."""


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
    of the modules at the runner's precision plus `BLOCK_FLOOR`; the map as in `SINGLE_MAP`, `HALF_MAP`. The blocks of a
    loop are left to these.
    """
    executor = runner.executor(batch)
    inputs = trial_inputs(executor)
    blocks = [] if executor.program.loops else module_ops(model, executor.program)
    kept = {op.name: None for _, ops in blocks for op in ops}
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
    """Runs the program op by op and gives each op with its checks, while what it wrote is in place; those of a loop in
    its first step.

    twin: the same program with constants that no backend made its own. Raises ValueError where it is another one.
    """
    place(executor, inputs)
    if len(executor.program.ops) != len(twin.ops):
        raise ValueError(f"{len(executor.program.ops)} ops, in the twin {len(twin.ops)}")
    seen: set[int] = set()
    for index, call in executor.steps():
        if index in seen:
            call()
            continue
        seen.add(index)
        op, other = executor.program.ops[index], twin.ops[index]
        if (op.name, op.kernel, list(op.arguments)) != (other.name, other.kernel, list(other.arguments)):
            raise ValueError(f"op {index} is {op.name}, in the twin {other.name}")
        arguments = contents(other, executor, op)
        written = {n: executor.tensor(op.arguments[n]) for n in op.writes if op.arguments[n] is not None}
        for name, tensor in written.items():
            if tensor.is_floating_point() and name not in op.in_place:
                tensor.fill_(torch.nan)  # what the op does not write cannot pass
        call()
        exact = exact_outputs(op, arguments)
        plain = torch_outputs(op, arguments)
        backend = executor.backends[op.name]
        yield op, [
            Check("op", index, op.name, op.kernel, backend, output, error, allowed)
            for output, error, allowed in judged(op, written, exact, plain, arguments)
        ]


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
        errors = distance(got, exact), distance(plain.pop((op.name, first)), exact)
        found.setdefault(op.name, []).append((*errors, largest(exact)))

    runners = (ModuleRunner, dict(precision=precision), keep), (ExactRunner, {}, compare)
    maps = []
    for kind, options, take in runners:
        modules = kind(model, runner.device, seed=runner.seed, **options)
        with watched([] if program.loops else module_ops(model, program), take):
            maps.append(modules.run(images).anomaly_map)
    checks = []
    for index, op in enumerate(program.ops):
        if op.name in found:
            # By torch, whose largest value is not a number where one of them is not.
            error, torch_error, scale = torch.tensor(found[op.name], dtype=torch.float64).amax(dim=0).tolist()
            allowed = 2 * torch_error + BLOCK_FLOOR[precision] * scale
            checks.append(Check("block", index, op.name, op.kernel, backends[op.name], "y", error, allowed))
    last = program.ops[-1]
    error, torch_error = (distance(of, maps[1]) for of in (anomaly_map, maps[0]))
    floor = EIGHT_BIT_MAP if precision in FORMATS else HALF_MAP
    allowed = SINGLE_MAP if precision == "float32" else 2 * torch_error + floor
    return [
        *checks,
        Check("map", len(program.ops), last.name, last.kernel, backends[last.name], "anomaly_map", error, allowed),
    ]
