from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfengine.errors import CheckpointError, DataError, UsageError
from dfengine.evaluation.calibration import Calibration, calibrate, false_alarm_rate_from_km

unit_float32 = st.floats(0, 1, width=32)


def test_threshold_is_the_conformal_rank():
    scores = np.random.default_rng(0).permutation(np.arange(1, 100) / 100)  # n = 99
    for rate, rank in [(0.1, 90), (0.05, 95), (0.01, 99), (0.015, 99), (0.5, 50)]:
        calibration = calibrate(scores, rate)
        assert calibration.threshold == pytest.approx(rank / 100) and calibration.estimated


@given(st.integers(1, 400), st.integers(1, 400))
def test_a_rate_of_j_in_n_plus_1_is_exact(n, j):
    j = min(j, n)
    calibration = calibrate(np.linspace(0, 1, n), j / (n + 1))
    assert calibration.estimated
    assert (np.linspace(0, 1, n) > calibration.threshold).sum() == j - 1


def test_the_promise_holds_on_new_normals():
    rng = np.random.default_rng(0)
    rates = [np.mean(rng.beta(2, 8, 500) > calibrate(rng.beta(2, 8, 50), 0.1).threshold) for _ in range(400)]
    assert 0.08 < np.mean(rates) <= 0.102  # the expected rate is floor(51 * 0.1) / 51 = 0.098
    bound = calibrate(rng.beta(2, 8, 50), 0.1).bound_95
    assert 0.92 < np.mean(np.array(rates) <= bound) < 0.98


def test_too_few_normals_are_said():
    calibration = calibrate([0.1, 0.4, 0.2], 0.01)
    assert calibration.threshold == 0.4 and not calibration.estimated and calibration.bound_95 == 1
    assert "cannot be estimated from 3 normal images (it takes at least 99)" in calibration.message
    assert calibrate(np.linspace(0, 0.5, 60), 0.01).bound_95 == pytest.approx(3 / 60)
    assert calibrate(np.linspace(0, 0.5, 98), 0.01).estimated is False
    enough = calibrate(np.linspace(0, 0.5, 99), 0.01)
    assert enough.estimated and "cannot" not in enough.message
    assert enough.bound_95 == pytest.approx(1 - 0.05 ** (1 / 99))


@given(
    normals=st.lists(unit_float32, min_size=1, max_size=30),
    scores=st.lists(unit_float32, min_size=1, max_size=30),
    rate=st.sampled_from([0.001, 0.05, 0.3]),
)
def test_calibrated_score_is_strictly_monotone_and_agrees_with_the_label(normals, scores, rate):
    calibration = calibrate(normals, rate)
    around = np.float32(calibration.threshold)
    near = np.clip([np.nextafter(around, np.float32(0)), around, np.nextafter(around, np.float32(1))], 0, 1)
    edges = np.float32([0, 1e-20, 0.5, 1 - 2**-24, 1])
    values = np.unique(np.concatenate([np.float32(scores), near.astype(np.float32), edges]))
    # Steps below 1e-12 are lost against the softening of the logit, and no map has them.
    values = values[np.append(True, np.diff(values.astype(np.float64)) > 1e-12)]
    calibrated = calibration.apply(values)
    assert calibrated.dtype == np.float64
    assert ((calibrated > 0) & (calibrated < 1)).all()
    assert (np.diff(calibrated) > 0).all()
    assert calibration.apply(calibration.threshold) == 0.5
    far = np.abs(values - calibration.threshold) > 1e-12
    np.testing.assert_array_equal((calibrated > 0.5)[far], calibration.decide(values)[far])


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_constant_normals(constant):
    calibration = calibrate([constant] * 20, 0.1)
    assert calibration.threshold == constant and not calibration.decide([constant]).any()
    values = calibration.apply(np.linspace(0, 1, 101))
    assert (np.diff(values) > 0).all() and calibration.apply([constant])[0] == 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(1e-6, 0.999))
def test_round_trip_through_json(scores, rate):
    calibration = calibrate(scores, rate)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_by_hand():
    calibration = Calibration.by_hand(0.7)
    assert calibration.apply(0.7) == 0.5 and "by hand" in calibration.message
    assert Calibration.from_dict(calibration.to_dict()) == calibration
    for bad in (-0.1, 1.1, math.nan, None, "0.5"):
        with pytest.raises(UsageError):
            Calibration.by_hand(bad)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": math.nan},
        {"threshold": 1.5},
        {"threshold": "0.5"},
        {"threshold": None},
        {"threshold": True},
        {"scale": 0},
        {"scale": math.inf},
        {"scale": None},
        {"n_normals": -1},
        {"n_normals": 2.5},
        {"n_normals": 0},
        {"bound_95": 2},
        {"bound_95": None},
        {"false_alarm_rate": 0},
        {"false_alarm_rate": None},
        {"estimated": 1},
        {"surprise": 1},
    ],
)
def test_bad_metadata_is_refused(change):
    values = calibrate([0.1, 0.2, 0.3], 0.3).to_dict()
    with pytest.raises(CheckpointError, match="^calibration: "):
        Calibration.from_dict(values | change)


def test_foreign_metadata_is_refused():
    for values in (None, [], "x", {}, {"threshold": 0.5, "colour": 1}, {"threshold": 0.5, "n_normals": 3}):
        with pytest.raises(CheckpointError, match="^calibration: "):
            Calibration.from_dict(values)


def test_bad_calibration_input():
    for rate in (0, 1, -0.1, math.nan):
        with pytest.raises(UsageError):
            calibrate([0.1], rate)
    for scores in ([], [math.nan], [1.5], [-0.1]):
        with pytest.raises(DataError):
            calibrate(scores, 0.1)
    with pytest.raises(DataError):
        Calibration.by_hand(0.5).apply([0.2, math.nan])


def test_alarms_per_km():
    assert false_alarm_rate_from_km(1) == pytest.approx(1 / 6667)
    assert false_alarm_rate_from_km(10, 2000) == pytest.approx(0.005)
    for alarms, fasteners in [(0, 6667), (-1, 6667), (6667, 6667), (math.nan, 6667), (1, 0), (1, math.inf)]:
        with pytest.raises(UsageError):
            false_alarm_rate_from_km(alarms, fasteners)
