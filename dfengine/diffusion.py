"""Noise schedule, forward noising, and the reconstructions: one step, norm-guided, iterative (DESIGN section 1).

Images are float (B, C, S, S) in model pixels; time steps are zero-based, an int for the whole batch or int64 (B,).
Noise is always an argument, so that any result can be reproduced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfengine.models.config import ModelConfig

TimeStep = int | Tensor
NoisePredictor = Callable[[Tensor, Tensor], Tensor]


class Schedule:
    """Linear beta schedule (DF Eq. 2): abar_t = prod_{i <= t} (1 - beta_i), computed in float64.

    `beta` and `alpha_bar` are float64 arrays of length `timesteps`.
    """

    def __init__(self, timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2):
        self.timesteps = timesteps
        self.beta = np.linspace(beta_start, beta_end, timesteps, dtype=np.float64)
        self.alpha_bar = np.cumprod(1.0 - self.beta)
        self._tables: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @classmethod
    def of(cls, config: ModelConfig) -> Schedule:
        """The schedule that `config` describes."""
        return cls(config.timesteps, config.beta_start, config.beta_end)

    def signal(self, t: TimeStep, like: Tensor) -> float | Tensor:
        """sqrt(abar_t), broadcastable against `like`."""
        return self._coefficient("signal", np.sqrt(self.alpha_bar), t, like)

    def noise(self, t: TimeStep, like: Tensor) -> float | Tensor:
        """sqrt(1 - abar_t), broadcastable against `like`."""
        return self._coefficient("noise", np.sqrt(1.0 - self.alpha_bar), t, like)

    def _coefficient(self, name: str, values: np.ndarray, t: TimeStep, like: Tensor) -> float | Tensor:
        if isinstance(t, int):
            return float(values[t])
        key = (name, like.dtype, like.device)
        if key not in self._tables:
            self._tables[key] = torch.from_numpy(values).to(device=like.device, dtype=like.dtype)
        return self._tables[key][t].view(-1, *([1] * (like.dim() - 1)))

    def q_sample(self, x_0: Tensor, t: TimeStep, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DF Eq. 2)."""
        return self.signal(t, x_0) * x_0 + self.noise(t, x_0) * noise

    def predict_x0(self, x_t: Tensor, t: TimeStep, eps: Tensor) -> Tensor:
        """One-step reconstruction (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t), not clamped (DF Eq. 5, DAD Eq. 5)."""
        return (x_t - self.noise(t, x_t) * eps) / self.signal(t, x_t)


class Guided(NamedTuple):
    """Result of `norm_guided`: the reconstruction, both noise predictions and both noised images, all (B, C, S, S)."""

    reconstruction: Tensor
    eps_s: Tensor
    eps_b: Tensor
    x_ts: Tensor
    x_tb: Tensor


def _steps(t: TimeStep, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, device=like.device) if isinstance(t, int) else t


def norm_guided(
    eps_model: NoisePredictor,
    schedule: Schedule,
    x_0: Tensor,
    t_s: TimeStep,
    t_b: TimeStep,
    noise_s: Tensor,
    noise_b: Tensor,
    guidance: float = 1.0,
) -> Guided:
    """Norm-guided one-step reconstruction from two noise scales (DF 3.3); one network call of batch 2B.

    With e_s, e_b the predictions at x_ts, x_tb: x_b = clamp(x0_hat(x_tb), -1, 1); n = x_b noised to t_s with e_s;
    e' = e_s - sqrt(1 - abar_s) w (n - x_ts); the reconstruction is clamp(x0_hat(x_ts) with e', -1, 1).
    This equals clamp(lerp(x0_hat(x_ts), x_b, w (1 - abar_s))), the form that the fused kernels compute.
    """
    x_ts = schedule.q_sample(x_0, t_s, noise_s)
    x_tb = schedule.q_sample(x_0, t_b, noise_b)
    steps = torch.cat((_steps(t_s, x_0), _steps(t_b, x_0)))
    eps_s, eps_b = eps_model(torch.cat((x_ts, x_tb)), steps).to(x_0.dtype).chunk(2)
    x_b = schedule.predict_x0(x_tb, t_b, eps_b).clamp(-1, 1)
    n = schedule.q_sample(x_b, t_s, eps_s)
    guided = eps_s - schedule.noise(t_s, x_0) * guidance * (n - x_ts)
    return Guided(schedule.predict_x0(x_ts, t_s, guided).clamp(-1, 1), eps_s, eps_b, x_ts, x_tb)


def one_step(
    eps_model: NoisePredictor, schedule: Schedule, x_0: Tensor, t: TimeStep, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise to t and reconstruct at once: (clamp(x0_hat(x_t), -1, 1), predicted noise) (DAD Eq. 5)."""
    x_t = schedule.q_sample(x_0, t, noise)
    eps = eps_model(x_t, _steps(t, x_0)).to(x_0.dtype)
    return schedule.predict_x0(x_t, t, eps).clamp(-1, 1), eps


def iterative(
    eps_model: NoisePredictor,
    schedule: Schedule,
    x_0: Tensor,
    t_start: int,
    noise: Tensor,
    step_noise: Callable[[int], Tensor],
) -> Tensor:
    """Noise to `t_start`, then the full reverse chain down to t = 0 (DF Table 3, row 1): `t_start` + 1 evaluations.

    Each step draws from the posterior q(x_{t-1} | x_t, clamp(x0_hat, -1, 1)) with its own variance
    beta_t (1 - abar_{t-1}) / (1 - abar_t); `step_noise(t)` gives the (B, C, S, S) noise of step t > 0.
    Returns the last step's x0_hat, clamped to [-1, 1].
    """
    alpha_bar, beta = schedule.alpha_bar, schedule.beta
    x_t = schedule.q_sample(x_0, t_start, noise)
    for t in range(t_start, 0, -1):
        eps = eps_model(x_t, _steps(t, x_0)).to(x_0.dtype)
        x0_hat = schedule.predict_x0(x_t, t, eps).clamp(-1, 1)
        remaining = 1.0 - alpha_bar[t]
        from_x0 = float(np.sqrt(alpha_bar[t - 1]) * beta[t] / remaining)
        from_xt = float(np.sqrt(1.0 - beta[t]) * (1.0 - alpha_bar[t - 1]) / remaining)
        sigma = float(np.sqrt(beta[t] * (1.0 - alpha_bar[t - 1]) / remaining))
        x_t = from_x0 * x0_hat + from_xt * x_t + sigma * step_noise(t)
    eps = eps_model(x_t, _steps(0, x_0)).to(x_0.dtype)
    return schedule.predict_x0(x_t, 0, eps).clamp(-1, 1)


def to_model(unit: Tensor, config: ModelConfig) -> Tensor:
    """[0, 1] pixels -> model pixels ("unit": unchanged; "signed": [-1, 1])."""
    return unit * 2 - 1 if config.pixel_range == "signed" else unit


def to_unit(pixels: Tensor, config: ModelConfig) -> Tensor:
    """Model pixels -> [0, 1], clamped."""
    return ((pixels + 1) / 2 if config.pixel_range == "signed" else pixels).clamp(0, 1)
