"""The training record inside a checkpoint: enough to know what the weights are and to make them again."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfengine._version import __version__
from dfengine.training.config import TrainConfig
from dfengine.training.data import Normals
from dfengine.training.distributed import World
from dfengine.training.state import RunState
from dfengine.wording import counted


def training_record(
    config: TrainConfig,
    data: Path,
    normals: Normals,
    state: RunState,
    world: World,
    seconds: float,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """JSON values. `seconds` have been trained, validation included; `metrics` is the validation of these weights.

    "plan": why this model was picked and how many images it was expected to see; empty where the user named it.
    "data": "trained" lists the digests (`content_digest`) of all images that the weights were trained on, those of the
    `init` checkpoint included; "held_out_also_trained" counts the held-out images among them.
    """
    # Only the last part of a path: checkpoints travel, and folders of the machine are nobody's business.
    paths = {name: value and Path(value).name for name, value in (("textures", config.textures), ("init", config.init))}
    return {
        "config": config.to_dict() | paths,
        "data": {
            "name": data.resolve().name,
            "fingerprint": normals.fingerprint,
            "images": len(normals.images),
            "trained": list(normals.trained),
            "held_out": normals.held_out_names,
            "held_out_also_trained": normals.overlap,
            "skipped": [name for name, _ in normals.skipped],
        },
        "plan": state.plan,
        "steps": state.step,
        "stage_steps": list(state.stage_steps),
        "images_seen": state.images_seen,
        "seconds": round(seconds, 1),
        "seed": config.seed,
        "precision": state.precision,
        "processes": world.size,
        "validation": metrics,
        "versions": {
            "dfengine": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "hardware": hardware(world.device),
    }


def hardware(device: torch.device) -> str:
    """The name of the processor or accelerator that `device` is, and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {counted(threads, 'thread')}"
