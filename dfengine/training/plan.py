"""The model of a run whose user names none: the largest one that the images are worth and the time is enough for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfengine.checkpoint import load_checkpoint, shipped_checkpoint
from dfengine.data.images import resize_unit
from dfengine.models import ModelConfig, preset
from dfengine.training.config import FASTENERS, NO_INIT, TrainConfig, start_path
from dfengine.training.data import MIN_IMAGES, survey
from dfengine.training.distributed import World
from dfengine.training.probe import agreed_precision, images_per_flop, images_per_second
from dfengine.training.record import hardware
from dfengine.training.state import read_state
from dfengine.wording import counted

FIRST_NEEDS = 60_000  # training images below which a run with the smallest model is told to take more time
IMAGES_NEEDED = 210_000  # training images that a larger model must see to be worth its size: what the papers' saw
SIZE_TOLERANCE = 1.1  # a model may be this much larger than the images: 250 pixels are enough for 256
# A candidate that FLOPs put below its need by more than this factor is not measured. Small networks leave a GPU mostly
# idle, so there their time says less about that of larger ones.
CLOSE = {"cpu": 2.0, "cuda": 8.0}


@dataclass(frozen=True)
class Candidate:
    """A model to choose from, and the number of training images below which a smaller one is the better choice."""

    model: ModelConfig
    images_needed: int = IMAGES_NEEDED

    def __str__(self) -> str:
        return f"{self.model.preset} at {self.model.image_size} pixels"


CANDIDATES = (  # from small to large
    Candidate(preset("diff-fastener-tiny"), FIRST_NEEDS),
    Candidate(preset("diff-fastener-tiny", image_size=128)),
    Candidate(preset("diff-fastener-small", image_size=128)),
    Candidate(preset("diff-fastener-small")),
    Candidate(preset("diff-fastener")),
)


@dataclass(frozen=True)
class Automatic:
    """In the place of a `ModelConfig`: to be chosen, with what is given here fixed."""

    image_size: int | None = None
    pixel_range: str | None = None

    def applied(self, model: ModelConfig) -> ModelConfig:
        """`model` with the fixed fields. Raises `ConfigError` where they cannot be."""
        fixed = {"image_size": self.image_size, "pixel_range": self.pixel_range}
        return model.replace(**{name: value for name, value in fixed.items() if value is not None})

    def candidates(self) -> list[Candidate]:
        """From small to large; of a fixed size, the smallest preset at it and then those that have it anyway."""
        fitting = [c for c in CANDIDATES[1:] if self.image_size in (None, c.model.image_size)]
        needed = {self.applied(c.model): c.images_needed for c in (CANDIDATES[0], *fitting)}
        return [Candidate(*item) for item in needed.items()]


@dataclass(frozen=True)
class Plan:
    """The `model` of a run. Where the user did not name it, the `reason` in words, and the training `images` that the
    run is expected to see (None where nothing was measured). `init`: the weights to start from, as in `TrainConfig`."""

    model: ModelConfig
    reason: str = ""
    images: float | None = None
    init: str | None = None

    def record(self) -> dict[str, Any]:
        """JSON values for the training record; empty where the user named the model."""
        expected = None if self.images is None else round(self.images)
        return {"picked": self.reason, "expected_images": expected} if self.reason else {}


def settle(
    wanted: ModelConfig | Automatic,
    config: TrainConfig,
    data: Path,
    state: Path | None,
    world: World,
    say: Callable[[str], None],
) -> Plan:
    """The model and the start weights of a run on the folder `data`; `say` tells the user what takes a while.

    `pick` says what model. A model that was picked in a default recipe starts from the shipped weights where they fit.
    Raises what `pick` raises.
    """
    plan = pick(wanted, config, data, state, world, say)
    if config.init == NO_INIT:
        return replace(plan, init=None)
    if config.init or plan.init:
        return replace(plan, init=config.init or plan.init)
    if isinstance(wanted, ModelConfig) or state is not None or config.recipe != "default":
        return plan
    shipped = load_checkpoint(shipped_checkpoint()).config
    if plan.model != shipped.replace(top_k=plan.model.top_k):  # how scores are taken from maps does not concern weights
        return plan
    start = "starting from the fastener weights that come with dfengine (--init none: from scratch)"
    return replace(plan, init=FASTENERS, reason=f"{plan.reason}; {start}" if plan.reason else "")


def pick(
    wanted: ModelConfig | Automatic,
    config: TrainConfig,
    data: Path,
    state: Path | None,
    world: World,
    say: Callable[[str], None],
) -> Plan:
    """The model of a run on the folder `data`, the same on all processes: `wanted` itself, or, where it is `Automatic`,
    that of the run to resume (`state` is its file), that of the checkpoint to start from, or what `choose` finds.

    A budget in steps or epochs gives no choice: it takes the smallest. Raises `ConfigError` for fixed fields that
    cannot be, `DataError` for a folder that cannot be read, `CheckpointError` for such a state or checkpoint.
    """
    if isinstance(wanted, ModelConfig):
        return Plan(wanted)
    if state is not None:
        identity = read_state(state).identity
        model = wanted.applied(ModelConfig.from_dict(identity.get("model")))
        return Plan(model, init=(identity.get("training") or {}).get("init"))
    if config.init and config.init != NO_INIT:
        start = start_path(config.init)
        model = wanted.applied(load_checkpoint(start).config)
        return Plan(model, f"picked {Candidate(model)}: the model of {start.name}")
    candidates = wanted.candidates()
    first = candidates[0].model
    if config.minutes is None:
        budget = "steps" if config.steps is not None else "epochs"
        return Plan(first, f"picked {candidates[0]}, the smallest: a budget of {budget} says nothing about the time; "
                    "--preset and --image-size take another, --minutes chooses by time")  # fmt: skip
    side, images = survey(data, max(candidate.model.image_size for candidate in candidates))
    if len(images) < MIN_IMAGES:
        return Plan(first)  # what is wrong with the images is said when they are read for training

    def resized(size: int) -> np.ndarray:
        return np.stack([np.rint(255 * resize_unit(image, size)).astype(np.uint8) for image in images])

    resolved, probes = config.resolve(first), resized(first.image_size)
    precision = agreed_precision(config.precision, resolved, first, probes, world, say).name
    say("timing training steps, to choose the model")

    def measured(model: ModelConfig) -> float:
        rate = images_per_second(config.resolve(model), model, resized(model.image_size), precision, world)
        return 60 * config.minutes * rate

    def cost(model: ModelConfig) -> float:
        return 1 / images_per_flop(config.resolve(model), model)

    side = side if wanted.image_size is None else np.inf
    where = f"in {config.minutes:g} {'minute' if config.minutes == 1 else 'minutes'} on {_machine(world)}"
    return choose(candidates, side, measured, cost, CLOSE[world.device.type], where)


def choose(
    candidates: Sequence[Candidate],
    side: float,
    measured: Callable[[ModelConfig], float],
    cost: Callable[[ModelConfig], float],
    close: float,
    where: str,
) -> Plan:
    """Climbs `candidates`, which go from small to large, while the next one is not larger than the images (their
    shorter side is `side` pixels) and sees the images that it needs; the first is taken in any case.

    `measured(model)`: training images within the budget; 0 where memory is too small. It is asked only where `cost`, in
    any unit an image, says from the last measured one that the need may be met to a factor of `close`. `where` says in
    words how long and on what.
    """
    picked, images, why = candidates[0], measured(candidates[0].model), ""
    if images < picked.images_needed:
        why = f"; {picked.images_needed:,} would be better: give it more minutes"
        candidates = candidates[:1]
    price = cost(picked.model) if candidates[1:] else 0.0
    for larger in candidates[1:]:
        if larger.model.image_size > SIZE_TOLERANCE * side:
            why = f"; the images, {side:.0f} pixels on their shorter side, are too small for {larger}"
            break
        larger_price = cost(larger.model)
        seen = images * price / larger_price
        if seen * close >= larger.images_needed:
            seen = measured(larger.model)
        if seen < larger.images_needed:
            why = f"; {larger} would see only {_about(seen)} of the {larger.images_needed:,} it needs"
            why = why if seen else f"; {larger} does not fit into memory"
            break
        picked, images, price = larger, seen, larger_price
    return Plan(picked.model, f"picked {picked}: about {_about(images)} images {where}{why}", images)


def _machine(world: World) -> str:
    threads = torch.get_num_threads()
    cpu = f"this CPU ({counted(threads, 'thread')})"
    name = cpu if world.device.type == "cpu" else hardware(world.device)
    return name if world.size == 1 else f"{name}, {world.size} processes"


def _about(count: float) -> str:
    """Two digits are what a few steps tell: 152345 reads "150,000"."""
    return f"{float(f'{count:.2g}'):,.0f}"
