"""`dfengine detect`: score images; write results.csv, results.jsonl, heatmaps and report.html."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dfengine.commands.scoring import Outputs, Scoring, open_detector, report_items, say, warn
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.errors import DataError
from dfengine.report.report import ReportItem, write_report


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
    images = _outside(out, collect_inputs(inputs[0] if len(inputs) == 1 else list(inputs)))
    outputs = Outputs(out)
    scoring = Scoring(detector, batch_size, original_size)
    rows: list[dict] = []
    alarms = 0

    def items() -> Iterator[ReportItem]:
        nonlocal alarms
        for detection in scoring.batches(images):
            files = outputs.heatmaps(detection, scoring.scored - len(detection)) if heatmaps else None
            rows.extend(detection.rows(files))
            alarms += int(detection.pred_label.sum())
            yield from report_items(detection, lambda name: (None, None))

    report = outputs.attempt(
        lambda: write_report(
            out,
            items(),
            scoring.refused,  # filled while the report draws its items
            detector.threshold,
            scoring.meta(checkpoint, ", ".join(map(str, inputs))),
            calibration=detector.calibration,
        )
    )
    outputs.rows(rows)
    say(f"{scoring.summary()}; {alarms} alarms (threshold {detector.threshold:.4g})")
    if report:
        say(f"report: {report}")
    return outputs.status(scoring)


def _outside(out: Path, images: list[InputImage]) -> list[InputImage]:
    """The images that do not lie in the output folder: heatmaps of an earlier run are no input."""
    target = out.resolve()
    kept = [image for image in images if image.path is None or target not in Path(image.path).resolve().parents]
    if len(kept) < len(images):
        warn(f"{len(images) - len(kept)} images inside the output folder {out} are left out")
    if not kept:
        raise DataError(f"{out}: all images to score lie inside the output folder")
    return kept
