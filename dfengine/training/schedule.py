"""Where a run is and what follows from it: progress, stage and learning rates, all functions of progress in [0, 1]."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from dfengine.training.config import TrainConfig

FINAL_RATE = 0.01  # share of the peak rate left at the end of a cosine
WARMUP_START = 0.05


class Clock:
    """Trained seconds of the whole run: `elapsed` at the start of this process plus the time since then."""

    def __init__(self, elapsed: float = 0.0):
        self._start = time.monotonic() - elapsed
        self._process_start = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def this_process(self) -> float:
        return time.monotonic() - self._process_start


@dataclass(frozen=True)
class Budget:
    """How long a run is: `seconds` or `steps`, whichever is not None."""

    seconds: float | None
    steps: int | None

    @classmethod
    def of(cls, config: TrainConfig, samples: int, world_size: int) -> Budget:
        """The budget of `config`; an epoch reads each of `samples` training images once, over all processes."""
        if config.minutes is not None:
            return cls(config.minutes * 60, None)
        if config.steps is not None:
            return cls(None, config.steps)
        per_step = config.batch_size * config.accumulate * world_size
        return cls(None, config.epochs * math.ceil(samples / per_step))

    def progress(self, step: int, elapsed: float) -> float:
        """Share of the run that is done after `step` steps and `elapsed` seconds, in [0, 1]."""
        done = step / self.steps if self.steps is not None else elapsed / self.seconds
        return min(1.0, done)

    def seconds_left(self, step: int, elapsed: float, seconds_per_step: float) -> float:
        """How long the rest takes; a budget of seconds does not ask for the pace."""
        if self.seconds is not None:
            return max(0.0, self.seconds - elapsed)
        return (self.steps - step) * seconds_per_step


class Pace:
    """Seconds of a step, with the validations between steps: a mean in which a step counts for less the longer it is
    past, by a factor of e for a quarter of the budget. It begins anew with each stage, whose steps take other times.
    steps: the budget, None where it is one of seconds."""

    def __init__(self, steps: int | None):
        self._memory = max(1.0, (steps or 0) / 4)
        self._stage: int | None = None

    def enter(self, stage: int, step: int, elapsed: float) -> None:
        """Before a step of `stage`, when `step` steps are done and `elapsed` seconds past."""
        if stage != self._stage:
            self._stage, self._step, self._elapsed = stage, step, elapsed
            self._steps = self._seconds = 0.0

    def at(self, step: int, elapsed: float) -> float:
        """The mean once `step` steps are done and `elapsed` seconds past, since `enter` one step at least."""
        steps, seconds = step - self._step, elapsed - self._elapsed
        self._step, self._elapsed = step, elapsed
        kept = math.exp(-steps / self._memory)
        self._steps = kept * self._steps + steps
        self._seconds = kept * self._seconds + seconds
        return self._seconds / self._steps


def stage_of(config: TrainConfig, progress: float) -> int:
    """1 = denoiser alone, 2 = joint."""
    return 1 if progress < config.denoiser_share else 2


def learning_rates(config: TrainConfig, progress: float, step: int) -> tuple[float, float]:
    """Rates (denoiser, segmentation) of step `step` of its stage, at `progress` of the run. `config` is resolved.

    "cosine": in each stage, linear warm-up and a cosine to 1% of the peak. "constant": the peak. With a
    `segmentation_period`, the segmentation rate follows a cosine of that many steps instead.
    """
    rate, segmentation_rate = config.learning_rate, config.segmentation_rate
    if config.schedule == "cosine":
        stage, share = stage_of(config, progress), config.denoiser_share
        inside = progress / share if stage == 1 else (progress - share) / max(1 - share, 1e-9)
        inside = min(1.0, max(0.0, inside))
        warm = 1.0
        if inside < config.warmup:
            warm = WARMUP_START + (1 - WARMUP_START) * inside / config.warmup
        factor = warm * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * inside)))
        rate *= factor * (config.joint_scale if stage == 2 and share > 0 else 1.0)
        segmentation_rate *= factor
    if config.segmentation_period:
        wave = 0.5 * (1 + math.cos(math.pi * step / config.segmentation_period))
        segmentation_rate = config.segmentation_rate * wave
    return rate, segmentation_rate
