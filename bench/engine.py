"""Time whole detection, images to scores, on this machine; write bench/results/<device name>/engine.json.

    python bench/engine.py [--preset NAME ...] [--batch N ...] [--precision NAME ...] [--seconds 20] [--json OUT]

The engine's program runs interleaved with its rivals in one process, on rotating images: torch eager (channels-last,
autocast in half precision) and `torch.compile` of the same modules (max-autotune; on a CPU with freezing). Weights are
redrawn, so that no layer is zero; a row is written only where the program's maps agree with the modules'.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "bench"]
sys.path.append(str(ROOT))

import torch  # noqa: E402

from bench.measuring import environment, results_path, write  # noqa: E402
from dfengine.engine.modules import ModuleRunner  # noqa: E402
from dfengine.engine.runner import ProgramRunner  # noqa: E402
from dfengine.models import PRESETS, Model, build_model, cost, preset  # noqa: E402
from tests.helpers import redraw  # noqa: E402

AGREEMENT = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
"""Largest difference of a map, in probability, from the float32 modules'."""
SETS = 4
BACKENDS = {"cpu": "cpu", "cuda": "triton"}


def redrawn(name: str) -> Model:
    return redraw(build_model(preset(name))).eval()


def runners(name: str, batch: int, precision: str, device: str, compiled: bool) -> dict:
    """Name -> function of float32 images (B, S, S, C) that gives the anomaly maps."""
    model = redrawn(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    program = ProgramRunner(redrawn(name), device, precision, backend=BACKENDS[device])
    program.executor(batch)
    eager = ModuleRunner(model, device, precision)
    found = {
        "engine": lambda images: program.run(images).anomaly_map,
        "eager": lambda images: eager.run(images).anomaly_map,
    }
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = device == "cpu"
        twin = ModuleRunner(model, device, precision)
        mode = "max-autotune-no-cudagraphs" if device == "cpu" else "max-autotune"
        twin.model = torch.nn.Module()
        twin.model.reconstruction = torch.compile(model.reconstruction, mode=mode, dynamic=False)
        twin.model.segmentation = torch.compile(model.segmentation, mode=mode, dynamic=False)
        with torch.no_grad():
            found["compile"] = lambda images: twin.run(images).anomaly_map
    return found


def bench(name: str, batch: int, precision: str, device: str, seconds: float, compiled: bool) -> dict:
    config = preset(name)
    size = config.image_size
    generator = torch.Generator().manual_seed(0)
    sets = [torch.rand((batch, size, size, 3), generator=generator).to(device) for _ in range(SETS)]
    functions = runners(name, batch, precision, device, compiled)
    exact = ModuleRunner(redrawn(name), device).run(sets[0]).anomaly_map
    error = (functions["engine"](sets[0]).float() - exact).abs().max().item()
    if error > AGREEMENT[precision]:
        raise SystemExit(f"{name} {precision}: the program's map differs by {error:.3g} from the modules'")
    times = {key: [] for key in functions}
    for function in functions.values():
        function(sets[0]), function(sets[1])
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 3:
        for key, function in functions.items():
            start = time.perf_counter()
            function(sets[turn % SETS])
            if device == "cuda":
                torch.cuda.synchronize()
            times[key].append(time.perf_counter() - start)
        turn += 1
    medians = {key: statistics.median(values) for key, values in times.items()}
    engine = sorted(times["engine"])
    return {
        "preset": name,
        "batch": batch,
        "precision": precision,
        "ms": medians["engine"] * 1e3,
        "ms_p99": engine[int(0.99 * (len(engine) - 1))] * 1e3,
        "images_per_second": batch / medians["engine"],
        "tflops": batch * cost(config).image_flops / medians["engine"] / 1e12,
        "error": error,
        "rivals_ms": {key: value * 1e3 for key, value in medians.items() if key != "engine"},
        "runs": turn,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    presets = ["diff-fastener-tiny", "diff-fastener-small"]
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=presets)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--precision", nargs="+", choices=sorted(AGREEMENT), default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write here instead")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    arguments = parser.parse_args()
    head, rows = environment(arguments.device) | {"note": arguments.note}, []
    for name in arguments.preset:
        for batch in arguments.batch:
            for precision in arguments.precision:
                compiled = not arguments.no_compile
                rows.append(bench(name, batch, precision, arguments.device, arguments.seconds, compiled))
                row = rows[-1]
                rivals = "  ".join(f"{key} {value:.1f} ms" for key, value in row["rivals_ms"].items())
                print(
                    f"{name:22} x{batch:<3} {precision:9} {row['ms']:8.1f} ms  {row['images_per_second']:7.2f} "
                    f"images/s  {row['tflops']:6.3f} TFLOP/s  ({rivals})",
                    flush=True,
                )
    write(arguments.json or results_path(head, "engine"), head | {"rows": rows})


if __name__ == "__main__":
    main()
