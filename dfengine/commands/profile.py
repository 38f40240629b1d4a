"""`dfengine profile`: a detector's program under a profiler."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from dfengine.commands.plan import aligned
from dfengine.commands.programs import Bound, bound_program
from dfengine.commands.scoring import say
from dfengine.devices import resolve_device
from dfengine.engine.profile import Timeline, captured, is_trace, timeline
from dfengine.errors import UsageError
from dfengine.files import atomic_write, check_own_writable, check_suffix
from dfengine.kernels.registry import ENVIRONMENT
from dfengine.wording import counted

TOP = 15
"""Ops that are printed."""
TRACE = Path("profile.json")


def run_profile(
    checkpoint: Path, batch: int, device: str, precision: str, iterations: int, out: Path | None
) -> None:
    """On a CPU writes a Chrome trace and prints the longest ops; on a GPU runs between cudaProfilerStart and Stop and
    prints the command lines of nsys and ncu that record this. Raises `DfengineError` where there is no program."""
    on_gpu = resolve_device(device).type == "cuda"
    if on_gpu and out is not None:
        raise UsageError("--out goes with a CPU; on a GPU nsys and ncu write the profile")
    if not on_gpu:
        check_suffix(out or TRACE, ".json")
        check_own_writable(out or TRACE, is_trace)
    with bound_program(checkpoint, batch, device, precision, timed=True) as bound:
        bound.executor.annotate()
        times = timeline(bound.executor, iterations)
        if on_gpu:
            captured(bound.executor, iterations)
    say(f"{checkpoint}: {bound.title}")
    say("\n".join(top_lines(times)))
    if on_gpu:
        say("\n".join(profiler_lines(bound, iterations)))
        return
    out = out or TRACE
    atomic_write(out, times.chrome_trace(**bound.facts()))
    ops = len(bound.executor.program.ops)
    say(f"{counted(iterations, 'run')} of {counted(ops, 'op')} in {out}; open it in chrome://tracing or Perfetto")


def top_lines(times: Timeline) -> list[str]:
    """A table of the ops that take longest, by the median of the runs."""
    slowest = times.slowest()
    total = sum(seconds for _, seconds in slowest)
    program = times.executor.program
    repeats = dict(zip(program.ops, program.repeats(), strict=True))
    lines = [["op", "kernel", "by", "shape", "us", "% of time", "GFLOP/s", "GB/s"]]
    for op, seconds in slowest[:TOP]:
        shape = "x".join(map(str, next(op.values(written=True)).shape))
        flops, moved = repeats[op] * op.flops, repeats[op] * op.moved
        rates = f"{flops / seconds / 1e9:.1f}" if flops else "", f"{moved / seconds / 1e9:.2f}"
        numbers = f"{seconds * 1e6:.1f}", f"{100 * seconds / total:.1f}", *rates
        lines.append([op.name, op.kernel, times.executor.backends[op.name], shape, *numbers])
    return list(aligned(lines, left=(0, 1, 2, 3)))


def profiler_lines(bound: Bound, iterations: int) -> list[str]:
    """The commands that run this again under Nsight Systems, and once under Nsight Compute."""
    program, runner = bound.executor.program, bound.runner
    options = ["--batch", str(program.batch), "--device", str(bound.executor.device), "--precision", runner.precision]
    again = [sys.executable, "-m", "dfengine", "profile", str(bound.path), *options, "--iterations"]
    forced = os.environ.get(ENVIRONMENT)
    before = f"{ENVIRONMENT}={shlex.quote(forced)} " if forced else ""
    nsys = [
        "nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx",
        "--force-overwrite=true", "--output=dfengine-nsys",
    ]  # fmt: skip
    # Clocks as they are in use, not at ncu's base clock: its times can then be compared with those above.
    ncu = [
        "ncu", "--nvtx", "--profile-from-start", "off", "--clock-control", "none", "--set", "full", "--force-overwrite",
        "--export", "dfengine-ncu",
    ]  # fmt: skip
    return [
        before + shlex.join([*nsys, *again, str(iterations)]),
        before + shlex.join([*ncu, *again, "1"]),
    ]
