"""Runs of a program for a profiler: as a Chrome trace, or between cudaProfilerStart and cudaProfilerStop."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass

import torch

from dfengine.engine.execute import Executor
from dfengine.engine.measure import by_op, cpu_round, cuda_round, place, trial_inputs
from dfengine.engine.program import Op
from dfengine.engine.ranges import named_range

WARM_UP = 3
"""Runs before those that count."""


@dataclass(frozen=True)
class Timeline:
    """stamps: for each run the seconds before its first op and after each op, on one clock of the host or, for a GPU,
    from the start of the run."""

    executor: Executor
    stamps: list[list[float]]

    def slowest(self) -> list[tuple[Op, float]]:
        """Every op with the median of its seconds in a run, the longest first."""
        taken = [by_op(self.executor, run) for run in self.stamps]
        medians = [statistics.median(values) for values in zip(*taken, strict=True)]
        return sorted(zip(self.executor.program.ops, medians, strict=True), key=lambda pair: -pair[1])

    def chrome_trace(self, **about: object) -> str:
        """A trace in Chrome's JSON format: an event for each op of each run, inside one for the run, in microseconds.
        about: JSON values kept with it."""
        begin = self.stamps[0][0]
        events: list[dict] = [PROCESS, _metadata("thread_name", "program")]
        for turn, run in enumerate(self.stamps):
            events.append(_event(f"run {turn}", "run", run[0] - begin, run[-1] - run[0], {}))
            for (index, _), before, after in zip(self.executor.steps(), run[:-1], run[1:], strict=True):
                op = self.executor.program.ops[index]
                shapes = {name: list(op.arguments[name].shape) for name in op.writes if op.arguments[name] is not None}
                facts = {
                    "kernel": op.kernel,
                    "shape": shapes[next(iter(shapes))],
                    "writes": shapes,
                    "flops": op.flops,
                    "bytes": op.moved,
                    "backend": self.executor.backends[op.name],
                }
                events.append(_event(op.name, op.kernel, before - begin, after - before, facts))
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": about})


def is_trace(content: bytes) -> bool:
    """Whether a file's content is a `chrome_trace`, and not a trace of another program."""
    return content.startswith(json.dumps({"traceEvents": [PROCESS]})[:-2].encode())


def _event(name: str, category: str, start: float, duration: float, facts: dict) -> dict:
    times = {"ts": start * 1e6, "dur": duration * 1e6}
    return {"name": name, "cat": category, "ph": "X", "pid": 0, "tid": 0, **times, "args": facts}


def _metadata(name: str, value: str) -> dict:
    return {"name": name, "ph": "M", "pid": 0, "tid": 0, "args": {"name": value}}


PROCESS = _metadata("process_name", "dfengine")
"""The first event of a trace."""


@torch.inference_mode()
def timeline(executor: Executor, iterations: int) -> Timeline:
    """`iterations` runs on trial images, timed op by op, after a warm-up."""
    inputs = trial_inputs(executor)
    split = cuda_round if executor.device.type == "cuda" else cpu_round
    stamps = []
    for _ in range(WARM_UP + iterations):
        place(executor, inputs)
        stamps.append(split(executor))
    return Timeline(executor, stamps[WARM_UP:])


@torch.inference_mode()
def captured(executor: Executor, iterations: int) -> None:
    """On a GPU: `iterations` warm runs on trial images, each in an NVTX range, which a profiler records that waits for
    cudaProfilerStart."""
    inputs = trial_inputs(executor)
    for _ in range(WARM_UP):
        place(executor, inputs)
        executor.launch()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        for turn in range(iterations):
            place(executor, inputs)
            named_range(f"run {turn}", executor.launch)()
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()
