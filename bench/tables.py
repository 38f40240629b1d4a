"""Write the measured tables of docs/kernels.md from bench/results.

    python bench/tables.py [--check]

`--check` changes nothing and exits with 1 where the page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def kernel_table(folder: Path) -> list[str]:
    """The rows of every kernel measured on one device."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result.get("rows", []):
            if "op" not in row:
                continue
            rate = f"{row['tflops'] * 1e3:.0f} GFLOP/s" if "tflops" in row else f"{row['gbps']:.1f} GB/s"
            label = row.get("label", "")
            lines.append(
                f"| `{row['op']}` | {'' if label == row['op'] else label} | {'x'.join(map(str, row['shape']))} | "
                f"{row['dtype']} | {row['us']:.0f} | {rate} | {row['percent_of_ceiling']:.0f}% | "
                f"{row['speedup']:.1f}x |"
            )
    return lines


def tables() -> str:
    """A table for each device that bench/results has kernels of."""
    parts = []
    for folder in sorted((ROOT / "bench" / "results").iterdir()):
        lines = kernel_table(folder) if folder.is_dir() else []
        if not lines:
            continue
        head = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
        parts.append(
            f"### {head['device']}\n\ntorch {head['torch']}, {head['threads']} threads.\n\n"
            "| op | case | shape | dtype | us | rate | of ceiling | against torch eager |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where the page is not up to date")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"
    if check:
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
