from __future__ import annotations

import torch

from dfengine.training.draws import draw_noise, draw_times
from tests.helpers import tiny_config

CPU = torch.device("cpu")


def test_a_sample_draws_the_same_in_any_batch():
    model = tiny_config()
    together = draw_times(model, 2, 5, range(6)), draw_noise(2, 3, 8, 5, range(6), CPU)
    for index in range(6):
        assert torch.equal(draw_times(model, 2, 5, [index])[:, 0], together[0][:, index])
        assert torch.equal(draw_noise(2, 3, 8, 5, [index], CPU)[:, 0], together[1][:, index])
    assert not torch.equal(draw_noise(2, 3, 8, 6, range(6), CPU), together[1])


def test_noise_is_standard_normal_and_independent_over_scales_and_samples():
    noise = draw_noise(2, 3, 64, 0, range(4), CPU)
    assert noise.shape == (2, 4, 3, 64, 64)
    assert all(scale.is_contiguous(memory_format=torch.channels_last) for scale in noise)
    flat = noise.reshape(8, -1)
    assert flat.mean(dim=1).abs().max() < 0.04
    assert (flat.std(dim=1) - 1).abs().max() < 0.03
    assert (torch.corrcoef(flat) - torch.eye(8)).abs().max() < 0.04


def test_time_ranges_of_each_stage():
    model = tiny_config()
    alone = draw_times(model, 1, 0, range(4000))
    assert alone.shape == (1, 4000)
    assert alone.min() < 5 and alone.max() > 994 and alone.max() < 1000
    small, big = draw_times(model, 2, 0, range(4000))
    assert small.min() < 3 and small.max() < 300 and small.max() > 296
    assert big.min() >= 300 and big.min() < 304 and big.max() > 995
    v1 = draw_times(model.replace(mode="averaged", t_s=100, t_b=200), 2, 0, range(4000))
    assert v1.shape == (1, 4000) and v1.min() >= 1


def test_share_at_the_inference_time_steps():
    model = tiny_config()
    small, big = draw_times(model, 2, 0, range(2000), inference_share=0.5)
    at_inference = (small == model.t_s) & (big == model.t_b)
    assert 0.45 < at_inference.float().mean() < 0.55
    v1 = draw_times(model.replace(mode="averaged", t_s=100, t_b=200), 2, 0, range(500), inference_share=1.0)
    assert set(v1[0].tolist()) == {100, 200}
