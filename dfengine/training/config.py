"""Training options: what the user chooses, and how unset fields follow from the recipe and the model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfengine.checkpoint import shipped_checkpoint
from dfengine.data.augment import AugmentConfig
from dfengine.data.synthesis import SynthesisConfig
from dfengine.errors import ConfigError, UsageError
from dfengine.models.config import ModelConfig

RECIPES = ("default", "paper")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
ANOMALY_SHARES = ("half", "coin")
LR_SCHEDULES = ("cosine", "constant")
SCALE_LOSSES = ("mean", "sum")
KEEP = ("best", "last")
FASTENERS = "fasteners"
NO_INIT = "none"

# Fields that decide where and how fast a run goes: a resumed run may change them. All but two leave every bit as it is.
# Another number of threads sums in another order, which a resumed run says; of the device the state keeps the type.
OPERATIONAL = ("device", "workers", "threads", "log_every", "save_minutes", "leg_minutes")


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `None` means "as the recipe says"; `resolve` fills those in.

    Budget: exactly one of `minutes` (wall clock, validation included), `steps` (optimiser steps) and `epochs`.
    A step reads `batch_size * accumulate` samples on each process.

    `recipe`: "default" (two stages, cosine rates, EMA, light augmentation) or "paper" (joint from the start, Adam at a
    constant 1e-4, no EMA, no augmentation, the papers' synthesis; DF 4.2, DAD 3.3).
    `denoiser_share`: share of the budget for stage 1, the denoiser alone on normal images.
    `joint_scale`: factor on the denoiser's rate in stage 2, after a stage 1.
    `denoiser_every`: in stage 2, only every so many steps train the denoiser too; the others, about four times as
    fast, train the segmentation network on its reconstructions.
    `inference_t_share`: share of the joint stage's samples drawn at the time steps used at inference (t_s, t_b).
    `anomaly_share`: "half" of each batch exactly, or a "coin" for each sample.
    `focal_gamma`: exponent of the focal part of the mask loss (4 in the papers; 0 is cross-entropy).
    `scale_loss`: the noise losses of the two scales enter as their "mean" (DF) or "sum" (DAD).
    Rates are peaks; `schedule` "cosine" warms up over `warmup` (share of a stage) and decays to 1%, per stage.
    `segmentation_period`: the segmentation rate follows a cosine of so many steps instead; 0 for none.
    `ema_decay` 0 switches averaging off; `clip` 0 switches gradient clipping (by global norm) off.
    `init`: a checkpoint of the same networks whose weights the run starts from, "fasteners" (the weights that come with
    the package; `start_path`) or "none". Unset, it is "fasteners" where they fit a model that was picked (no preset was
    named) in the default recipe.
    `holdout`: share of the normals kept from training for validation and calibration (at least 2 images).
    `validations` over the run, on `validation_samples` fixed synthetic anomalies of the held-out normals.
    `keep`: write the "best" weights by validation score, or the "last". `false_alarm_rate` sets the first threshold.
    `precision` "auto" on CPU takes bfloat16 only where it measures faster.
    `leg_minutes` ends this process early (state saved, as if interrupted), so that a long run can go in legs.
    `workers` prepare samples beside the training process; `threads` is torch's intra-op thread count.
    """

    recipe: str = "default"
    minutes: float | None = None
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 0

    denoiser_share: float | None = None
    joint_scale: float | None = None
    denoiser_every: int | None = None
    inference_t_share: float | None = None
    anomaly_share: str | None = None
    scale_loss: str | None = None
    focal_gamma: float | None = None
    learning_rate: float | None = None
    segmentation_rate: float | None = None
    schedule: str | None = None
    segmentation_period: int | None = None
    warmup: float = 0.02
    weight_decay: float = 0.0
    ema_decay: float | None = None
    clip: float | None = None
    synthesis: SynthesisConfig | None = None
    augment: AugmentConfig | None = None
    textures: str | None = None
    init: str | None = None

    holdout: float = 0.1
    validations: int = 10
    validation_samples: int = 48
    keep: str = "best"
    false_alarm_rate: float = 0.01

    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    log_every: int = 10
    save_minutes: float = 3.0
    leg_minutes: float | None = None

    def __post_init__(self):
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise UsageError(message)

        budgets = [name for name in ("minutes", "steps", "epochs") if getattr(self, name) is not None]
        need(len(budgets) == 1, f"give exactly one of minutes, steps and epochs, not {' and '.join(budgets) or 'none'}")
        need(_positive(getattr(self, budgets[0])), f"{budgets[0]} must be a positive number")
        for name, choices in (
            ("recipe", RECIPES),
            ("precision", PRECISIONS),
            ("keep", KEEP),
            ("anomaly_share", (None, *ANOMALY_SHARES)),
            ("schedule", (None, *LR_SCHEDULES)),
            ("scale_loss", (None, *SCALE_LOSSES)),
        ):
            value = getattr(self, name)
            known = ", ".join(c for c in choices if c)
            need(value in choices, f"{name} must be one of {known}, not {value!r}")
        for name in ("steps", "epochs", "accumulate", "denoiser_every", "validations", "log_every", "threads"):
            value = getattr(self, name)
            need(value is None or (type(value) is int and value >= 1), f"{name} must be at least 1, not {value!r}")
        for name in ("denoiser_share", "inference_t_share"):
            value = getattr(self, name)
            need(value is None or 0 <= value <= 1, f"{name} must be between 0 and 1, not {value!r}")
        for name in ("learning_rate", "segmentation_rate", "joint_scale"):
            value = getattr(self, name)
            need(value is None or _positive(value), f"{name} must be positive, not {value!r}")
        need(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay must be in [0, 1)")
        need(self.clip is None or self.clip >= 0, "clip must not be negative")
        need(self.focal_gamma is None or 0 <= self.focal_gamma <= 10, "focal_gamma must be between 0 and 10")
        need((self.segmentation_period or 0) >= 0, "segmentation_period must not be negative")
        need(self.weight_decay >= 0, "weight_decay must not be negative")
        need(0 <= self.warmup <= 1, "warmup must be between 0 and 1")
        need(0 < self.holdout < 1, "holdout must be between 0 and 1")
        need(0 < self.false_alarm_rate < 1, "false_alarm_rate must be between 0 and 1")
        need(self.validation_samples >= 2, "validation_samples must be at least 2")
        need(self.workers is None or self.workers >= 0, "workers must not be negative")
        need(self.batch_size >= 2, f"batch_size must be at least 2, not {self.batch_size}: BatchNorm needs two")
        need(_positive(self.save_minutes), "save_minutes must be positive")
        need(self.leg_minutes is None or _positive(self.leg_minutes), "leg_minutes must be positive")
        need(type(self.seed) is int and 0 <= self.seed < 2**64, "seed must be a whole number of at least 0, below 2^64")

    def resolve(self, model: ModelConfig) -> TrainConfig:
        """Every recipe field filled in for `model`."""
        paper = self.recipe == "paper"
        diffusionad = model.paper == "diffusionad"
        # 1e-3 suits a base of 16 to 32; wider nets want less, in proportion.
        rate = 1e-4 if paper else 1e-3 * min(1.0, 32 / model.base)
        seg_rate = (1e-5 if diffusionad else 1e-4) if paper else 1e-3 * min(1.0, 32 / model.seg_base)
        filled = dict(
            denoiser_share=0.0 if paper else 0.1,
            joint_scale=1.0 if paper else 0.5,
            denoiser_every=1 if paper else 16,
            inference_t_share=0.0 if paper else 1.0,
            anomaly_share="coin" if paper and diffusionad else "half",
            scale_loss="sum" if diffusionad else "mean",
            focal_gamma=4.0 if paper else 0.0,
            learning_rate=rate,
            segmentation_rate=seg_rate,
            schedule="constant" if paper else "cosine",
            segmentation_period=10 if paper and diffusionad else 0,
            ema_decay=0.0 if paper else 0.999,
            clip=0.0 if paper else 1.0,
            synthesis=SynthesisConfig(recipe="paper", decoy=0.0) if paper else SynthesisConfig(),
            augment=AugmentConfig.off() if paper else AugmentConfig(),
        )
        return dataclasses.replace(self, **{k: v for k, v in filled.items() if getattr(self, k) is None})

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed. Raises `UsageError` when the result does not hold together."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` inverts it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("synthesis", "augment"):
            values[name] = values[name].to_dict() if values[name] is not None else None
        return values

    @classmethod
    def from_dict(cls, values: Any) -> TrainConfig:
        """Inverse of `to_dict`. Raises `ConfigError` for unknown fields and `UsageError` for bad values."""
        if not isinstance(values, dict):
            raise ConfigError("the training configuration is not a table of fields")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"unknown training configuration fields: {', '.join(map(str, unknown))}")
        values = dict(values)
        for name, kind in (("synthesis", SynthesisConfig), ("augment", AugmentConfig)):
            if values.get(name) is not None:
                values[name] = kind.from_dict(values[name])
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what a run computes: a state can only be resumed with the same ones."""
        return {key: value for key, value in self.to_dict().items() if key not in OPERATIONAL}


def start_path(init: str) -> Path:
    """The file of the start weights called `init`. Raises `UsageError` where there is none of that name, and
    `CheckpointError` where a shipped one is missing."""
    if init == FASTENERS:
        return shipped_checkpoint()
    if not Path(init).exists():
        raise UsageError(f"init {init}: no such checkpoint; give a file, {FASTENERS} or {NO_INIT}")
    return Path(init)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0
