"""Time steps and noise of training samples, drawn from the seed and the global sample index alone.

A sample's draw therefore does not depend on the process, batch or accumulation step it falls into, and a run can stop
and go on at any step without saving a generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dfengine.data.streams import Stream, seed_sequence, stream
from dfengine.models.config import ModelConfig


def draw_times(
    model: ModelConfig, stage: int, seed: int, indices: Sequence[int], inference_share: float = 0.0
) -> Tensor:
    """Zero-based time steps of the samples `indices`: int64 (scales, B).

    Stage 1: one scale, t uniform in [0, T). Stage 2: two scales, t_s uniform in [0, tau) and t_b in [tau, T) (DF 4.2),
    or (t_s, t_b) of inference for a share `inference_share` of the samples. Mode "averaged" (`diffusionad-v1`): one
    scale, t uniform in [1, T), the share taking t_s or t_b.
    """
    columns = []
    for index in indices:
        rng = stream(seed, Stream.TIMES, index)
        if stage == 1:
            columns.append([rng.integers(model.timesteps)])
            continue
        at_inference = rng.random() < inference_share
        if model.mode == "averaged":
            columns.append([rng.choice([model.t_s, model.t_b]) if at_inference else rng.integers(1, model.timesteps)])
        elif at_inference:
            columns.append([model.t_s, model.t_b])
        else:
            columns.append([rng.integers(model.tau), rng.integers(model.tau, model.timesteps)])
    return torch.from_numpy(np.array(columns, dtype=np.int64).T.copy())


def draw_noise(
    scales: int,
    channels: int,
    size: int,
    seed: int,
    indices: Sequence[int],
    device: torch.device,
    tag: Stream = Stream.NOISE,
) -> Tensor:
    """Standard normal noise of the samples `indices` of the streams `tag`: float32 (scales, B, C, S, S) on `device`,
    channels-last."""
    noise = torch.empty((scales, len(indices), size, size, channels), device=device)
    generator = torch.Generator(device)
    for place, index in enumerate(indices):
        key = seed_sequence(seed, tag, index).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(key >> np.uint64(1)))
        for scale in range(scales):
            noise[scale, place].normal_(generator=generator)
    return noise.permute(0, 1, 4, 2, 3)
