"""Time whole detection, uint8 images to scores, or one evaluation of the U-Net, beside the rivals of bench/rivals.py.

    python bench/throughput.py [--case detect|unet|waterfall] [--preset NAME ...] [--size S ...] [--batch N ...]
        [--precision NAME ...] [--rivals NAME,NAME...] [--tactics tuned] [--seconds 20] [--json OUT]

One process, all interleaved, on rotating inputs; weights are redrawn, so that no layer is zero. No row is written where
the engine's results are not the float32 modules'. `waterfall` adds the engine's own optimisations one after the other.
Results go to bench/results/<device name>/throughput-<case>.json, and from there into the README and docs/results.md by
bench/tables.py. OpenVINO, ONNX Runtime and TensorRT are timed where they are installed (pip install openvino nncf onnx
onnxruntime, or tensorrt onnx). On a GPU whose energy NVML counts, rows hold the joules of an image.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "bench"]
sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bench.energy import joules_per_call  # noqa: E402
from bench.measuring import environment, peak_memory, results_path, rows_of, write  # noqa: E402
from bench.rivals import HALF_BESIDE, RIVALS, OneEvaluation, WholeDetection, rival  # noqa: E402
from dfengine.engine.arithmetic import float32_arithmetic  # noqa: E402
from dfengine.engine.builder import Fusion  # noqa: E402
from dfengine.engine.execute import Executor  # noqa: E402
from dfengine.engine.lower import Lowering  # noqa: E402
from dfengine.engine.modules import PRECISIONS  # noqa: E402
from dfengine.engine.quantize import Ranges, measured_ranges  # noqa: E402
from dfengine.engine.runner import ProgramRunner  # noqa: E402
from dfengine.engine.timing import matmul_rate, statistics_of, type_name  # noqa: E402
from dfengine.models import PRESETS, Model, build_model, cost, preset  # noqa: E402
from tests.helpers import redraw  # noqa: E402

AGREEMENT = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 0.05, "float16": 0.02, "int8": 0.1, "fp8": 0.1}
"""Largest difference of a map, in probability, from the float32 modules'; of predicted noise, beside its largest."""
RIVAL_AGREEMENT = {precision: 2 * allowed for precision, allowed in AGREEMENT.items()}
SETS = 4
PAUSE = 0.02
"""Seconds before each call: the threads of the runner before it go on spinning for a while."""
Function = Callable[[Tensor], tuple[Tensor, ...]]


def model_of(name: str, size: int | None, **changes) -> Model:
    return redraw(build_model(preset(name, **({"image_size": size} if size else {}), **changes))).eval()


