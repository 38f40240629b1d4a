"""How much mild changes of a normal photo (light, focus, position, compression) raise the false-alarm rate.

Each image is changed at its own size and depth, before the detector resizes it, and always in the same way. The goal is
that no change at a mild level raises the false-alarm rate to more than `GOAL_RATIO` times that of the unchanged images.

The rate is taken at two thresholds:

- at the *clean 90% quantile*, which `CLEAN_SHARE` of the unchanged images themselves exceed (`quantile_threshold`). Its
  clean rate is never 0, so the ratio exists unless images could not be scored once changed: this is the number that the
  goal is about. It compares changed with unchanged images of one set and says nothing of how many alarms another set
  would raise.
- at the detector's own threshold. Where no unchanged image exceeds that one, only the changed rate is given, no ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from scipy.stats import binomtest

from dfengine.data.images import to_unit
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.errors import DataError, ImageError
from dfengine.evaluation.metrics import auroc

if TYPE_CHECKING:
    from dfengine.detection import Detection
    from dfengine.detector import Detector

CLEAN_SHARE = 0.1
GOAL_RATIO = 2.0
MAX_JPEG_SIDE = 65_500

ROW_FIELDS = (
    "change", "n", "alarms", "rate", "rate_low", "rate_high", "ratio", "passes", "alarms_at_threshold",
    "rate_at_threshold", "ratio_at_threshold", "mean_shift", "image_auroc",
)  # fmt: skip
"""The keys of a row of `robustness_table`, in the order of the columns of robustness.csv."""


@dataclass(frozen=True)
class Perturbation:
    """A mild change, `change(array, level)`, of an array image."""

    name: str
    change: Callable[[np.ndarray, float], np.ndarray]
    level: float

    def __call__(self, array: np.ndarray, name: str = "image") -> np.ndarray:
        """`array` (H, W, 3) changed: a new array of its shape, uint8 or uint16 as it was, any float as float32.

        Raises ImageError, as `to_unit` does, for other pixels, and where the change cannot be made.
        """
        if array.dtype not in (np.uint8, np.uint16):
            array = to_unit(array, name)
        try:
            return self.change(array, self.level)
        except ValueError as error:
            raise ImageError(name, str(error)) from None


def _brightness(array: np.ndarray, gain: float) -> np.ndarray:
    return _tone(array, lambda values: gain * values)


def _contrast(array: np.ndarray, gain: float) -> np.ndarray:
    """About the mean of the picture, all channels together."""
    mean = array.mean(dtype=np.float64)
    return _tone(array, lambda values: mean + gain * (values - mean))


def _tone(array: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`curve`, from value to value, applied to each pixel, then rounded and clipped to what the dtype holds."""
    if array.dtype == np.float32:
        return np.clip(curve(array), 0, 1).astype(np.float32)
    white = np.iinfo(array.dtype).max
    levels = curve(np.arange(white + 1, dtype=np.float64))
    return np.clip(np.rint(levels), 0, white).astype(array.dtype)[array]


def _blur(array: np.ndarray, share: float) -> np.ndarray:
    """Gaussian; sigma is `share` of each side, so that it is one blur in the square image that the model sees."""
    height, width = array.shape[:2]
    return cv2.GaussianBlur(
        array, (0, 0), sigmaX=share * width, sigmaY=share * height, borderType=cv2.BORDER_REFLECT_101
    )


def _shift(array: np.ndarray, share: float) -> np.ndarray:
    """Moved right and down (left and up where negative) by `share` of each side, in whole pixels: nothing is blurred.

    The border is mirrored. A side where `share` is half a pixel or less does not move.
    """
    for axis in (0, 1):
        length = array.shape[axis]
        step = round(share * length)
        source = np.pad(np.arange(length), abs(step), mode="reflect")[abs(step) - step :][:length]
        array = array.take(source, axis=axis)
    return array


def _jpeg(array: np.ndarray, quality: float) -> np.ndarray:
    """Through a JPEG file, which holds 8 bits: deeper images are rounded to them. Raises ValueError where too large."""
    if max(array.shape) > MAX_JPEG_SIDE:
        raise ValueError(f"a side of {max(array.shape)} pixels; JPEG holds at most {MAX_JPEG_SIDE}")
    pixels = array if array.dtype == np.uint8 else np.rint(to_unit(array) * 255).astype(np.uint8)
    _, code = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    pixels = cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    if array.dtype == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    return pixels if array.dtype == np.uint8 else to_unit(pixels)


