"""`dfengine demo`: fresh procedural fasteners through the shipped checkpoint, with metrics, a baseline and a report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from rich.progress import track

from dfengine.checkpoint import shipped_checkpoint
from dfengine.commands.evaluate import evaluate_dataset
from dfengine.commands.scoring import open_detector, say
from dfengine.console import OutputConsole
from dfengine.data.fasteners import render_fastener, write_fasteners
from dfengine.data.folders import open_dataset
from dfengine.data.images import load_unit, resize_unit
from dfengine.evaluation.baseline import MeanStdBaseline
from dfengine.evaluation.metrics import auroc
from dfengine.files import BUSY, atomic_write, locked, make_folder
from dfengine.results import earlier_results, list_result, listed_results, refuse_images

DEMO = "demo.json"
"""Of the results. Where it is there, or their marker lists it, the images beside them are a demo's."""
TEST_GOOD, PER_DEFECT = 100, 40
GOAL_IMAGE_AUROC, GOAL_PIXEL_AUROC, BASELINE_LIMIT = 0.98, 0.95, 0.90
BASELINE_IMAGES = 176
TRAINING_SEED = 0
"""Seed of the fasteners that the shipped checkpoint was trained on; the baseline is made from the first of them."""


def run_demo(out: Path, seed: int, device: str) -> int:
    """Renders, detects, evaluates, writes the report, and prints what was measured; returns the exit status.

    An earlier demo's images and results in `out` are replaced. Raises `UsageError` where they are somebody else's, and
    `DfengineError` where another demo is writing them.
    """
    make_folder(out)
    with locked(out / DEMO, f"{out}: {BUSY}"):
        return _demo(out, seed, device)


def _demo(out: Path, seed: int, device: str) -> int:
    started = time.perf_counter()
    checkpoint = shipped_checkpoint()
    images = out / "images"
    results = out / "results"
    earlier = earlier_results(results)
    # One that was interrupted is listed, but not found; one of an earlier version, which listed nothing, is found.
    if results / DEMO not in earlier and DEMO not in (listed_results(results) or ()):
        refuse_images(images, "the demo")
    for folder in (images, results):
        make_folder(folder)
    detector = open_detector(checkpoint, device, "auto", 0)
    console = OutputConsole(stderr=True)
    total = TEST_GOOD + 3 * PER_DEFECT
    say(f"rendering {total} fresh test fasteners (seed {seed}) into {images}")
    list_result(results, DEMO, *(path.relative_to(results).as_posix() for path in earlier))
    write_fasteners(images, 0, TEST_GOOD, PER_DEFECT, seed)
    dataset = open_dataset(images)
    status, result = evaluate_dataset(detector, dataset, results, checkpoint, others=[DEMO])
    if not result:
        return status

    size = detector.config.image_size
    rendered = range(BASELINE_IMAGES)
    baseline = MeanStdBaseline(
        resize_unit(render_fastener(TRAINING_SEED, index, "good", split="train")[0], size, f"training fastener {index}")
        for index in track(rendered, "baseline", console=console, transient=True, disable=not console.is_terminal)
    )
    scores, _ = baseline.score([load_unit(sample.path, size) for sample in dataset.test], detector.config.top_k)
    labels = np.array([sample.label for sample in dataset.test], dtype=bool)
    measured = {
        "image_auroc": result["image_auroc"],
        "pixel_auroc": result["pixel_auroc"],
        "baseline_image_auroc": auroc(labels, scores),
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    atomic_write(results / DEMO, json.dumps(measured, indent=2) + "\n")
    say(f"baseline (per-pixel mean and deviation of {BASELINE_IMAGES} training images): image AUROC "
        f"{measured['baseline_image_auroc']:.4f}")  # fmt: skip
    say(f"dfengine: image AUROC {measured['image_auroc']:.4f}, pixel AUROC {measured['pixel_auroc']:.4f}")
    for what, missed in (
        (f"image AUROC below {GOAL_IMAGE_AUROC}", measured["image_auroc"] < GOAL_IMAGE_AUROC),
        (f"pixel AUROC below {GOAL_PIXEL_AUROC}", measured["pixel_auroc"] < GOAL_PIXEL_AUROC),
        (f"baseline above {BASELINE_LIMIT}: the task is too easy", measured["baseline_image_auroc"] > BASELINE_LIMIT),
    ):
        if missed:
            say(f"the demo misses its goal: {what}")
    say(f"demo finished in {measured['seconds']:.0f} s; open {(results / 'report.html').resolve()}")
    return status
