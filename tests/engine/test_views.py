"""Views of an image (dfengine/engine/views.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.checkpoint import Checkpoint
from dfengine.detector import Detector
from dfengine.engine.modules import Output, image_score
from dfengine.engine.views import offsets, run_views, shifted
from dfengine.errors import ConfigError
from dfengine.models import cost, preset
from tests.helpers import tiny_model

SIZE = 64


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed))


def brightness(unit: torch.Tensor) -> Output:
    """A runner that finds each pixel by itself, whose map moves along with the image."""
    found = unit.mean(dim=-1)
    return Output(found, unit, image_score(found, 800))


def test_a_view_shows_the_image_moved_and_mirrored_at_its_edges():
    unit = images(2)
    for dy, dx in [(2, 0), (-2, 0), (0, 2), (0, -2), (3, -1)]:
        view = shifted(unit, dy, dx).numpy()
        rows, columns = (np.abs(np.arange(SIZE) + d) for d in (dy, dx))
        rows, columns = (np.where(at >= SIZE, 2 * SIZE - 2 - at, at) for at in (rows, columns))
        np.testing.assert_array_equal(view, unit.numpy()[:, rows[:, None], columns[None]])


def test_a_runner_that_sees_the_same_in_every_view_gives_the_same_map():
    unit = images(3)
    found, plain = run_views(brightness, unit, 5, 800), brightness(unit)
    for name in Output._fields:
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=0, atol=0)


def test_what_stays_in_place_while_the_image_moves_is_taken_away():
    """As a false alarm that hangs on the network's grid does."""

    def with_speck(unit: torch.Tensor) -> Output:
        plain = brightness(unit).anomaly_map.clone()
        plain[:, 20, 30] = 1.0
        return Output(plain, unit, image_score(plain, 800))

    unit = images(2) * 0.5
    expected = brightness(unit).anomaly_map
    found = run_views(with_speck, unit, 5, 800)
    torch.testing.assert_close(found.anomaly_map, expected, rtol=0, atol=0)
    torch.testing.assert_close(found.pred_score, image_score(expected, 800), rtol=0, atol=0)
    assert (with_speck(unit).anomaly_map - expected).max() > 0.4


def test_results_that_the_runner_writes_again_are_kept():
    room = torch.empty((2, SIZE, SIZE))

    def reusing(unit: torch.Tensor) -> Output:
        room.copy_(unit.mean(dim=-1))
        return Output(room, unit, image_score(room, 800))

    unit = images(2)
    torch.testing.assert_close(
        run_views(reusing, unit, 5, 800).anomaly_map, brightness(unit).anomaly_map, rtol=0, atol=0
    )


def test_a_detector_with_views_takes_the_smallest_of_the_maps_of_shifted_images():
    model = tiny_model(views=5)
    checkpoint = Checkpoint(model.config, model.state_dict())
    five = Detector(checkpoint, precision="float32")
    one = Detector(Checkpoint(model.config.replace(views=1), model.state_dict()), precision="float32")
    size = model.config.image_size
    batch = torch.rand((3, size, size, 3), generator=torch.Generator().manual_seed(3))
    expected = one.detect(batch.numpy()).anomaly_map.copy()
    for dy, dx in offsets(5, size)[1:]:
        seen = one.detect(shifted(batch, dy, dx).numpy()).anomaly_map
        for y in range(size):
            for x in range(size):
                if 0 <= y - dy < size and 0 <= x - dx < size:
                    expected[:, y, x] = np.minimum(expected[:, y, x], seen[:, y - dy, x - dx])
    found = five.detect(batch.numpy())
    np.testing.assert_allclose(found.anomaly_map, expected, rtol=0, atol=1e-6)
    scores = image_score(torch.from_numpy(expected), model.config.top_k).numpy()
    np.testing.assert_allclose([image.pred_score for image in found], scores, atol=1e-6)
    alone = five.detect(batch[1:2].numpy())
    np.testing.assert_allclose(alone.anomaly_map[0], found.anomaly_map[1], rtol=0, atol=1e-5)


def test_there_are_one_or_five_views_and_each_costs_an_evaluation():
    with pytest.raises(ConfigError, match="views must be one of"):
        preset("diff-fastener-tiny", views=3)
    assert offsets(5, 64) == [(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)]
    assert offsets(1, 64) == [(0, 0)]
    one, five = (cost(preset("diff-fastener-tiny", views=views)) for views in (1, 5))
    assert (five.evaluations, five.segmentations) == (5 * one.evaluations, 5 * one.segmentations)
