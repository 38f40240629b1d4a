"""`dfengine verify --data`: hold a precision to float32 on images, and note a pass in the checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from dfengine import __version__
from dfengine.checkpoint import Checkpoint, load_checkpoint, update_checkpoint
from dfengine.commands.calibrate import digest_of, trained_images
from dfengine.commands.scoring import WRONG_WAY_ROUND, Scoring, say, warn
from dfengine.console import OutputConsole
from dfengine.data.folders import Dataset, fingerprint, open_dataset
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.detector import Detector
from dfengine.devices import resolve_device
from dfengine.engine.arithmetic import float32_arithmetic
from dfengine.engine.quantize import measured_ranges
from dfengine.engine.runner import ProgramRunner
from dfengine.errors import DataError, DfengineError, ImageError, UsageError
from dfengine.evaluation.precision import AUROC_POINTS, PrecisionComparison, compare_precision
from dfengine.kernels.quantization import FORMATS
from dfengine.precision import check_precision, half_precision
from dfengine.verified import has_labels, verdict
from dfengine.wording import counted

MOST_RANGE_IMAGES = 32
"""Normal images from which ranges are measured."""
MOST_PASTED, LEAST_COMPARED = 64, 8
"""Images with a patch pasted in, and images as they are, to which a precision of eight bits is held."""


def run_verify_data(
    checkpoint: Path, data: Path, precision: str, record: bool, batch_size: int, device: str, seed: int
) -> int:
    """Compares and prints; returns 0, or 3 where some images could not be read.

    Labelled test images are used where `data` has sound and defective ones, else all its normal images. A precision of
    eight bits has its ranges measured on normal images that are then not compared, and without labels is held to the
    others with patches pasted in too: what it rounds wrongly shows where something is out of place. Raises
    `DfengineError` with the reasons where the precision is refused. record: write what was found into `checkpoint`.
    """
    where = resolve_device(device)
    if precision == "auto":
        precision = half_precision(where) or "float32"
        if precision == "float32":
            raise UsageError(f"{where} has no precision that is faster than float32; name one with --precision")
    if precision == "float32":
        raise UsageError("float32 is what a precision is compared with; name another with --precision")
    check_precision(precision, where)
    loaded = load_checkpoint(checkpoint)
    dataset = open_dataset(data)
    labelled = len({sample.label for sample in dataset.test}) == 2
    samples = dataset.test if labelled else [s for s in (*dataset.train, *dataset.test) if not s.label]
    if not samples:
        raise DataError(f"{data}: no normal images on which to compare the precisions")
    measured = _measured(dataset, labelled) if precision in FORMATS else []
    samples = [sample for sample in samples if sample.path not in measured]
    images = collect_inputs([sample.path for sample in samples]) if samples else []
    ranges = None
    if precision in FORMATS:
        ranges = _ranges(loaded, dataset.root, measured, where, seed)
        if len(images) < LEAST_COMPARED:
            reason = f"{counted(len(images), 'image')} beside the {len(measured)} that ranges are measured on"
            raise DataError(f"{data}: {reason}; {precision} must be held to {LEAST_COMPARED} at least")
        images += [] if labelled else _pasted(images, loaded.config.image_size)
    tried = replace(loaded, verified={precision: {"ranges": ranges}} if ranges else {})
    other = Detector(tried, device, precision, seed)
    scoring = Scoring(Detector(loaded, device, "float32", seed), batch_size)
    labels = {str(sample.path): bool(sample.label) for sample in samples} if labelled else None
    comparison = compare_precision(precision, scoring.batches(images), other.stream(images, batch_size), labels)
    if scoring.stopped:
        raise DfengineError("verify: float32 did not score all images, so nothing is said of the precision")
    _print(comparison)
    if len(images) > len(samples):
        say(f"{len(images) - len(samples)} of these images are copies of the others with a patch pasted in")
    if measured:
        say(f"ranges from {counted(len(measured), 'other normal image')}; none of these is compared")
    trained = trained_images(loaded.training)
    known = len(trained & {digest_of(sample.path) for sample in samples}) if trained else 0
    if known:
        say(f"{counted(known, 'image')} of these the model was trained on: images it has not seen may differ more")
    if comparison.auroc_float32 is not None and comparison.auroc_float32 < 0.5:
        warn(f"image AUROC of float32 {comparison.auroc_float32:.3f}: {WRONG_WAY_ROUND}")
    passes, noted = not comparison.failures, ""
    if record:
        unread = {name for name, _ in scoring.refused}
        paths = [sample.path for sample in samples if str(sample.path) not in unread]
        facts = {"name": data.resolve().name, "fingerprint": fingerprint(paths), "labelled": labelled, "known": known}
        note = {precision: _record(comparison, facts, where.type, seed) | ({"ranges": ranges} if ranges else {})}

        def outweighed(present: Checkpoint) -> bool:
            """Whether it was refused by the labels of images, which a pass without labels says nothing against."""
            earlier = present.verified.get(precision, {})
            return passes and not labelled and bool(earlier.get("refused")) and has_labels(earlier)

        def change(present: Checkpoint) -> Checkpoint:
            return present if outweighed(present) else replace(present, verified=present.verified | note)

        before, _ = update_checkpoint(checkpoint, loaded, change)
        earlier = before.verified.get(precision)
        if outweighed(before):
            noted = f"not noted in {checkpoint}, where it {verdict(earlier)}: that stays until it passes with labels"
        else:
            noted = f"noted in {checkpoint}" + (f", where before it {verdict(earlier)}" if earlier is not None else "")
    if not passes:
        reasons = "; ".join(comparison.failures)
        raise DfengineError(f"{precision} is refused: {reasons}" + (f" ({noted})" if noted else ""))
    say(f"{precision} passes" + (f"; {noted}" if noted else ""))
    return scoring.status


def _measured(dataset: Dataset, labelled: bool) -> list[Path]:
    """The normal images from which ranges are measured: of training, else half of those there are."""
    train, good = ([s.path for s in part if not s.label] for part in (dataset.train, dataset.test))
    if labelled and train:
        return train[:MOST_RANGE_IMAGES]
    normals = good if labelled else train + good
    return normals[: min(MOST_RANGE_IMAGES, len(normals) // 2)]


def _ranges(
    checkpoint: Checkpoint, root: Path, normals: list[Path], device: torch.device, seed: int
) -> dict[str, list[float]]:
    """What the program's convolutions read for these images, as JSON values."""
    units = [torch.from_numpy(unit).to(device) for unit in _units(normals, checkpoint.config.image_size)]
    if not units:
        raise DataError(f"{root}: no normal image can be read, from which to measure the ranges of the precision")
    runner = ProgramRunner(checkpoint.build(), device, "float32", seed)
    with float32_arithmetic(device, "float32"):
        found = measured_ranges(runner.executor(1), torch.stack(units))
    return {name: [low, high] for name, (low, high) in found.items()}


