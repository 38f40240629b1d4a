"""The tables and the plot of `docs/study.md` from the study's results.

    python bench/study_report.py bench/results/study/study.csv --against default

A cell is the mean over seeds of the image AUROC by the mean of the map's largest pixels (`ModelConfig.top_k`), and,
with two seeds or more, half their range. With `--against`, the cells of other variants are differences from the named
one, seed by seed: variants of one seed are trained and measured on the same pictures, so these spread less.
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
    """(set, variant) -> its rows, one a seed, in the order of the files. Exits where a seed is there twice."""
    rows = defaultdict(list)
    for path in paths:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                of = rows[row["set"], row["variant"]]
                if row["seed"] in {other["seed"] for other in of}:
                    raise SystemExit(f"{path}: {row['set']} {row['variant']}: seed {row['seed']} is there twice")
                of.append(row)
    return rows


def cell(rows: list[dict[str, str]], column: str, base: list[dict[str, str]] | None = None) -> str:
    """Mean and half range over seeds; of the differences from `base` in the seeds that both have, where it is given."""
    values = {row["seed"]: float(row[column]) for row in rows if row.get(column)}
    if base is not None:
        others = {row["seed"]: float(row[column]) for row in base if row.get(column)}
        values = {seed: value - others[seed] for seed, value in values.items() if seed in others}
    if not values:
        return ""
    low, high = min(values.values()), max(values.values())
    spread = f" ± {(high - low) / 2:.3f}" if len(values) > 1 else ""
    mean = round(float(np.mean(list(values.values()))), 3) + 0.0  # no -0.000
    return f"{mean:{'' if base is None else '+'}.3f}{spread}"


def table(
    rows: dict[tuple[str, str], list[dict[str, str]]], score: str = "seg@800", against: str | None = None
) -> str:
    """Markdown: one row a variant and set, one column a group of anomalies that any of them was measured on."""
    every = [row for found in rows.values() for row in found]
    groups = {group: title for group, title in GROUPS if any(row.get(f"{group}/{score}") for row in every)}
    lines = ["| set | variant | seeds | steps | " + " | ".join(groups.values()) + " | pixel AP |"]
    lines.append("|---" * (5 + len(groups)) + "|")
    for (name, variant), found in rows.items():
        base = rows.get((name, against)) if variant != against else None
        columns = [*(f"{group}/{score}" for group in groups), "pixel_ap"]
        shared = {row["seed"] for row in found} & {row["seed"] for row in base or found}
        head = [name, variant, str(len(shared)), found[0]["steps"]]
        lines.append("| " + " | ".join([*head, *(cell(found, column, base) for column in columns)]) + " |")
    return "\n".join(lines)


def plot(rows: dict[tuple[str, str], list[dict[str, str]]], path: Path, score: str = "seg@800") -> None:
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
    shown = [axis.get_legend_handles_labels() for axis in axes[0]]
    handles = {label: handle for of in shown for handle, label in zip(*of, strict=True)}
    figure.legend(handles.values(), handles, fontsize=8, loc="lower center", ncols=len(handles))
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--score", default="seg@800", help="which image score (bench/study_scores.py)")
    parser.add_argument("--against", help="the variant from which the others' differences are shown")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    rows = read(arguments.results)
    print(table(rows, arguments.score, arguments.against))
    if arguments.plot:
        plot(rows, arguments.plot, arguments.score)
    return 0


if __name__ == "__main__":
    sys.exit(main())
