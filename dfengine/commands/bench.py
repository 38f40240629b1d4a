"""`dfengine bench`: how fast a detector runs here, beside the same model as plain PyTorch modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dfengine.checkpoint import load_checkpoint
from dfengine.commands.plan import aligned
from dfengine.commands.programs import warn_of_load
from dfengine.commands.scoring import say
from dfengine.detector import Detector
from dfengine.devices import hardware_name
from dfengine.engine.measure import trial_images
from dfengine.engine.modules import PRECISIONS, ModuleRunner
from dfengine.engine.timing import interleaved, statistics_of, type_name
from dfengine.errors import DfengineError
from dfengine.files import atomic_write, check_json_writable
from dfengine.kernels.quantization import FORMATS
from dfengine.wording import counted

ROTATED_INPUTS = 4
LEAST_CALLS = 2
"""Of each, where `seconds` are over before: the modules may take half a minute."""


def run_bench(
    checkpoint: Path, batch: list[int], device: str, precision: str, seconds: float, out: Path | None
) -> None:
    """Prints images/s and latencies of detection, images in memory to results, by batch size; writes them to `out`.
    The 99th percentile is that of a hundred calls at least.

    seconds: for each batch size, as far as `LEAST_CALLS` are done by then. Warns where other work was running.
    """
    if out is not None:
        check_json_writable(out, "preset", "image_size", "hardware", "rows")
    loaded = load_checkpoint(checkpoint)
    load = warn_of_load()
    detector = Detector(loaded, device, precision)
    eight_bits = detector.precision in FORMATS  # which torch's modules have not
    plain = type_name(PRECISIONS[detector.precision]) if eight_bits else detector.precision
    modules = ModuleRunner(loaded.build(), detector.device, plain, detector.seed)
    rows = [row for size in batch for row in _rows(detector, modules, size, seconds)]
    facts = {
        "file": str(checkpoint),
        "preset": detector.config.preset,
        "image_size": detector.config.image_size,
        "hardware": hardware_name(detector.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": load,
        "rows": rows,
    }
    where = f"{facts['hardware']}" + (f", threads: {facts['threads']}" if detector.device.type == "cpu" else "")
    where += "" if load is None else f", load average at the start: {load:.1f}"
    say(f"{checkpoint}: {detector.config.preset}, {facts['image_size']} pixels, {where}")
    lines = [["runs", "precision", "batch", "images/s", "ms", "p99 ms", "calls"]]
    for row in rows:
        p99 = f"{row['ms_p99']:.2f}" if "ms_p99" in row else "-"
        numbers = f"{row['images_per_second']:.1f}", f"{row['ms']:.2f}", p99, str(row["calls"])
        lines.append([row["runs"], row["precision"], str(row["batch"]), *numbers])
    say("\n".join(aligned(lines, left=(0, 1))))
    if out is not None:
        atomic_write(out, json.dumps(facts, indent=2))


def _rows(detector: Detector, modules: ModuleRunner, batch: int, seconds: float) -> list[dict]:
    size = detector.config.image_size
    try:
        images = [(trial_images(batch, size, 3, seed) * 255).round().to(torch.uint8) for seed in range(ROTATED_INPUTS)]
        units = [(part.float() / 255).to(detector.device) for part in images]
    except (RuntimeError, MemoryError):  # on a CPU torch has no error of its own for it
        wanted = f"batches of {counted(batch, 'image')}"
        raise DfengineError(f"{detector.device}: no memory for {wanted}; use a smaller one") from None
    arrays = [list(part.numpy()) for part in images]

    def plain(unit: torch.Tensor) -> None:
        modules.run(unit).anomaly_map.cpu()

    functions = {
        "detect": lambda turn: detector.detect(arrays[turn], batch_size=batch),
        "PyTorch modules": lambda turn: plain(units[turn]),
    }
    # By the host's clock on every device: what is timed begins and ends there.
    sets = [(turn,) for turn in range(ROTATED_INPUTS)]
    times = interleaved(functions, sets, "cpu", seconds, least=LEAST_CALLS, warmup=1)
    precisions = detector.precision, modules.precision
    return [_row(name, times[name], batch, used) for name, used in zip(functions, precisions, strict=True)]


def _row(name: str, values: list[float], batch: int, precision: str) -> dict:
    facts = {"runs": name, "precision": precision, "batch": batch}
    return facts | statistics_of(values, batch) | {"calls": len(values)}
