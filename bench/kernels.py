"""Time the kernels on this machine; write bench/results/<device name>/<op>.json, or one file.

    python bench/kernels.py [OP ...] [--device cpu|cuda] [--seconds 2] [--json OUT [--resume]]

For every case of bench/kernels/<op>.py the op runs interleaved with its rivals on rotating arguments that together
exceed the last-level cache. On a GPU a function is captured once, for all arguments, in a CUDA graph, whose replays are
timed. A row holds the median and p99 in microseconds, GB/s of the bytes that must move, TFLOP/s where there are matrix
products, and the percent of the ceiling: the time that the case would take at the copy bandwidth (of a working set of
the same size) or at the rate of a large matrix product, whichever is longer, both measured in the same process. A rival
that fails is left out of its row and named there; where the op itself fails, the other cases go on and the exit status
is 1. `--once` times nothing: it calls every function of the cases once, outside of graphs, for a profiler to look at.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "bench"]  # whose names would hide others
sys.path.append(str(ROOT))

import torch  # noqa: E402

from bench.kernels import Case  # noqa: E402
from bench.measuring import environment, results_path, rows_of, write  # noqa: E402
from dfengine.engine.timing import copy_function, interleaved, matmul_rate, p99_of  # noqa: E402

ROTATED_BYTES = {"cpu": 128 * 2**20, "cuda": 512 * 2**20}
"""Inputs and outputs of the rotation together: beyond the last-level cache."""
MOST_SETS = {"cpu": 4096, "cuda": 256}


def bench_case(op: str, case: Case, device: str, seconds: float, clock: str, compiled: bool) -> dict:
    count = min(MOST_SETS[device], max(2, ROTATED_BYTES[device] // case.moved))
    rivals = dict(case.rivals)
    for name in ("torch", "chain") if compiled else ():
        if name in rivals:
            label = "compile" if name == "torch" else f"compile {name}"
            rivals[label] = torch.compile(rivals[name], mode="max-autotune-no-cudagraphs", dynamic=False)
    sets = [case.make() for _ in range(count)]
    rivals, failed = running(rivals, sets[0], device)
    rivals["copy"] = copy_function(case.moved, count, device)
    times = interleaved(rivals, sets, device, seconds, clock)
    medians = {name: statistics.median(values) for name, values in times.items()}
    kernel, rates = medians["kernel"], {"copy_gbps": case.moved / medians["copy"] / 1e9}
    least = medians["copy"]
    if case.flops:
        rate = matmul_rate(case.dtype, device, clock)
        least = max(least, case.flops / rate)
        rates |= {"tflops": case.flops / kernel / 1e12, "matmul_tflops": rate / 1e12}
    return {
        **described(op, case),
        "us": kernel * 1e6,
        "us_best": min(times["kernel"]) * 1e6,
        **({} if (p99 := p99_of(times["kernel"])) is None else {"us_p99": p99 * 1e6}),
        "gbps": case.moved / kernel / 1e9,
        **rates,
        "percent_of_ceiling": 100 * least / kernel,
        "speedup": medians["torch"] / kernel,
        "rivals_us": {name: value * 1e6 for name, value in medians.items() if name not in ("kernel", "copy")},
        "runs": len(times["kernel"]),
        **({"failed": failed} if failed else {}),
    }


def running(rivals: dict[str, Callable], arguments: tuple, device: str) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those that run once, and for the others the reason. What "kernel" and "torch" raise is the caller's."""
    found, failed = {}, {}
    for name, function in rivals.items():
        try:
            function(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            found[name] = function
        except Exception as error:
            if name in ("kernel", "torch"):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, failed


def described(op: str, case: Case) -> dict:
    """What a row says of its case."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"op": op, "label": case.label, "shape": list(case.shape), "dtype": dtype}


def name_of(row: dict) -> str:
    """A row's case in words, which `--match` looks through."""
    return f"{row['op']} {row['label']} {'x'.join(map(str, row['shape']))} {row['dtype']}"


def show(row: dict) -> None:
    shape = "x".join(map(str, row["shape"]))
    rate = f"{row['tflops']:7.2f} TFLOP/s" if "tflops" in row else f"{row['gbps']:7.1f} GB/s   "
    print(
        f"{row['op']:18} {row['label']:24} {shape:16} {row['dtype']:9} {row['us']:9.1f} us  {rate}  "
        f"{row['percent_of_ceiling']:5.1f}% of ceiling  {row['speedup']:5.1f}x torch",
        flush=True,
    )


def main() -> int:
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
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--match", default="", metavar="TEXT", help='only cases with this in "op label shape dtype"')
    parser.add_argument("--without", action="append", default=[], metavar="TEXT", help="no rival with this in its name")
    parser.add_argument("--once", action="store_true", help="call everything once and time nothing")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all rows to this file")
    parser.add_argument("--resume", action="store_true", help="keep the rows that OUT holds of this machine")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="else one file for each op here")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    arguments = parser.parse_args()
    clock = "cpu" if arguments.cpu_time else "elapsed"
    unknown = set(arguments.ops) - set(modules)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}")
    if arguments.resume and arguments.json is None:
        parser.error("--resume: goes on with the file that --json names")
    head = environment(arguments.device) | {"clock": clock, "note": arguments.note}
    kept = rows_of(arguments.json, head) if arguments.resume else []
    rows, failures = {name_of(row): row for row in kept}, 0
    done = {
        name
        for name, row in rows.items()
        if (not arguments.compile or "compile" in row["rivals_us"] or "compile" in row.get("failed", {}))
        and set(row.get("without", [])) <= set(arguments.without)
    }
    for op in arguments.ops or modules:
        for case in importlib.import_module(f"bench.kernels.{op}").cases(arguments.device):
            name = name_of(described(op, case))
            if name in done or arguments.match not in name:
                continue
            rivals = {r: call for r, call in case.rivals.items() if not any(text in r for text in arguments.without)}
            case = case._replace(rivals=rivals)
            try:
                if arguments.once:
                    _, failed = running(case.rivals, case.make(), arguments.device)
                    print(name, *(f"{rival}: {reason}" for rival, reason in failed.items()), sep="\n  ", flush=True)
                    continue
                row = bench_case(op, case, arguments.device, arguments.seconds, clock, arguments.compile)
            except Exception as error:
                print(f"{name}: failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failures += 1
                continue
            rows[name] = row | ({"without": arguments.without} if arguments.without else {})
            show(row)
            if arguments.json is not None:  # after each case, so that what was timed is kept where time runs out
                write(arguments.json, head | {"rows": list(rows.values())}, tell=False)
        of_op = [row for row in rows.values() if row["op"] == op]
        if arguments.json is None and of_op:
            write(results_path(head, op, arguments.out), head | {"rows": of_op})
    if arguments.json is not None and not arguments.once:
        write(arguments.json, head | {"rows": list(rows.values())})
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
