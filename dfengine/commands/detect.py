"""`dfengine detect`: score images; write results.csv, results.jsonl, heatmaps and report.html."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dfengine.commands.scoring import Outputs, Scoring, open_detector, report_items, say, warn
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.report.report import ReportItem, write_report
from dfengine.stderr import print_error
from dfengine.wording import counted


def run_detect(
    checkpoint: Path,
    inputs: list[Path],
    out: Path,
    batch_size: int,
    threshold: float | None,
    heatmaps: bool,
    original_size: bool,
    device: str,
    precision: str,
    seed: int,
) -> int:
    """Scores `inputs` (files and folders) and returns the exit status: 0, 3 (some refused) or 1 (nothing scored)."""
    detector = open_detector(checkpoint, device, precision, seed, threshold)
    images = collect_inputs(inputs[0] if len(inputs) == 1 else list(inputs))
    again = len(images) - len({os.path.realpath(image.path or image.name) for image in images})
    if again:
        warn(f"{counted(again, 'image')} given more than once, and counted each time")
    with Outputs(out, images, ("results.csv", "results.jsonl", "report.html")) as outputs:
        return _detect(Scoring(detector, batch_size, original_size), images, outputs, heatmaps, checkpoint, inputs)


def _detect(
    scoring: Scoring,
    images: list[InputImage],
    outputs: Outputs,
    heatmaps: bool,
    checkpoint: Path,
    inputs: list[Path],
) -> int:
    detector, out = scoring.detector, outputs.out
    rows: list[dict] = []
    alarms = 0

    def items() -> Iterator[ReportItem]:
        nonlocal alarms
        for detection in scoring.batches(images):
            files = outputs.heatmaps(detection, scoring.scored - len(detection)) if heatmaps else None
            rows.extend(detection.rows(files))
            alarms += int(detection.pred_label.sum())
            yield from report_items(detection, lambda name: (None, None))

    def report_file() -> Path:
        return write_report(
            out,
            items(),
            scoring.refused,  # filled while the report draws its items
            detector.threshold,
            scoring.meta(checkpoint, ", ".join(map(str, inputs))),
            calibration=detector.calibration,
        )

    try:
        report = outputs.attempt(report_file)
        outputs.rows(rows)
    except KeyboardInterrupt:
        outputs.rows(rows)
        scored = sum(row["error"] is None for row in rows)
        print_error(f"{scored} of {counted(len(images), 'image')} scored; the results are in {out / 'results.csv'}")
        raise
    say(f"{scoring.summary()}; {counted(alarms, 'alarm')} (threshold {detector.threshold:.4g})")
    if report:
        say(f"report: {report}")
    return outputs.status(scoring)
