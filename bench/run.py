"""Time the kernels on this machine and write bench/results/<device name>/<op>.json.

    python bench/run.py [OP ...] [--device cpu|cuda] [--seconds 2] [--cpu-time] [--out FOLDER]

For every case of bench/kernels/<op>.py the op runs interleaved with its rivals on rotating inputs that together exceed
the last-level cache; a row holds median and p99 in microseconds, GB/s of the bytes that must move, and the share of the
copy bandwidth that was measured in the same process on a working set of the same size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import torch  # noqa: E402

import dfengine.native  # noqa: E402
from dfengine._version import __version__  # noqa: E402

ROTATED_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Inputs and outputs of the rotation together: beyond the last-level cache."""
OPS = sorted(path.stem for path in (ROOT / "bench" / "kernels").glob("*.py"))
CLOCKS = {"elapsed": time.perf_counter, "cpu": time.process_time}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text).group(1)
        family, model = (re.search(rf"^{key}\s*:\s*(\d+)", text, re.M).group(1) for key in ("cpu family", "model"))
        return f"{name} family {family} model {model}, {os.cpu_count()} cores"
    except (OSError, AttributeError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def command_output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, text=True, check=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: str) -> dict:
    """Where and with what the numbers were measured."""
    result = {
        "device": device_name(device),
        "dfengine": __version__,
        "commit": command_output("git", "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": dfengine.native.status(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device == "cuda":
        import triton

        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
        result |= {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "driver, clocks, power": command_output("nvidia-smi", query, "--format=csv,noheader"),
        }
    return result


def time_once(function, arguments, device: str, clock: str) -> float:
    """Seconds of one call, to its end on the device; on a CPU by `clock`."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = CLOCKS[clock]()
    function(*arguments)
    return CLOCKS[clock]() - start


def measure(functions: dict, sets: list, device: str, seconds: float, clock: str) -> dict[str, list[float]]:
    """Times of every function, called in turn on rotating sets, for about `seconds` seconds after a warm-up."""
    times = {name: [] for name in functions}
    for function in functions.values():
        for arguments in sets[:2]:
            function(*arguments)
    end = time.perf_counter() + seconds
    turn = 0
    while time.perf_counter() < end or turn < 8:
        for name, function in functions.items():
            times[name].append(time_once(function, sets[turn % len(sets)], device, clock))
            turn += 1
    return times


def copy_function(moved: int, count: int, device: str):
    """A copy that reads moved / 2 bytes and writes as many, on buffers that rotate as the cases do."""
    pairs = [tuple(torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(count)]
    turn = 0

    def copy(*_arguments):
        nonlocal turn
        source, target = pairs[turn % count]
        turn += 1
        target.copy_(source)

    return copy


def bench_op(op: str, device: str, seconds: float, clock: str) -> list[dict]:
    rows = []
    for shape, dtype, moved, make, rivals, *label in importlib.import_module(f"bench.kernels.{op}").cases(device):
        count = max(2, ROTATED_BYTES[device] // moved)
        sets = [make() for _ in range(count)]
        times = measure({**rivals, "copy": copy_function(moved, count, device)}, sets, device, seconds, clock)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ceiling = moved / medians["copy"]
        row = {
            "op": label[0] if label else op,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "us": medians["kernel"] * 1e6,
            "us_best": min(times["kernel"]) * 1e6,
            "us_p99": sorted(times["kernel"])[int(0.99 * (len(times["kernel"]) - 1))] * 1e6,
            "gbps": moved / medians["kernel"] / 1e9,
            "copy_gbps": ceiling / 1e9,
            "percent_of_ceiling": 100 * moved / medians["kernel"] / ceiling,
            "speedup": medians["torch"] / medians["kernel"],
            "rivals_us": {name: value * 1e6 for name, value in medians.items() if name not in ("kernel", "copy")},
            "runs": len(times["kernel"]),
        }
        rows.append(row)
        print(
            f"{row['op']:24} {'x'.join(map(str, shape)):16} {row['dtype']:9} {row['us']:9.1f} us  "
            f"{row['gbps']:7.1f} GB/s  {row['percent_of_ceiling']:5.1f}% of copy  {row['speedup']:5.1f}x torch"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the CPU time of the process, for one thread (OMP_NUM_THREADS=1) on a busy machine",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    arguments = parser.parse_args()
    clock = "cpu" if arguments.cpu_time else "elapsed"
    unknown = set(arguments.ops) - set(OPS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}")
    for op in arguments.ops or OPS:
        head = environment(arguments.device)
        rows = bench_op(op, arguments.device, arguments.seconds, clock)
        folder = arguments.out / re.sub(r"[^A-Za-z0-9.]+", "-", head["device"]).strip("-").lower()
        folder.mkdir(parents=True, exist_ok=True)
        result = {**head, "clock": clock, "note": arguments.note, "rows": rows}
        (folder / f"{op}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {folder / f'{op}.json'}")


if __name__ == "__main__":
    main()
