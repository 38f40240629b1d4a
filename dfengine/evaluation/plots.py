"""Plots as PNG bytes: ROC, precision-recall, and the histogram of calibrated scores.

Figures are made without pyplot, so no display, global state or thread is involved, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

GOOD, DEFECT, LINE, GRAY = "#3b7dbd", "#d9622b", "#1f2933", "#9aa5b1"


def roc_plot(fpr: Sequence[float], tpr: Sequence[float], title: str = "") -> bytes:
    """ROC curve with the diagonal of guessing; one point per distinct score."""
    figure, axes = _square("false-alarm rate (good images above the threshold)", "recall (defects found)", title)
    axes.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle="--", label="guessing")
    axes.plot(fpr, tpr, color=GOOD, linewidth=2, label="detector")
    axes.legend(loc="lower right", frameon=False)
    return _png(figure)


def pr_plot(recall: Sequence[float], precision: Sequence[float], share: float, title: str = "") -> bytes:
    """Precision-recall steps; `share` is the share of anomalous images, the precision of guessing."""
    figure, axes = _square("recall (defects found)", "precision (alarms that are defects)", title)
    axes.axhline(share, color=GRAY, linewidth=1, linestyle="--", label="guessing")
    axes.step(recall, precision, where="pre", color=GOOD, linewidth=2, label="detector")
    axes.legend(loc="lower left", frameon=False)
    return _png(figure)


def score_histogram(calibrated, anomalous=None, threshold: float | None = None) -> bytes:
    """Histogram of calibrated scores (N,), whose threshold is 0.5.

    `anomalous` bool (N,) where the truth is known: two colours then, and one scale of counts for both. `threshold` is
    the raw threshold, named in the label. The calibrated scale is the readable one: raw scores crowd at 0 and 1.
    """
    calibrated = np.asarray(calibrated, dtype=np.float64)
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, 51)
    if anomalous is None:
        axes.hist(calibrated, edges, color=GOOD, label="images")
    else:
        anomalous = np.asarray(anomalous, dtype=bool)
        groups = [calibrated[~anomalous], calibrated[anomalous]]
        axes.hist(groups, edges, stacked=True, color=[GOOD, DEFECT], label=["good (truth)", "defect (truth)"])
    raw = "" if threshold is None else f" (raw score {threshold:.4g})"
    axes.axvline(0.5, color=LINE, linewidth=1.5, linestyle="--", label=f"threshold{raw}")
    axes.set(xlim=(0, 1), xlabel="calibrated score", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _bare(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False)
    return _png(figure)


def _square(xlabel: str, ylabel: str, title: str):
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel, title=title, aspect="equal")
    axes.grid(color="#e4e7eb", linewidth=0.8)
    _bare(axes)
    return figure, axes


def _bare(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
