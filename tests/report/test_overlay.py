from __future__ import annotations

import numpy as np
import pytest

from dfengine.report.overlay import heatmap_overlay


def test_zero_map_is_the_gray_image():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    result = heatmap_overlay(image, np.zeros((20, 30)))
    assert result.shape == image.shape and result.dtype == np.uint8
    assert (result[..., 0] == result[..., 1]).all() and (result[..., 0] == result[..., 2]).all()
    assert np.abs(result[..., 0] - image @ [0.299, 0.587, 0.114]).max() <= 1


def test_colour_depends_on_the_value_alone_and_not_on_the_other_pixels():
    image = np.full((8, 8, 3), 128, np.uint8)
    low, high = np.full((8, 8), 0.5), np.full((8, 8), 0.5)
    high[0, 0] = 1.0
    np.testing.assert_array_equal(heatmap_overlay(image, low)[1:], heatmap_overlay(image, high)[1:])
    np.testing.assert_array_equal(heatmap_overlay(image, low), heatmap_overlay(image, low * 4, vmax=4))


def test_lightness_grows_with_the_value_on_a_dark_image():
    ramp = np.linspace(0, 1, 64)[None].repeat(4, axis=0)
    result = heatmap_overlay(np.zeros((4, 64, 3), np.uint8), ramp).astype(float)
    lightness = result @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness[0]) >= -1).all() and lightness[0, -1] > 150


def test_small_map_is_resized_and_mask_is_outlined():
    image = np.full((64, 64, 3), 90, np.uint8)
    mask = np.zeros((64, 64), bool)
    mask[16:32, 16:32] = True
    plain = heatmap_overlay(image, np.zeros((16, 16)))
    outlined = heatmap_overlay(image, np.zeros((16, 16)), mask=mask)
    changed = (plain != outlined).any(axis=2)
    assert changed[16, 16:32].all() and changed[16:32, 31].all()
    assert not changed[20:28, 20:28].any() and not changed[:14].any()
    np.testing.assert_array_equal(outlined, heatmap_overlay(image, np.zeros((16, 16)), mask=mask[::4, ::4]))


def test_wrong_input():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="finite"):
        heatmap_overlay(image, np.full((8, 8), np.nan))
    with pytest.raises(ValueError, match="uint8"):
        heatmap_overlay(image.astype(np.float32), np.zeros((8, 8)))
