from __future__ import annotations

import numpy as np
import pytest

from dfengine.training.validation import GAP, panel, verdict


@pytest.mark.parametrize(
    "auroc, cases, doubtful",
    [(1.0, 100, False), (0.9999, 99, False), (0.97, 97, False), (0.29, 29, True), (0.8499, 84, True), (0.85, 85, 0)],
)
def test_the_verdict_counts_cases_and_warns_below_85(auroc, cases, doubtful):
    first, *others = verdict({"val_image_auroc": auroc, "val_pixel_ap": 0.1})
    assert first == (
        "on held-out images with synthetic defects the detector ranks a defective above a sound image in "
        f"{cases} of 100 cases"
    )
    assert len(others) == int(doubtful)
    assert all("more minutes or more images would help; look at the last panel" in line for line in others)


def test_the_verdict_says_where_it_is_optimistic_or_missing():
    assert verdict({"val_image_auroc": 0.9}, trained=2)[0].endswith("(optimistic: the weights have seen 2 of them)")
    assert verdict({"val_noise_loss": 0.1}) == [
        "no verdict on quality: these weights were never tried on synthetic defects"
    ]


@pytest.mark.parametrize("size, side", [(32, 128), (86, 86), (256, 256)])
@pytest.mark.parametrize("joint", [False, True])
def test_a_panel_is_captioned_beside_its_tiles(size, side, joint):
    images = np.random.default_rng(0).integers(0, 255, (4, size, size, 3), np.uint8)
    maps = np.zeros((4, size, size), np.float32)
    found = [np.array([0.1, 0.1, 0.1, 0.9]), maps, maps > 0] if joint else []
    grid = panel(images, images / 255, np.array([0, 0, 1, 1]), *found)
    step, columns = side + GAP, 5 if joint else 3
    left, top = grid.shape[1] - columns * step, grid.shape[0] - 4 * step
    for row, image in enumerate(images):
        tile = grid[top + row * step :, left:][:side, :side]
        np.testing.assert_array_equal(tile, image.repeat(side // size, 0).repeat(side // size, 1))
    heads = [grid[:top, left + column * step :][:, :step] for column in range(columns)]
    assert all((head < 128).any() for head in heads)
    assert all((head[:, -GAP:] == 255).all() for head in heads), "no caption runs into the next"
    sound, again, defect, other = (grid[top + row * step :][:step, :left] for row in range(4))
    assert (sound < 128).any() and (sound[:, -GAP:] == 255).all() and (defect[:, -GAP:] == 255).all()
    np.testing.assert_array_equal(sound, again)
    assert (sound != defect).any()
    assert (defect != other).any() == joint, "the scores"
