from __future__ import annotations

import numpy as np
import pytest

from dfengine.data.augment import Augmentation, AugmentConfig, augment_normal
from dfengine.errors import ConfigError
from tests.data.scenes import bars

IMAGES, MASKS = bars(1, 32)
IMAGE, MASK = IMAGES[0], MASKS[0]


def only(**changes):
    return AugmentConfig(**{**AugmentConfig.off().to_dict(), **changes})


def test_off_changes_nothing():
    for seed in range(5):
        np.testing.assert_array_equal(augment_normal(IMAGE, np.random.default_rng(seed), AugmentConfig.off()), IMAGE)


def test_same_generator_same_bytes():
    first = [augment_normal(IMAGE, np.random.default_rng(seed), AugmentConfig()) for seed in range(5)]
    again = [augment_normal(IMAGE, np.random.default_rng(seed), AugmentConfig()) for seed in range(5)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert first[0].dtype == np.uint8 and first[0].shape == IMAGE.shape


def test_shift_moves_whole_pixels_and_the_mask_with_them():
    moved = 0
    for seed in range(10):
        augmentation = Augmentation(32, np.random.default_rng(seed), only(shift=0.1))
        x, y = (int(v) for v in augmentation.matrix[:, 2])
        assert abs(x) <= 3 and abs(y) <= 3
        rows, columns = slice(max(0, y), 32 + min(0, y)), slice(max(0, x), 32 + min(0, x))
        back_rows, back_columns = slice(max(0, -y), 32 + min(0, -y)), slice(max(0, -x), 32 + min(0, -x))
        np.testing.assert_array_equal(augmentation.pose(IMAGE)[rows, columns], IMAGE[back_rows, back_columns])
        np.testing.assert_array_equal(augmentation.mask(MASK)[rows, columns], MASK[back_rows, back_columns])
        moved += (x, y) != (0, 0)
    assert moved >= 8


@pytest.mark.parametrize("flip, axes", [("h", {1}), ("v", {0}), ("hv", {0, 1})])
def test_flips_are_those_asked_for(flip, axes):
    options = {IMAGE.tobytes()}
    for axis in axes:
        options |= {np.flip(np.frombuffer(o, np.uint8).reshape(IMAGE.shape), axis).tobytes() for o in options}
    seen = {augment_normal(IMAGE, np.random.default_rng(seed), only(flip=flip)).tobytes() for seed in range(40)}
    assert seen == options


def test_exposure_is_a_gain():
    for seed in range(10):
        augmentation = Augmentation(32, np.random.default_rng(seed), only(exposure=0.3))
        expected = np.clip(np.rint(IMAGE * augmentation.gain), 0, 255)
        assert np.abs(augmentation.camera(IMAGE) - expected).max() <= 1
        assert 2**-0.3 <= augmentation.gain <= 2**0.3


def test_contrast_keeps_the_mean():
    gray = np.clip(IMAGE, 60, 190)
    for seed in range(10):
        augmentation = Augmentation(32, np.random.default_rng(seed), only(contrast=0.2))
        image = augmentation.camera(gray).astype(float)
        assert abs(image.mean() - gray.mean()) < 1
        assert image.std() == pytest.approx(augmentation.contrast * gray.std(), rel=0.02)


@pytest.mark.parametrize("name, value", [("noise", 3.0), ("blur", 40.0), ("gamma", 0.5), ("white_balance", 0.2)])
def test_every_change_changes_something_mildly(name, value):
    changes = [
        np.abs(augment_normal(IMAGE, np.random.default_rng(seed), only(**{name: value})).astype(int) - IMAGE).mean()
        for seed in range(10)
    ]
    assert 0 < max(changes) < 40


def test_gray_stays_gray():
    gray = np.repeat(IMAGE[..., :1], 3, axis=2)
    for seed in range(5):
        image = augment_normal(gray, np.random.default_rng(seed), AugmentConfig())
        assert not np.array_equal(image, gray)
        assert (image == image[..., :1]).all()


def test_mask_follows_rotation():
    augmentation = Augmentation(32, np.random.default_rng(3), only(rotation=20.0, scale=0.1, shift=0.1))
    image, mask = augmentation.pose(IMAGE), augmentation.mask(MASK)
    dark = image.mean(axis=-1) < 125
    assert (dark & mask).sum() / (dark | mask).sum() > 0.8


def test_config_round_trip_and_refusals():
    config = AugmentConfig(shift=0.1, flip="hv")
    assert AugmentConfig.from_dict(config.to_dict()) == config
    refused = ({"shift": -1}, {"shift": 1.0}, {"flip": "x"}, {"noise": float("nan")}, {"blur": True}, {"zoom": 1})
    for bad in refused:
        with pytest.raises(ConfigError):
            AugmentConfig.from_dict(bad)
