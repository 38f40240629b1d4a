"""`dfengine calibrate`: set a checkpoint's threshold from held-out normal images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dfengine.checkpoint import load_checkpoint, save_checkpoint
from dfengine.commands.scoring import Scoring, say
from dfengine.data.folders import Sample, fingerprint, open_dataset
from dfengine.data.inputs import collect_inputs
from dfengine.detector import Detector
from dfengine.errors import DataError, UsageError
from dfengine.evaluation.calibration import Calibration, calibrate, false_alarm_rate_from_km

DEFAULT_RATE = 0.01


def run_calibrate(
    checkpoint: Path,
    data: Path,
    false_alarm_rate: float | None,
    alarms_per_km: float | None,
    fasteners_per_km: float,
    threshold: float | None,
    out: Path | None,
    half: bool,
    batch_size: int,
    device: str,
    precision: str,
    seed: int,
) -> int:
    """Calibrates and writes the checkpoint (in place without `out`); returns the exit status."""
    if sum(value is not None for value in (false_alarm_rate, alarms_per_km, threshold)) > 1:
        raise UsageError("give only one of --false-alarm-rate, --alarms-per-km and --threshold")
    loaded = load_checkpoint(checkpoint)
    if half:
        loaded = loaded.half()
    status = 0
    if threshold is not None:
        calibration = Calibration.by_hand(threshold)
    else:
        rate = DEFAULT_RATE if false_alarm_rate is None else false_alarm_rate
        if alarms_per_km is not None:
            rate = false_alarm_rate_from_km(alarms_per_km, fasteners_per_km)
        normals = held_out_normals(data, loaded.training)
        scoring = Scoring(Detector(loaded, device, precision, seed), batch_size)
        images = collect_inputs([sample.path for sample in normals])
        scores = [detection.pred_score for detection in scoring.batches(images)]
        if not scoring.scored:
            raise DataError(f"{data}: no normal image could be scored")
        calibration = calibrate(np.concatenate(scores), rate)
        status = scoring.status
    target = out or checkpoint
    save_checkpoint(target, loaded.with_calibration(calibration))
    say(calibration.message)
    say(f"threshold {calibration.threshold:.6g}, written to {target}")
    return status


def held_out_normals(data: Path, training: dict) -> list[Sample]:
    """The normal images of `data` that may set a threshold: none that the model was trained on.

    Of the training data set itself (same fingerprint) those are the images held out in training; of any other folder,
    its normal training images, or where it has none, its images under test/good.
    """
    dataset = open_dataset(data)
    normals = list(dataset.train) or [sample for sample in dataset.test if not sample.label]
    record = training.get("data", {}) if isinstance(training.get("data"), dict) else {}
    skipped = set(record.get("skipped", ()))
    read = [sample.path for sample in dataset.train if _name(sample, dataset.root) not in skipped]
    if read and record.get("fingerprint") == fingerprint(read):
        names = set(record.get("held_out", ()))
        held_out = [sample for sample in normals if _name(sample, dataset.root) in names]
        if not held_out:
            raise DataError(f"{data}: is what the model was trained on, with none held out; give other normals")
        say(f"{data} is the training data: the {len(held_out)} normals held out in training are used")
        return held_out
    if not normals:
        raise DataError(f"{data}: no normal images to calibrate on")
    return normals


def _name(sample: Sample, root: Path) -> str:
    return sample.path.relative_to(root).as_posix()
