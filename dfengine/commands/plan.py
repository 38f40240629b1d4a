"""`dfengine info --plan`: every op of a detector's program, with its time beside what the device could do."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from dfengine.commands.programs import Bound, bound_program
from dfengine.commands.scoring import say, warn
from dfengine.engine.measure import MOST_MEASURED, Plan, Row, measure, unmeasured
from dfengine.engine.timing import type_name
from dfengine.wording import counted

NO_CEILINGS = (
    f"ops ran far above the ceilings of this device, measured {MOST_MEASURED} times, perhaps beside other work"
)
"""Of a measured plan without ceilings."""


def run_plan(checkpoint: Path, batch: int, device: str, precision: str, measured: bool, as_json: bool) -> None:
    """Prints the plan, and warns of `NO_CEILINGS`. Raises `DfengineError` where the detector runs no program."""
    with bound_program(checkpoint, batch, device, precision, timed=measured) as bound:
        plan = measure(bound.executor) if measured else unmeasured(bound.executor)
        facts = plan_facts(bound, plan)
    if plan.run_seconds is not None and plan.ceilings is None:
        warn(f"{NO_CEILINGS}, so no percentages are given; measure again when the machine is idle")
    say(json.dumps(facts, indent=2) if as_json else "\n".join(plan_lines(bound, plan)))


def plan_facts(bound: Bound, plan: Plan) -> dict:
    """The plan as JSON values."""
    program, arena = bound.executor.program, bound.executor.arena
    totals = {
        "ops": len(plan.rows),
        "flops": program.flops,
        "bytes": program.moved,
        "arena_bytes": arena.nbytes,
        "arena_lower_bound": arena.lower_bound,
    }
    facts = bound.facts()
    if plan.run_seconds is not None:
        totals |= {
            "us": plan.run_seconds * 1e6,
            "ops_us": plan.op_seconds * 1e6,
            "images_per_second": program.batch / plan.run_seconds,
            "gflops": program.flops / plan.run_seconds / 1e9,
            "rounds": plan.rounds,
        }
    if plan.ceilings is not None:
        totals["percent_of_roofline"] = plan.percent
        copies = {str(size): rate / 1e9 for size, rate in plan.ceilings.copies.items()}
        products = {type_name(dtype): rate / 1e9 for dtype, rate in plan.ceilings.products.items()}
        facts["ceilings"] = {"matmul_gflops_by_type": products, "copy_gbps_by_bytes": copies}
    return facts | {"totals": totals, "ops": [row.facts() for row in plan.rows]}


def plan_lines(bound: Bound, plan: Plan) -> Iterator[str]:
    """The plan as text."""
    program, arena = bound.executor.program, bound.executor.arena
    yield f"{bound.path}: {bound.title}"
    yield from op_table(plan.rows)
    yield (
        f"{len(plan.rows)} ops, {program.flops / 1e9:.2f} GFLOP, {program.moved / 1e6:.1f} MB moved, "
        f"{arena.nbytes / 1e6:.2f} MB of activations (at least {arena.lower_bound / 1e6:.2f})"
    )
    if plan.run_seconds is None:
        return
    yield from kernel_table(plan.rows)
    share = "" if plan.ceilings is None else f", {plan.percent:.1f}% of the roofline"
    yield (
        f"a run takes {plan.run_seconds * 1e3:.2f} ms ({program.batch / plan.run_seconds:.1f} images/s, "
        f"{program.flops / plan.run_seconds / 1e9:.1f} GFLOP/s){share}; its ops "
        f"{plan.op_seconds * 1e3:.2f} ms; medians of {counted(plan.rounds, 'run')}"
    )
    if plan.ceilings is not None:
        yield ceiling_line(plan)


def ceiling_line(plan: Plan) -> str:
    """What the device reached in the same run."""
    copies = ", ".join(f"{rate / 1e9:.1f} GB/s at {size / 2**20:g} MiB" for size, rate in plan.ceilings.copies.items())
    products = plan.ceilings.products.items()
    rates = ", ".join(f"{rate / 1e9:.1f} GFLOP/s ({type_name(dtype)})" for dtype, rate in products)
    return f"measured ceilings: matrix product {rates}, copies {copies}"


def op_table(rows: list[Row]) -> Iterator[str]:
    """A line for each op, with its time where it was measured, and its share of the roofline where that is known."""
    head = ["#", "op", "kernel", "shape", "MFLOP", "kB", "by"]
    head += ["us", "GFLOP/s", "GB/s"] if rows[0].seconds is not None else []
    head += ["% of roofline", "limit"] if rows[0].bound is not None else []
    yield from aligned([head, *map(_cells, rows)], left=(1, 2, 3, 6, 11))


def _cells(row: Row) -> list[str]:
    op, shape = row.op, "x".join(map(str, row.shape))
    flops = f"{row.flops / 1e6:.2f}" if op.flops else ""
    name = op.name if row.repeat == 1 else f"{op.name} x {row.repeat}"
    cells = [str(row.index), name, op.kernel, shape, flops, f"{row.moved / 1e3:.1f}", row.backend]
    if row.seconds is not None:
        rate = f"{row.flops / row.seconds / 1e9:.1f}" if op.flops else ""
        cells += [f"{row.seconds * 1e6:.1f}", rate, f"{row.moved / row.seconds / 1e9:.2f}"]
    if row.bound is not None:
        cells += [f"{row.percent:.1f}", row.limit]
    return cells


def kernel_table(rows: list[Row]) -> Iterator[str]:
    """A line for each kernel and implementation: its measured ops together, the longest first."""
    kinds: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row.op.kernel, row.backend].append(row)
    total, bounded = sum(row.seconds for row in rows), rows[0].bound is not None
    lines = [["kernel", "by", "ops", "us", "% of time"] + (["% of roofline"] if bounded else [])]
    for (kernel, backend), group in sorted(kinds.items(), key=lambda item: -sum(row.seconds for row in item[1])):
        seconds = sum(row.seconds for row in group)
        shares = [f"{100 * seconds / total:.1f}"]
        if bounded:
            shares.append(f"{100 * sum(row.bound for row in group) / seconds:.1f}")
        lines.append([kernel, backend, str(len(group)), f"{seconds * 1e6:.1f}", *shares])
    yield from aligned(lines, left=(0, 1))


def aligned(lines: list[list[str]], left: Iterable[int]) -> Iterator[str]:
    """The cells in columns; those of `left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        yield "  ".join(cells).rstrip()
