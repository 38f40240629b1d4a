"""`dfengine calibrate`: set a checkpoint's threshold from held-out normal images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from dfengine.checkpoint import (
    TRIAL_IMAGES,
    Checkpoint,
    check_output,
    load_checkpoint,
    save_checkpoint,
    update_checkpoint,
)
from dfengine.commands.scoring import Scoring, say, warn
from dfengine.data.folders import Sample, content_digest, open_dataset
from dfengine.data.inputs import collect_inputs
from dfengine.detector import Detector
from dfengine.devices import resolve_device
from dfengine.errors import DataError, UsageError
from dfengine.evaluation.calibration import FASTENERS_PER_KM, Calibration, calibrate, false_alarm_rate_from_km
from dfengine.precision import with_trial
from dfengine.wording import counted

DEFAULT_RATE = 0.01


def run_calibrate(
    checkpoint: Path,
    data: Path | None,
    false_alarm_rate: float | None,
    alarms_per_km: float | None,
    fasteners_per_km: float | None,
    threshold: float | None,
    top_k: float | None,
    out: Path | None,
    half: bool,
    batch_size: int,
    device: str,
    precision: str,
    seed: int,
) -> int:
    """Calibrates and writes the checkpoint (in place without `out`); returns the exit status.

    `half` alone leaves the threshold as it is, and says so, and where the weights were in half precision already.
    """
    _check_options(data, false_alarm_rate, alarms_per_km, fasteners_per_km, threshold, top_k, half)
    fasteners_per_km = FASTENERS_PER_KM if fasteners_per_km is None else fasteners_per_km
    keep = data is None and threshold is None  # the threshold as it is
    loaded = seen = load_checkpoint(checkpoint)
    target = out or checkpoint
    in_place = os.path.realpath(target) == os.path.realpath(checkpoint)
    check_output(target, in_place)
    trial = loaded.trial.images if half and loaded.trial else None  # the images whose maps have to be made again
    loaded = _as_wanted(loaded, half, top_k)
    already = loaded is seen
    status = 0
    if threshold is not None:
        calibration = Calibration.by_hand(threshold)
    elif keep:
        calibration = loaded.calibration
    else:
        rate = DEFAULT_RATE if false_alarm_rate is None else false_alarm_rate
        if alarms_per_km is not None:
            rate = false_alarm_rate_from_km(alarms_per_km, fasteners_per_km)
        normals = held_out_normals(data, loaded.training)
        scoring = Scoring(Detector(loaded, device, precision, seed), batch_size)
        images = collect_inputs([sample.path for sample in normals])
        scores, shown = [], []
        for detection in scoring.batches(images):
            scores.append(detection.pred_score)
            if sum(map(len, shown)) < TRIAL_IMAGES:
                shown.append(detection.image)
        if not scoring.scored:
            raise DataError(f"{data}: no normal image could be scored")
        calibration = calibrate(np.concatenate(scores), rate, seed, scoring.detector.precision)
        status = scoring.status
        trial = np.concatenate(shown)
    if trial is not None:
        loaded = with_trial(loaded, trial, resolve_device(device))
    if not in_place:
        after = loaded.with_calibration(calibration)
        save_checkpoint(target, after)
    else:

        def change(present: Checkpoint) -> Checkpoint:
            present = _as_wanted(present, half, top_k)
            present = present if trial is None else replace(present, trial=loaded.trial)
            return present if keep else present.with_calibration(calibration)

        before, after = update_checkpoint(target, seen, change)
        if not keep and before.calibration != seen.calibration:
            warn(f"{target}: another run set a threshold meanwhile; the one of this run takes its place")
        calibration = after.calibration
    if seen.verified and not after.verified:
        warn(f"{target}: without what `dfengine verify --record` noted of the scores before; run it again")
    if keep:
        kept = "no threshold is" if calibration is None else f"threshold {calibration.threshold:.6g}, as it was,"
        weights = f"weights in half precision{', as they were already,' if already else ''}"
        say(f"{weights} and {kept} written to {target}")
        return status
    say(calibration.message)
    if alarms_per_km is not None:
        most = calibration.bound_95 * fasteners_per_km
        wanted = f"alarms a km: {alarms_per_km:g} wanted, at most {_few_digits(most)} with 95% confidence"
        say(f"With {fasteners_per_km:g} fasteners per km of track, {wanted}.")
    was = f" (before it was {seen.calibration.threshold:.6g})" if seen.calibration else ""
    say(f"threshold {calibration.threshold:.6g}, written to {target}{was}")
    return status


def _check_options(
    data: Path | None,
    false_alarm_rate: float | None,
    alarms_per_km: float | None,
    fasteners_per_km: float | None,
    threshold: float | None,
    top_k: float | None,
    half: bool,
) -> None:
    """Raises `UsageError` for options that contradict each other, lack another, or would change nothing."""
    if sum(value is not None for value in (false_alarm_rate, alarms_per_km, threshold)) > 1:
        raise UsageError("give only one of --false-alarm-rate, --alarms-per-km and --threshold")
    if fasteners_per_km is not None and alarms_per_km is None:
        raise UsageError("--fasteners-per-km goes with --alarms-per-km")
    if threshold is not None:
        if data is not None:
            raise UsageError(f"--threshold is set without images; leave out {data}, or --threshold")
        return
    if data is not None:
        return
    named = {"--false-alarm-rate": false_alarm_rate, "--alarms-per-km": alarms_per_km}
    for name, value in named.items():
        if value is not None:
            raise UsageError(f"{name} needs a folder of normal images to set the threshold from")
    if top_k is not None:
        raise UsageError("--top-k changes every score: give normal images for a new threshold, or --threshold")
    if not half:
        raise UsageError("give a folder of normal images to set the threshold from, or --threshold, or --half")


def _as_wanted(checkpoint: Checkpoint, half: bool, top_k: float | None) -> Checkpoint:
    checkpoint = checkpoint.half() if half else checkpoint
    return checkpoint if top_k is None else checkpoint.with_top_k(top_k)


def held_out_normals(data: Path, training: dict) -> list[Sample]:
    """The normal images of `data` that may set a threshold: none whose bytes the model was trained on.

    They are its normal training images, or where it has none, its images under test/good. Raises `DataError` where
    none is left.
    """
    dataset = open_dataset(data)
    normals = list(dataset.train) or [sample for sample in dataset.test if not sample.label]
    if not normals:
        raise DataError(f"{data}: no normal images to calibrate on")
    trained = trained_images(training)
    unique = {digest_of(sample.path): sample for sample in reversed(normals)}
    if len(unique) < len(normals):
        say(f"{counted(len(normals) - len(unique), 'copy of another image', 'copies of other images')} left out")
    if not dataset.train:
        say(f"{data} has no training images: test/good sets the threshold, and false alarms there will look too rare")
    held_out = [sample for digest, sample in reversed(unique.items()) if digest not in trained]
    if not held_out:
        raise DataError(f"{data}: the model was trained on all of these images; give normals that it has not seen")
    if len(held_out) < len(unique):
        say(f"{counted(len(unique) - len(held_out), 'image')} that the model was trained on left out")
    return held_out


def _few_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def trained_images(training: dict) -> set[str]:
    """The digests of the images that a training record names; empty where it names none."""
    record = training.get("data")
    trained = record.get("trained") if isinstance(record, dict) else None
    return set(map(str, trained)) if isinstance(trained, list) else set()


def digest_of(path: Path) -> str:
    """`content_digest`, or for what cannot be read its path: it is then refused as an image, and the others are not."""
    try:
        return content_digest(path)
    except DataError:
        return str(path)
