from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from dfengine.data.augment import Augmentation, AugmentConfig
from dfengine.data.fills import membrane
from dfengine.data.foreground import estimate_foreground
from dfengine.data.regions import Scene, any_region, compactness
from dfengine.data.structural import STRUCTURAL_KINDS, Structural, changed_mask
from tests.data.scenes import bars

IMAGES, FOREGROUNDS = bars(6, 64)


def scene(index=0):
    return Scene(IMAGES[index].astype(np.float32), FOREGROUNDS[index])


def test_membrane_keeps_the_known_and_continues_the_constant():
    rng = np.random.default_rng(0)
    for size in (32, 33, 64, 100):
        known = np.ones((size, size), bool)
        known[size // 4 : size // 2, size // 4 :] = False
        values = rng.normal(0, 1, (size, size, 3)).astype(np.float32)
        result = membrane(values, known)
        np.testing.assert_allclose(result[known], values[known], atol=1e-5)
        constant = membrane(np.full((size, size, 3), 7.0, np.float32), known)
        np.testing.assert_allclose(constant, 7.0, rtol=1e-5)


def test_membrane_stays_within_the_known_and_near_a_ramp():
    ramp = np.repeat(np.linspace(0, 100, 64, dtype=np.float32)[None, :, None], 64, axis=0)
    known = np.ones((64, 64), bool)
    known[20:40, 20:40] = False
    result = membrane(np.where(known[..., None], ramp, 1e6), known)
    assert 0 <= result.min() and result.max() <= 100
    assert np.abs(result - ramp).max() < 25


def test_changed_mask_is_where_the_picture_changed():
    before = np.full((64, 64, 3), 100, np.float32)
    after = before.copy()
    after[10:20, 30:50, 1] += 40  # one channel is enough
    after[40:44, 40:44] += 5  # below the threshold
    mask = changed_mask(before, after)
    truth = np.zeros((64, 64), bool)
    truth[10:20, 30:50] = True
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    assert not mask[38:46, 38:46].any()
    assert not changed_mask(before, before).any()


def test_changed_mask_closes_small_holes_and_keeps_rings():
    before = np.zeros((64, 64, 3), np.float32)
    ring = np.zeros((64, 64), np.uint8)
    cv2.circle(ring, (32, 32), 16, 1, 5)
    after = before + 80 * ring[..., None]
    assert not changed_mask(before, after)[30:35, 30:35].any()
    disc = cv2.circle(np.zeros((64, 64), np.uint8), (32, 32), 16, 1, -1)
    disc[29:36, 29:36] = 0
    assert changed_mask(before, before + 80 * disc[..., None])[30:35, 30:35].all()


def test_every_kind_is_drawn_and_changes_the_picture():
    structural = Structural(IMAGES, FOREGROUNDS)
    changed: dict[str, list[float]] = {}
    for seed in range(120):
        after, kind = structural.draw(scene(seed % 6), np.random.default_rng(seed))
        assert after.shape == (64, 64, 3) and after.dtype == np.float32 and np.isfinite(after).all()
        changed.setdefault(kind, []).append(changed_mask(IMAGES[seed % 6].astype(np.float32), after).mean())
    assert set(changed) == set(STRUCTURAL_KINDS)
    for kind, areas in changed.items():
        assert np.mean(np.array(areas) > 0.003) > 0.6, kind
        assert np.max(areas) < 0.6, kind


def test_transplants_bring_the_object_of_another_image():
    images, foregrounds = bars(6, 64)
    images = images // 8 * 8
    for image, foreground, level in zip(images, foregrounds, range(100, 220, 20), strict=True):
        image[foreground] = level
    structural = Structural(images, foregrounds)
    brought = 0
    for seed in range(20):
        before = Scene(images[0].astype(np.float32), foregrounds[0])
        after = structural.transplant(before, np.random.default_rng(seed))
        assert after.shape == (64, 64, 3) and after.dtype == np.float32 and np.isfinite(after).all()
        far = ~cv2.dilate(foregrounds.any(axis=0).astype(np.uint8), np.ones((15, 15), np.uint8)).astype(bool)
        assert np.abs(after - before.image)[far].max(initial=0) < 1
        brought += np.abs(after - before.image)[foregrounds[0]].mean() > 5
    assert brought >= 8


def test_objects_are_aligned_where_they_stand_alike():
    assert Structural(np.repeat(IMAGES[:1], 6, axis=0), np.repeat(FOREGROUNDS[:1], 6, axis=0)).aligned
    scattered = np.zeros_like(FOREGROUNDS)
    for index, mask in enumerate(scattered):
        mask[10 * index : 10 * index + 8, 10 * index : 10 * index + 8] = True
    assert not Structural(IMAGES, scattered).aligned
    assert not Structural(IMAGES[:1], FOREGROUNDS[:1]).aligned  # nothing to bring


@pytest.mark.parametrize("kind", ["auto", "none", "texture"])
def test_textures_are_not_aligned(kind):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    images = np.stack([cv2.GaussianBlur(image, (0, 0), 2) for image in noise])
    assert not Structural(images, estimate_foreground(images, kind)).aligned


def test_transplants_are_posed_like_the_scene():
    """In a set of one picture, seen in a mirror, a transplant changes nothing."""
    images, foregrounds = np.repeat(IMAGES[:1], 4, axis=0), np.repeat(FOREGROUNDS[:1], 4, axis=0)
    images[:, 20:30, 5:25] = 200  # not its own mirror image
    structural = Structural(images, foregrounds)
    mirror = dataclasses.replace(AugmentConfig.off(), flip="h")
    for seed in range(10):
        pose = Augmentation(64, np.random.default_rng(seed), mirror)
        mirrored = Scene(pose.pose(images[0]).astype(np.float32), pose.mask(foregrounds[0]))
        after = structural.transplant(mirrored, np.random.default_rng(seed), pose)
        np.testing.assert_allclose(after, mirrored.image, atol=1)


@pytest.mark.parametrize("area", [0.01, 0.05, 0.2])
def test_regions_have_about_the_area_and_lie_on_the_object(area):
    images, foregrounds = bars(1, 64, clutter=True)
    place = Scene(images[0].astype(np.float32), np.ones((64, 64), bool))
    areas = [any_region(place, np.random.default_rng(seed), area).mean() for seed in range(60)]
    assert area / 3 < np.median(areas) < area * 3
    place = Scene(images[0].astype(np.float32), foregrounds[0])
    on_object = [(any_region(place, np.random.default_rng(s), area) & foregrounds[0]).any() for s in range(60)]
    assert np.mean(on_object) > 0.85


def test_erasing_the_object_leaves_background():
    """Where the object was, the filled picture has the brightness of the background, not of the object."""
    structural = Structural(IMAGES, FOREGROUNDS)
    levels = []
    for seed in range(20):
        filled = structural._fill(scene(), FOREGROUNDS[0], np.random.default_rng(seed))
        levels.append(filled[FOREGROUNDS[0]].mean())
    background = IMAGES[0][~FOREGROUNDS[0]].mean()
    assert np.abs(np.median(levels) - background) < 15
    assert np.mean(np.abs(np.array(levels) - background) < 40) > 0.9


def test_decoys_of_background_do_not_touch_the_object():
    structural = Structural(IMAGES, FOREGROUNDS)
    changes = []
    for seed in range(60):
        before = scene(seed % 6)
        after = structural.decoy(before, np.random.default_rng(seed))
        difference = cv2.GaussianBlur(after - before.image, (0, 0), 1.0)
        changes.append(np.abs(difference)[before.foreground].max())
    # A decoy either leaves the object or re-blends it with nearly itself.
    assert np.mean(np.array(changes) < 25) > 0.9
    assert max(np.abs(structural.decoy(scene(), np.random.default_rng(s)) - scene().image).max() for s in range(9)) > 1


def testcompactness():
    canvas = np.zeros((64, 64), np.uint8)
    assert compactness(cv2.circle(canvas.copy(), (32, 32), 20, 1, -1).astype(bool)) == pytest.approx(1, abs=0.02)
    assert compactness(cv2.line(canvas.copy(), (5, 5), (60, 60), 1, 4).astype(bool)) < 0.3


def test_single_image_and_whole_foreground_work():
    structural = Structural(IMAGES[:1], np.ones((1, 64, 64), bool))
    place = Scene(IMAGES[0].astype(np.float32), np.ones((64, 64), bool))
    for seed in range(40):
        assert np.isfinite(structural.draw(place, np.random.default_rng(seed))[0]).all()
        assert np.isfinite(structural.decoy(place, np.random.default_rng(seed))).all()
