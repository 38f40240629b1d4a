"""`dfengine roofline`: a picture of a program's ops against what the device reaches."""

from __future__ import annotations

from pathlib import Path

from dfengine.commands.plan import NO_CEILINGS, ceiling_line
from dfengine.commands.programs import bound_program
from dfengine.commands.scoring import say
from dfengine.engine.measure import measure
from dfengine.engine.roofline import is_roofline, roofline_plot
from dfengine.errors import DfengineError
from dfengine.files import atomic_write, check_own_writable, check_suffix


def run_roofline(checkpoint: Path, out: Path, batch: int, device: str, precision: str) -> None:
    """Writes the PNG `out`. Raises `UsageError` for another kind of file and for a picture of somebody else,
    `DfengineError` where there is no program, and where the measured ceilings cannot be true."""
    check_suffix(out, ".png")
    check_own_writable(out, is_roofline)
    with bound_program(checkpoint, batch, device, precision, timed=True) as bound:
        plan = measure(bound.executor)
    if plan.ceilings is None:
        raise DfengineError(f"{NO_CEILINGS}, so no picture is drawn; try again when the machine is idle")
    atomic_write(out, roofline_plot(plan, bound.title))
    say(f"{bound.title}: {plan.run_seconds * 1e3:.2f} ms a run, {plan.percent:.1f}% of the roofline; wrote {out}")
    say(ceiling_line(plan))