def engine(
    case: str,
    name: str,
    size: int | None,
    batch: int,
    precision: str,
    device: str,
    tactics: str,
    tuning_seconds: float | None,
) -> Function:
    """The engine's own way to do what the case asks."""
    ranges = ranges_of(name, size, device) if precision in HALF_BESIDE else None
    known = {"tactics": tactics, "tuning_seconds": tuning_seconds, "ranges": ranges}
    if case == "detect":
        runner = ProgramRunner(model_of(name, size), device, precision, **known)
        runner.warm_up([batch])

        def detect(images: Tensor) -> tuple[Tensor, ...]:
            found = runner.run(images.float() / 255)
            return found.anomaly_map, found.pred_score

        return detect
    # A chain of one step is one evaluation at batch B, of which only the network's ops are timed.
    of = model_of(name, size, mode="iterative", t_b=preset(name).t_b)
    runner = ProgramRunner(of, device, precision, buckets=False, **known)
    runner.warm_up([batch])
    executor = runner.executor(batch)
    ops = {op.name: op for op in executor.program.ops}
    around = {"ingest", "reverse_step", "one_step", "score"}
    calls = [executor.call(op) for name, op in ops.items() if name not in around and not name.startswith("segment.")]
    x_t, out = (executor.tensor(ops["reverse_step"].arguments[key]) for key in ("x_t", "eps"))
    if device == "cuda":  # as detection runs them, and the rivals
        calls = [one_graph(calls)]

    def evaluate(noised: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            x_t.copy_(noised.permute(0, 2, 3, 1))
            for call in calls:
                call()
            return (out.permute(0, 3, 1, 2).float(),)

    return evaluate


def one_graph(calls: list[Callable[[], None]]) -> Callable[[], None]:
    """The calls, which have run before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def ranges_of(name: str, size: int | None, device: str) -> Ranges:
    """As `dfengine verify --record` measures them; on images of noise."""
    runner = ProgramRunner(model_of(name, size), device, buckets=False)
    images = torch.cat(inputs_of("detect", runner.config.image_size, 1, device)).float() / 255
    with float32_arithmetic(torch.device(device), "float32"):
        return measured_ranges(runner.executor(1), images)


def inputs_of(case: str, size: int, batch: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size, size, 3) if case == "detect" else (batch, 3, size, size)
    if case == "detect":
        return [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device) for _ in range(SETS)]
    return [torch.randn(shape, generator=generator).to(device) for _ in range(SETS)]


def maker(case: str, name: str, size: int | None, batch: int, device: str) -> Callable:
    kind = WholeDetection if case == "detect" else OneEvaluation

    def make(autocast: torch.dtype | None):
        model = model_of(name, size).to(device=device, memory_format=torch.channels_last)
        return kind(model, batch, device, autocast)

    return make


def difference(case: str, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    error = (found[0].float() - exact[0]).abs().max().item()
    return error if case == "detect" else error / exact[0].abs().max().item()


def timed(functions: dict[str, Function], sets: list[Tensor], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, in turn, at least ten of each."""
    cuda = sets[0].is_cuda
    times: dict[str, list[float]] = {label: [] for label in functions}
    for function in functions.values():
        function(sets[0]), function(sets[1])
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 10:
        labels = list(functions)
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:  # none follows the same one always
            function = functions[label]
            if cuda:
                torch.cuda.synchronize()
            time.sleep(PAUSE)
            start = time.perf_counter()
            function(sets[turn % SETS])
            if cuda:
                torch.cuda.synchronize()
            times[label].append(time.perf_counter() - start)
        turn += 1
    return times


def bench(case: str, name: str, size: int | None, batch: int, precision: str, arguments: argparse.Namespace) -> dict:
    """One row. Exits where the engine is wrong."""
    device, config = arguments.device, preset(name, **({"image_size": size} if size else {}))
    sets, make = inputs_of(case, config.image_size, batch, device), maker(case, name, size, batch, device)
    _, exactly = rival("eager", make, sets, "float32")
    with float32_arithmetic(torch.device(device), "float32"):
        exact = tuple(tensor.clone() for tensor in exactly(sets[0]))
    of_engine = case, name, size, batch, precision, device, arguments.tactics, arguments.tuning_seconds
    functions = {"dfengine": engine(*of_engine)}
    errors = {"dfengine": difference(case, functions["dfengine"](sets[0]), exact)}
    if not errors["dfengine"] <= AGREEMENT[precision]:
        raise SystemExit(f"{name} {precision}: {errors['dfengine']:.3g} from the modules: nothing is timed")
    for rival_name in arguments.rivals:
        try:
            label, function = rival(rival_name, make, sets, precision)
            error = difference(case, function(sets[0]), exact)
        except Exception as error:  # whatever a rival's library raises where it cannot run this, or memory is short
            print(f"  {rival_name}: left out: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
            continue
        if not error <= RIVAL_AGREEMENT[precision if label.endswith("int8") else HALF_BESIDE.get(precision, precision)]:
            print(f"  {label}: left out: {error:.3g} from the modules", flush=True)
            continue
        functions[label], errors[label] = function, error
    times = timed(functions, sets, arguments.seconds)
    found = {label: statistics_of(values, batch) | {"error": errors[label]} for label, values in times.items()}
    for label, function in functions.items():
        joules = joules_per_call(partial(function, sets[0]), device)
        found[label] |= {"joules_per_image": joules / batch} if joules is not None else {}
    flops = batch * (cost(config).image_flops if case == "detect" else cost(config).reconstruction_flops)
    dtype = torch.int8 if precision == "int8" else PRECISIONS[precision]
    achieved = flops / found["dfengine"]["ms"] * 1e3
    others = {label: values["ms"] for label, values in found.items() if label != "dfengine"}
    best = min(others, key=others.get) if others else None
    row = {
        "case": case,
        "preset": name,
        "size": config.image_size,
        "batch": batch,
        "precision": precision,
        "gflop": flops / 1e9,
        "tflops": achieved / 1e12,
        "percent_of_matmul": 100 * achieved / matmul_rate(dtype, device),
        "matmul": type_name(dtype),
        "best_rival": best,
        "speedup": others[best] / found["dfengine"]["ms"] if best else None,
        "runs": len(times["dfengine"]),
        "runners": found,
    }
    if arguments.memory:
        for label in ("dfengine", *arguments.rivals):
            row.setdefault("peak_mb", {})[label] = memory_of(label, row, arguments)
    return row


def memory_of(label: str, row: dict, arguments: argparse.Namespace) -> float | None:
    """The peak memory, MB, of a process of its own that runs this alone, beyond that of the imports."""
    case = {key: row[key] for key in ("case", "preset", "size", "batch", "precision")}
    of_engine = {name: getattr(arguments, name) for name in ("device", "tactics", "tuning_seconds")}
    text = json.dumps(case | of_engine | {"label": label})
    command = [sys.executable, __file__, "--memory-of", text]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return float(lines[-1]) if done.returncode == 0 and lines else None


def print_memory(of: dict) -> None:
    case, name, size, batch, device = (of[key] for key in ("case", "preset", "size", "batch", "device"))
    sets, before = inputs_of(case, size, batch, device), peak_memory(device)
    if of["label"] == "dfengine":
        function = engine(case, name, size, batch, of["precision"], device, of["tactics"], of["tuning_seconds"])
    else:
        make = maker(case, name, size, batch, device)
        _, function = rival(of["label"], make, sets, of["precision"])
    for images in sets:
        function(images)
    print((peak_memory(device) - before) / 1e6)


WATERFALL = [
    ("norms, activations and concatenations as ops of their own", dict(), False),
    ("+ norm and activation as the convolution reads", dict(prologue=True), False),
    ("+ concatenation as a second source", dict(prologue=True, two_sources=True), False),
    (
        "+ residual resampled as it is added",
        dict(prologue=True, two_sources=True, residual_resample=True),
        False,
    ),
    (
        "+ moments left for the next norm",
        dict(prologue=True, two_sources=True, residual_resample=True, moments=True),
        False,
    ),
    (
        "+ half precision",
        dict(prologue=True, two_sources=True, residual_resample=True, moments=True),
        True,
    ),
]
NOTHING = dict(prologue=False, two_sources=False, residual_resample=False, moments=False)


def waterfall(name: str, size: int | None, batch: int, arguments: argparse.Namespace) -> dict:
    """The engine's steps, one after the other, and torch eager before them."""
    device = arguments.device
    config = preset(name, **({"image_size": size} if size else {}))
    sets = inputs_of("detect", config.image_size, batch, device)
    half = "bfloat16" if "bfloat16" in arguments.precision else "float16"
    _, eager = rival("eager", maker("detect", name, size, batch, device), sets, "float32")
    exact = eager(sets[0])
    functions: dict[str, Function] = {"torch eager": eager}
    for label, fused, in_half in WATERFALL:
        precision = half if in_half else "float32"
        family = "cpu" if device == "cpu" else "triton"
        fusion = Fusion(**{**NOTHING, **fused}, tile_pixels=Fusion.of(family).tile_pixels)
        lowering = Lowering(model_of(name, size), PRECISIONS[precision], device, family, fusion)
        executor = Executor(lowering.program(batch), device, family if device == "cpu" else None)
        threshold = torch.ones(1, device=device)

        def run(images: Tensor, executor=executor, threshold=threshold) -> tuple[Tensor, ...]:
            found = executor.run(images=images.float() / 255, threshold=threshold)
            return found["anomaly_map"], found["pred_score"]

        error = difference("detect", run(sets[0]), exact)
        if not error <= AGREEMENT[precision]:
            raise SystemExit(f"{label}: {error:.3g} from the modules: nothing is timed")
        functions[label] = run
    times = timed(functions, sets, arguments.seconds)
    steps = [{"step": label, **statistics_of(values, batch)} for label, values in times.items()]
    return {"case": "waterfall", "preset": name, "size": config.image_size, "batch": batch, "steps": steps}


def shown(row: dict) -> str:
    head = f"{row['preset']} {row['size']} x{row['batch']}"
    if row["case"] == "waterfall":
        return "\n".join([head, *(f"  {step['ms']:9.2f} ms  {step['step']}" for step in row["steps"])])
    runners = sorted(row["runners"].items(), key=lambda item: item[1]["ms"])
    times = "  ".join(f"{label} {values['ms']:.1f} ms" for label, values in runners)
    tail = f"  ({row['tflops']:.3f} TFLOP/s, {row['percent_of_matmul']:.0f}% of a matrix product in {row['matmul']}"
    tail += f"; {row['speedup']:.2f}x {row['best_rival']})" if row["speedup"] else ")"
    peaks = ", ".join(f"{label} {value:.0f}" for label, value in row.get("peak_mb", {}).items() if value)
    memory = f"  peak MB: {peaks}" if peaks else ""
    return f"{row['case']} {head} {row['precision']}: {times}{tail}{memory}"


def merged(kept: list[dict], rows: list[dict]) -> list[dict]:
    """What was kept, but for what was measured again, and then the new rows."""

    def named(row: dict) -> tuple:
        return tuple(row.get(key) for key in ("case", "preset", "size", "batch", "precision"))

    again = {named(row) for row in rows}
    return [row for row in kept if named(row) not in again] + rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("detect", "unet", "waterfall"), default="detect")
    presets = ["diff-fastener-tiny", "diff-fastener-small"]
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=presets)
    parser.add_argument("--size", nargs="+", type=int, default=[None], help="model pixels (default: the preset's)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--precision", nargs="+", choices=sorted(AGREEMENT), default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="comma-separated; empty for none")
    parser.add_argument("--tactics", choices=("default", "tuned", "exhaustive"), default="default")
    parser.add_argument("--tuning-seconds", type=float, help="measure no further op of a program after so long")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a process of its own")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write here instead")
    parser.add_argument("--add", action="store_true", help="keep what the file holds of this machine")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return print_memory(json.loads(arguments.memory_of))
    arguments.rivals = [name for name in arguments.rivals.split(",") if name]
    unknown = [name for name in arguments.rivals if name not in RIVALS]
    if unknown:
        parser.error(f"--rivals: {', '.join(unknown)}: known are {', '.join(RIVALS)}")
    head, rows = environment(arguments.device) | {"tactics": arguments.tactics, "note": arguments.note}, []
    out = arguments.json or results_path(head, f"throughput-{arguments.case}")
    kept = rows_of(out, head) if arguments.add else []
    torch.backends.cudnn.benchmark = True  # for every runner; it means nothing on a CPU
    cases = list(itertools.product(arguments.preset, arguments.size, arguments.batch))
    if arguments.case == "waterfall":
        for case in cases:
            rows.append(waterfall(*case, arguments))
            print(shown(rows[-1]), flush=True)
        return write(out, head | {"rows": merged(kept, rows)})
    for case, precision in itertools.product(cases, arguments.precision):
        rows.append(bench(arguments.case, *case, precision, arguments))
        print(shown(rows[-1]), flush=True)
        write(out, head | {"rows": merged(kept, rows)})  # row by row: an end of time loses one at most
        torch.compiler.reset()


if __name__ == "__main__":
    main()
