"""The networks as plain torch modules: trainable, and the definition of correct for every kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dfengine.models.config import PRESETS, ModelConfig, preset
from dfengine.models.reconstruction import ReconstructionUNet
from dfengine.models.segmentation import SegmentationUNet

__all__ = ["PRESETS", "Cost", "Model", "ModelConfig", "build_model", "cost", "preset"]


class Model(nn.Module):
    """The pair of networks of one detector.

    `reconstruction(x_t, t)`: float (B, C, S, S) model pixels, int64 (B,) -> predicted noise (B, C, S, S).
    `segmentation(cat(x_0, x0_hat))`: float (B, 2C, S, S) -> logits (B, 1, S, S).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.reconstruction = ReconstructionUNet(config)
        self.segmentation = SegmentationUNet(config)


def build_model(preset_or_config: str | ModelConfig) -> Model:
    """The model pair of a preset name or a configuration, channels-last, freshly initialised (torch's global seed).

    Raises `ConfigError` for an unknown preset.
    """
    config = preset(preset_or_config) if isinstance(preset_or_config, str) else preset_or_config
    return Model(config).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Cost:
    """Parameters of each network, FLOPs of one evaluation of it (2 per multiply-add), and evaluations per image."""

    reconstruction_parameters: int
    segmentation_parameters: int
    reconstruction_flops: int
    segmentation_flops: int
    evaluations: int
    segmentations: int

    @property
    def image_flops(self) -> int:
        """FLOPs of one image: all evaluations of both networks."""
        return self.evaluations * self.reconstruction_flops + self.segmentations * self.segmentation_flops


def cost(config: ModelConfig) -> Cost:
    """Counts parameters and FLOPs without allocating weights (meta device).

    Attention is counted as two matrix products, as the math backend computes it (DESIGN section 1, "Cost").
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        model = Model(config).eval()
        size = config.image_size
        flops = []
        for network, arguments in (
            (model.reconstruction, (torch.empty(1, config.channels, size, size), torch.empty(1, dtype=torch.int64))),
            (model.segmentation, (torch.empty(1, 2 * config.channels, size, size),)),
        ):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                network(*arguments)
            flops.append(counter.get_total_flops())
    evaluations = {"norm-guided": 2, "averaged": 2, "iterative": config.t_b + 1}[config.mode]
    return Cost(
        sum(p.numel() for p in model.reconstruction.parameters()),
        sum(p.numel() for p in model.segmentation.parameters()),
        *flops,
        evaluations=evaluations * config.noise_draws,
        segmentations=(2 if config.mode == "averaged" else 1) * config.noise_draws,
    )