def _units(images: list[Path] | list[InputImage], size: int) -> list[np.ndarray]:
    """Those that can be read, float32 (S, S, 3); the others are reported where they are scored."""
    units = []
    for image in collect_inputs(images) if images else ():
        try:
            units.append(image.load(size))
        except ImageError:
            continue
    return units


def _pasted(images: list[InputImage], size: int) -> list[InputImage]:
    """The first of the images, each with a patch of the next one in another place; of one image, of itself."""
    units = _units(images[:MOST_PASTED], size)
    generator, side = np.random.default_rng(0), size // 4
    made = []
    for index, unit in enumerate(units):
        (y, x), (y_from, x_from) = generator.integers(0, size - side, (2, 2))
        other, picture = units[(index + 1) % len(units)], (255 * unit).round().astype(np.uint8)
        patch = other[y_from : y_from + side, x_from : x_from + side]
        picture[y : y + side, x : x + side] = (255 * patch).round().astype(np.uint8)
        made.append(InputImage(f"image {index + 1} with a patch pasted in", array=picture))
    return made


def _record(comparison: PrecisionComparison, data: dict[str, Any], device: str, seed: int) -> dict[str, Any]:
    """What a checkpoint keeps of a comparison, as JSON values; "refused" holds the reasons of a refusal."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    record = {"date": date, "dfengine": __version__, "device": device, "seed": seed, "data": data}
    record |= {"refused": list(comparison.failures)} if comparison.failures else {}
    return record | comparison.to_dict()


def _print(comparison: PrecisionComparison) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column(f"{comparison.precision} against float32, {counted(comparison.images, 'image')}", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)

    def row(name: str, value: float | None, form: str, allowed: str = "") -> None:
        table.add_row(name, "-" if value is None else format(value, form), allowed)

    row("largest map difference", comparison.max_map_difference, ".5f", f"{comparison.tolerance:g}")
    row("mean map difference", comparison.mean_map_difference, ".6f")
    row("largest score difference", comparison.max_score_difference, ".5f")
    row("mean score difference", comparison.mean_score_difference, ".6f")
    row("rank correlation of the scores", comparison.rank_correlation, ".5f")
    row("image AUROC, float32", comparison.auroc_float32, ".5f")
    row(f"image AUROC, {comparison.precision}", comparison.auroc, ".5f")
    row("difference in points", comparison.auroc_points, "+.3f", f"{AUROC_POINTS:g}")
    row("labels that flip at the threshold", comparison.flips, "d")
    OutputConsole(highlight=False).print(table)
