"""The state of a training process and one optimiser step on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dfengine.checkpoint import check_state, load_checkpoint
from dfengine.data.synthesis import Synthesizer
from dfengine.data.training_set import TrainingSet
from dfengine.errors import CheckpointError, DfengineError, UsageError
from dfengine.models import ModelConfig, build_model
from dfengine.training.config import TrainConfig, start_path
from dfengine.training.data import batches
from dfengine.training.distributed import World
from dfengine.training.ema import Ema
from dfengine.training.group_norm import speed_up
from dfengine.training.precision import Precision
from dfengine.training.schedule import learning_rates
from dfengine.training.state import RunState, optimizer_tensors, restore_optimizer, save_state
from dfengine.training.step import Objective, gradient_norm

MAX_OVERFLOWS = 20  # float16 steps in a row that loss scaling may skip


def initial_weights(path: str, model_config: ModelConfig) -> dict[str, Tensor]:
    """Weights of the checkpoint `path` (`start_path`), in float32.

    Raises `UsageError` where they are of another preset, `CheckpointError` where their tensors do not fit.
    """
    loaded = load_checkpoint(start_path(path))
    state = loaded.state
    try:
        check_state(model_config, state, path)
    except CheckpointError:
        ours, theirs = (f"{config.preset} at {config.image_size} pixels" for config in (model_config, loaded.config))
        if ours == theirs:  # a model with fields of its own: only the tensors tell
            raise
        raise UsageError(f"init {path}: the weights of {theirs} do not fit {ours}; use others or none") from None
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


class TrainingDiverged(DfengineError):
    """The loss or a gradient stopped being finite; the last saved state is kept."""


class Trainer:
    """Model, averages and optimiser of one process, advanced by `step`.

    `average` is the model that is validated and written: the moving average of the weights, or, without one, a copy.
    `stopping` is set when a signal asks the run to stop: it may have ended the worker processes too, and the step under
    way is then finished without them.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        images: np.ndarray,
        synthesizer: Synthesizer,
        world: World,
        precision: Precision,
        state: RunState,
    ):
        self.config, self.model_config, self.world = config, model_config, world
        self.precision, self.state = precision, state
        self.images, self.synthesizer = images, synthesizer
        device = world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(model_config)
        if config.init:
            self.model.load_state_dict(initial_weights(config.init, model_config))
        self.model = self.model.to(device).train()
        speed_up(self.model)
        self.average = build_model(model_config).to(device).requires_grad_(False).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.averages = {
            name: Ema(getattr(self.model, name), getattr(self.average, name), config.ema_decay)
            for name in ("reconstruction", "segmentation")
        }
        self.parameters = dict(self.model.named_parameters())
        groups = [
            {"params": list(network.parameters()), "lr": 0.0}
            for network in (self.model.reconstruction, self.model.segmentation)
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
        self.objective = Objective(self.model, config, model_config, precision)
        self._stream: tuple[int, Iterator[dict[str, Tensor]]] | None = None
        self.stopping = False
        self._overflows = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # noise loss, mask loss, gradient norm
        self.summed = 0

    def step(self, stage: int, progress: float) -> None:
        """One optimiser step of `stage`. Raises `TrainingDiverged` before touching the weights on CPU; on CUDA the
        check waits until `means` is asked, so that the device never waits for the host."""
        config, state = self.config, self.state
        rates = learning_rates(config, progress, state.stage_steps[stage - 1])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        train_denoiser = stage == 1 or state.stage_steps[1] % config.denoiser_every == 0
        losses = []
        for part in range(config.accumulate):
            loss = self.objective(self._next(stage, part), stage, train_denoiser)
            self.precision.scaler.scale(loss.total / config.accumulate).backward()
            losses.append(torch.stack((loss.noise, loss.mask)))
        self.world.average_gradients(self.parameters.values())
        self._update(torch.stack(losses).mean(dim=0))
        if train_denoiser:
            self.averages["reconstruction"].update()
            self.objective.denoiser_changed()
        if stage == 2:
            self.averages["segmentation"].update()
        state.step += 1
        state.stage_steps[stage - 1] += 1
        state.images_seen += config.batch_size * config.accumulate * self.world.size

    def _update(self, losses: Tensor) -> None:
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        norm = gradient_norm(list(self.parameters.values()), self.config.clip)
        if scaler.is_enabled() and not torch.isfinite(norm):
            self._overflows += 1
            if self._overflows > MAX_OVERFLOWS:
                raise self._diverged("gradient")
        else:
            self._overflows = 0
            self.sums += torch.cat((losses, norm[None]))
            self.summed += 1
            if self.world.device.type == "cpu":
                self._check()
        scaler.step(self.optimizer)  # skips a step whose gradients overflowed
        scaler.update()

    def _check(self) -> None:
        for name, value in zip(("noise loss", "mask loss", "gradient"), self.sums.tolist(), strict=True):
            if not math.isfinite(value):
                raise self._diverged(name)

    def _diverged(self, name: str) -> TrainingDiverged:
        return TrainingDiverged(f"the {name} is not finite at step {self.state.step}; try a lower learning rate")

    def means(self) -> dict[str, float]:
        """Mean noise loss, mask loss and gradient norm since the last call, over all processes; starts anew.

        Raises `TrainingDiverged` when one of them is not finite.
        """
        self._check()
        values = self.world.mean(self.sums / max(1, self.summed)).tolist()
        self.sums.zero_()
        self.summed = 0
        return dict(zip(("noise_loss", "mask_loss", "grad_norm"), values, strict=True))

    def refresh_average(self) -> None:
        """Makes `average` what is to be validated now: a plain copy where no moving average is kept."""
        if self.config.ema_decay == 0:
            self.average.load_state_dict(self.model.state_dict())

    def positions(self, step: int) -> list[list[int]]:
        """Places in the stream of samples of this process's micro-batches at `step`: each sample is read once."""
        size, ranks, accumulate = self.config.batch_size, self.world.size, self.config.accumulate
        numbers = [(step * accumulate + k) * ranks + self.world.rank for k in range(accumulate)]
        return [list(range(number * size, (number + 1) * size)) for number in numbers]

    def _next(self, stage: int, part: int) -> dict[str, Tensor]:
        """Micro-batch `part` of the present step; they are asked for in turn."""
        if self._stream is None or self._stream[0] != stage:
            self.close()
            self._stream = stage, self._batches(stage, self.config.workers)
        try:
            return next(self._stream[1])
        except (RuntimeError, OSError, EOFError):  # a worker has died, perhaps while handing over a batch
            if not self.stopping or not self.config.workers:
                raise
        self.close()
        self._stream = stage, islice(self._batches(stage, workers=0), part, None)
        return next(self._stream[1])

    def _batches(self, stage: int, workers: int) -> Iterator[dict[str, Tensor]]:
        config, share = self.config, "none" if stage == 1 else self.config.anomaly_share
        samples = TrainingSet(self.images, self.synthesizer, config.augment, config.seed, config.batch_size, share)
        return batches(samples, self.positions, self.state.step, workers, self.world.device)

    def close(self) -> None:
        """Ends the worker processes."""
        self._stream = None

    def save(self, path: Path) -> None:
        """Writes the state atomically. Raises `TrainingDiverged` rather than save weights that are not finite."""
        self._check()
        self.state.average_updates = {name: ema.updates for name, ema in self.averages.items()}
        self.state.scaler = self.precision.scaler.state_dict()
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.config.ema_decay:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer, names).items()}
        save_state(path, self.state, tensors)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes over the tensors that `save` wrote, and the counters of `state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.objective.denoiser_changed()
        self.average.load_state_dict(part("average.") or part("model."))
        restore_optimizer(self.optimizer, self.parameters, part("optimizer."))
        for name, updates in self.state.average_updates.items():
            self.averages[name].updates = updates
        if self.state.scaler:
            self.precision.scaler.load_state_dict(self.state.scaler)