PERTURBATIONS = (
    Perturbation("brightness x0.9", _brightness, 0.9),
    Perturbation("brightness x1.1", _brightness, 1.1),
    Perturbation("contrast x0.9", _contrast, 0.9),
    Perturbation("contrast x1.1", _contrast, 1.1),
    Perturbation("blur 3/1000", _blur, 0.003),
    Perturbation("blur 5/1000", _blur, 0.005),
    Perturbation("shift +2%", _shift, 0.02),
    Perturbation("shift -2%", _shift, -0.02),
    Perturbation("shift +4%", _shift, 0.04),
    Perturbation("shift -4%", _shift, -0.04),
    Perturbation("JPEG quality 75", _jpeg, 75),
    Perturbation("JPEG quality 50", _jpeg, 50),
)


class PerturbedImage(InputImage):
    """`source` changed each time it is read, so that a long list of them needs no memory."""

    def __init__(self, source: InputImage, perturbation: Perturbation):
        super().__init__(f"{source.name} ({perturbation.name})")
        self.source, self.perturbation = source, perturbation

    @property
    def one_thread(self) -> bool:
        return self.source.one_thread

    def _read(self) -> np.ndarray:
        array = self.source._read()
        if isinstance(array, torch.Tensor):
            on_host = collect_inputs(array.movedim(-1, 0).cpu())[0].array
            array = InputImage(self.source.name, array=on_host)._read()
        array = self.perturbation(array, self.name)
        self._size = tuple(array.shape[:2])
        return array


def measure_robustness(
    detector: Detector,
    good: Any,
    anomalous: Any = None,
    batch_size: int = 16,
    perturbations: Sequence[Perturbation] = PERTURBATIONS,
) -> dict[str, Any]:
    """`robustness_table` of a detector on `good` images; `anomalous` ones, which stay unchanged, give the AUROC.

    Both are anything that `Detector.detect` takes. Images that are refused are left out. Raises DataError where no good
    image can be scored, and what `detect` raises for a batch that is none.
    """
    batches = partial(detector.stream, batch_size=batch_size)
    images = collect_inputs(good)
    clean = _scores(batches, images)
    scored = np.isfinite(clean)
    images = [image for image, usable in zip(images, scored, strict=True) if usable]
    defects = _scores(batches, collect_inputs(anomalous)) if anomalous is not None else np.empty(0)
    changed = perturbed_scores(batches, images, perturbations)
    return robustness_table(clean[scored], changed, detector.threshold, defects[np.isfinite(defects)])


def perturbed_scores(
    batches: Callable[[list[InputImage]], Iterable[Detection]],
    images: Sequence[InputImage],
    perturbations: Sequence[Perturbation] = PERTURBATIONS,
) -> dict[str, np.ndarray]:
    """Name of each perturbation -> raw scores float64 (N,) of the N changed images, NaN where one was not scored.

    `batches` gives the detections of a list of images, batch by batch and in order, as `Detector.stream` does.
    """
    inputs = [PerturbedImage(image, perturbation) for perturbation in perturbations for image in images]
    scores = _scores(batches, inputs).reshape(len(perturbations), len(images))
    return {perturbation.name: row for perturbation, row in zip(perturbations, scores, strict=True)}


def _scores(batches: Callable[[list[InputImage]], Iterable[Detection]], images: list[InputImage]) -> np.ndarray:
    """Raw scores float64 (N,), NaN where an image was refused or `batches` ended early."""
    scores = np.full(len(images), np.nan)
    start = 0
    for detection in batches(images) if images else ():
        end = start + len(detection) + len(detection.errors)
        scores[np.setdiff1d(np.arange(start, end), [error.index for error in detection.errors])] = detection.pred_score
        start = end
    return scores


def quantile_threshold(clean) -> float:
    """The threshold that `CLEAN_SHARE` of the scores `clean` (N,) exceed: ceil(N / 10) of them, the largest ones.

    It lies half-way to the next lower score, so that rounding moves no image across it. Scores that tie with the lowest
    of those above it are above it as well, and where no lower score is left it is just below them all.
    """
    ranked = np.sort(np.asarray(clean, dtype=np.float64))
    lowest_above = ranked[-math.ceil(CLEAN_SHARE * ranked.size - 1e-9)]
    below = ranked[ranked < lowest_above]
    return float((lowest_above + below[-1]) / 2 if below.size else np.nextafter(lowest_above, -np.inf))


