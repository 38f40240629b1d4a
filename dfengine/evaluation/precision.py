"""The accuracy gate of a precision: scores, maps and AUROC beside those of float32 on the same images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from dfengine.errors import DataError
from dfengine.evaluation.metrics import UndefinedMetric, auroc
from dfengine.precision import TOLERANCE

if TYPE_CHECKING:
    from dfengine.detection import Detection

AUROC_POINTS = 0.1
"""How far image AUROC may move, in points (hundredths)."""


@dataclass(frozen=True)
class PrecisionComparison:
    """How `precision` differs from float32 on `images` images.

    max_map_difference, mean_map_difference: absolute, over all pixels, and tolerance: the most allowed of the former.
    max_score_difference, mean_score_difference: absolute. rank_correlation: Spearman's, of the scores; None where it is
    undefined (one image, or one score for all). auroc_float32, auroc: of the images, None without labels of both kinds.
    flips: labels that change at the threshold; None without one. lost: images that only float32 could score.
    """

    precision: str
    images: int
    tolerance: float
    max_map_difference: float
    mean_map_difference: float
    max_score_difference: float
    mean_score_difference: float
    rank_correlation: float | None
    auroc_float32: float | None
    auroc: float | None
    flips: int | None
    lost: int

    @property
    def auroc_points(self) -> float | None:
        """By how many points (hundredths) AUROC moves; below 0 where it falls."""
        return None if self.auroc is None else 100 * (self.auroc - self.auroc_float32)

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the precision is refused; empty where it passes."""
        reasons = []
        if self.lost:
            reasons.append(f"{self.lost} of {self.images + self.lost} images have no finite result")
        if not self.max_map_difference <= self.tolerance:
            reasons.append(f"a map differs by {self.max_map_difference:.4g} ({self.tolerance:g} allowed)")
        if self.auroc is not None and not abs(self.auroc_points) <= AUROC_POINTS + 1e-9:  # rounding
            reasons.append(f"image AUROC moves by {self.auroc_points:+.3f} points ({AUROC_POINTS:g} allowed)")
        return tuple(reasons)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"auroc_points": self.auroc_points}


def compare_precision(
    precision: str,
    exact: Iterable[Detection],
    other: Iterable[Detection],
    labels: dict[str, bool] | None = None,
) -> PrecisionComparison:
    """Compares two streams over the same images in batches of one size: `exact` of float32, `other` of `precision`, as
    far as both go.

    labels: name of each image -> whether it is anomalous. An image that `exact` refused is left out. Raises DataError
    where no image is left.
    """
    scores, names, largest, means = [], [], [0.0], []
    start = lost = flips = 0
    threshold = None
    for a, b in zip(exact, other, strict=False):
        places = np.arange(start, start + len(a) + len(a.errors))
        start += len(places)
        in_a, in_b = (np.setdiff1d(places, [error.index for error in part.errors]) for part in (a, b))
        both = np.intersect1d(in_a, in_b)
        lost += len(in_a) - len(both)
        if not len(both):
            continue
        a, b = a[np.searchsorted(in_a, both)], b[np.searchsorted(in_b, both)]
        names += a.names
        scores.append(np.stack([a.pred_score, b.pred_score]).astype(np.float64))
        difference = np.abs(a.anomaly_map.astype(np.float64) - b.anomaly_map)
        largest.append(float(difference.max()))
        means += difference.mean(axis=(1, 2)).tolist()
        threshold = a.threshold
        if threshold is not None:
            flips += int((a.pred_label != b.pred_label).sum())
    if not names:
        raise DataError(f"{precision}: no image could be compared with float32")
    first, second = np.concatenate(scores, axis=1)
    score_difference = np.abs(first - second)
    varied = np.ptp(first) > 0 and np.ptp(second) > 0
    areas: list[float | None] = [None, None]
    if labels is not None:
        truth = np.array([labels[name] for name in names])
        try:
            areas = [float(auroc(truth, values)) for values in (first, second)]
        except UndefinedMetric:
            pass
    return PrecisionComparison(
        precision=precision,
        images=len(names),
        tolerance=TOLERANCE[precision],
        max_map_difference=max(largest),
        mean_map_difference=float(np.mean(means)),
        max_score_difference=float(score_difference.max()),
        mean_score_difference=float(score_difference.mean()),
        rank_correlation=float(spearmanr(first, second).statistic) if varied else None,
        auroc_float32=areas[0],
        auroc=areas[1],
        flips=None if threshold is None else flips,
        lost=lost,
    )
