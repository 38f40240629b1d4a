from __future__ import annotations

import json

import numpy as np
import pytest

from dfengine.detection import Detection, Refused
from dfengine.errors import DataError
from dfengine.evaluation.calibration import Calibration
from dfengine.evaluation.precision import AUROC_POINTS, compare_precision
from dfengine.precision import TOLERANCE

SIZE = 4


def detection(scores, first=0, refused=(), maps=0.0, calibration=None) -> Detection:
    """Images numbered from `first`, those of the numbers `refused` left out; `scores` of the others."""
    count = len(scores) + len(refused)
    names = [f"{i}" for i in range(first, first + count) if i not in refused]
    blank = np.zeros((len(scores), SIZE, SIZE), np.float32)
    pixels = np.zeros((len(scores), SIZE, SIZE, 3), np.float32)
    return Detection(
        names=tuple(names),
        pred_score=np.array(scores, np.float32),
        anomaly_map=blank + np.float32(maps),
        reconstruction=pixels,
        image=pixels.astype(np.uint8),
        calibration=calibration,
        errors=tuple(Refused(i, f"{i}", "bad") for i in refused),
    )


def test_differences_by_hand():
    threshold = Calibration.by_hand(0.5)
    exact = [detection([0.1, 0.4, 0.6], calibration=threshold), detection([0.9], 3, calibration=threshold)]
    other = [detection([0.1, 0.52, 0.6], maps=0.01, calibration=threshold),
             detection([0.88], 3, maps=0.03, calibration=threshold)]  # fmt: skip
    labels = {"0": False, "1": False, "2": True, "3": True}
    found = compare_precision("bfloat16", exact, other, labels)
    assert (found.images, found.flips, found.lost, found.failures) == (4, 1, 0, ())
    assert found.max_map_difference == pytest.approx(0.03) and found.mean_map_difference == pytest.approx(0.015)
    assert found.max_score_difference == pytest.approx(0.12) and found.mean_score_difference == pytest.approx(0.035)
    assert found.rank_correlation == 1 and (found.auroc_float32, found.auroc, found.auroc_points) == (1, 1, 0)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    unlabelled = compare_precision("bfloat16", exact, other)
    assert unlabelled.auroc is None and unlabelled.auroc_points is None and unlabelled.failures == ()
    one_kind = compare_precision("bfloat16", exact, other, dict.fromkeys(labels, False))
    assert one_kind.auroc is None
    still = [detection([0.5, 0.5])]
    assert compare_precision("bfloat16", still, still).rank_correlation is None
    assert compare_precision("bfloat16", still, still).flips is None


@pytest.mark.parametrize("wrong", [1, -1])
def test_the_gate_of_auroc(wrong):
    """1,000 pairs, of which float32 ranks half right; one pair more is 0.1 point and passes, two more do not."""
    bad, good = 25, 40

    def scores(moved: int) -> list[float]:
        ranks = np.arange(good, dtype=float)
        defects = np.full(bad, good / 2 - 0.5)
        defects[:moved] += wrong
        return ((np.concatenate([ranks, defects]) + 2) / 100).tolist()

    labels = {f"{i}": i >= good for i in range(good + bad)}
    exact = [detection(scores(0))]
    passes, fails = (compare_precision("float16", exact, [detection(scores(n))], labels) for n in (1, 2))
    assert passes.auroc_points == pytest.approx(0.1 * wrong) and fails.auroc_points == pytest.approx(0.2 * wrong)
    assert AUROC_POINTS == 0.1 and not passes.failures
    assert len(fails.failures) == 1 and f"AUROC moves by {0.2 * wrong:+.3f} points" in fails.failures[0]


def test_the_gate_of_maps():
    exact = [detection([0.5, 0.6])]
    for precision in ("float16", "bfloat16"):
        allowed = TOLERANCE[precision]
        assert not compare_precision(precision, exact, [detection([0.5, 0.6], maps=0.9 * allowed)]).failures
        (reason,) = compare_precision(precision, exact, [detection([0.5, 0.6], maps=1.1 * allowed)]).failures
        assert "a map differs by" in reason and f"({allowed:g} allowed)" in reason


def test_refused_images_do_not_shift_the_others():
    exact = [detection([0.2, 0.3], refused=(1,)), detection([0.5, 0.6, 0.7], 3)]
    other = [detection([0.3], refused=(0, 1)), detection([0.6, 0.7], 3, refused=(3,))]
    found = compare_precision("bfloat16", exact, other)
    assert (found.images, found.lost, found.max_score_difference) == (3, 2, 0)
    assert found.failures == ("2 of 5 images have no finite result",)
    with pytest.raises(DataError, match="no image could be compared"):
        compare_precision("bfloat16", [detection([], refused=(0,))], [detection([], refused=(0,))])
