"""Checkpoints: one safetensors file with weights, configuration, training record and calibration. No pickle.

Metadata keys: `format` ("dfengine"), `version`, and JSON texts `config`, `training`, `calibration`.
Tensor names: "reconstruction.*" and "segmentation.*", the state-dict names of `dfengine.models.Model`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfengine.errors import CheckpointError, ConfigError
from dfengine.evaluation.calibration import Calibration
from dfengine.files import atomic_path
from dfengine.models import Model, ModelConfig

FORMAT = "dfengine"
VERSION = "1"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checkpoint:
    """A detector at rest.

    `state` maps the names of `Model.state_dict()` to CPU tensors (float32, or half for shipping).
    `training` is the training record: JSON values (data fingerprint, steps, seed, versions, ...).
    """

    config: ModelConfig
    state: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def build(self) -> Model:
        """A float32 model with these weights, in evaluation mode."""
        with torch.device("meta"):
            model = Model(self.config)
        state = {
            name: value.float() if value.is_floating_point() else value.clone() for name, value in self.state.items()
        }
        model.load_state_dict(state, assign=True)
        return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def half(self) -> Checkpoint:
        """A copy with matrices and filters in float16; vectors (biases, norms and their statistics) stay float32."""
        state = {
            name: value.half() if value.is_floating_point() and value.dim() >= 2 else value
            for name, value in self.state.items()
        }
        return replace(self, state=state)

    def with_calibration(self, calibration: Calibration | None) -> Checkpoint:
        """A copy with another calibration."""
        return replace(self, calibration=calibration)


def shipped_checkpoint(name: str = "fastener-tiny.safetensors") -> Path:
    """A checkpoint inside the package, by default the demo's. Raises `CheckpointError` where it is missing."""
    path = Path(str(resources.files("dfengine") / "assets" / name))
    if not path.is_file():
        raise CheckpointError(f"{path}: the shipped checkpoint is missing from this installation")
    return path


def check_state(config: ModelConfig, state: dict[str, Tensor], name: str) -> None:
    """Raises `CheckpointError` where names, shapes, dtypes or values do not fit the model of `config`."""
    with torch.device("meta"):
        expected = Model(config).state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        parts = []
        for word, keys in (("missing", missing), ("unexpected", unexpected)):
            if keys:
                parts.append(f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
        raise CheckpointError(f"{name}: tensors do not fit the configuration: {'; '.join(parts)}")
    for key, want in expected.items():
        have = state[key]
        if have.shape != want.shape:
            raise CheckpointError(f"{name}: {key} has shape {tuple(have.shape)}, expected {tuple(want.shape)}")
        if want.is_floating_point():
            if have.dtype not in _FLOATS:
                raise CheckpointError(f"{name}: {key} has dtype {have.dtype}, expected a floating-point tensor")
            if not torch.isfinite(have).all():
                raise CheckpointError(f"{name}: {key} holds values that are not finite")
        elif have.dtype != want.dtype:
            raise CheckpointError(f"{name}: {key} has dtype {have.dtype}, expected {want.dtype}")


def check_target(path: str | Path) -> None:
    """Raises `CheckpointError` where `path` is a file that is not a dfengine checkpoint: it would be overwritten."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise CheckpointError(f"{path}: is there already and is not a dfengine checkpoint; choose another name")


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` atomically. Raises `CheckpointError` for weights that do not fit, and `DfengineError` where
    the file cannot be written.
    """
    check_target(path)
    check_state(checkpoint.config, checkpoint.state, str(path))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(checkpoint.config.to_dict()),
        "training": json.dumps(checkpoint.training),
        "calibration": json.dumps(checkpoint.calibration.to_dict() if checkpoint.calibration else None),
    }
    with atomic_path(path) as temporary:
        state = {name: value.detach().cpu().contiguous() for name, value in checkpoint.state.items()}
        save_file(state, str(temporary), metadata)


def _json(metadata: dict[str, str], key: str, path: Path) -> Any:
    try:
        return json.loads(metadata[key])
    except KeyError:
        raise CheckpointError(f"{path}: metadata field {key!r} is missing") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: metadata field {key!r} is not valid JSON") from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks a checkpoint; executes nothing from it.

    Raises `CheckpointError` with one line for a file that is missing, truncated, not safetensors, not a dfengine
    checkpoint, of another version, or whose tensors do not fit its configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder, not a checkpoint' if path.is_dir() else 'no such file'}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a dfengine checkpoint (its metadata does not name the format)")
            if metadata.get("version") != VERSION:
                raise CheckpointError(
                    f"{path}: checkpoint version {metadata.get('version')!r} is not supported (this dfengine reads "
                    f"version {VERSION})"
                )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {_damage(path, error)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    try:
        config = ModelConfig.from_dict(_json(metadata, "config", path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    training = _json(metadata, "training", path)
    if not isinstance(training, dict):
        raise CheckpointError(f"{path}: metadata field 'training' is not a table of fields")
    values = _json(metadata, "calibration", path)
    try:
        calibration = None if values is None else Calibration.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    check_state(config, state, str(path))
    return Checkpoint(config, state, training, calibration)


def _damage(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return "the file is empty"
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return "a PyTorch pickle, not a safetensors checkpoint; import DiffusionAD weights with `dfengine convert`"
    return f"not a readable safetensors file: truncated or damaged ({error})"
