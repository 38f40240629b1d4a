"""Write the measured tables of README.md, docs/kernels.md, docs/results.md and docs/study.md from bench/results.

    python bench/tables.py [--check]

`--check` changes nothing and exits with 1 where a page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from bench import study_report  # noqa: E402

RESULTS = ROOT / "bench" / "results"
RIVALS = ("torch.compile", "OpenVINO", "OpenVINO int8", "ONNX Runtime", "autocast", "eager")
"""Columns: labels of runners, without the floating-point type that ends them."""


def results(name: str) -> Iterator[dict]:
    """The results files of this name, by device; `*` matches what it does in a glob."""
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for path in sorted(folder.glob(f"{name}.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):  # a check of the compiler is a list
                continue
            if name.startswith("throughput"):
                content["rows"] = sorted(content["rows"], key=_place)
            yield content


def _place(row: dict) -> tuple:
    """Of a row of throughput: larger models first, then by size, batch and precision."""
    order = ("float32", "tf32", "bfloat16", "float16", "int8", "fp8")
    precision = order.index(row["precision"]) if "precision" in row else 0
    return row["preset"].endswith("-tiny"), row["preset"].endswith("-small"), row["size"], row["batch"], precision


def kernel_lines(result: dict) -> Iterator[str]:
    """The rows of a kernel measured on one device."""
    for row in result.get("rows", []):
        if "op" not in row:
            continue
        rate = f"{row['tflops'] * 1e3:.0f} GFLOP/s" if "tflops" in row else f"{row['gbps']:.1f} GB/s"
        label = row.get("label", "")
        yield (
            f"| `{row['op']}` | {'' if label == row['op'] else label} | {'x'.join(map(str, row['shape']))} | "
            f"{row['dtype']} | {row['us']:.0f} | {rate} | {row['percent_of_ceiling']:.0f}% | "
            f"{row['speedup']:.1f}x |"
        )


def kernel_tables() -> str:
    """A table for each device that bench/results has kernels of."""
    lines: dict[str, list[str]] = {}
    heads: dict[str, str] = {}
    for result in results("*"):
        rows = list(kernel_lines(result))
        if rows:
            heads.setdefault(result["device"], f"torch {result['torch']}, {result['threads']} threads.")
            lines.setdefault(result["device"], []).extend(rows)
    head = (
        "| op | case | shape | dtype | us | rate | of ceiling | against torch eager |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
    )
    parts = [f"### {device}\n\n{heads[device]}\n\n{head}" + "\n".join(rows) for device, rows in lines.items()]
    return "\n\n".join(parts) + "\n"


def model_name(row: dict) -> str:
    """ "small, 256 pixels", or another preset by its name."""
    size = row["preset"].removeprefix("diff-fastener-")
    size = "full" if size == "diff-fastener" else size
    return f"{size}, {row['size']} pixels"


def rival_ms(row: dict, name: str) -> str:
    """The milliseconds of the runner of this column; "" where it did not run."""
    times = {re.sub(r" (b?float\d+|tf32)$", "", label): runner["ms"] for label, runner in row["runners"].items()}
    return f"{times[name]:.1f}" if name in times else ""


def of_matmul(row: dict) -> str:
    """Of the rate of a large product in the row's type, or in another one, which is then named."""
    other = row["precision"] == "int8" and row.get("matmul") != "int8"  # a row that names no type is of bfloat16
    return f"{row['percent_of_matmul']:.0f}%" + (" of bfloat16" if other else "")


