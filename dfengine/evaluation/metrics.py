"""Image and pixel metrics of anomaly detection, exact on any distribution of scores (DESIGN section 3, "Metrics").

Scores grow with the suspicion of a defect; labels and masks are True where anomalous. Nothing is binned: ties share one
point of a curve, as in scikit-learn. A metric that the data cannot give (one class only, no normal pixel) raises
`UndefinedMetric`; the functions that return a dictionary put None there and the reason under "undefined".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from dfengine.errors import DataError

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


class UndefinedMetric(DataError):
    """A metric that this data cannot give; the message is the reason."""


def image_metrics(labels, scores, threshold: float | None = None) -> dict:
    """Metrics of whole images.

    `labels` (N,) truth, `scores` (N,) raw scores, `threshold` the calibrated one (an alarm is score > threshold).
    Returns image_auroc, image_ap, image_f1_max (an oracle: its threshold is chosen on the labels themselves),
    precision, recall, f1, false_alarm_rate (share of the good images that raise an alarm), and "undefined", a
    dictionary metric -> reason for those that are None.
    """
    labels, scores = _labels_and_scores(labels, scores)
    undefined: dict[str, str] = {}
    result = {
        "image_auroc": _value("image_auroc", lambda: auroc(labels, scores), undefined),
        "image_ap": _value("image_ap", lambda: average_precision(labels, scores), undefined),
        "image_f1_max": _value("image_f1_max", lambda: f1_max(labels, scores), undefined),
    }
    at_threshold = ("precision", "recall", "f1", "false_alarm_rate")
    if threshold is None:
        result |= dict.fromkeys(at_threshold)
        undefined |= dict.fromkeys(at_threshold, "no threshold is given")
    else:
        alarm = scores > float(threshold)
        hits, alarms, defects = int((alarm & labels).sum()), int(alarm.sum()), int(labels.sum())
        good = labels.size - defects
        ratios = {
            "precision": (hits, alarms, "no image is above the threshold"),
            "recall": (hits, defects, "no anomalous image"),
            "f1": (2 * hits, alarms + defects, "no anomalous image and no alarm"),
            "false_alarm_rate": (alarms - hits, good, "no good image"),
        }
        for name, (numerator, denominator, reason) in ratios.items():
            result[name] = numerator / denominator if denominator else None
            if not denominator:
                undefined[name] = reason
    result["undefined"] = undefined
    return result


def pixel_metrics(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], max_fpr: float = 0.3) -> dict:
    """Metrics over all pixels of all images: pixel_auroc, pixel_ap, aupro, and "undefined" (metric -> reason).

    `masks` N x bool (H, W), `maps` N x float (H, W); an array (N, H, W) or a list whose images differ in size.
    """
    masks, maps = _masks_and_maps(masks, maps)
    labels = np.concatenate([mask.ravel() for mask in masks])
    scores = np.concatenate([image.ravel() for image in maps])
    undefined: dict[str, str] = {}
    return {
        "pixel_auroc": _value("pixel_auroc", lambda: auroc(labels, scores, "pixel"), undefined),
        "pixel_ap": _value("pixel_ap", lambda: average_precision(labels, scores, "pixel"), undefined),
        "aupro": _value("aupro", lambda: aupro(masks, maps, max_fpr), undefined),
        "undefined": undefined,
    }


def auroc(labels: np.ndarray, scores: np.ndarray, unit: str = "image") -> float:
    """Area under the ROC curve; `unit` names in the reason what is missing where it is undefined."""
    _require(bool(labels.any()), f"no anomalous {unit}")
    _require(not labels.all(), f"no good {unit}")
    return float(roc_auc_score(labels, scores))


def average_precision(labels: np.ndarray, scores: np.ndarray, unit: str = "image") -> float:
    """Average precision: the step-wise area under the precision-recall curve."""
    _require(bool(labels.any()), f"no anomalous {unit}")
    return float(average_precision_score(labels, scores))


def f1_max(labels: np.ndarray, scores: np.ndarray) -> float:
    """The largest F1 over all thresholds: an oracle, an upper limit of what any calibration can reach."""
    _require(bool(labels.any()), "no anomalous image")
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)))


def aupro(masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], max_fpr: float = 0.3) -> float:
    """Area under the per-region-overlap curve up to `max_fpr`, divided by `max_fpr` (the MVTec AD definition).

    At a threshold, a pixel is positive when its score is at or above it. The per-region overlap is the mean, over the
    8-connected ground-truth regions of all images, of the share of a region that is positive; the false-positive rate
    is the positive share of the normal pixels of all images, those without a defect included. Each distinct score is a
    threshold; the curve starts at (0, 0), is linear between its points, and is interpolated at `max_fpr`.

    `masks` N x bool (H, W), `maps` N x float (H, W), as in `pixel_metrics`.
    Raises UndefinedMetric where there is no region or no normal pixel, ValueError when max_fpr is not in (0, 1].
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in (0, 1], not {max_fpr}")
    masks, maps = _masks_and_maps(masks, maps)
    normal = np.concatenate([image[~mask] for mask, image in zip(masks, maps, strict=True)])
    _require(normal.size > 0, "no normal pixel")

    # The curve beyond max_fpr is not used, so only pixels down to its first point past max_fpr need sorting: the
    # threshold at which floor(max_fpr n) + 1 normal pixels are positive.
    first_past = int(max_fpr * normal.size) + 1
    lowest = -np.inf if first_past > normal.size else np.partition(normal, -first_past)[-first_past]
    n_normal, normal = normal.size, normal[normal >= lowest]

    scores, shares, n_regions = [normal], [np.zeros(normal.size)], 0
    for mask, image in zip(masks, maps, strict=True):
        if not mask.any():
            continue
        regions, count = ndimage.label(mask, structure=_EIGHT_CONNECTED)
        kept = mask & (image >= lowest)
        scores.append(image[kept])
        shares.append(1.0 / np.bincount(regions.ravel())[regions[kept]])
        n_regions += count
    _require(n_regions > 0, "no anomalous pixel in the masks")
    score, share = np.concatenate(scores), np.concatenate(shares)

    order = np.argsort(score)[::-1]
    score, is_normal, share = score[order], order < normal.size, share[order]
    last_of_tie = np.append(np.flatnonzero(score[1:] != score[:-1]), score.size - 1)
    fpr = np.append(0.0, np.cumsum(is_normal)[last_of_tie] / n_normal)
    overlap = np.append(0.0, np.cumsum(share)[last_of_tie] / n_regions)

    inside = fpr <= max_fpr
    end = np.interp(max_fpr, fpr, overlap)
    area = np.trapezoid(np.append(overlap[inside], end), np.append(fpr[inside], max_fpr))
    return float(min(area / max_fpr, 1.0))


