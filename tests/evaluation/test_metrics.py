from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfengine.errors import DataError
from dfengine.evaluation.metrics import (
    UndefinedMetric,
    aupro,
    auroc,
    bootstrap_auroc,
    f1_max,
    image_metrics,
    pixel_metrics,
)


def regions_of(mask):
    """8-connected regions by flood fill: a list of lists of (y, x)."""
    left, regions = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for neighbour in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
        regions.append(region)
    return regions


def brute_force_aupro(masks, maps, max_fpr):
    """O(thresholds x regions), from the definition: a point for each distinct score, then trapezoids cut at max_fpr."""
    regions = [(i, region) for i, mask in enumerate(masks) for region in regions_of(mask)]
    normal = [float(v) for mask, image in zip(masks, maps, strict=True) for v in image[~mask]]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for image in maps for v in image.ravel()}, reverse=True):
        fpr = sum(v >= threshold for v in normal) / len(normal)
        overlaps = [sum(maps[i][p] >= threshold for p in region) / len(region) for i, region in regions]
        points.append((fpr, sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 >= max_fpr:
            break
        if x1 > max_fpr:
            y1 = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
            x1 = max_fpr
        area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


@st.composite
def small_maps(draw):
    """One to three images of up to 9x9, dense masks (holes, touching corners), few distinct scores, 0 and 1 often."""
    height, width, count = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    masks = rng.random((count, height, width)) < draw(st.sampled_from([0.05, 0.3, 0.6, 0.9]))
    masks[rng.random(count) < 0.3] = False
    levels = np.array(draw(st.sampled_from([(0, 1), (0.5,), (0, 0.25, 1), (0, 0, 0, 0.1, 0.2, 0.7, 1, 1)])), np.float32)
    maps = rng.choice(levels, masks.shape)
    if draw(st.booleans()):
        maps = np.clip(maps + 0.3 * masks, 0, 1).astype(np.float32)
    return masks, maps


@settings(max_examples=300, deadline=None)
@given(small_maps(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_aupro_equals_brute_force(data, max_fpr):
    masks, maps = data
    if not masks.any() or masks.all():
        with pytest.raises(UndefinedMetric):
            aupro(masks, maps, max_fpr)
        return
    assert aupro(masks, maps, max_fpr) == pytest.approx(brute_force_aupro(masks, maps, max_fpr), abs=1e-12)


def test_aupro_equals_brute_force_on_distinct_scores():
    rng = np.random.default_rng(1)
    masks = np.zeros((2, 16, 16), dtype=bool)
    masks[0, 2:9, 2:9] = True
    masks[0, 4:6, 4:6] = False  # a hole is normal
    masks[0, 5, 5] = True  # an island in the hole, connected to the ring across a corner
    masks[1, 12, 3] = True
    maps = (rng.random(masks.shape) + 0.4 * masks).astype(np.float32)
    assert aupro(masks, maps) == pytest.approx(brute_force_aupro(masks, maps, 0.3), abs=1e-12)


def test_aupro_known_values():
    mask = np.zeros((1, 10, 10), dtype=bool)
    mask[0, :2, :5] = True
    assert aupro(mask, mask.astype(np.float32)) == pytest.approx(1, abs=1e-12)
    assert aupro(mask, 1 - mask.astype(np.float32)) == 0.0
    assert aupro(mask, np.full(mask.shape, 0.5)) == pytest.approx(0.15)  # the diagonal up to 0.3: 0.3^2 / 2 / 0.3
    # A large found region and a missed pixel weigh the same: the overlap stays at one half.
    mask[0, 9, 9] = True
    found = mask.astype(np.float32)
    found[0, 9, 9] = -1
    assert aupro(mask, found) == pytest.approx(0.5)


def test_aupro_diagonal_neighbours_are_one_region():
    masks = np.zeros((1, 4, 4), dtype=bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 3] = True
    maps = np.zeros(masks.shape, np.float32)
    maps[0, 0, 0] = maps[0, 1, 1] = 1
    # Regions {(0,0), (1,1)} and {(3,3)}: one of two is found. With three regions it would start at 2/3.
    expected = 0.5 + 0.5 * 0.3 / 2
    assert aupro(masks, maps) == pytest.approx(expected)


def test_aupro_takes_images_of_different_sizes():
    rng = np.random.default_rng(0)
    masks = [rng.random((5, 7)) < 0.3, rng.random((9, 4)) < 0.3]
    maps = [rng.random(mask.shape) for mask in masks]
    assert aupro(masks, maps) == pytest.approx(brute_force_aupro(masks, maps, 0.3), abs=1e-12)


def test_pixel_metrics_of_masks_without_anomaly():
    result = pixel_metrics(np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4)))
    assert [result[name] for name in ("pixel_auroc", "pixel_ap", "aupro")] == [None] * 3
    assert set(result["undefined"]) == {"pixel_auroc", "pixel_ap", "aupro"}


def test_pixel_metrics_refuses_wrong_maps():
    mask = np.zeros((1, 4, 4), bool)
    with pytest.raises(DataError, match="image 0 has shape"):
        pixel_metrics(mask, np.zeros((1, 4, 5)))
    with pytest.raises(DataError, match="image 0 holds a value"):
        pixel_metrics(mask, np.full((1, 4, 4), np.nan))


def pairwise_auroc(labels, scores):
    bad, good = scores[labels], scores[~labels]
    wins = (bad[:, None] > good[None]).sum() + 0.5 * (bad[:, None] == good[None]).sum()
    return wins / (bad.size * good.size)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])), min_size=2, max_size=40))
