"""Detection with the plain torch modules: the reference that every other way of running must agree with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfengine.diffusion import Schedule, iterative, norm_guided, one_step, to_model, to_unit
from dfengine.errors import UsageError
from dfengine.kernels.philox import philox_normal
from dfengine.models import Model

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
    "fp8": torch.float16,
}
"""The dtype of weights and activations in memory. int8 and fp8 are those of the large products, in a program alone."""


NOISE_BYTES = 64 * 2**20
"""How much drawn noise a `ModuleRunner` keeps. At 256 x 256 x 3 a draw is 786 KB: room for 85."""


class Output(NamedTuple):
    """What one batch gives, as float32 tensors on the runner's device.

    `anomaly_map` (B, S, S) in [0, 1]; `reconstruction` (B, S, S, C) in [0, 1]; `pred_score` (B,).
    """

    anomaly_map: Tensor
    reconstruction: Tensor
    pred_score: Tensor


def top_k_count(height: int, width: int, top_k: float = 50) -> int:
    """How many pixels the image score averages: max(1, round(top_k H W / 65536)) (DESIGN, "Score")."""
    return max(1, round(top_k * height * width / 65536))


def image_score(anomaly_map: Tensor, top_k: float = 50) -> Tensor:
    """Mean of the `top_k_count` largest pixels of each map: (B, H, W) -> (B,)."""
    k = top_k_count(*anomaly_map.shape[-2:], top_k)
    return anomaly_map.flatten(1).topk(k, dim=1).values.mean(dim=1)


class ModuleRunner:
    """Runs a model's inference as its configuration says, with noise that depends on `seed` alone.

    Noise is Philox normals keyed by (seed; draw, step, scale, pixel, channel), the same for every image, so that an
    image's result does not depend on its batch or its place in it. `precision` other than float32 runs the networks
    under torch autocast; schedule arithmetic, maps and scores stay float32.

    Noise is kept once drawn, up to `NOISE_BYTES`. At 256 x 256 a one-step mode takes two for
    each of `noise_draws` and fits; the iterative mode takes 401 at t_b = 400, 315 MB, and draws what
    does not fit again for each batch.
    """

    def __init__(self, model: Model, device: str | torch.device = "cpu", precision: str = "float32", seed: int = 0):
        if precision not in PRECISIONS:
            raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.config = model.config
        self.device = torch.device(device)
        self.precision = precision
        self.seed = seed
        self.model = model.to(device=self.device, memory_format=torch.channels_last).eval()
        self.schedule = Schedule.of(model.config)
        self._drawn: dict[tuple[int, int, int], Tensor] = {}

    def _draw(self, draw: int, step: int, scale: int) -> Tensor:
        size, channels = self.config.image_size, self.config.channels
        noise = philox_normal(self.seed, draw, step, scale, (size, size, channels))
        return noise.permute(2, 0, 1)[None].to(self.device)

    def _noise(self, batch: int, draw: int, step: int, scale: int) -> Tensor:
        key = (draw, step, scale)
        noise = self._drawn.get(key)
        if noise is None:
            noise = self._draw(*key)
            if (len(self._drawn) + 1) * noise.nbytes <= NOISE_BYTES:
                self._drawn[key] = noise
        return noise.expand(batch, -1, -1, -1)

    def _networks(self):
        if self.precision in ("float32", "tf32"):
            return nullcontext()
        return torch.autocast(self.device.type, PRECISIONS[self.precision])

    def _eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        with self._networks():
            return self.model.reconstruction(x_t.contiguous(memory_format=torch.channels_last), t)

    def segment(self, x_0: Tensor, reconstruction: Tensor) -> Tensor:
        """Anomaly map (B, S, S) float32 of images and reconstructions (B, C, S, S) in model pixels."""
        pair = torch.cat((x_0, reconstruction), dim=1).contiguous(memory_format=torch.channels_last)
        with self._networks():
            logits = self.model.segmentation(pair)
        return logits.float().sigmoid()[:, 0]

    def reconstruct(self, x_0: Tensor, draw: int = 0) -> list[Tensor]:
        """The reconstructions (B, C, S, S) in model pixels that are segmented: one, or two in "averaged" mode."""
        config, batch = self.config, x_0.shape[0]
        big = self._noise(batch, draw, 0, 1)
        if config.mode == "iterative":
            chain = iterative(
                self._eps, self.schedule, x_0, config.t_b, big, lambda t: self._noise(batch, draw, t, 1)
            )
            return [chain]
        small = self._noise(batch, draw, 0, 0)
        if config.mode == "averaged":
            scales = ((config.t_s, small), (config.t_b, big))
            return [one_step(self._eps, self.schedule, x_0, t, noise)[0] for t, noise in scales]
        guided = norm_guided(
            self._eps, self.schedule, x_0, config.t_s, config.t_b, small, big, config.guidance
        )
        return [guided.reconstruction]

    @torch.inference_mode()
    def run(self, unit: np.ndarray | Tensor) -> Output:
        """Scores a batch of float32 (B, S, S, C) images in [0, 1] at model size."""
        images = torch.as_tensor(unit, dtype=torch.float32, device=self.device)
        x_0 = to_model(images.permute(0, 3, 1, 2), self.config)
        pairs = [
            (self.segment(x_0, reconstruction), reconstruction)
            for draw in range(self.config.noise_draws)
            for reconstruction in self.reconstruct(x_0, draw)
        ]
        anomaly_map = torch.stack([m for m, _ in pairs]).mean(dim=0)
        reconstruction = torch.stack([to_unit(r, self.config) for _, r in pairs]).mean(dim=0)
        return Output(anomaly_map, reconstruction.permute(0, 2, 3, 1), image_score(anomaly_map, self.config.top_k))
