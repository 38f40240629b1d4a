"""`dfengine evaluate`: score a labelled test set; write metrics, plots, results and the report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.table import Table

from dfengine.commands.scoring import WRONG_WAY_ROUND, Outputs, Scoring, open_detector, report_items, say, warn
from dfengine.console import OutputConsole
from dfengine.data.folders import Dataset, Sample, open_test_set
from dfengine.data.images import read_mask
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.detection import resize_map
from dfengine.detector import Detector
from dfengine.errors import DataError, ImageError, UsageError
from dfengine.evaluation.evaluate import evaluate, write_metrics
from dfengine.evaluation.robustness import perturbed_scores, robustness_table
from dfengine.report.report import ReportItem, write_report
from dfengine.stderr import print_error
from dfengine.wording import counted

MAX_PIXELS = 40_000_000
"""Pixel metrics are taken at the images' own size, reduced so that all maps together have at most this many pixels."""


def run_evaluate(
    checkpoint: Path,
    data: Path,
    out: Path,
    group_by: str | None,
    robustness: bool,
    batch_size: int,
    device: str,
    precision: str,
    seed: int,
) -> int:
    """Evaluates on the test images of `data` and returns the exit status, as `run_detect` does."""
    dataset = open_test_set(data)
    if robustness and all(sample.label for sample in dataset.test):
        raise DataError(f"{data}: no good test images, which --robustness needs (expected test/good)")
    detector = open_detector(checkpoint, device, precision, seed)
    status, _ = evaluate_dataset(detector, dataset, out, checkpoint, group_by, batch_size, robustness)
    return status


def evaluate_dataset(
    detector: Detector,
    dataset: Dataset,
    out: Path,
    checkpoint: Path,
    group_by: str | None = None,
    batch_size: int = 16,
    robustness: bool = False,
    others: Sequence[str] = (),
) -> tuple[int, dict[str, Any]]:
    """Scores the test images and writes results.csv, results.jsonl, metrics.json, per_defect.csv, roc.png, pr.png and
    report.html into `out`; returns the exit status and the metrics ({} when nothing could be scored).

    `group_by`: regular expression whose first group, searched in the file name, names the bootstrap unit.
    `robustness`: score the good images under mild changes too; adds robustness.csv and "robustness" to the metrics.
    `others`: further files that the caller will write into `out`.
    """
    groups = _groups(dataset.test, group_by)
    images = collect_inputs([sample.path for sample in dataset.test])
    names = ["results.csv", "results.jsonl", "report.html", "metrics.json", "per_defect.csv", "roc.png", "pr.png"]
    with Outputs(out, images, [*names, *["robustness.csv"] * robustness, *others]) as outputs:
        return _evaluate(Scoring(detector, batch_size), dataset, images, groups, outputs, checkpoint, robustness)


