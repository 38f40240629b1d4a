"""`dfengine tune`: measure which kernels are quickest for a detector on this device, and remember it."""

from __future__ import annotations

import os
from pathlib import Path

from dfengine.commands.plan import aligned
from dfengine.commands.programs import Bound, bound_program
from dfengine.commands.scoring import say
from dfengine.engine.tactics import check_cache
from dfengine.errors import DfengineError, UsageError
from dfengine.files import check_json_writable
from dfengine.kernels.registry import ENVIRONMENT
from dfengine.wording import counted


def run_tune(
    checkpoint: Path,
    batch: list[int],
    device: str,
    precision: str,
    exhaustive: bool,
    seconds: float | None,
    out: Path | None,
) -> None:
    """Prints what was found and writes it to the cache, or to `out`. Raises DfengineError where there is no program, or
    what is measured could not be kept; UsageError where the place has to be another."""
    sizes = sorted(set(batch), reverse=True)  # the largest needs the memory that all share
    tactics = "exhaustive" if exhaustive else "tuned"
    if out is None:
        try:
            check_cache()
        except DfengineError as error:
            raise type(error)(f"{error}; name a file with --out to keep what is measured") from None
    else:
        check_json_writable(out, "format", "environment", "tactics")
    with bound_program(checkpoint, sizes[0], device, precision, 0, tactics, seconds, timed=True) as bound:
        if bound.runner.tactics is None:
            raise UsageError(f"{ENVIRONMENT}={os.environ[ENVIRONMENT]}: leaves tactics no choice; tune without it")
        for size in sizes[1:]:
            bound.runner.executor(bound.runner.program_batch(size))
        say(f"{checkpoint}: {bound.title}")
        say("\n".join(found_lines(bound)))
        known = bound.runner.tactics
        if out is not None:
            known.write(out)
        elif bound.runner.choices:
            known.save()
        say(f"{counted(len(known), 'tactic')} known for this device; measured ones are in {out or known.path}")


def found_lines(bound: Bound) -> list[str]:
    """A table of the ops for which another choice than the default is quicker, and the sum over all."""
    choices, left = bound.runner.choices, bound.runner.unmeasured
    if not choices:
        return [f"no time for {counted(left, 'op')}" if left else "nothing was left to measure"]
    changed = [c for c in choices if c.tactic.microseconds < c.default]
    lines = [["op", "kernel", "shape", "quickest", "us", "default us", "tried"]]
    for choice in sorted(changed, key=lambda c: c.tactic.microseconds - c.default):
        shape = "x".join(map(str, next(choice.op.values(written=True)).shape))
        times = f"{choice.tactic.microseconds:.1f}", f"{choice.default:.1f}", str(choice.tried)
        lines.append([choice.op.name, choice.op.kernel, shape, str(choice.tactic), *times])
    before, after = sum(c.default for c in choices), sum(c.tactic.microseconds for c in choices)
    refused = sum(len(c.refused) for c in choices)
    summary = (
        f"{counted(len(choices), 'op')} measured, one of those that are alike; {len(changed)} quicker than by default: "
        f"{before / 1e3:.2f} ms to {after / 1e3:.2f} ms"
        + (f"; {counted(refused, 'candidate')} wrong and not taken" if refused else "")
    ) + (f"; no time for {counted(left, 'op')}" if left else "")
    return [*(aligned(lines, left=(0, 1, 2, 3)) if changed else []), summary]
