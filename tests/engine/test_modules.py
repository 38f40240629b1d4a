from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.diffusion import to_model, to_unit
from dfengine.engine.modules import ModuleRunner, image_score, top_k_count
from dfengine.errors import UsageError
from tests.helpers import tiny_model


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 32, 32, 3), dtype=np.float32)


MODES = {
    "norm-guided": {},
    "averaged": dict(mode="averaged", t_s=100, t_b=200),
    "iterative": dict(mode="iterative", t_b=3),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draws", [1, 2])
def test_an_image_scores_the_same_in_any_batch_and_place(mode, draws):
    runner = ModuleRunner(tiny_model(noise_draws=draws, **MODES[mode]), seed=5)
    batch = images(5)
    together, reversed_ = runner.run(batch), runner.run(batch[::-1].copy())
    for i in range(5):
        alone = runner.run(batch[i : i + 1])
        for a, b, c in zip(alone, together, reversed_, strict=True):
            torch.testing.assert_close(a[0], b[i], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a[0], c[4 - i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_output_shapes_ranges_and_seed(mode):
    model = tiny_model(**MODES[mode])
    out = ModuleRunner(model, seed=0).run(images(2))
    assert out.anomaly_map.shape == (2, 32, 32) and out.reconstruction.shape == (2, 32, 32, 3)
    assert out.pred_score.shape == (2,)
    assert 0 <= out.anomaly_map.min() and out.anomaly_map.max() <= 1
    assert 0 <= out.reconstruction.min() and out.reconstruction.max() <= 1
    torch.testing.assert_close(out.pred_score, out.anomaly_map.flatten(1).amax(1))
    again, other = ModuleRunner(model, seed=0).run(images(2)), ModuleRunner(model, seed=1).run(images(2))
    assert torch.equal(out.anomaly_map, again.anomaly_map)
    assert not torch.allclose(out.anomaly_map, other.anomaly_map)


def test_averaged_mode_averages_two_maps():
    runner = ModuleRunner(tiny_model(mode="averaged", t_s=100, t_b=200))
    x_0 = to_model(torch.from_numpy(images(1)).permute(0, 3, 1, 2), runner.config)
    with torch.no_grad():
        parts = runner.reconstruct(x_0)
        assert len(parts) == 2
        expected = (runner.segment(x_0, parts[0]) + runner.segment(x_0, parts[1])) / 2
        mean = (to_unit(parts[0], runner.config) + to_unit(parts[1], runner.config)) / 2
    out = runner.run(images(1))
    torch.testing.assert_close(out.anomaly_map, expected)
    torch.testing.assert_close(out.reconstruction, mean.permute(0, 2, 3, 1))


def test_bfloat16_is_close_and_scores_stay_float32():
    full, half = (ModuleRunner(tiny_model(), precision=p).run(images(2)) for p in ("float32", "bfloat16"))
    assert half.anomaly_map.dtype == half.pred_score.dtype == torch.float32
    assert 0 < (full.anomaly_map - half.anomaly_map).abs().max() < 0.1


def test_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="float32, tf32"):
        ModuleRunner(tiny_model(), precision="int3")


def test_score_is_the_mean_of_the_largest_pixels():
    assert [top_k_count(s, s) for s in (8, 32, 64, 128, 256, 512)] == [1, 1, 3, 12, 50, 200]
    maps = torch.rand(3, 64, 64)
    expected = [np.sort(m.numpy().ravel())[-3:].mean() for m in maps]
    np.testing.assert_allclose(image_score(maps), expected, rtol=1e-6)