def _evaluate(
    scoring: Scoring,
    dataset: Dataset,
    images: list[InputImage],
    groups: dict[str, str] | None,
    outputs: Outputs,
    checkpoint: Path,
    robustness: bool,
) -> tuple[int, dict[str, Any]]:
    detector, out = scoring.detector, outputs.out
    samples = {str(sample.path): sample for sample in dataset.test}
    with_masks = any(sample.mask for sample in dataset.test)
    size = detector.config.image_size
    budget = MAX_PIXELS / len(images)
    reduced = 0
    rows: list[dict] = []
    names: list[str] = []
    scores: list[float] = []
    maps: list[np.ndarray] = []
    masks: dict[str, np.ndarray | None] = {}

    def truth(name: str) -> tuple[str, np.ndarray | None]:
        mask = masks.get(name)
        return samples[name].defect, None if mask is None else _resize_mask(mask, (size, size))

    result: dict[str, Any] = {}  # filled when the last image has been scored, before the report shows it

    def items() -> Iterator[ReportItem]:
        nonlocal reduced
        pending = iter(images)
        for detection in scoring.batches(images):
            shapes = {image.name: image for image in islice(pending, len(detection) + len(detection.errors))}
            for image in detection if with_masks else ():
                height, width = shapes[image.name].original_size
                scale = min(1.0, (budget / (height * width)) ** 0.5)
                reduced += scale < 1
                shape = max(1, round(height * scale)), max(1, round(width * scale))
                masks[image.name] = _mask(samples[image.name], (height, width), shape, scoring)
                maps.append(resize_map(image.anomaly_map, shape))
            rows.extend(detection.rows())
            names.extend(detection.names)
            scores.extend(detection.pred_score.tolist())
            yield from report_items(detection, truth)

        if names:
            kept = [samples[name] for name in names]
            result.update(
                evaluate(
                    scores,
                    [sample.label for sample in kept],
                    [sample.defect for sample in kept],
                    maps if with_masks else None,
                    [masks[name] for name in names] if with_masks else None,
                    detector.threshold,
                    None if groups is None else [groups[name] for name in names],
                )
            )
            if dataset.missing_masks:
                result["notes"].append("No mask for " + ", ".join(s.path.name for s in dataset.missing_masks[:5]) + ".")
            if reduced:
                result["notes"].append(f"Reduced for the pixel metrics, to bound memory: {counted(reduced, 'image')}.")
            if robustness:
                result.update(_robustness(scoring, images, dict(zip(names, scores, strict=True)), samples))

    report = outputs.attempt(
        lambda: write_report(
            out,
            items(),
            scoring.refused,
            detector.threshold,
            scoring.meta(checkpoint, str(dataset.root)),
            metrics=result,
            calibration=detector.calibration,
        )
    )
    outputs.rows(rows)
    result.update({"seed": detector.seed, "inference_precision": detector.precision} if result else {})
    if not result:
        return outputs.status(scoring), {}
    outputs.attempt(lambda: write_metrics(out, result))
    say(scoring.summary())
    print_metrics(result)
    if "robustness" in result:
        print_robustness(result["robustness"])
    if report:
        say(f"metrics: {out / 'metrics.json'}, report: {report}")
    return outputs.status(scoring), result


def print_metrics(result: dict[str, Any]) -> None:
    """Prints the metrics, the table per defect, and what could not be computed."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    low_high = result["image_auroc_interval"]
    interval = f" (95%: {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
    say(f"image AUROC {number(result['image_auroc'])}{interval}, AP {number(result['image_ap'])}")
    if result["image_auroc"] is not None and result["image_auroc"] < 0.5:
        warn(WRONG_WAY_ROUND)
    say(
        f"pixel AUROC {number(result['pixel_auroc'])}, AP {number(result['pixel_ap'])}, "
        f"AUPRO {number(result['aupro'])}"
    )
    say(
        f"at threshold {number(result['threshold'])}: precision {number(result['precision'])}, recall "
        f"{number(result['recall'])}, F1 {number(result['f1'])}, false alarms {number(result['false_alarm_rate'])}; "
        f"F1-max (oracle) {number(result['image_f1_max'])}"
    )
    for row in result["per_defect"]:
        say(
            f"  {row['defect']}: {counted(row['n'], 'image')}, image AUROC {number(row['image_auroc'])}, "
            f"recall {number(row['recall'])}"
        )
    for reason in dict.fromkeys(result["undefined"].values()):
        metrics = [name for name, why in result["undefined"].items() if why == reason]
        say(f"not computed: {', '.join(metrics)} ({reason})")
    for note in result["notes"]:
        say(f"note: {note}")


def print_robustness(table: dict[str, Any]) -> None:
    """Prints what `robustness_table` returned, in 80 columns."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("change", no_wrap=True)
    headings = ("alarms at\nclean 90%", "95%", "ratio", "goal", "alarms at\nthreshold", "ratio", "mean\nshift", "AUROC")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in table["rows"]:
        n, low, high = row["n"], row["rate_low"], row["rate_high"]
        at_threshold = row["alarms_at_threshold"]
        shown.add_row(
            row["change"],
            f"{row['alarms']}/{n}" if n else "-",
            f"{100 * low:.0f}-{100 * high:.0f}%" if n else "-",
            number(row["ratio"], ".2f"),
            {True: "pass", False: "FAIL", None: "-"}[row["passes"]],
            "-" if at_threshold is None else f"{at_threshold}/{n}",
            number(row["ratio_at_threshold"], ".2f"),
            number(row["mean_shift"], "+.4f"),
            number(row["image_auroc"], ".4f"),
        )
    def above(recall: str) -> str:
        return "" if table[recall] is None else f"; {table[recall]:.1%} of the anomalous images exceed it"

    goal = f"at most {table['goal_ratio']:g}"
    good = counted(table["n_good"], "good image")
    say(f"robustness: false alarms of {good} under mild changes")
    say(
        f"  clean 90%: the score {table['quantile_threshold']:.4f}, which {table['rows'][0]['alarms']} of the "
        f"{table['n_good']} unchanged images exceed{above('recall_at_quantile')}"
    )
    if table["threshold"] is not None:
        say(f"  threshold: the detector's own, {table['threshold']:.4f}{above('recall_at_threshold')}")
    say(f"  ratio: alarms over those of the unchanged images; the goal at clean 90% is {goal}")
    OutputConsole(highlight=False).print(shown)
    if table["rows"][0]["passes"] is None:
        say(f"too few of the {good} stay below clean 90% to tell whether changes keep the goal")
        return
    failed, unmeasured = ([row["change"] for row in table["rows"] if row["passes"] is x] for x in (False, None))
    said = f"not under {', '.join(failed)}" if failed else f"under every change{' measured' if unmeasured else ''}"
    unknown = f"; not measured under {', '.join(unmeasured)}" if unmeasured else ""
    say(f"ratio {goal} at clean 90%: {said}{unknown}")


