"""Finds the tactics of a program by measurement on its device.

The program runs op by op on trial images, so that each op finds what it will find in use. Where an op has several
implementations or configurations, each runs on these inputs into outputs of not-a-number and is held to the numeric
contract (`dfengine.engine.contract`); those that meet it are timed in turn, and the quickest is recorded.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dfengine.devices import processors
from dfengine.engine.contract import contents, exact_outputs, judged, torch_outputs
from dfengine.engine.execute import Executor
from dfengine.engine.measure import place, trial_inputs
from dfengine.engine.program import Op, Value
from dfengine.engine.tactics import Tactic, Tactics, signature
from dfengine.engine.timing import interleaved, on_cuda
from dfengine.errors import DfengineError
from dfengine.kernels import OPS, PRIORITY
from dfengine.kernels.triton_import import compile_ahead

log = logging.getLogger("dfengine")

LEVELS = ("tuned", "exhaustive")
SECONDS = {"tuned": 0.03, "exhaustive": 0.3}
"""For timing the candidates of one op, and as many again for confirming the quickest; at least five calls of each."""
WORTH = 0.97
"""What is quicker than the default by less is noise, and the default stays."""
CONFIRMED = 3
"""Of the candidates that are quicker than the default, so many are at most compared with it once more, alone, each for
a share of the time, until one is quicker again."""
COMPILED_AHEAD = 64
"""Candidates in Triton, of one op and those after it, that are compiled side by side before the op is measured."""
HOPELESS = 2.0
"""Candidates that take so many times as long as the best in their first calls are dropped, unless exhaustive."""


@dataclass(frozen=True)
class Choice:
    """What was found for an op. default: the microseconds of what is taken without tactics; refused: candidates whose
    results were wrong, with the reasons; tried: how many were right."""

    op: Op
    tactic: Tactic
    default: float
    tried: int
    refused: tuple[str, ...] = ()


def candidates(op: Op, arguments: list[Any], device: str, exhaustive: bool = False) -> Iterator[Tactic]:
    """Every way to run these arguments on the device, what is taken without tactics first."""
    kernel = OPS[op.kernel]
    found = 0
    for backend in PRIORITY[device]:
        implementation = kernel.implementations.get(backend)
        if implementation is None or (backend == "reference" and found and not exhaustive):
            continue
        try:
            implementation.available(device)
            implementation.can_run(*arguments)
            configurations = list(implementation.configurations(*arguments))
        except DfengineError:
            continue
        if not found and {} not in configurations:
            configurations.insert(0, {})  # what is taken without tactics
        found += len(configurations)
        yield from (Tactic(backend, options) for options in configurations)


@torch.inference_mode()
def tune(
    executor: Executor, tactics: Tactics, level: str = "tuned", seconds: float | None = None
) -> tuple[list[Choice], int]:
    """Measure every op of the executor's program that `tactics` does not know, and record what is quickest.

    level: "tuned", or "exhaustive": also the reference, every candidate to the end, and ops already known. seconds: no
    further op is begun after so long. Returns the choices and how many ops were left unmeasured. The program's packed
    weights must be whole (`Lowering(disposable=False)`).
    """
    place(executor, trial_inputs(executor))
    choices: dict[str, Choice] = {}
    left = 0
    compiled: set[str] = set()
    begun = time.perf_counter()

    def wanted(op: Op) -> list[Tactic]:
        known = op in tactics and (level != "exhaustive" or op.name in choices)
        ways = [] if known else list(candidates(op, executor.arguments(op), executor.device.type, exhaustive))
        return ways if len(ways) > 1 else []

    exhaustive = level == "exhaustive"
    for i, op in enumerate(executor.program.ops):
        ways = wanted(op)
        if ways and seconds is not None and time.perf_counter() - begun > seconds:
            left += 1
        elif ways:
            if op.name not in compiled:
                compiled |= _compiled(executor, executor.program.ops[i:], wanted)
            try:
                choice = _measured(executor, op, executor.arguments(op), ways, level)
            except torch.OutOfMemoryError:  # the check takes float64 copies of what the op reads and writes
                log.warning("tactics: %s (%s): no memory to check its candidates: left as it is", op.name, op.kernel)
                torch.cuda.empty_cache()
                choice, left = None, left + 1
            if choice is not None:
                choices[op.name] = choice
                tactics.record(op, choice.tactic)
        executor.call(op)()
    return list(choices.values()), left


def _compiled(executor: Executor, ops: Sequence[Op], wanted: Callable[[Op], list[Tactic]]) -> set[str]:
    """Compiles the Triton candidates of the first of `ops`, and of as many more as make `COMPILED_AHEAD` of them, side
    by side; the names of these ops. Those that are alike count once."""
    names, seen, calls = set(), set(), []
    for op in ops:
        if len(calls) >= COMPILED_AHEAD:
            break
        names.add(op.name)
        if signature(op) in seen:
            continue
        seen.add(signature(op))
        arguments, triton = executor.arguments(op), OPS[op.kernel].implementations.get("triton")
        for way in wanted(op):
            if way.backend == "triton":
                calls.append(triton.bound(*arguments, **way.options))
    compile_ahead(calls, processors())
    return names


def _measured(executor: Executor, op: Op, arguments: list[Any], ways: list[Tactic], level: str) -> Choice | None:
    """The choice among `ways`, or None where none of them is right. Leaves what the op reads as it was."""
    kernel, device = OPS[op.kernel], executor.device
    before = contents(op, executor)
    exact, plain = exact_outputs(op, before), torch_outputs(op, before)
    written = {name: executor.tensor(op.arguments[name]) for name in op.writes if op.arguments[name] is not None}
    changed = [(executor.tensor(v), before[name]) for name, v in op.arguments.items() if isinstance(v, Value)]
    right: dict[str, tuple[Tactic, Callable[[], None]]] = {}
    refused = []

    def restore() -> None:
        for place_of, content in changed:
            place_of.copy_(content)

    for way in ways:
        for name, tensor in written.items():
            if tensor.is_floating_point() and name not in op.in_place:
                tensor.fill_(torch.nan)
        try:
            call = kernel.implementations[way.backend].bound(*arguments, **way.options)
            call()
            if device.type == "cuda":
                on_cuda(call, [()])()  # what cannot be captured cannot be timed, nor taken
        except Exception as error:  # Triton has errors of its own, for what does not compile or fit
            refused.append(f"{way}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            restore()
            continue
        try:
            wrong = [f"{n} {e:.3g} > {a:.3g}" for n, e, a in judged(op, written, exact, plain, before) if not e <= a]
        finally:
            restore()
        if wrong:
            refused.append(f"{way}: {', '.join(wrong)}")
        else:
            right[str(way)] = way, call
    for reason in refused:
        log.warning("tactics: %s (%s): not taken: %s", op.name, op.kernel, reason)
    if not right:
        return None
    calls = {name: call for name, (_, call) in right.items()}
    usual = next(iter(right))
    sets = [()] * (8 if device.type == "cuda" else 1)
    if level != "exhaustive" and len(calls) > 2:
        first = {name: min(t) for name, t in interleaved(calls, sets, device.type, 0).items()}
        calls = {name: call for name, call in calls.items() if first[name] <= HOPELESS * min(first.values())}
        calls.setdefault(usual, right[usual][1])

    def medians(names: Iterable[str], seconds: float) -> dict[str, float]:
        compared = {name: calls[name] for name in names}
        found = interleaved(compared, sets, device.type, seconds)
        return {name: statistics.median(times) for name, times in found.items()}

    times, best = medians(calls, SECONDS[level]), usual
    quicker = [name for name in sorted(times, key=times.get) if times[name] < WORTH * times[usual]][:CONFIRMED]
    for name in quicker:  # a hiccup of the machine must not pass for a gain
        times = medians((usual, name), SECONDS[level] / len(quicker))
        if times[name] < WORTH * times[usual]:
            best = name
            break
    restore()
    way = right[best][0]
    return Choice(
        op, Tactic(way.backend, way.options, times[best] * 1e6), times[usual] * 1e6, len(right), tuple(refused)
    )