def bootstrap_auroc(labels, scores, groups=None, n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval (low, high) of the image AUROC.

    Whole groups are resampled with replacement (`groups` (N,): the photo of each crop, say); without groups, images.
    Resamples that hold one class only have no AUROC and are left out. The interval of a perfect separation is (1, 1):
    a bootstrap cannot see errors that the sample does not hold. Raises UndefinedMetric where only one class is there.
    """
    labels, scores = _labels_and_scores(labels, scores)
    auroc(labels, scores)  # raises where undefined
    groups = np.arange(labels.size) if groups is None else np.asarray(groups)
    if groups.shape != labels.shape:
        raise ValueError(f"{groups.size} groups for {labels.size} images")

    order = np.argsort(scores, kind="stable")
    labels, scores = labels[order], scores[order]
    _, group_of = np.unique(groups[order], return_inverse=True)
    n_groups = int(group_of.max()) + 1
    tie_starts = np.append(0, np.flatnonzero(scores[1:] != scores[:-1]) + 1)

    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // max(labels.size, n_groups))
    values = []
    for start in range(0, n, chunk):
        draws = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=min(chunk, n - start))
        weight = draws[:, group_of]
        bad = np.add.reduceat(weight * labels, tie_starts, axis=1)
        good = np.add.reduceat(weight * ~labels, tie_starts, axis=1)
        pairs = bad.sum(axis=1) * good.sum(axis=1)
        # The Mann-Whitney form of the AUROC: good images below each anomalous one, ties counted as one half.
        won = (bad * (np.cumsum(good, axis=1) - 0.5 * good)).sum(axis=1)
        values.append(won[pairs > 0] / pairs[pairs > 0])
    auc = np.concatenate(values)
    _require(auc.size > 0, "no resample holds both classes")
    low, high = np.quantile(auc, (0.025, 0.975))
    return float(low), float(high)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise UndefinedMetric(reason)


def _value(name: str, compute: Callable[[], float], undefined: dict[str, str]) -> float | None:
    try:
        return compute()
    except UndefinedMetric as reason:
        undefined[name] = str(reason)
        return None


def _labels_and_scores(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """Bool (N,) and float64 (N,): float64, because a float32 comparison would round the threshold first."""
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must be two vectors of one length")
    if not np.isfinite(scores).all():
        raise DataError(f"the score of image {int(np.argmin(np.isfinite(scores)))} is not finite")
    return labels, scores


def _masks_and_maps(masks, maps) -> tuple[list[np.ndarray], list[np.ndarray]]:
    masks, maps = [np.asarray(mask).astype(bool, copy=False) for mask in masks], [np.asarray(image) for image in maps]
    if len(masks) != len(maps) or not maps:
        raise ValueError(f"{len(masks)} masks for {len(maps)} maps")
    for index, (mask, image) in enumerate(zip(masks, maps, strict=True)):
        if mask.ndim != 2 or mask.shape != image.shape:
            raise DataError(f"the mask of image {index} has shape {mask.shape}, its map {image.shape}")
        if not np.isfinite(image).all():
            raise DataError(f"the anomaly map of image {index} holds a value that is not finite")
    return masks, maps
