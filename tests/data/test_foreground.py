from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dfengine.data.foreground import estimate_foreground, fill_holes, random_part
from tests.data.scenes import bars


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_object_on_a_plain_background_is_found(size):
    images, truth = bars(6, size)
    found = estimate_foreground(images)
    assert found.shape == truth.shape and found.dtype == bool
    assert min(overlap(a, b) for a, b in zip(found, truth, strict=True)) > 0.6


def test_object_in_clutter_is_found_in_the_middle():
    images, truth = bars(12, 64, clutter=True)
    found = estimate_foreground(images)
    for mask, ring in zip(found, truth, strict=True):
        assert mask[ring].mean() > 0.6  # most of the ring is in
        assert mask[~fill_holes(ring)].mean() < 0.25  # and little of the rest
    assert 0.1 < found.mean() < 0.5


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 32, 32, 3), np.uint8),
        np.full((2, 16, 16, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8),
        bars(1, 32)[0],
    ],
    ids=["black", "white", "noise", "single"],
)
def test_never_empty(images):
    assert estimate_foreground(images).any(axis=(1, 2)).all()


def test_other_kinds_are_whole_images():
    images, _ = bars(2, 32)
    assert estimate_foreground(images, "none").all()
    assert estimate_foreground(images, "texture").all()
    with pytest.raises(ValueError, match="foreground kind"):
        estimate_foreground(images, "nothing")


def test_random_part_is_a_part():
    parts = [random_part(64, np.random.default_rng(seed)) for seed in range(50)]
    areas = [part.mean() for part in parts]
    assert min(areas) > 0.02 and max(areas) < 0.9
    assert np.std(areas) > 0.05


def test_fill_holes():
    mask = np.zeros((9, 9), bool)
    mask[1:6, 1:6] = True
    mask[2:5, 2:5] = False  # a hole of 9 pixels
    mask[0, 7], mask[1, 8] = True, True  # a corner cut off by the border is no hole
    closed = fill_holes(mask)
    assert closed[1:6, 1:6].all() and not closed[0, 8] and closed.sum() == 27
    assert np.array_equal(fill_holes(mask, largest=8), mask)
    assert fill_holes(np.ones((3, 3), bool)).all()


@pytest.mark.skipif("DFENGINE_DATA" not in os.environ, reason="DFENGINE_DATA is not set")
def test_real_screws_and_clips():
    from dfengine.data.images import list_images, load_uint8, read_mask

    data = Path(os.environ["DFENGINE_DATA"])
    screws = np.stack([load_uint8(path, 64) for path in list_images(data / "mvtec_screw/train/good")[::20]])
    areas = estimate_foreground(screws).mean(axis=(1, 2))
    assert 0.05 < areas.min() and areas.max() < 0.35
    # Defects lie on the object: true for screws with any defect, which the estimate has never seen.
    paths = list_images(data / "mvtec_screw/test/manipulated_front")[::6]
    found = estimate_foreground(np.stack([load_uint8(path, 256) for path in paths]))
    truths = [read_mask(data / f"mvtec_screw/ground_truth/manipulated_front/{path.stem}_mask.png") for path in paths]
    # A bent tip leaves an empty place, which the defect's mask holds too.
    assert np.mean([mask[truth].mean() for mask, truth in zip(found, truths, strict=True)]) > 0.6
    clips = np.stack([load_uint8(path, 64) for path in list_images(data / "rail_eclip/train/good")[::6]])
    found = estimate_foreground(clips)
    assert found[:, 28:36, 28:36].mean() > 0.9
    assert found[:, :, :8].mean() < 0.1
