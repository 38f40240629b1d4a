from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dfengine.data.images import resize_unit, to_unit
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.detection import Detection, Refused
from dfengine.errors import DataError, ImageError
from dfengine.evaluation.evaluate import evaluate, write_metrics
from dfengine.evaluation.robustness import (
    PERTURBATIONS,
    ROW_FIELDS,
    PerturbedImage,
    measure_robustness,
    perturbed_scores,
    quantile_threshold,
    robustness_table,
)

NAMED = {perturbation.name: perturbation for perturbation in PERTURBATIONS}


def picture(height: int = 61, width: int = 45, dtype=np.uint8) -> np.ndarray:
    """A smooth picture with a sharp box: values from 20 to 235 of 255."""
    y, x = np.mgrid[0:height, 0:width]
    values = np.stack([40 + 150 * y / height, 200 - 160 * x / width, 60 + 80 * (x + y) / (height + width)], axis=-1)
    values[height // 3 : height // 2, width // 4 : width // 2] = (235, 20, 128)
    unit = values / 255
    if dtype == np.uint8:
        return np.rint(255 * unit).astype(np.uint8)
    return np.rint(65535 * unit).astype(np.uint16) if dtype == np.uint16 else unit.astype(dtype)


class MeanDetector:
    """Scores an image by the mean of its pixels, so that every number of the table can be computed by hand."""

    def __init__(self, threshold: float | None = None):
        self.threshold = threshold
        self.asked = []

    def stream(self, batch, batch_size: int = 16):
        images = collect_inputs(batch)
        for start in range(0, len(images), batch_size):
            scores, names, errors = [], [], []
            for index, image in enumerate(images[start : start + batch_size], start):
                self.asked.append(image.name)
                try:
                    scores.append(image.load(16).mean(dtype=np.float64))
                    names.append(image.name)
                except ImageError as error:
                    errors.append(Refused(index, image.name, error.reason))
            empty = np.zeros((len(names), 16, 16, 3))
            yield Detection(tuple(names), np.array(scores), empty[..., 0], empty, empty, errors=tuple(errors))


def grays(levels, dtype=np.uint8) -> list[np.ndarray]:
    return [np.full((20, 30, 3), level, dtype) for level in levels]


def rows_of(table: dict) -> dict[str, dict]:
    return {row["change"]: row for row in table["rows"]}


def test_brightness_is_a_gain():
    image = picture()
    for name, gain in (("brightness x0.9", 0.9), ("brightness x1.1", 1.1)):
        expected = np.minimum(np.rint(gain * image.astype(np.float64)), 255).astype(np.uint8)
        np.testing.assert_array_equal(NAMED[name](image), expected)
    assert NAMED["brightness x1.1"](image).max() == 255


def test_contrast_scales_what_differs_from_the_mean():
    image = picture(dtype=np.float32)
    for name, gain in (("contrast x0.9", 0.9), ("contrast x1.1", 1.1)):
        changed = NAMED[name](np.float32(0.5) + (image - image.mean()) / 2)
        assert changed.mean() == pytest.approx(0.5, abs=1e-5)
        np.testing.assert_allclose(changed - 0.5, gain * (image - image.mean()) / 2, atol=1e-5)


@pytest.mark.parametrize("share", [0.003, 0.005])
def test_blur_spreads_a_point_by_its_share_of_each_side(share):
    height, width = 1201, 1599
    image = np.zeros((height, width, 3), np.float32)
    image[600, 800] = 1
    blurred = NAMED[f"blur {1000 * share:.0f}/1000"](image)[..., 1].astype(np.float64)
    y, x = np.mgrid[0:height, 0:width]
    assert blurred.sum() == pytest.approx(1, abs=1e-4)
    assert np.sqrt((blurred * (y - 600) ** 2).sum()) == pytest.approx(share * height, rel=0.02)
    assert np.sqrt((blurred * (x - 800) ** 2).sum()) == pytest.approx(share * width, rel=0.02)


@pytest.mark.parametrize(("height", "width"), [(61, 45), (100, 251), (8, 8)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_shift_moves_both_axes_and_mirrors_the_border(height, width, dtype):
    image = picture(height, width, dtype)
    for name, share in (("shift +2%", 0.02), ("shift -2%", -0.02), ("shift +4%", 0.04), ("shift -4%", -0.04)):
        down, right = round(share * height), round(share * width)
        assert (height, width) == (8, 8) or (down and right)
        padded = np.pad(image, ((16, 16), (16, 16), (0, 0)), mode="reflect" if height > 16 else "edge")
        expected = padded[16 - down : 16 - down + height, 16 - right : 16 - right + width]
        np.testing.assert_array_equal(NAMED[name](image), expected)


def test_jpeg_loses_more_at_lower_quality_and_keeps_gray_gray():
    rng = np.random.default_rng(0)
    image = np.clip(picture() + rng.normal(0, 8, (61, 45, 1)), 0, 255).astype(np.uint8)
    errors = [np.abs(NAMED[f"JPEG quality {quality}"](image).astype(float) - image).mean() for quality in (75, 50)]
    assert 0.5 < errors[0] < errors[1] < 15
    gray = np.repeat(image[..., :1], 3, axis=2)
    coded = NAMED["JPEG quality 50"](gray)
    assert (coded == coded[..., :1]).all() and not np.array_equal(coded, gray)


def test_pixels_of_a_tensor_are_those_of_an_array_and_warned_of_by_their_name(caplog):
    few = (picture(40, 48, np.uint16) // 16).astype(np.uint16)
    for name in ("blur 5/1000", "shift +2%"):
        tensor, array = InputImage("left camera", array=torch.from_numpy(few)), InputImage("x", array=few)
        from_tensor, from_array = (PerturbedImage(image, NAMED[name]).load(32) for image in (tensor, array))
        np.testing.assert_array_equal(from_tensor, from_array)
    assert "left camera: " in caplog.text and "batch[0]" not in caplog.text


def test_channels_are_not_swapped():
    image = np.full((32, 48, 3), (220, 90, 20), np.uint8)
    for perturbation in PERTURBATIONS:
        red, green, blue = perturbation(image).mean(axis=(0, 1))
        assert red > green + 60 > blue + 120, perturbation.name


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda perturbation: perturbation.name)
def test_every_change_keeps_shape_and_depth_and_input(perturbation):
    height, width = 211, 155
    eight = perturbation(picture(height, width))
    for dtype, kept in ((np.uint8, np.uint8), (np.uint16, np.uint16), (np.float32, np.float32),
                        (np.float64, np.float32), (np.float16, np.float32)):  # fmt: skip
        image = picture(height, width, dtype)
        before = image.copy()
        changed = perturbation(image)
        assert changed.shape == image.shape and changed.dtype == kept
        np.testing.assert_array_equal(image, before)
        np.testing.assert_array_equal(perturbation(image), changed)
        assert not np.shares_memory(changed, image)
        assert not np.array_equal(to_unit(changed), to_unit(image))
        # The same change at any depth, up to the rounding to 8 bits.
        np.testing.assert_allclose(to_unit(changed), to_unit(eight), atol=0.08 if "JPEG" in perturbation.name else 0.01)


def test_a_deep_image_keeps_its_depth_where_the_change_does():
    image = picture(dtype=np.uint16)
    for name, perturbation in NAMED.items():
        changed = perturbation(image)
        assert (changed % 257 == 0).all() == name.startswith("JPEG"), name


def test_the_same_change_at_no_strength_changes_nothing():
    for dtype in (np.uint8, np.uint16, np.float32):
        image = picture(dtype=dtype)
        for name, level in (("brightness x0.9", 1.0), ("contrast x0.9", 1.0), ("shift +2%", 0.0)):
            np.testing.assert_allclose(replace(NAMED[name], level=level)(image), image, atol=1e-6)


def test_pixels_out_of_range_are_refused_not_clipped():
    image = picture(dtype=np.float32)
    image[3, 4] = 1.5
    for perturbation in PERTURBATIONS:
        with pytest.raises(ImageError, match=r"^photo: float pixels from 0.07\d* to 1.5"):
            perturbation(image, "photo")
    with pytest.raises(ImageError, match="int32"):
        PERTURBATIONS[0](picture().astype(np.int32))


def test_the_table_of_a_score_that_is_the_mean():
    levels = range(100, 200, 5)  # 20 images
    detector = MeanDetector(threshold=193.5 / 255)
    table = measure_robustness(detector, grays(levels), grays([200]), batch_size=7)
    assert table["quantile_threshold"] == pytest.approx(187.5 / 255)  # 2 of 20 are above
    assert (table["n_good"], table["n_anomalous"], table["goal_ratio"], table["passes"]) == (20, 1, 2.0, False)
    assert (table["recall_at_quantile"], table["recall_at_threshold"]) == (1.0, 1.0)
    rows = rows_of(table)
    assert list(rows) == ["none", *NAMED] and all(tuple(row) == ROW_FIELDS for row in table["rows"])
    assert {row["n"] for row in rows.values()} == {20}

    clean = rows["none"]
    assert (clean["alarms"], clean["rate"], clean["ratio"], clean["passes"]) == (2, 0.1, 1.0, True)
    assert (clean["alarms_at_threshold"], clean["rate_at_threshold"], clean["ratio_at_threshold"]) == (1, 0.05, 1.0)
    assert (clean["mean_shift"], clean["image_auroc"]) == (0.0, 1.0)

    brighter = rows["brightness x1.1"]  # 175 and more exceed 187.5, 180 and more exceed 193.5, 185 and more exceed 200
    assert (brighter["alarms"], brighter["rate"], brighter["ratio"], brighter["passes"]) == (5, 0.25, 2.5, False)
    assert (brighter["alarms_at_threshold"], brighter["ratio_at_threshold"]) == (4, 4.0)
    assert brighter["mean_shift"] == pytest.approx(np.mean([np.rint(1.1 * v) - v for v in levels]) / 255)
    assert brighter["image_auroc"] == pytest.approx(17 / 20)
    # scipy.stats.beta.ppf(0.025, 5, 16) and (0.975, 6, 15)
    assert (brighter["rate_low"], brighter["rate_high"]) == pytest.approx((0.0866, 0.4910), abs=1e-4)

    darker = rows["brightness x0.9"]
    assert (darker["alarms"], darker["ratio"], darker["passes"], darker["rate_low"]) == (0, 0.0, True, 0.0)
    assert darker["rate_high"] == pytest.approx(1 - 0.025 ** (1 / 20))
    assert darker["mean_shift"] < 0
    for name in ("contrast x1.1", "blur 5/1000", "shift +4%", "shift -2%"):  # nothing to change in a flat image
        assert (rows[name]["ratio"], rows[name]["passes"]) == (1.0, True)
        assert rows[name]["mean_shift"] == pytest.approx(0, abs=1e-6)


def test_twice_the_rate_passes_and_no_clean_alarm_means_no_ratio():
    clean = np.linspace(0.1, 0.68, 58)  # 6 above the quantile
    twice, more = clean.copy(), clean.copy()
    twice[:6] = more[:7] = 0.9
    table = robustness_table(clean, {"twice": twice, "more": more}, threshold=0.8)
    rows = rows_of(table)
    assert [row["alarms"] for row in table["rows"]] == [6, 12, 13]
    assert rows["twice"]["ratio"] == 2.0 and rows["twice"]["passes"] and not rows["more"]["passes"]
    assert rows["none"]["alarms_at_threshold"] == 0 and rows["none"]["ratio_at_threshold"] is None
    assert rows["more"]["rate_at_threshold"] == 7 / 58 and rows["more"]["ratio_at_threshold"] is None
    assert rows["more"]["image_auroc"] is None and table["n_anomalous"] == 0
    assert table["recall_at_quantile"] is None and table["recall_at_threshold"] is None
    defects = robustness_table(clean, {}, 0.8, [0.5, 0.7, 0.79, 0.81])
    assert (defects["recall_at_quantile"], defects["recall_at_threshold"]) == (0.75, 0.25)
    assert robustness_table(clean, {}, anomalous=[0.9])["recall_at_threshold"] is None
    assert robustness_table(clean, {"twice": twice})["passes"]
    assert rows_of(robustness_table(clean, {"twice": twice}))["twice"]["rate_at_threshold"] is None


@pytest.mark.parametrize(("count", "above"), [(1, 1), (2, 1), (10, 1), (11, 2), (20, 2), (58, 6), (100, 10), (101, 11)])
def test_a_tenth_of_the_clean_images_exceed_the_quantile(count, above):
    clean = np.random.default_rng(count).permutation(np.linspace(0.2, 0.7, count))
    threshold = quantile_threshold(clean)
    assert (clean > threshold).sum() == above
    # Rounding of a score moves no image across.
    assert count == 1 or (clean - 1e-6 > threshold).sum() == (clean + 1e-6 > threshold).sum() == above


def test_ties_never_leave_the_quantile_without_a_clean_alarm():
    assert (np.ones(30) > quantile_threshold(np.ones(30))).all()
    assert (np.zeros(3) > quantile_threshold(np.zeros(3))).all()
    tied = np.array([0.5] * 15 + [1.0] * 5)
    assert quantile_threshold(tied) == 0.75
    assert rows_of(robustness_table(tied, {"same": tied}))["same"]["ratio"] == 1.0


def test_refused_images_leave_the_others_in_place(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    long = np.full((8, 65_501, 3), 120, np.uint8)
    good = [*grays([100, 150]), tmp_path / "broken.png", long, *grays([110, 140, 90])]
    detector = MeanDetector()
    table = measure_robustness(detector, good, batch_size=2)
    rows = rows_of(table)
    assert table["n_good"] == 6 and table["threshold"] is None
    for name, row in rows.items():
        assert row["n"] == (5 if name.startswith("JPEG") else 6)
    assert rows["JPEG quality 50"]["mean_shift"] == pytest.approx(0, abs=1.5 / 255)
    darker = -0.1 * np.mean([100, 150, 120, 110, 140, 90]) / 255
    assert rows["brightness x0.9"]["mean_shift"] == pytest.approx(darker, abs=1e-5)
    assert sum("broken" in name for name in detector.asked) == 1
    with pytest.raises(ImageError, match=r"batch\[3\] \(JPEG quality 75\): a side of 65501 pixels"):
        PerturbedImage(InputImage("batch[3]", array=long), NAMED["JPEG quality 75"]).load(32)


def test_nothing_scored_under_a_change_is_neither_pass_nor_failure():
    clean = np.array([0.1, 0.2, 0.3, 0.4])
    table = robustness_table(clean, {"gone": [np.nan] * 4, "some": [np.nan, 0.1, 0.3, 0.2]}, 0.5, [0.9])
    gone, some = table["rows"][1:]
    assert gone == dict.fromkeys(ROW_FIELDS) | {"change": "gone", "n": 0}
    assert some["n"] == 3 and some["mean_shift"] == pytest.approx(-0.1) and some["passes"] is True
    assert table["passes"] is None
    assert robustness_table(clean, {"twice": [0.5, 0.5, 0.1, 0.1]})["passes"] is True
    assert robustness_table(clean, {"gone": [np.nan] * 4, "worse": [0.5] * 4})["passes"] is False


@pytest.mark.parametrize("clean", [[0.1], [0.1, 0.2], [0.5] * 20])
def test_so_few_images_that_none_could_fail_do_not_pass(clean):
    table = robustness_table(clean, {"same": clean, "worse": [0.9] * len(clean)})
    assert table["passes"] is None and {row["passes"] for row in table["rows"]} == {None}
    assert table["rows"][2]["ratio"] <= 2


def test_the_ratio_is_of_the_images_that_were_scored_changed():
    clean = np.linspace(0.1, 1.0, 10)  # one above the quantile
    changed = {"same": np.where(clean > 0.75, clean, np.nan), "others": np.where(clean < 0.3, 2.0, np.nan)}
    same, others = robustness_table(clean, changed, 0.95)["rows"][1:]
    assert (same["n"], same["alarms"], same["ratio"], same["ratio_at_threshold"], same["passes"]) == (3, 1, 1, 1, True)
    assert (others["n"], others["alarms"], others["ratio"], others["passes"]) == (2, 2, None, None)


def test_batches_that_end_early_leave_the_rest_unscored():
    def batches(images):
        yield next(MeanDetector().stream(images, batch_size=3))

    scores = perturbed_scores(batches, collect_inputs(grays([50, 100])), PERTURBATIONS[:2])
    assert np.isfinite(scores["brightness x0.9"]).all()
    np.testing.assert_array_equal(np.isfinite(scores["brightness x1.1"]), [True, False])


def test_no_good_image(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="no good image could be scored"):
        measure_robustness(MeanDetector(), [tmp_path / "broken.png"])
    with pytest.raises(DataError, match="not finite"):
        robustness_table([0.1, np.nan], {})
    with pytest.raises(ValueError, match="1 scores for 2 images"):
        robustness_table([0.1, 0.2], {"x": [0.1]})


def test_a_change_that_changes_nothing_has_ratio_1():
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 9 * i + 10, (32 + i, 40 - i, 3), dtype=np.uint8) for i in range(12)]
    images += [picture(dtype=np.uint16), picture(dtype=np.float32), picture()[..., 0]]
    same = [replace(NAMED["brightness x0.9"], name="gain 1", level=1.0),
            replace(NAMED["shift +2%"], name="no shift", level=0.0)]  # fmt: skip
    table = measure_robustness(MeanDetector(0.2), images, images[:4], batch_size=4, perturbations=same)
    clean, *changed = table["rows"]
    assert clean["alarms"] == 2 and clean["alarms_at_threshold"] > 2 and len(changed) == 2
    for row in changed:
        assert row == clean | {"change": row["change"], "mean_shift": pytest.approx(0, abs=1e-6)}
        assert row["ratio"] == row["ratio_at_threshold"] == 1.0


@pytest.mark.parametrize("name", ["blur 5/1000", "shift -4%", "JPEG quality 50"])
def test_the_change_is_made_before_the_image_is_resized(name):
    image, perturbation = picture(301, 420), NAMED[name]
    changed = PerturbedImage(InputImage("x", array=image), perturbation)
    np.testing.assert_array_equal(changed.load(64), resize_unit(perturbation(image), 64))
    assert np.abs(changed.load(64) - perturbation(resize_unit(image, 64))).max() > 0.01
    assert changed.original_size == (301, 420) and changed.name == f"x ({name})"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_a_tensor_is_changed_as_an_array_is(dtype):
    gray = torch.from_numpy(picture()[..., :1].copy())
    pixels = gray if dtype == torch.uint8 else (gray.float() / 255).to(dtype)
    values = pixels.numpy() if dtype == torch.uint8 else pixels.float().numpy()
    for perturbation in (NAMED["brightness x0.9"], NAMED["shift +4%"]):
        image = PerturbedImage(InputImage("t", array=pixels), perturbation)
        expected = to_unit(perturbation(np.repeat(values, 3, axis=2)))
        assert image.original_size == (61, 45)
        np.testing.assert_allclose(image.load_tensor(45), InputImage("e", array=expected).load(45), atol=1e-6)


def test_files(tmp_path):
    result = evaluate([0.1, 0.2, 0.8], [0, 0, 1], ["good", "good", "bent"], None, None, 0.5)
    result["robustness"] = robustness_table([0.1, 0.2], {"dim": [0.6, 0.2], "gone": [np.nan] * 2}, 0.5, [0.8])
    paths = write_metrics(tmp_path, result)
    read = json.loads(paths["metrics.json"].read_text())["robustness"]
    assert read == result["robustness"]
    with open(paths["robustness.csv"], newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ROW_FIELDS and [row["change"] for row in rows] == ["none", "dim", "gone"]
    assert (rows[1]["alarms"], rows[1]["alarms_at_threshold"], rows[1]["ratio_at_threshold"]) == ("2", "1", "")
    assert float(rows[1]["mean_shift"]) == 0.25 and rows[2]["rate"] == ""