def test_auroc_and_f1_max_equal_their_definitions(pairs):
    labels, scores = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if labels.any() and not labels.all():
        assert auroc(labels, scores) == pytest.approx(pairwise_auroc(labels, scores))
    if labels.any():
        alarms = [scores >= threshold for threshold in scores]
        assert f1_max(labels, scores) == pytest.approx(
            max(2 * (a & labels).sum() / (a.sum() + labels.sum()) for a in alarms)
        )


def test_image_metrics_at_a_threshold():
    result = image_metrics([0, 0, 0, 1, 1], [0.1, 0.5, 0.6, 0.5, 0.9], 0.5)  # a score equal to it is no alarm
    assert (result["precision"], result["recall"], result["f1"]) == (0.5, 0.5, 0.5)
    assert result["false_alarm_rate"] == pytest.approx(1 / 3)
    assert result["undefined"] == {}


def test_image_metrics_compares_in_float64():
    score = np.float32(0.1)  # above 0.1 by 1.5e-9, equal to it in float32
    assert image_metrics([1, 0], np.array([score, 0], np.float32), 0.1)["recall"] == 1


def test_image_metrics_of_one_class():
    good = image_metrics([0, 0], [0.2, 0.3], 0.5)
    assert good["image_auroc"] is None and good["recall"] is None and good["precision"] is None
    assert good["undefined"]["image_auroc"] == "no anomalous image"
    assert good["false_alarm_rate"] == 0
    bad = image_metrics([1, 1], [0.2, 0.7], 0.5)
    assert bad["undefined"]["image_auroc"] == "no good image"
    assert bad["recall"] == 0.5 and bad["image_f1_max"] == 1
    with pytest.raises(DataError, match="image 1 is not finite"):
        image_metrics([0, 1], [0.2, np.nan], 0.5)


def test_bootstrap_is_a_weighted_pairwise_auroc():
    rng = np.random.default_rng(3)
    labels, scores = rng.random(30) < 0.4, rng.integers(0, 6, 30) / 5
    draws = np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), size=50)
    expected = []
    for draw in draws:
        picked = np.repeat(np.arange(30), draw)
        expected.append(pairwise_auroc(labels[picked], scores[picked]))
    assert bootstrap_auroc(labels, scores, n=50, seed=7) == pytest.approx(tuple(np.quantile(expected, (0.025, 0.975))))


def test_bootstrap_over_groups():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2 == 0
    scores = rng.normal(size=200) + labels
    groups = np.array([f"photo {i // 20}" for i in range(200)])
    low, high = bootstrap_auroc(labels, scores, groups)
    assert low < auroc(labels, scores) < high
    assert bootstrap_auroc(labels, scores, groups) == (low, high)
    # Copies of a crop in its photo add no information: the interval must not shrink, as it would over images.
    copied = (np.repeat(labels, 5), np.repeat(scores, 5), np.repeat(groups, 5))
    assert bootstrap_auroc(*copied) == pytest.approx((low, high), abs=1e-12)
    narrow = bootstrap_auroc(*copied[:2])
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


def test_bootstrap_of_one_class_is_undefined():
    with pytest.raises(UndefinedMetric, match="no good image"):
        bootstrap_auroc([1, 1], [0.1, 0.2])
