"""The precision of a run, measured on its own training step."""

from __future__ import annotations

import numpy as np
import torch

from dfengine.models import ModelConfig, build_model
from dfengine.training.config import PRECISIONS, TrainConfig
from dfengine.training.distributed import World
from dfengine.training.group_norm import speed_up
from dfengine.training.precision import Precision, choose_precision
from dfengine.training.step import Objective


def agreed_precision(
    name: str, config: TrainConfig, model_config: ModelConfig, images: np.ndarray, world: World
) -> Precision:
    """The precision called `name`; all processes take what the main one measures for "auto".

    Measured on the denoiser's step with a batch of `images`, uint8 (N, S, S, 3).
    """
    device, count = world.device, min(8, config.batch_size)
    batch = {
        "image": torch.from_numpy(images[np.arange(count) % len(images)]),
        "position": torch.arange(count),
        "mask": torch.zeros((count, *images.shape[1:3]), dtype=torch.uint8),
        "label": torch.zeros(count, dtype=torch.int64),
    }
    model = None

    def step(precision: Precision) -> None:
        nonlocal model
        if model is None:
            model = build_model(model_config).to(device)
            speed_up(model)
        model.zero_grad(set_to_none=True)
        Objective(model, config, model_config, precision)(batch, stage=1).total.backward()

    chosen = choose_precision(name, device, step)
    names = list(PRECISIONS)
    return Precision(names[int(world.agree(False, names.index(chosen.name))[1])], device)
