"""`dfengine verify`: is what a detector runs what its model says?"""

from __future__ import annotations

from pathlib import Path

from dfengine.commands.plan import aligned
from dfengine.commands.programs import bound_program
from dfengine.commands.scoring import say
from dfengine.engine.verify import Check, first_divergence, verify
from dfengine.errors import DfengineError

WORST = 8
"""Ops and blocks that are printed."""


def run_verify(checkpoint: Path, batch: int, device: str, precision: str, seed: int) -> int:
    """Prints the worst checks and the verdict; the status is 0. Raises `DfengineError`, which names the first
    divergence, where there is one, and where the detector runs no program."""
    verify_program(checkpoint, batch, device, precision, seed)
    return 0


def verify_program(checkpoint: Path, batch: int, device: str, precision: str, seed: int) -> None:
    """The program against its kernels' references and its modules."""
    with bound_program(checkpoint, batch, device, precision, seed) as bound:
        checks = verify(bound.runner, bound.checkpoint.build(), batch)
    say(f"{checkpoint}: {bound.title}")
    for kind in ("op", "block", "map"):
        say("\n".join(worst([check for check in checks if check.kind == kind])))
    wrong, ops = first_divergence(checks), len({check.name for check in checks if check.kind == "op"})
    if wrong is not None:
        bad = len({check.name for check in checks if check.kind == "op" and not check.agrees})
        raise DfengineError(f"{checkpoint}: the first divergence is {wrong}; by themselves {bad} of {ops} ops differ")
    blocks = sum(check.kind == "block" for check in checks)
    say(f"all {ops} ops agree with their references; {blocks} blocks and the map agree with the modules")


def worst(checks: list[Check]) -> list[str]:
    """A table of the checks, all of one kind, nearest to what is allowed, or farthest beyond it."""
    chosen = sorted(checks, key=lambda check: -check.share)[:WORST]
    lines = [[f"worst {checks[0].kind}s", "kernel", "by", "output", "error", "allowed", "share"]]
    for c in chosen:
        numbers = f"{c.error:.3g}", f"{c.allowed:.3g}", f"{c.share:.3f}"
        lines.append([c.name, c.kernel, c.backend, c.output, *numbers])
    return list(aligned(lines, left=(0, 1, 2, 3)))
