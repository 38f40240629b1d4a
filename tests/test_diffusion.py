from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.diffusion import Schedule, iterative, norm_guided, one_step, to_model, to_unit
from dfengine.models import preset

SHAPE = (3, 3, 8, 8)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curved(x, t):
    """A stand-in for the network that depends on the pixels and on t."""
    return torch.tanh(x) * 0.7 + t.view(-1, 1, 1, 1) / 3000


def test_the_schedule_is_the_cumulative_product():
    schedule = Schedule()
    beta = np.linspace(1e-4, 2e-2, 1000)
    product = 1.0
    for t in range(1000):
        product *= 1.0 - beta[t]
        assert schedule.alpha_bar[t] == pytest.approx(product, rel=1e-12)


def test_the_true_noise_gives_the_image_back():
    schedule = Schedule()
    x_0, noise = draw(0), draw(1)
    t = torch.tensor([0, 300, 999])
    x_t = schedule.q_sample(x_0, t, noise)
    torch.testing.assert_close(schedule.predict_x0(x_t, t, noise), x_0)
    for i, step in enumerate(t.tolist()):
        torch.testing.assert_close(schedule.q_sample(x_0[i : i + 1], step, noise[i : i + 1]), x_t[i : i + 1])


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.0])
def test_norm_guidance_equals_the_lerp_identity(guidance):
    schedule = Schedule()
    x_0 = draw(0).clamp(-1, 1)
    t_s, t_b = 200, torch.tensor([300, 400, 999])
    result = norm_guided(curved, schedule, x_0, t_s, t_b, draw(1), draw(2), guidance)
    from_s = schedule.predict_x0(result.x_ts, t_s, result.eps_s)
    x_b = schedule.predict_x0(result.x_tb, t_b, result.eps_b).clamp(-1, 1)
    weight = guidance * (1 - schedule.alpha_bar[t_s])
    torch.testing.assert_close(result.reconstruction, torch.lerp(from_s, x_b, weight).clamp(-1, 1))
    torch.testing.assert_close(result.eps_b, curved(result.x_tb, t_b))
    torch.testing.assert_close(result.x_tb, schedule.q_sample(x_0, t_b, draw(2)))


def test_a_perfect_denoiser_reconstructs_by_every_road():
    schedule = Schedule()
    x_0 = draw(0).clamp(-1, 1)

    def oracle(x_t, t):
        # The noise that leads from x_0 to x_t: what a network that knows x_0 would predict.
        x = x_0.repeat(x_t.shape[0] // x_0.shape[0], 1, 1, 1)
        return (x_t - schedule.signal(t, x) * x) / schedule.noise(t, x)

    torch.testing.assert_close(norm_guided(oracle, schedule, x_0, 200, 400, draw(1), draw(2)).reconstruction, x_0)
    torch.testing.assert_close(one_step(oracle, schedule, x_0, 100, draw(1))[0], x_0)
    torch.testing.assert_close(iterative(oracle, schedule, x_0, 40, draw(1), lambda t: draw(10 + t)), x_0)


def test_the_chain_visits_every_step_once_and_uses_its_noise():
    schedule = Schedule()
    visited, asked = [], []

    def record(x_t, t):
        visited.append(int(t[0]))
        return curved(x_t, t)

    def noise(t):
        asked.append(t)
        return draw(t)

    first = iterative(record, schedule, draw(0), 12, draw(1), noise)
    assert visited == list(range(12, -1, -1)) and asked == list(range(12, 0, -1))
    again = iterative(curved, schedule, draw(0), 12, draw(1), lambda t: draw(t + 100))
    assert not torch.allclose(first, again)


def test_one_chain_step_has_the_posterior_moments():
    schedule = Schedule(timesteps=2, beta_start=0.1, beta_end=0.3)
    x_0 = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    noise = torch.full_like(x_0, 0.8)
    seen = []

    def eps(x_t, t):
        seen.append(x_t.item())
        return torch.zeros_like(x_t)

    iterative(eps, schedule, x_0, 1, noise, lambda t: torch.ones_like(x_0))
    a0, a1, b1 = 0.9, 0.9 * 0.7, 0.3
    x_1 = np.sqrt(1 - a1) * 0.8
    x0_hat = x_1 / np.sqrt(a1)
    mean = np.sqrt(a0) * b1 / (1 - a1) * x0_hat + np.sqrt(0.7) * (1 - a0) / (1 - a1) * x_1
    assert seen == pytest.approx([x_1, mean + np.sqrt(b1 * (1 - a0) / (1 - a1))])


def test_pixel_ranges():
    unit = torch.rand(2, 3, 4, 4)
    for pixel_range in ("unit", "signed"):
        config = preset("diff-fastener", pixel_range=pixel_range)
        torch.testing.assert_close(to_unit(to_model(unit, config), config), unit)
    assert to_model(torch.zeros(1), preset("diff-fastener-tiny")).item() == -1
    assert to_unit(torch.tensor([-0.5, 1.5]), preset("diff-fastener")).tolist() == [0, 1]
