"""The roofline of a program as PNG bytes: its ops against the ceilings measured on the same device."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.figure import Figure

from dfengine.engine.measure import Plan, Row
from dfengine.engine.timing import Ceilings, type_name

COLOURS = ("#3b7dbd", "#d9622b", "#4c9f70", "#8a5fb0", "#b8860b", "#c2417c", "#5f7d8c", "#2aa5a0", "#7a5230", "#6b7a1e")
LINE, GRAY = "#1f2933", "#9aa5b1"
SOFTWARE = "dfengine roofline"
"""In the text chunk "Software" of each picture."""


def roofline_plot(plan: Plan, title: str) -> bytes:
    """Two panels, both with logarithmic axes. Left, the ops that multiply matrices: FLOP/s by FLOP for each byte that
    must move, under the ceilings of arithmetic and of bandwidth. Right, the others: bytes/s by bytes, under the
    measured bandwidth. A point's area is the op's share of the time. Raises ValueError for a plan without ceilings."""
    if plan.ceilings is None:
        raise ValueError("the plan has no ceilings")
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    products, traffic = figure.subplots(1, 2)
    figure.suptitle(f"{title}\n{plan.run_seconds * 1e3:.2f} ms a run, {plan.percent:.1f}% of the roofline", fontsize=10)
    kernels = sorted({row.op.kernel for row in plan.rows})
    colours = {kernel: COLOURS[i % len(COLOURS)] for i, kernel in enumerate(kernels)}
    multiplying = [row for row in plan.rows if row.op.flops]
    moving = [row for row in plan.rows if not row.op.flops]
    _product_ceilings(products, plan.ceilings, multiplying)
    _points(products, plan, multiplying, colours, lambda r: (r.op.flops / r.op.moved, r.flops / r.seconds / 1e9))
    products.set(xlabel="arithmetic intensity (FLOP/byte)", ylabel="GFLOP/s", title="matrix products")
    sizes = np.array(sorted(plan.ceilings.copies), dtype=float)
    rates = np.array([plan.ceilings.copies[int(size)] for size in sizes])
    traffic.plot(sizes, rates / 1e9, color=LINE, linewidth=1.5, marker="_", label="copy, measured")
    least = min((row.op.moved for row in moving), default=sizes[0])
    if least < sizes[0]:
        traffic.plot([least, sizes[0]], [rates[0] / 1e9] * 2, color=LINE, linewidth=1, linestyle=":")
    _points(traffic, plan, moving, colours, lambda r: (r.op.moved, r.moved / r.seconds / 1e9))
    traffic.set(xlabel="bytes read and written", ylabel="GB/s", title="all other ops")
    for axes in (products, traffic):
        axes.set(xscale="log", yscale="log")
        axes.grid(True, which="major", color=GRAY, alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": SOFTWARE})
    return content.getvalue()


def is_roofline(content: bytes) -> bool:
    """Whether a file's content is a picture of `roofline_plot`."""
    return content.startswith(b"\x89PNG\r\n\x1a\n") and b"tEXtSoftware\0" + SOFTWARE.encode() in content[:1024]


def _product_ceilings(axes, ceilings: Ceilings, rows: list[Row]) -> None:
    """The roofs of arithmetic, and those of the quickest copy, from a cache, and of the largest, from memory."""
    largest, highest = ceilings.copies[max(ceilings.copies)], max(ceilings.products.values())
    intensities = [row.op.flops / row.op.moved for row in rows] + [highest / largest]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 4, 200)
    for (dtype, rate), style in zip(ceilings.products.items(), ("-", ":"), strict=False):
        label = f"matrix product, {rate / 1e9:.4g} GFLOP/s ({type_name(dtype)})"
        axes.plot(x, np.full_like(x, rate / 1e9), color=LINE, linewidth=1.5, linestyle=style, label=label)
    for name, rate, style in (("cache", max(ceilings.copies.values()), "--"), ("memory", largest, "-.")):
        below = x[x * rate <= highest]
        if len(below):
            label = f"copy in {name}, {rate / 1e9:.3g} GB/s"
            axes.plot(below, below * rate / 1e9, color=LINE, linewidth=1, linestyle=style, label=label)


def _points(axes, plan: Plan, rows: list[Row], colours: dict[str, str], place) -> None:
    """A point for each row, by kernel and implementation; the longest three are named."""
    for kernel, backend in sorted({(row.op.kernel, row.backend) for row in rows}):
        group = [row for row in rows if (row.op.kernel, row.backend) == (kernel, backend)]
        x, y = zip(*map(place, group), strict=True)
        areas = [12 + 3000 * row.seconds / plan.op_seconds for row in group]
        label = f"{kernel} ({backend}): {100 * sum(row.seconds for row in group) / plan.op_seconds:.1f}% of the time"
        axes.scatter(x, y, s=areas, color=colours[kernel], alpha=0.55, edgecolors="none", label=label)
    for row in sorted(rows, key=lambda row: -row.seconds)[:3]:
        axes.annotate(row.op.name, place(row), xytext=(4, 4), textcoords="offset points", fontsize=7, color=LINE)
