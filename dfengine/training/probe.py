"""What a run must know of its machine, measured on its own training step: the precision, and images per second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dfengine.data.synthesis import Synthesizer
from dfengine.data.textures import TextureSource
from dfengine.models import ModelConfig, build_model, cost
from dfengine.training.config import PRECISIONS, TrainConfig
from dfengine.training.distributed import World
from dfengine.training.group_norm import speed_up
from dfengine.training.precision import Precision, choose_precision
from dfengine.training.state import RunState
from dfengine.training.step import Objective
from dfengine.training.trainer import Trainer

# Steps of each kind that are timed, and images of one. The first step of a kind warms up: the median passes over it.
STEPS = {"cpu": 3, "cuda": 9}
# A GPU is measured with the run's own batch; a CPU gains little from more than this many rows of pixels (8 images of 64
# pixels, 4 of 128): some 10% at both sizes.
CPU_ROWS = 512


def agreed_precision(
    name: str,
    config: TrainConfig,
    model_config: ModelConfig,
    images: np.ndarray,
    world: World,
    say: Callable[[str], None],
) -> Precision:
    """The precision called `name`; all processes take what the main one measures for "auto".

    Measured on the denoiser's step with a batch of `images`, uint8 (N, S, S, 3), which it tells the user by `say`.
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
            say("timing training steps, to choose their precision")
            model = build_model(model_config).to(device)
            speed_up(model)
        model.zero_grad(set_to_none=True)
        Objective(model, config, model_config, precision)(batch, stage=1).total.backward()

    chosen = choose_precision(name, device, step)
    names = list(PRECISIONS)
    return Precision(names[int(world.agree(False, names.index(chosen.name))[1])], device)


def images_per_second(
    config: TrainConfig, model_config: ModelConfig, images: np.ndarray, precision: str, world: World
) -> float:
    """Training images that the processes of a run of the resolved `config` read together in a second, the same on all
    of them: as the slowest allows; 0 where the memory of an accelerator is too small.

    Whole steps of a `Trainer` are timed, and how long their samples take to prepare, from `images`, uint8 (N, S, S, 3)
    with N >= 2. All processes must call this together; what averaging their gradients takes is not timed.
    """
    # Each by itself: in a step together, the others would wait for ever for one that has run out of memory.
    return world.size * world.minimum(_own_rate(config, model_config, images, precision, world.alone()))


def _own_rate(
    config: TrainConfig, model_config: ModelConfig, images: np.ndarray, precision: str, world: World
) -> float:
    """`images_per_second` of a world of one process."""
    device, size = world.device, model_config.image_size
    count = config.batch_size if device.type == "cuda" else min(max(2, CPU_ROWS // size), config.batch_size)
    plain = config.replace(batch_size=count, accumulate=1, workers=0, init=None)
    synthesizer = Synthesizer(images, TextureSource.procedural(size), config.synthesis)
    trainer = None

    def seconds(stage: int, train_denoiser: bool) -> float:
        start = time.perf_counter()
        trainer.batch = next(trainer._batches(stage, workers=0))
        preparing, times = time.perf_counter() - start, []
        for _ in range(STEPS[device.type]):
            trainer.state.stage_steps[1] = 0 if train_denoiser else 1
            _finish(device)
            start = time.perf_counter()
            trainer.step(stage, progress=0.5)
            _finish(device)
            times.append(time.perf_counter() - start)
        return _together(float(np.median(times)) / count, preparing / count, config.workers or 0, device)

    try:
        trainer = _SameBatch(
            plain, model_config, images, synthesizer, world, Precision(precision, device), RunState({})
        )
        return _mixed_rate(config, seconds)
    except torch.OutOfMemoryError:
        return 0.0
    finally:
        trainer = None
        if device.type == "cuda":
            torch.cuda.empty_cache()


def images_per_flop(config: TrainConfig, model_config: ModelConfig) -> float:
    """The same for each floating-point operation of the networks, where a backward pass counts twice its forward one.

    For the norm-guided mode, whose joint steps evaluate the denoiser at two noise scales.
    """
    costs = cost(model_config)
    denoiser, segmentation = costs.reconstruction_flops, costs.segmentation_flops

    def flops(stage: int, train_denoiser: bool) -> float:
        passes = 3 if train_denoiser else 1
        return passes * denoiser if stage == 1 else 2 * passes * denoiser + 3 * segmentation

    return _mixed_rate(config, flops)


class _SameBatch(Trainer):
    """Steps on one batch again and again: the time of a step is then its own."""

    batch: dict[str, Tensor]

    def _next(self, stage: int, part: int) -> dict[str, Tensor]:
        return self.batch


def _mixed_rate(config: TrainConfig, cost_of: Callable[[int, bool], float]) -> float:
    """Images per unit of cost over a run: `cost_of(stage, train_denoiser)` is what an image costs in a kind of step."""
    share, every, rate = config.denoiser_share, config.denoiser_every, 0.0
    if share > 0:
        rate += share / cost_of(1, True)
    if share < 1:
        others = (every - 1) * cost_of(2, False) if every > 1 else 0.0
        rate += (1 - share) * every / (cost_of(2, True) + others)
    return rate


def _together(computing: float, preparing: float, workers: int, device: torch.device) -> float:
    """Seconds of an image of which `computing` are spent by the training process and `preparing` by workers beside it:
    as long as the slower of the two needs, or as the cores do where they have to be shared."""
    if not workers:
        return computing + preparing
    cores, threads = os.cpu_count() or 1, torch.get_num_threads() if device.type == "cpu" else 1
    return max(computing, preparing / workers, (min(threads, cores) * computing + preparing) / cores)


def _finish(device: torch.device) -> None:
    """Waits for what has been asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
