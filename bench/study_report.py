"""The tables and the plot of `docs/method.md` from the study's results.

    python bench/study_report.py bench/results/study/*.csv [--plot docs/study.png]

A cell is the mean over seeds of the image AUROC by the mean of the map's largest pixels (`ModelConfig.top_k` = 50),
and, with two seeds or more, their half range.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

GROUPS = (
    ("own", "own synthesis"),
    ("foreign", "foreign erasure"),
    ("small", "small damage"),
    ("texture", "textures"),
    ("real", "rendered defects"),
)


def read(paths: list[Path]) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(set, variant) -> its rows, one a seed, in the order of the files."""
    rows = defaultdict(list)
    for path in paths:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                rows[row["set"], row["variant"]].append(row)
    return rows


def cell(rows: list[dict[str, str]], column: str) -> str:
    values = [float(row[column]) for row in rows if row.get(column)]
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def table(rows: dict[tuple[str, str], list[dict[str, str]]], score: str = "seg@50") -> str:
    """Markdown: one row a variant and set, one column a group of anomalies that any of them was measured on."""
    every = [row for found in rows.values() for row in found]
    groups = {group: title for group, title in GROUPS if any(row.get(f"{group}/{score}") for row in every)}
    lines = ["| set | variant | seeds | steps | " + " | ".join(groups.values()) + " | pixel AP |"]
    lines.append("|---" * (5 + len(groups)) + "|")
    for (name, variant), found in rows.items():
        cells = [cell(found, f"{group}/{score}") for group in groups]
        head = [name, variant, str(len(found)), found[0]["steps"]]
        lines.append("| " + " | ".join([*head, *cells, cell(found, "pixel_ap")]) + " |")
    return "\n".join(lines)


def plot(rows: dict[tuple[str, str], list[dict[str, str]]], path: Path, score: str = "seg@50") -> None:
    """Dots for each seed, a panel for each set, a row for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = list(dict.fromkeys(name for name, _ in rows))
    size = 5.2 * len(sets), 0.24 * len(rows) / len(sets) + 1.6
    figure, axes = plt.subplots(1, len(sets), figsize=size, squeeze=False)
    for axis, name in zip(axes[0], sets, strict=True):
        variants = [variant for other, variant in rows if other == name][::-1]
        for (group, title), marker in zip(GROUPS, "osDx^", strict=True):
            points = [
                (float(row[f"{group}/{score}"]), place)
                for place, variant in enumerate(variants)
                for row in rows[name, variant]
                if row.get(f"{group}/{score}")
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker, label=title, markersize=5, alpha=0.8)
        axis.set_yticks(range(len(variants)), variants, fontsize=8)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("image AUROC")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--score", default="seg@50", help="which image score (bench/study_scores.py)")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.results)
    print(table(rows, arguments.score))
    if arguments.plot:
        plot(rows, arguments.plot, arguments.score)
    return 0


if __name__ == "__main__":
    sys.exit(main())
