"""`dfengine train`: from command-line options to a training run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dfengine.console import OutputConsole
from dfengine.data.augment import AugmentConfig
from dfengine.data.synthesis import SynthesisConfig
from dfengine.errors import UsageError
from dfengine.models import preset as model_preset
from dfengine.training import Automatic, TrainConfig
from dfengine.training import train as run_training

DEFAULT_MINUTES = 30.0


def run_train(
    data: Path,
    out: Path,
    preset: str | None,
    image_size: int | None,
    pixel_range: str | None,
    recipe: Any,
    synthesis: Any,
    textures: Path | None,
    init: str | None,
    foreground: str | None,
    decoy: float | None,
    flip: str | None,
    rotation: float | None,
    augment: bool,
    resume: bool,
    **training: Any,
) -> int:
    """Builds the configurations and trains; the options are those of `dfengine.cli.train`. Returns the exit status: 0,
    or 3 where some images were refused."""
    model = automatic = Automatic(image_size, pixel_range)
    if preset is not None:
        model = automatic.applied(model_preset(preset))
    if all(training[name] is None for name in ("minutes", "steps", "epochs")):
        training["minutes"] = DEFAULT_MINUTES
    training["recipe"] = getattr(recipe, "value", recipe)
    training["textures"] = None if textures is None else str(textures)
    training["init"] = init
    config = TrainConfig(**training)
    # The synthesis and the augmentation follow from the recipe, whatever the model.
    filled = config.resolve(automatic.candidates()[0].model)
    wanted = dict(recipe=getattr(synthesis, "value", synthesis), foreground=foreground, decoy=decoy)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if wanted:
        fields = filled.synthesis.to_dict() | wanted
        config = config.replace(synthesis=SynthesisConfig.from_dict(fields))
    moves = dict(flip="" if flip == "none" else flip, rotation=rotation)
    moves = {name: value for name, value in moves.items() if value is not None}
    if not augment:
        if any(moves.values()):
            raise UsageError(f"--{next(k for k, v in moves.items() if v)} needs augmentation; leave out --no-augment")
        config = config.replace(augment=AugmentConfig.off())
    elif moves:
        config = config.replace(augment=dataclasses.replace(filled.augment, **moves))
    result = run_training(config, model, data, out, resume=resume, console=OutputConsole())
    return 3 if result.record.get("data", {}).get("skipped") else 0
