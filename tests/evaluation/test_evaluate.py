from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from dfengine.errors import DataError, DfengineError
from dfengine.evaluation.evaluate import evaluate, write_metrics
from dfengine.evaluation.metrics import pixel_metrics

SCORES = np.array([0.1, 0.2, 0.6, 0.3, 0.7, 0.8, 0.9])
LABELS = np.array([0, 0, 0, 1, 1, 1, 1])
DEFECTS = ["good", "good", "good", "broken", "broken", "missing", "missing"]


def masks_and_maps():
    rng = np.random.default_rng(0)
    masks = np.zeros((7, 12, 12), dtype=bool)
    masks[3:, 2:6, 3:8] = True
    return masks, (rng.random(masks.shape) + 0.5 * masks).astype(np.float32)


def test_values_and_keys():
    masks, maps = masks_and_maps()
    result = evaluate(SCORES, LABELS, DEFECTS, maps, masks, 0.5)
    assert result["image_auroc"] == pytest.approx(11 / 12)
    assert (result["precision"], result["recall"], result["f1"]) == (0.75, 0.75, 0.75)
    assert result["false_alarm_rate"] == pytest.approx(1 / 3)
    assert (result["n_images"], result["n_good"], result["n_anomalous"]) == (7, 3, 4)
    assert result["threshold"] == 0.5
    low, high = result["image_auroc_interval"]
    assert low < 11 / 12 <= high
    expected = pixel_metrics(masks, maps)
    assert all(result[name] == expected[name] for name in ("pixel_auroc", "pixel_ap", "aupro"))
    assert result["undefined"] == {} and result["notes"] == []
    assert result["per_defect"] == [
        {"defect": "broken", "n": 2, "image_auroc": pytest.approx(5 / 6), "alarms": 1, "recall": 0.5},
        {"defect": "missing", "n": 2, "image_auroc": 1.0, "alarms": 2, "recall": 1.0},
    ]


def test_without_masks_and_without_threshold():
    result = evaluate(SCORES, LABELS, DEFECTS, None, None, None)
    assert result["aupro"] is None and result["undefined"]["aupro"] == "no ground-truth masks"
    assert result["f1"] is None and result["undefined"]["f1"] == "no threshold is given"
    assert result["per_defect"][0]["recall"] is None
    assert result["image_auroc"] == pytest.approx(11 / 12)


def test_missing_masks():
    masks, maps = masks_and_maps()
    whole = evaluate(SCORES, LABELS, DEFECTS, maps, masks, 0.5)
    none_for_good = [None, None, None, *masks[3:]]
    assert evaluate(SCORES, LABELS, DEFECTS, maps, none_for_good, 0.5)["aupro"] == whole["aupro"]
    without_one = evaluate(SCORES, LABELS, DEFECTS, maps, [*masks[:6], None], 0.5)
    assert without_one["aupro"] == pixel_metrics(masks[:6], maps[:6])["aupro"]
    assert without_one["notes"] == ["Left out of the pixel metrics: 1 anomalous image without a mask."]
    without_any = evaluate(SCORES, LABELS, DEFECTS, maps, [None] * 7, 0.5)
    assert without_any["undefined"]["pixel_auroc"] == "no ground-truth masks"
    with pytest.raises(DataError, match="mask of image"):
        evaluate(SCORES, LABELS, DEFECTS, maps, [mask[:5] for mask in masks], 0.5)


def test_groups_widen_or_change_the_interval():
    groups = ["a", "b", "c", "a", "b", "c", "c"]
    result = evaluate(SCORES, LABELS, DEFECTS, None, None, 0.5, groups)
    assert result["n_groups"] == 3
    assert result["image_auroc_interval"] != evaluate(SCORES, LABELS, DEFECTS, None, None, 0.5)["image_auroc_interval"]


def test_perfect_separation_says_that_the_interval_means_little():
    result = evaluate([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], ["good", "good", "x", "x"], None, None, 0.5)
    assert result["image_auroc_interval"] == [1, 1] and "no width" in result["notes"][0]


@pytest.mark.parametrize("labels", [LABELS, np.zeros(7), np.ones(7)])
def test_files(tmp_path, labels):
    defects = ['bad, "very"' if label else "good" for label in labels]
    result = evaluate(SCORES, labels, defects, None, None, 0.5)
    paths = write_metrics(tmp_path / "new", result)
    read = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert "curves" not in read and read["n_images"] == 7 and read["image_auroc"] == result["image_auroc"]
    both = bool(labels.any() and not labels.all())
    assert set(paths) == {"metrics.json", "per_defect.csv"} | ({"roc.png", "pr.png"} if both else set())
    for name, path in paths.items():
        if name.endswith(".png"):
            with Image.open(path) as picture:
                assert picture.size[0] > 300
    with open(paths["per_defect.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["defect"] for row in rows] == (['bad, "very"'] if labels.any() else [])
    if both:
        assert float(rows[0]["recall"]) == 0.75


def test_curves_hold_the_areas():
    curves = evaluate(SCORES, LABELS, DEFECTS, None, None, 0.5)["curves"]
    assert np.trapezoid(curves["roc"]["tpr"], curves["roc"]["fpr"]) == pytest.approx(11 / 12)
    recall, precision = np.array(curves["pr"]["recall"]), np.array(curves["pr"]["precision"])
    ap = evaluate(SCORES, LABELS, DEFECTS, None, None, 0.5)["image_ap"]
    assert (np.diff(recall) * precision[1:]).sum() == pytest.approx(ap)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DfengineError, match="cannot be written"):
        write_metrics(tmp_path / "file", evaluate(SCORES, LABELS, DEFECTS, None, None, 0.5))