def _robustness(
    scoring: Scoring, images: list[InputImage], scores: dict[str, float], samples: dict[str, Sample]
) -> dict[str, Any]:
    """{"robustness": the table} of the images that have `scores` (name -> raw), {} where none of them is good."""
    good = [image for image in images if image.name in scores and not samples[image.name].label]
    if not good:
        warn("no good image could be scored: robustness is not measured")
        return {}
    # Counted apart: the summary speaks of the test images.
    changed = Scoring(scoring.detector, scoring.batch_size)
    changed_scores = perturbed_scores(changed.batches, good)
    scoring.refused += changed.refused
    scoring.stopped |= changed.stopped
    clean = [scores[image.name] for image in good]
    anomalous = [score for name, score in scores.items() if samples[name].label]
    return {"robustness": robustness_table(clean, changed_scores, scoring.detector.threshold, anomalous)}


def _groups(samples, pattern: str | None) -> dict[str, str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by: not a regular expression: {error}") from None
    if compiled.groups < 1:
        raise UsageError("--group-by: needs a group in parentheses, for example '^([0-9]+)_'")
    groups = {}
    for sample in samples:
        match = compiled.search(sample.path.name)
        if not match or match.group(1) is None:
            raise UsageError(f"--group-by: {sample.path.name} does not match {pattern!r}")
        groups[str(sample.path)] = match.group(1)
    return groups


def _mask(
    sample: Sample, image_shape: tuple[int, int], shape: tuple[int, int], scoring: Scoring
) -> np.ndarray | None:
    """The mask of a test image (H, W) at `shape`: empty for a good image, None where there is none or it is refused."""
    if not sample.label:
        return np.zeros(shape, dtype=bool)
    if sample.mask is None:
        return None
    try:
        return _resize_mask(read_mask(sample.mask, image_shape), shape)
    except ImageError as error:
        scoring.refused.append((error.name, error.reason))
        print_error(f"{error}; its image is left out of the pixel metrics")
        return None


def _resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if mask.shape == shape:
        return mask
    return cv2.resize(mask.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST).astype(bool)
