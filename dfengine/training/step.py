"""One micro-batch of either stage: from images to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfengine.diffusion import Schedule, norm_guided, one_step, to_model
from dfengine.models import Model, ModelConfig
from dfengine.training.config import TrainConfig
from dfengine.training.draws import draw_noise, draw_times
from dfengine.training.frozen import FrozenDenoiser
from dfengine.training.losses import mask_loss, noise_loss
from dfengine.training.precision import Precision


class Losses(NamedTuple):
    """Scalars: `total` is what is minimised; `noise` and `mask` are its parts, detached."""

    total: Tensor
    noise: Tensor
    mask: Tensor


class Objective:
    """The loss of a batch. `model_config.mode` says which method: norm-guided (mean or sum of the two scales' noise
    losses, on normal samples), or "averaged" (`diffusionad-v1`: one scale, all samples).

    The iterative preset trains like norm-guided: only its inference differs.
    """

    def __init__(self, model: Model, config: TrainConfig, model_config: ModelConfig, precision: Precision):
        self.model, self.config, self.model_config, self.precision = model, config, model_config, precision
        self.schedule = Schedule.of(model_config)
        self.scale_weight = 1.0 if config.scale_loss == "sum" else 0.5
        self.frozen = FrozenDenoiser(model, precision) if FrozenDenoiser.serves(model, config, precision) else None

    def __call__(self, batch: dict[str, Tensor], stage: int, train_denoiser: bool = True) -> Losses:
        """`batch`: image uint8 (B, S, S, 3), mask uint8 (B, S, S), label (B,), position (B,), on any device.

        Without `train_denoiser`, stage 2 takes the reconstruction as given: only the mask loss has a gradient, and a
        step costs about a third.
        """
        device, model = self.precision.device, self.model_config
        indices = batch["position"].tolist()
        image = batch["image"].to(device, non_blocking=True)
        x_0 = to_model(image.permute(0, 3, 1, 2).float() / 255, model)
        share = self.config.inference_t_share
        times = draw_times(model, stage, self.config.seed, indices, share).to(device, non_blocking=True)
        noise = draw_noise(len(times), model.channels, model.image_size, self.config.seed, indices, device)
        if stage == 1:
            x_t = self.schedule.q_sample(x_0, times[0], noise[0])
            loss = noise_loss(self._eps(x_t, times[0]), noise[0])
            return Losses(loss, loss.detach(), torch.zeros_like(loss))

        normal = (batch["label"] == 0).to(device, non_blocking=True)
        if self.frozen and not train_denoiser:
            pair, eps = self.frozen(x_0, noise)
            denoising = self._denoising(eps.float(), noise, normal)
        else:
            with torch.set_grad_enabled(train_denoiser):
                if model.mode == "averaged":
                    reconstruction, eps = one_step(self._eps, self.schedule, x_0, times[0], noise[0])
                    denoising = noise_loss(eps, noise[0])
                else:
                    guided = norm_guided(self._eps, self.schedule, x_0, *times, *noise, model.guidance)
                    reconstruction = guided.reconstruction
                    denoising = self._denoising((guided.eps_s, guided.eps_b), noise, normal)
            pair = torch.cat((x_0, reconstruction), dim=1)
        with self.precision.autocast():
            logits = self.model.segmentation(pair)
        mask = (batch["mask"] > 0).to(device, non_blocking=True)[:, None]
        segmentation = mask_loss(logits, mask, self.config.focal_gamma)
        return Losses(denoising + segmentation, denoising.detach(), segmentation.detach())

    def denoiser_changed(self) -> None:
        """To be called after every change of the denoiser's weights."""
        if self.frozen:
            self.frozen.forget()

    def _denoising(self, eps: Sequence[Tensor], noise: Tensor, normal: Tensor) -> Tensor:
        return self.scale_weight * sum(noise_loss(*of, normal) for of in zip(eps, noise, strict=True))

    def _eps(self, x_t: Tensor, t: Tensor) -> Tensor:
        with self.precision.autocast():
            return self.model.reconstruction(x_t, t)


def gradient_norm(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """Global L2 norm of the gradients; where `clip` > 0 and the norm exceeds it, they are scaled down to it."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if clip > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
    return norm
