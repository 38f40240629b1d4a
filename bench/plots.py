"""Draw the measured speeds of bench/results into docs/speed.png.

    python bench/plots.py [--out docs/speed.png]

A panel for each row of `throughput-detect.json` with a model at its own size and a batch of 1 or 16; a bar for each
runner, in milliseconds a call.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.tables import ROOT, model_name, results  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLUMNS = 3
OWN, OTHERS = "#c2410c", "#94a3b8"


def draw(out: Path) -> int:
    """Writes the plot; the number of its panels."""
    panels = [
        (result["device"], row)
        for result in results("throughput-detect")
        for row in result["rows"]
        if row["batch"] in (1, 16) and row["size"] in (64, 256)
    ]
    if not panels:
        raise SystemExit("bench/results holds no throughput-detect.json: nothing to draw")
    rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.3 * rows), squeeze=False)
    for axis, (_, row) in zip(axes.flat, panels, strict=False):
        runners = sorted(row["runners"].items(), key=lambda item: -item[1]["ms"])
        bars = axis.barh(
            [label for label, _ in runners],
            [values["ms"] for _, values in runners],
            color=[OWN if label == "dfengine" else OTHERS for label, _ in runners],
        )
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
        axis.margins(x=0.18)
        axis.set_title(f"{model_name(row)}, batch {row['batch']}, {row['precision']}", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("ms", fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle("Whole detection: " + "; ".join(dict.fromkeys(device for device, _ in panels)), fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return len(panels)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.png")
    draw(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
