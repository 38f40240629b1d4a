"""The alarm threshold, from scores of held-out normal images, and the calibrated score (DESIGN section 3, "Metrics").

An alarm is `score > threshold`. The threshold is the conformal one: of n exchangeable normal scores it is the k-th
smallest, k = ceil((n + 1)(1 - rate)), and the next normal image then raises an alarm with probability at most `rate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from dfengine.arguments import real_number
from dfengine.errors import ArgumentTypeError, CheckpointError, DataError, UsageError
from dfengine.wording import counted

FASTENERS_PER_KM = 6667
"""Both rails, two fasteners a rail seat, sleepers 0.6 m apart: 4 / 0.6 m."""

SOFTENING = 1e-6
"""Keeps the logit of a score of exactly 0 or 1 finite; it is far below any step of a score that matters."""

MIN_SCALE = 0.1
"""Least scale in logits, so that normals with (nearly) one score do not turn every other score into 0 or 1."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and how far it can be trusted.

    threshold: raw score in [0, 1]; an alarm is score > threshold.
    scale: spread of the normal scores in logits (> 0), the unit of the calibrated score.
    false_alarm_rate: the wanted rate in (0, 1); None where the threshold was set by hand.
    n_normals: number of held-out normal images used; 0 where the threshold was set by hand.
    bound_95: the true false-alarm rate is at most this with 95% confidence; None where the threshold was set by hand.
    estimated: whether n_normals images are enough to estimate false_alarm_rate.
    seed, precision: of the noise and the networks that scored those images; None where unknown. The threshold holds
        for scores made with the same.
    Raises ValueError for values outside these ranges.
    """

    threshold: float
    scale: float = 1.0
    false_alarm_rate: float | None = None
    n_normals: int = 0
    bound_95: float | None = None
    estimated: bool = False
    seed: int | None = None
    precision: str | None = None

    def __post_init__(self):
        _check_number("threshold", self.threshold, 0 <= self.threshold <= 1)
        _check_number("scale", self.scale, 0 < self.scale < math.inf)
        if isinstance(self.n_normals, bool) or not isinstance(self.n_normals, int) or self.n_normals < 0:
            raise ValueError(f"n_normals is {self.n_normals!r}, not a count")
        if not isinstance(self.estimated, bool):
            raise ValueError(f"estimated is {self.estimated!r}, not true or false")
        by_hand = self.n_normals == 0
        if by_hand != (self.false_alarm_rate is None) or by_hand != (self.bound_95 is None):
            raise ValueError("false_alarm_rate, n_normals and bound_95 do not belong together")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise ValueError(f"seed is {self.seed!r}, not a seed")
        if not isinstance(self.precision, str | None):
            raise ValueError(f"precision is {self.precision!r}, not a name")
        if by_hand and self.estimated:
            raise ValueError("estimated is true without normal images")
        if not by_hand:
            _check_number("false_alarm_rate", self.false_alarm_rate, 0 < self.false_alarm_rate < 1)
            _check_number("bound_95", self.bound_95, 0 <= self.bound_95 <= 1)

    @classmethod
    def by_hand(cls, threshold: float, scale: float = 1.0) -> Calibration:
        """A threshold that the user sets. Raises UsageError when it is not in [0, 1], ArgumentTypeError when it is no
        number."""
        threshold, scale = real_number("the threshold", threshold), real_number("the scale", scale)
        if not 0 <= threshold <= 1:
            raise UsageError(f"the threshold must lie between 0 and 1, as scores do, not {threshold:g}")
        try:
            return cls(threshold, scale)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from None

    @property
    def message(self) -> str:
        """One or two sentences for the user: what the threshold promises, and what it cannot."""
        if self.false_alarm_rate is None:
            return "The threshold was set by hand; no false-alarm rate is known for it."
        wanted = _percent(self.false_alarm_rate)
        normals = counted(self.n_normals, "normal image")
        bound = f"with 95% confidence the true rate is at most {_percent(self.bound_95)}"
        if self.estimated:
            return f"Threshold for a false-alarm rate of {wanted}, from {normals}; {bound}."
        least = math.ceil(1 / self.false_alarm_rate - 1e-9) - 1
        return (
            f"A false-alarm rate of {wanted} cannot be estimated from {normals} (it takes at least {least}). The "
            f"threshold is the largest normal score; {bound} (rule of three)."
        )

    def decide(self, scores) -> np.ndarray:
        """pred_label: bool, of the shape of `scores`; True is an alarm. Compares in float64, as stored."""
        return np.asarray(scores, dtype=np.float64) > self.threshold

    def apply(self, scores) -> np.ndarray:
        """pred_score_calibrated: float64 in (0, 1), of the shape of `scores` (raw, in [0, 1]).

        Strictly increasing (for steps of the score above 1e-12) and exactly 0.5 at the threshold; keep it in float64,
        or neighbours of the threshold round to it. With z = (logit(score) - logit(threshold)) / scale it is
        (1 + z / (1 + |z|)) / 2: the logistic function would round to exactly 1 far from the threshold, and clear alarms
        could no longer be ranked.
        Raises DataError for scores that are not finite or outside [0, 1].
        """
        z = (_logit(_checked(scores)) - _logit(np.float64(self.threshold))) / self.scale
        return 0.5 + 0.5 * z / (1 + np.abs(z))

    def to_dict(self) -> dict:
        """Plain JSON values, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> Calibration:
        """Reads checkpoint metadata; raises CheckpointError naming what is missing, unknown or out of range."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"calibration: a table is expected, not {type(values).__name__}")
        unknown = sorted(map(str, set(values) - {field.name for field in fields(cls)}))
        if unknown or "threshold" not in values:
            wrong = f"unknown entry: {', '.join(unknown)}" if unknown else "no threshold"
            raise CheckpointError(f"calibration: {wrong}")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"calibration: {error}") from None


def calibrate(
    scores, false_alarm_rate: float = 0.01, seed: int | None = None, precision: str | None = None
) -> Calibration:
    """Calibration from raw scores (N,) of held-out normal images, in [0, 1], for a wanted false-alarm rate in (0, 1).
    `seed` and `precision` say how the scores were made.

    A rate below 1 / (N + 1) cannot be estimated: the threshold is then the largest score, `estimated` is False, and
    `bound_95` is 3 / N (rule of three). Otherwise `bound_95` is the exact one: the share of normals above the k-th
    smallest of N scores follows Beta(N + 1 - k, k).
    Raises UsageError for the rate, DataError for no scores, or scores not finite or outside [0, 1], ArgumentTypeError
    where either is no number.
    """
    from scipy.special import betaincinv

    false_alarm_rate = real_number("the false-alarm rate", false_alarm_rate)
    if not 0 < false_alarm_rate < 1:
        raise UsageError(f"the false-alarm rate must lie between 0 and 1, not {false_alarm_rate:g}")
    ranked = np.sort(_checked(scores).ravel())
    n = ranked.size
    if n == 0:
        raise DataError("no normal image to calibrate on")
    # ceil((n + 1)(1 - rate)), without the rounding of 1 - rate that would move a rate of exactly j / (n + 1).
    rank = n + 1 - math.floor((n + 1) * false_alarm_rate + 1e-9)
    estimated = rank <= n
    bound = float(betaincinv(n + 1 - rank, rank, 0.95)) if estimated else min(1.0, 3 / n)
    quartiles = np.quantile(_logit(ranked), (0.25, 0.75))
    scale = max(float(quartiles[1] - quartiles[0]) / 1.349, MIN_SCALE)  # 1.349 sigma between quartiles of a normal law
    threshold = float(ranked[min(rank, n) - 1])
    return Calibration(threshold, scale, false_alarm_rate, n, bound, estimated, seed, precision)


def false_alarm_rate_from_km(alarms_per_km: float, fasteners_per_km: float = FASTENERS_PER_KM) -> float:
    """The rate per fastener that gives `alarms_per_km`. Raises UsageError where it is not between 0 and 1."""
    if not (math.isfinite(fasteners_per_km) and fasteners_per_km > 0):
        raise UsageError(f"the fasteners per km must be a positive number, not {fasteners_per_km:g}")
    rate = alarms_per_km / fasteners_per_km
    if not 0 < rate < 1:
        raise UsageError(
            f"the alarms per km must lie between 0 and the {fasteners_per_km:g} fasteners per km, not {alarms_per_km:g}"
        )
    return rate


def _logit(score):
    return np.log((score + SOFTENING) / (1 - score + SOFTENING))


def _checked(scores) -> np.ndarray:
    try:
        scores = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise ArgumentTypeError("scores must be an array of numbers") from None
    inside = (scores >= 0) & (scores <= 1)
    if not inside.all():
        raise DataError(f"a score of {scores[~inside].flat[0]:g}: scores must lie in [0, 1]")
    return scores


def _check_number(name: str, value, in_range: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not in_range:
        raise ValueError(f"{name} is {value!r}, out of range")


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}%"
