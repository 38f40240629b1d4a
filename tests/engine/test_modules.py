"""The module runner: batches, modes, noise, and its precision against float64 (DESIGN section 3, "Numerics")."""

from __future__ import annotations

import copy
import math
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from dfengine.diffusion import to_model, to_unit
from dfengine.engine import modules
from dfengine.engine.modules import ModuleRunner, image_score, top_k_count
from dfengine.errors import UsageError
from dfengine.kernels.philox import philox_normal
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


class ExactTimeEmbedding(torch.nn.Module):
    """`TimeEmbedding` in the arithmetic of `dtype`."""

    def __init__(self, dim: int, dtype: torch.dtype):
        super().__init__()
        self.dim, self.dtype = dim, dtype

    def forward(self, t):
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=self.dtype) * (-math.log(1e4) / half))
        angles = t.to(self.dtype)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)


def plain_maps(model, unit: np.ndarray, seed: int, dtype: torch.dtype, autocast: torch.dtype | None = None):
    """Anomaly maps (B, S, S) from the formulas of DESIGN section 1, with everything in `dtype` (float64 for the truth),
    the networks under `autocast` where it is given. Shares the networks with the runner, and nothing else.
    """
    model = copy.deepcopy(model).to(dtype)
    model.reconstruction.time_embedding[0] = ExactTimeEmbedding(model.reconstruction.time_embedding[0].dim, dtype)
    c = model.config
    beta = np.linspace(c.beta_start, c.beta_end, c.timesteps)
    abar = np.cumprod(1 - beta)
    x_0 = torch.from_numpy(unit).to(dtype).permute(0, 3, 1, 2)
    networks = torch.autocast("cpu", autocast) if autocast else nullcontext()

    def noise(draw, step, scale):
        return philox_normal(seed, draw, step, scale, unit.shape[1:], dtype).permute(2, 0, 1)

    def eps(x_t, t):
        with networks:
            return model.reconstruction(x_t, torch.full((len(x_t),), t)).to(dtype)

    def noised(x, t, e):
        return math.sqrt(abar[t]) * x + math.sqrt(1 - abar[t]) * e

    def denoised(x_t, t, e):
        return (x_t - math.sqrt(1 - abar[t]) * e) / math.sqrt(abar[t])

    maps = []
    for draw in range(c.noise_draws):
        small, big = noise(draw, 0, 0), noise(draw, 0, 1)
        if c.mode == "iterative":
            x_t = noised(x_0, c.t_b, big)
            for t in range(c.t_b, 0, -1):
                hat = denoised(x_t, t, eps(x_t, t)).clamp(-1, 1)
                mean = math.sqrt(abar[t - 1]) * beta[t] * hat + math.sqrt(1 - beta[t]) * (1 - abar[t - 1]) * x_t
                variance = beta[t] * (1 - abar[t - 1]) / (1 - abar[t])
                x_t = mean / (1 - abar[t]) + math.sqrt(variance) * noise(draw, t, 1)
            found = [denoised(x_t, 0, eps(x_t, 0))]
        elif c.mode == "averaged":
            x_ts, x_tb = noised(x_0, c.t_s, small), noised(x_0, c.t_b, big)
            found = [denoised(x_ts, c.t_s, eps(x_ts, c.t_s)), denoised(x_tb, c.t_b, eps(x_tb, c.t_b))]
        else:
            x_ts, x_tb = noised(x_0, c.t_s, small), noised(x_0, c.t_b, big)
            e_s = eps(x_ts, c.t_s)
            x_b = denoised(x_tb, c.t_b, eps(x_tb, c.t_b)).clamp(-1, 1)
            guided = e_s - math.sqrt(1 - abar[c.t_s]) * c.guidance * (noised(x_b, c.t_s, e_s) - x_ts)
            found = [denoised(x_ts, c.t_s, guided)]
        for reconstruction in found:
            with networks:
                logits = model.segmentation(torch.cat((x_0, reconstruction.clamp(-1, 1)), dim=1))
            maps.append(logits.to(dtype).sigmoid()[:, 0])
    return torch.stack(maps).mean(dim=0).double()


@pytest.mark.parametrize("mode", MODES)
def test_maps_meet_the_precision_contract(mode):
    """DESIGN section 3: 1e-4 of float64 in float32; in bfloat16 at most 2 x the error of torch autocast + 1e-3."""
    model = tiny_model(noise_draws=2, **MODES[mode])
    for module in model.segmentation.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data *= 3  # so that the signal outlives the layers, and the reconstruction shows in the map
    unit = 0.7 + 0.3 * images(3)  # off-centre
    with torch.inference_mode():
        truth = plain_maps(model, unit, 5, torch.float64)
        other_noise = plain_maps(model, unit, 6, torch.float64)
        autocast_error = (plain_maps(model, unit, 5, torch.float32, torch.bfloat16) - truth).abs().max()
    full, half = (ModuleRunner(model, precision=p, seed=5).run(unit) for p in ("float32", "bfloat16"))
    assert truth.std() > 0.1 and (truth - other_noise).abs().max() > 0.04
    assert half.anomaly_map.dtype == half.pred_score.dtype == torch.float32
    assert (full.anomaly_map - truth).abs().max() <= 1e-4
    error = (half.anomaly_map - truth).abs()
    assert 1e-4 < error.max() <= 2 * autocast_error + 1e-3
    # Both could be wrong in one way, so also in numbers: the maps spread by 0.2, and other noise moves them by 0.05.
    assert error.max() < 0.045 and error.mean() < 0.01


@pytest.mark.parametrize("mode", MODES)
def test_noise_is_drawn_once_and_kept(mode, monkeypatch):
    runner = ModuleRunner(tiny_model(noise_draws=3, **MODES[mode]), seed=5)
    drawn, draw = [], runner._draw
    monkeypatch.setattr(runner, "_draw", lambda *key: drawn.append(key) or draw(*key))
    runner.run(images(1))
    once = list(drawn)
    assert len(set(once)) == len(once) == 3 * (4 if mode == "iterative" else 2)
    assert mode != "iterative" or all(scale == 1 for _, _, scale in once)
    runner.run(images(2))
    assert drawn == once


def test_noise_beyond_the_limit_is_drawn_again(monkeypatch):
    model = tiny_model(**MODES["iterative"])
    expected = ModuleRunner(model, seed=5).run(images(2))
    monkeypatch.setattr(modules, "NOISE_BYTES", 2 * 4 * 32 * 32 * 3)
    runner = ModuleRunner(model, seed=5)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(runner.run(images(2)), expected, strict=True))
        assert len(runner._drawn) == 2


def test_a_runner_is_freed_with_its_last_reference():
    gone = weakref.ref(ModuleRunner(tiny_model()))
    assert gone() is None


def test_unknown_precision_is_refused():
    with pytest.raises(UsageError, match="float32, tf32"):
        ModuleRunner(tiny_model(), precision="int3")


def test_score_is_the_mean_of_the_largest_pixels():
    assert [top_k_count(s, s) for s in (8, 32, 64, 128, 256, 512)] == [1, 1, 3, 12, 50, 200]
    maps = torch.rand(3, 64, 64)
    expected = [np.sort(m.numpy().ravel())[-3:].mean() for m in maps]
    np.testing.assert_allclose(image_score(maps), expected, rtol=1e-6)
