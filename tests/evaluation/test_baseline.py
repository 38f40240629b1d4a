from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.engine.modules import image_score
from dfengine.evaluation.baseline import MIN_STD, MeanStdBaseline, top_mean


def test_mean_and_std_are_those_of_numpy():
    images = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)
    baseline = MeanStdBaseline(images)
    np.testing.assert_allclose(baseline.mean, (images / 255).mean(axis=0))
    np.testing.assert_allclose(baseline.std, (images / 255).std(axis=0, ddof=1))
    same = MeanStdBaseline(iter(list(images / 255)))
    np.testing.assert_allclose(same.std, baseline.std)


def test_finds_a_patch_where_the_training_images_are_quiet():
    rng = np.random.default_rng(0)
    train = np.clip(rng.normal(0.5, 0.05, (40, 64, 64, 3)), 0, 1)
    good, bad = np.clip(rng.normal(0.5, 0.05, (2, 64, 64, 3)), 0, 1)
    bad[10:20, 10:20] += 0.4
    scores, maps = MeanStdBaseline(train).score([good, bad])
    assert scores[1] > 1.8 * scores[0]
    assert maps.shape == (2, 64, 64) and maps.dtype == np.float32
    assert maps[1, 10:20, 10:20].mean() > 4 * maps[1, 30:, 30:].mean()


def test_constant_pixels_do_not_divide_by_zero():
    image = np.full((8, 8, 3), 100, np.uint8)
    scores, _ = MeanStdBaseline([image, image]).score([image, image + 1])
    assert scores == pytest.approx([0, 1 / 255 / MIN_STD], abs=1e-5)


def test_top_mean_counts():
    ramp = np.arange(256 * 256, dtype=np.float32).reshape(256, 256)
    assert top_mean(ramp) == ramp.ravel()[-50:].mean(dtype=np.float64)
    assert top_mean(ramp[:8, :8]) == ramp[7, 7]
    assert top_mean(ramp, top_k=7) == ramp.ravel()[-7:].mean(dtype=np.float64)


def test_the_score_counts_pixels_as_the_detector_does():
    rng = np.random.default_rng(1)
    baseline = MeanStdBaseline(rng.random((4, 96, 64, 3)))
    for top_k in (50, 400):
        scores, maps = baseline.score(rng.random((3, 96, 64, 3)), top_k)
        np.testing.assert_allclose(scores, image_score(torch.from_numpy(maps), top_k), rtol=1e-6)
    assert baseline.score(rng.random((1, 96, 64, 3)))[1].shape == (1, 96, 64)


def test_wrong_images():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="at least two"):
        MeanStdBaseline([image])
    with pytest.raises(ValueError, match="shape"):
        MeanStdBaseline([image, image[:4]])
    with pytest.raises(ValueError, match="H, W, 3"):
        MeanStdBaseline([image[..., 0], image[..., 0]])
