"""Time the kernels on this machine; write bench/results/<device name>/<op>.json, or one file.

    python bench/kernels.py [OP ...] [--device cpu|cuda] [--seconds 2] [--json OUT]

For every case of bench/kernels/<op>.py the op runs interleaved with its rivals on rotating arguments that together
exceed the last-level cache. On a GPU a function is captured once, for all arguments, in a CUDA graph, whose replays are
timed. A row holds the median and p99 in microseconds, GB/s of the bytes that must move, TFLOP/s where there are matrix
products, and the percent of the ceiling: the time that the case would take at the copy bandwidth (of a working set of
the same size) or at the rate of a large matrix product, whichever is longer, both measured in the same process.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "bench"]  # whose names would hide others
sys.path.append(str(ROOT))

import torch  # noqa: E402

from bench.kernels import Case  # noqa: E402
from bench.measuring import environment, results_path, write  # noqa: E402

ROTATED_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Inputs and outputs of the rotation together: beyond the last-level cache."""
MOST_SETS = {"cpu": 4096, "cuda": 256}
CLOCKS = {"elapsed": time.perf_counter, "cpu": time.process_time}
MATMUL = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices whose product is the ceiling of arithmetic."""


def on_cpu(function, sets: list, clock: str):
    """A function that runs `function` on the next set of arguments and returns the seconds it took."""
    turn = -1

    def once() -> float:
        nonlocal turn
        turn = (turn + 1) % len(sets)
        start = CLOCKS[clock]()
        function(*sets[turn])
        return CLOCKS[clock]() - start

    return once


def on_cuda(function, sets: list):
    """A function that replays a graph of `function` on all sets and returns the seconds that one call took."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in sets[:3]:
            function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(*arguments)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(sets)

    return once


def measure(functions: dict, sets: list, device: str, seconds: float, clock: str) -> dict[str, list[float]]:
    """Seconds of calls of every function, in turn, for about `seconds` seconds after a warm-up."""
    timed = {name: on_cuda(f, sets) if device == "cuda" else on_cpu(f, sets, clock) for name, f in functions.items()}
    times = {name: [] for name in timed}
    for once in timed.values():
        once(), once()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["kernel"]) < 5:
        for name, once in timed.items():
            times[name].append(once())
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


@cache
def matmul_rate(dtype: torch.dtype, device: str, clock: str) -> float:
    """FLOP/s of the product of two large square matrices."""
    side = MATMUL[device]
    sets = [tuple(torch.ones((side, side), dtype=dtype, device=device) for _ in range(3))]
    times = measure({"kernel": lambda a, b, c: torch.mm(a, b, out=c)}, sets, device, 0.5, clock)["kernel"]
    return 2 * side**3 / statistics.median(times)


def bench_case(op: str, case: Case, device: str, seconds: float, clock: str, compiled: bool) -> dict:
    count = min(MOST_SETS[device], max(2, ROTATED_BYTES[device] // case.moved))
    rivals = dict(case.rivals)
    if compiled:
        rivals["compile"] = torch.compile(rivals["torch"], mode="max-autotune-no-cudagraphs", dynamic=False)
    rivals["copy"] = copy_function(case.moved, count, device)
    times = measure(rivals, [case.make() for _ in range(count)], device, seconds, clock)
    medians = {name: statistics.median(values) for name, values in times.items()}
    kernel, rates = medians["kernel"], {"copy_gbps": case.moved / medians["copy"] / 1e9}
    least = medians["copy"]
    if case.flops:
        rate = matmul_rate(case.dtype, device, clock)
        least = max(least, case.flops / rate)
        rates |= {"tflops": case.flops / kernel / 1e12, "matmul_tflops": rate / 1e12}
    return {
        "op": op,
        "label": case.label,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "us": kernel * 1e6,
        "us_best": min(times["kernel"]) * 1e6,
        "us_p99": sorted(times["kernel"])[int(0.99 * (len(times["kernel"]) - 1))] * 1e6,
        "gbps": case.moved / kernel / 1e9,
        **rates,
        "percent_of_ceiling": 100 * least / kernel,
        "speedup": medians["torch"] / kernel,
        "rivals_us": {name: value * 1e6 for name, value in medians.items() if name not in ("kernel", "copy")},
        "runs": len(times["kernel"]),
    }


def show(row: dict) -> None:
    shape = "x".join(map(str, row["shape"]))
    rate = f"{row['tflops']:7.2f} TFLOP/s" if "tflops" in row else f"{row['gbps']:7.1f} GB/s   "
    print(
        f"{row['op']:18} {row['label']:24} {shape:16} {row['dtype']:9} {row['us']:9.1f} us  {rate}  "
        f"{row['percent_of_ceiling']:5.1f}% of ceiling  {row['speedup']:5.1f}x torch",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modules = sorted(path.stem for path in (ROOT / "bench" / "kernels").glob("[!_]*.py"))
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(modules)}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure the CPU time of the process, for one thread (OMP_NUM_THREADS=1) on a busy machine",
    )
    parser.add_argument("--compile", action="store_true", help="time torch.compile too; always done on a GPU")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows to this file")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="else one file for each op here")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    arguments = parser.parse_args()
    clock = "cpu" if arguments.cpu_time else "elapsed"
    unknown = set(arguments.ops) - set(modules)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}")
    compiled = arguments.compile or arguments.device == "cuda"
    collected = []
    for op in arguments.ops or modules:
        head = environment(arguments.device) | {"clock": clock, "note": arguments.note}
        rows = []
        for case in importlib.import_module(f"bench.kernels.{op}").cases(arguments.device):
            rows.append(bench_case(op, case, arguments.device, arguments.seconds, clock, compiled))
            show(rows[-1])
        collected += rows
        if arguments.json is None and rows:
            write(results_path(head, op, arguments.out), head | {"rows": rows})
    if arguments.json is not None:
        write(arguments.json, head | {"rows": collected})


if __name__ == "__main__":
    main()
