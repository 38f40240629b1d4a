"""How long each op of a program takes, beside what the device could do: the rows of `dfengine info --plan`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dfengine.engine.execute import Executor
from dfengine.engine.program import Constant, Op, Value
from dfengine.engine.timing import Ceilings
from dfengine.kernels.conv_weight import ConvWeight

LEAST_ROUNDS = 5
MOST_ROUNDS = 1000
ROTATED_INPUTS = 3
"""Batches of images that take turns."""
MOST_PERCENT = 150.0
"""Of the roofline: an op above it, but in fp8, shows that the ceilings are too low, as other work makes them."""
MOST_MEASURED = 4
"""How often the ceilings are measured until no op is above `MOST_PERCENT`; twice in any case."""


@dataclass(frozen=True)
class Row:
    """An op of a program: what it is, which implementation serves it, and, where measured, its time.

    repeat: how often it runs in a run of the program, all of which counts in `flops`, `moved` and the times. seconds:
    median of the op in whole runs of the program, so with its inputs where the ops before left them.
    bound: seconds below which the device cannot go, by `Ceilings.bound`; None without ceilings.
    """

    index: int
    op: Op
    backend: str
    repeat: int = 1
    seconds: float | None = None
    bound: float | None = None
    limit: str | None = None
    """What the bound is: "matmul" or "bandwidth"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first thing that the op writes."""
        return next(self.op.values(written=True)).shape

    @property
    def flops(self) -> int:
        return self.op.flops * self.repeat

    @property
    def moved(self) -> int:
        return self.op.moved * self.repeat

    @property
    def percent(self) -> float | None:
        """Of the roofline: above 100 where a matrix product or a copy of torch is slower than it could be."""
        return None if self.bound is None else 100 * self.bound / self.seconds

    def facts(self) -> dict:
        """As JSON values; times in microseconds, rates in GFLOP/s and GB/s."""
        facts = {
            "index": self.index,
            "name": self.op.name,
            "kernel": self.op.kernel,
            "shape": list(self.shape),
            "flops": self.flops,
            "bytes": self.moved,
            "backend": self.backend,
            "repeat": self.repeat,
        }
        if self.seconds is not None:
            facts |= {
                "us": self.seconds * 1e6,
                "gflops": self.flops / self.seconds / 1e9,
                "gbps": self.moved / self.seconds / 1e9,
            }
        if self.bound is not None:
            facts |= {"bound_us": self.bound * 1e6, "limit": self.limit, "percent_of_roofline": self.percent}
        return facts


@dataclass(frozen=True)
class Plan:
    """The ops of a bound program. run_seconds: median of whole runs without a clock between the ops; None where nothing
    was measured. ceilings: None there too, and where ops ran above all that were measured, so that none can be true."""

    rows: list[Row]
    ceilings: Ceilings | None = None
    run_seconds: float | None = None
    rounds: int = 0

    @property
    def op_seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def percent(self) -> float | None:
        """Of the roofline, the whole run; None without ceilings."""
        return None if self.ceilings is None else 100 * sum(row.bound for row in self.rows) / self.run_seconds

    def slowest(self) -> list[Row]:
        """The measured rows, the longest first."""
        return sorted(self.rows, key=lambda row: -row.seconds)


def trial_images(batch: int, size: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Smooth colour noise, float32 (B, S, S, C) in [0, 1]: like a photo, most of its energy is in low frequencies."""
    coarse = torch.rand((batch, channels, 8, 8), generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
    return smooth.permute(0, 2, 3, 1).contiguous()


def trial_inputs(executor: Executor, seed: int = 0) -> dict[str, torch.Tensor]:
    """For every input of the program by name: `trial_images`, and the threshold 0.5."""
    inputs = {}
    for buffer in executor.program.buffers:
        if buffer.role == "input":
            tensor = executor.tensor(Value(buffer))
            images = trial_images(*(buffer.shape[i] for i in (0, 1, 3)), seed) if len(buffer.shape) == 4 else None
            inputs[buffer.name] = (torch.full(buffer.shape, 0.5) if images is None else images).to(tensor)
    return inputs


def place(executor: Executor, inputs: dict[str, torch.Tensor]) -> None:
    """Put the inputs where the ops read them. Each run needs them anew: other buffers get their place in the arena."""
    for buffer in executor.program.buffers:
        if buffer.role == "input":
            executor.tensor(Value(buffer)).copy_(inputs[buffer.name])


def unmeasured(executor: Executor) -> Plan:
    """The ops alone."""
    repeats = executor.program.repeats()
    return Plan([Row(i, op, executor.backends[op.name], repeats[i]) for i, op in enumerate(executor.program.ops)])


@torch.inference_mode()
def measure(executor: Executor, seconds: float = 2.0, ceilings: Ceilings | None = None) -> Plan:
    """Time every op of the program: in turn whole runs with a clock between the ops, and runs without, for about
    `seconds` in all and at least five of each, on rotating images after a warm-up.

    Ceilings that are given hold as they are. Else they are measured before and after, and again while an op is above
    `MOST_PERCENT`, up to `MOST_MEASURED` times in all, each at its highest. Where one is above it still, the plan has
    none. An op that multiplies in fp8 may be above: it is held to the rate of another type.
    """
    program, device = executor.program, executor.device
    types = [multiplied_type(op, program.dtype) for op in program.ops]
    given, asked = ceilings is not None, list(dict.fromkeys([program.dtype, *types]))
    ceilings = ceilings or Ceilings.measured(device, asked)
    sets = [trial_inputs(executor, seed) for seed in range(ROTATED_INPUTS)]
    split = cuda_round if device.type == "cuda" else cpu_round
    for inputs in sets[:2]:
        place(executor, inputs)
        split(executor)
    ops: list[list[float]] = []
    runs: list[float] = []
    end = time.perf_counter() + seconds
    while len(runs) < LEAST_ROUNDS or (time.perf_counter() < end and len(runs) < MOST_ROUNDS):
        inputs = sets[len(runs) % len(sets)]
        place(executor, inputs)
        ops.append(by_op(executor, split(executor)))
        place(executor, inputs)
        with timed(device) as taken:
            executor.launch()
        runs.append(taken[0])
    repeats = program.repeats()
    rows = [
        Row(index, op, executor.backends[op.name], repeats[index], statistics.median(values))
        for index, (op, values) in enumerate(zip(program.ops, zip(*ops, strict=True), strict=True))
    ]
    run = statistics.median(runs)
    if given:
        return Plan(_bounded(rows, types, ceilings), ceilings, run, len(runs))
    for _ in range(MOST_MEASURED - 1):
        ceilings = ceilings.higher(Ceilings.measured(device, asked))
        bounded = _bounded(rows, types, ceilings)
        if all(row.percent <= MOST_PERCENT for row in bounded if rounding_of(row.op) != "fp8"):
            return Plan(bounded, ceilings, run, len(runs))
    return Plan(rows, None, run, len(runs))


def _bounded(rows: list[Row], types: list[torch.dtype], ceilings: Ceilings) -> list[Row]:
    """The measured rows, which multiply in `types`, with their bounds under `ceilings`."""
    bounded = []
    for row, dtype in zip(rows, types, strict=True):
        bound = ceilings.bound(row.op.flops, row.op.moved, dtype)
        limit = "matmul" if row.op.flops and bound == row.op.flops / ceilings.products[dtype] else "bandwidth"
        bounded.append(replace(row, bound=bound * row.repeat, limit=limit))
    return bounded


def multiplied_type(op: Op, dtype: torch.dtype) -> torch.dtype:
    """In which type an op of a program of `dtype` multiplies: int8 for a convolution with such a weight. One in fp8
    counts as `dtype`: the rate of that type is not measured."""
    return torch.int8 if rounding_of(op) == "int8" else dtype


def rounding_of(op: Op) -> str | None:
    """The format, "int8" or "fp8", that the weight of an op is rounded to; None for the others."""
    weight = op.arguments.get("weight")
    packed = weight.content if isinstance(weight, Constant) else None
    rounding = packed.quantization if isinstance(packed, ConvWeight) else None
    return None if rounding is None else rounding.format


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """For `with`: a list that afterwards holds the seconds that the block's work took on the device."""
    taken: list[float] = []
    if device.type != "cuda":
        start = time.perf_counter()
        yield taken
        taken.append(time.perf_counter() - start)
        return
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    yield taken
    end.record()
    end.synchronize()
    taken.append(begin.elapsed_time(end) / 1e3)


def by_op(executor: Executor, stamps: list[float]) -> list[float]:
    """The seconds of each op between the stamps of a round; of those in loops over all steps."""
    taken = [0.0] * len(executor.program.ops)
    for (index, _), before, after in zip(executor.steps(), stamps[:-1], stamps[1:], strict=True):
        taken[index] += after - before
    return taken


def cpu_round(executor: Executor, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Run the program on the inputs in place: seconds on the clock before the first of `Executor.steps` and after each.
    """
    stamps = [clock()]

    def stamped(call: Callable[[], None]) -> None:
        call()
        stamps.append(clock())

    executor.launch(stamped)
    return stamps


def cuda_round(executor: Executor) -> list[float]:
    """As `cpu_round` by events, in seconds from the first: the GPU waits first, so that it never waits for the host."""
    calls = [call for _, call in executor.steps()]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HOST_CYCLES * len(events))
    events[0].record()
    for event, call in zip(events[1:], calls, strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [events[0].elapsed_time(event) / 1e3 for event in events]


HOST_CYCLES = 200_000
"""Clock cycles of a GPU in which the host launches an op: 0.1 ms, several times what it takes."""