def robustness_table(
    clean, changed: Mapping[str, Any], threshold: float | None = None, anomalous: Any = ()
) -> dict[str, Any]:
    """What each change does to the scores of good images. An alarm is score > threshold.

    `clean` (N,) raw scores of the unchanged images; `changed` name -> (N,) scores of the same images changed, NaN where
    an image could not be scored; `threshold` the detector's; `anomalous` (M,) scores of unchanged anomalous images.

    Returns quantile_threshold, threshold, recall_at_quantile and recall_at_threshold (shares of the anomalous images
    above them), goal_ratio, n_good, n_anomalous, passes (whether every change does; None where none fails, but some
    could not be measured) and rows, one for the unchanged images (change "none") and one per change, each with
        n                      images scored
        alarms, rate           above the quantile threshold: count, and share of n
        rate_low, rate_high    exact (Clopper-Pearson) 95% interval of the rate, with the threshold taken as given and
                               the images as independent
        ratio, passes          alarms over those of the same images unchanged; whether it, as measured, is at most
                               `GOAL_RATIO`; both None where these raise none, as when most could not be scored,
                               and no pass where so many do that all n could not miss the goal (n of 1 or 2)
        alarms_at_threshold, rate_at_threshold, ratio_at_threshold
                               the same at the detector's threshold
        mean_shift             mean of changed score - clean score
        image_auroc            good images changed, anomalous ones not
    with None for what does not exist. Raises DataError for no clean score, or one that is not finite.
    """
    clean, anomalous = np.asarray(clean, dtype=np.float64), np.asarray(anomalous, dtype=np.float64)
    if not clean.size or not np.isfinite(clean).all():
        raise DataError("no good image could be scored" if not clean.size else "a clean score is not finite")
    quantile = quantile_threshold(clean)

    def recall(at: float | None) -> float | None:
        return float((anomalous > at).mean()) if anomalous.size and at is not None else None

    def row(change: str, scores: np.ndarray) -> dict[str, Any]:
        scored = np.isfinite(scores)
        kept, n = scores[scored], int(scored.sum())
        values = dict.fromkeys(ROW_FIELDS) | {"change": change, "n": n}
        if not n:
            return values
        alarms = int((kept > quantile).sum())
        interval = binomtest(alarms, n).proportion_ci(0.95, "exact")
        values |= {
            "alarms": alarms,
            "rate": alarms / n,
            "rate_low": float(interval.low),
            "rate_high": float(interval.high),
            "ratio": _ratio(alarms, clean[scored], quantile),
            "mean_shift": float(np.mean(kept - clean[scored])),
        }
        able = values["ratio"] is not None and n > GOAL_RATIO * int((clean[scored] > quantile).sum())
        values["passes"] = values["ratio"] <= GOAL_RATIO if able else None
        if threshold is not None:
            alarms = int((kept > float(threshold)).sum())
            values |= {
                "alarms_at_threshold": alarms,
                "rate_at_threshold": alarms / n,
                "ratio_at_threshold": _ratio(alarms, clean[scored], float(threshold)),
            }
        if anomalous.size:
            labels = np.arange(n + anomalous.size) >= n
            values["image_auroc"] = auroc(labels, np.concatenate([kept, anomalous]))
        return values

    rows = [row("none", clean)]
    for change, scores in changed.items():
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != clean.shape:
            raise ValueError(f"{change}: {scores.size} scores for {clean.size} images")
        rows.append(row(change, scores))
    passes = [row["passes"] for row in rows]
    return {
        "quantile_threshold": quantile,
        "threshold": None if threshold is None else float(threshold),
        "recall_at_quantile": recall(quantile),
        "recall_at_threshold": recall(threshold),
        "goal_ratio": GOAL_RATIO,
        "n_good": int(clean.size),
        "n_anomalous": int(anomalous.size),
        "passes": False if False in passes else None if None in passes else True,
        "rows": rows,
    }


def _ratio(alarms: int, clean: np.ndarray, threshold: float) -> float | None:
    """`alarms` over those of the same images unchanged, scores `clean`; None where there are none."""
    clean_alarms = int((clean > threshold).sum())
    return alarms / clean_alarms if clean_alarms else None