def speed_table(case: str) -> str:
    """Every row of a case, a table for each device."""
    parts = []
    for result in results(f"throughput-{case}"):
        columns = [name for name in RIVALS if any(rival_ms(row, name) for row in result["rows"])]
        heads = ["model", "batch", "precision", "dfengine, ms", "p99", "images/s", "of matmul", "calls"]
        heads += [f"{name}, ms" for name in columns] + ["against the best"]
        memory = any("peak_mb" in row for row in result["rows"])
        heads += ["peak MB (eager)"] if memory else []
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
        for row in result["rows"]:
            own = row["runners"]["dfengine"]
            p99 = f"{own['ms_p99']:.1f}" if "ms_p99" in own else ""
            cells = [model_name(row), str(row["batch"]), row["precision"], f"{own['ms']:.1f}", p99]
            cells += [f"{own['images_per_second']:.1f}", of_matmul(row), str(row["runs"])]
            cells += [rival_ms(row, name) for name in columns]
            cells += [f"{row['speedup']:.2f}x" if row["speedup"] else ""]
            if memory:
                peaks = row.get("peak_mb", {})
                eager = peaks.get("autocast") or peaks.get("eager")  # in the same precision
                cells += [f"{peaks['dfengine']:.0f} ({eager:.0f})" if eager else ""]
            lines.append(f"| {' | '.join(cells)} |")
        where = f"{result['device']}, torch {result['torch']}, {result['threads']} threads."
        parts.append(f"{where}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def waterfall_table() -> str:
    """What each of the engine's steps brings."""
    parts = []
    for result in results("throughput-waterfall"):
        for row in result["rows"]:
            lines = [f"{result['device']}:", "", f"| {model_name(row)}, batch {row['batch']} | ms |", "| --- | --- |"]
            lines += [f"| {step['step']} | {step['ms']:.1f} |" for step in row["steps"]]
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


SHORT_RIVALS = {
    "OpenVINO": "OpenVINO", "ONNX Runtime": "ONNX Runtime (float32)", "torch.compile": "`torch.compile`",
    "autocast": "torch autocast",
}  # fmt: skip


def short_table() -> str:
    """The half-precision rows of detection for the README, at the presets' own sizes and batches of 1 and 16.

    Of a case that was measured twice the row with the most rivals; only devices whose every row has them all, if any.
    """
    devices: dict[str, dict[tuple, dict]] = {}
    for result in results("throughput-detect*"):
        rows = devices.setdefault(result["device"], {})
        for row in result["rows"]:
            case = model_name(row), row["batch"]
            half = row["precision"] in ("bfloat16", "float16")
            if half and row["batch"] in (1, 16) and row["size"] in (64, 256):
                rows[case] = max(rows.get(case, row), row, key=lambda row: len(row["runners"]))
    whole = {
        device: rows
        for device, rows in devices.items()
        if rows and all(rival_ms(row, name) for row in rows.values() for name in SHORT_RIVALS)
    }
    parts = []
    for device, rows in (whole or {device: rows for device, rows in devices.items() if rows}).items():
        lines = [f"{device}:", "", f"| model | dfengine | {' | '.join(SHORT_RIVALS.values())} |", "|" + " --- |" * 6]
        for (name, batch), row in rows.items():
            own = row["runners"]["dfengine"]
            times = [rival_ms(row, rival) for rival in SHORT_RIVALS]
            cells = [f"{name}, batch {batch}", f"{own['ms']:.1f} ms, {own['images_per_second']:.1f} images/s"]
            cells += [f"{time} ms" if time else "not measured" for time in times]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def study_table(name: str, against: str) -> str:
    """Every variant of a study, beside the one called `against`."""
    return study_report.table(study_report.read([RESULTS / "study" / f"{name}.csv"]), against=against) + "\n"


TABLES = {
    "README.md": {"speed": short_table},
    "docs/kernels.md": {"tables": kernel_tables},
    "docs/results.md": {
        "detect": lambda: speed_table("detect"),
        "unet": lambda: speed_table("unet"),
        "waterfall": waterfall_table,
    },
    "docs/study.md": {
        "study": lambda: study_table("study", "default"),
        "screws": lambda: study_table("screws", "screw"),
    },
}
"""Page -> marker -> what stands between `<!-- marker: begin -->` and `<!-- marker: end -->`."""


def written(text: str, marker: str, content: str) -> str:
    """The page with this content at the marker. Raises ValueError where the page has not got it."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if not pattern.search(text):
        raise ValueError(f"no marker {begin}")
    return pattern.sub(lambda _: f"{begin}\n\n{content}\n{end}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where a page is not up to date")
    check = parser.parse_args().check
    stale = 0
    for name, tables in TABLES.items():
        page = ROOT / name
        text = new = page.read_text(encoding="utf-8")
        for marker, table in tables.items():
            new = written(new, marker, table())
        if new != text and check:
            print(f"{name}: not what bench/results says; python bench/tables.py writes it")
            stale = 1
        elif new != text:
            page.write_text(new, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
