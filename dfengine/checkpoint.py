"""Checkpoints: one safetensors file with weights, configuration, training record and calibration. No pickle.

Metadata keys: `format` ("dfengine"), `version`, JSON texts `config`, `training`, `calibration`, `verified`, and
`sha256`, the checksum of all the others and of the tensors (`_checksum`).
Tensor names: "reconstruction.*" and "segmentation.*", the state-dict names of `dfengine.models.Model`, and, both or
neither, "trial.images" and "trial.anomaly_map". Version 2 has a trial, version 1 has none; either may lack `verified`,
and `sha256`, which older releases did not write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfengine.arguments import path_of
from dfengine.errors import CheckpointError, ConfigError, DfengineError, UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.files import atomic_path, check_suffix, check_writable, locked, os_reason
from dfengine.models import Model, ModelConfig
from dfengine.verified import check_records

FORMAT = "dfengine"
SUFFIX = ".safetensors"
VERSIONS = ("1", "2")
TRIAL_IMAGES = 4
"""The most images of a `Trial`."""
_TRIAL = "trial."
_SUM = "sha256"
_REMEDY = "copy it again or train anew"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Trial:
    """Normal images that show, when the model is loaded, whether a precision serves it.

    images: uint8 (N, S, S, C) at model size, N from 1 to `TRIAL_IMAGES`. anomaly_map: float16 (N, S, S), their maps by
    float32 and seed 0; 131 KB at 256 pixels, beside 197 KB of image, for each.
    """

    images: Tensor
    anomaly_map: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A detector at rest.

    `state` maps the names of `Model.state_dict()` to CPU tensors (float32, or half for shipping).
    `training` is the training record: JSON values (data fingerprint, steps, seed, versions, ...).
    `verified` maps each precision that `dfengine verify --record` held to float32 with these weights to the record of
    that; one with "refused" says why the precision does not serve. A copy with other weights keeps neither it nor the
    trial, as `half` shows.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    training: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    trial: Trial | None = None
    verified: dict[str, dict[str, Any]] = field(default_factory=dict)

    def build(self) -> Model:
        """A float32 model with these weights, in evaluation mode."""
        with torch.device("meta"):
            model = Model(self.config)
        state = {
            name: value.float() if value.is_floating_point() else value.clone() for name, value in self.state.items()
        }
        model.load_state_dict(state, assign=True)
        return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def refuses(self, precision: str, device: str) -> bool:
        """Whether `dfengine verify --record` found that this precision does not serve on this type of device."""
        record = self.verified.get(precision, {})
        return bool(record.get("refused")) and record.get("device") == device

    def passes(self, precision: str, device: str) -> bool:
        """Whether `dfengine verify --record` found that this precision serves on this type of device."""
        record = self.verified.get(precision)
        return record is not None and not record.get("refused") and record.get("device") == device

    def ranges(self, precision: str) -> dict[str, tuple[float, float]]:
        """Of a precision of eight bits (`dfengine.engine.quantize.Ranges`), as verified; empty where none are kept."""
        return {name: (low, high) for name, (low, high) in self.verified.get(precision, {}).get("ranges", {}).items()}

    def half(self) -> Checkpoint:
        """A copy with matrices and filters in float16; vectors (biases, norms and their statistics) stay float32.

        It has no trial and nothing verified: those are of the weights as they were. Where these are stored so already,
        the checkpoint as it is.
        """
        state = {
            name: value.half() if value.is_floating_point() and value.dim() >= 2 else value
            for name, value in self.state.items()
        }
        if all(value.dtype == self.state[name].dtype for name, value in state.items()):
            return self
        return replace(self, state=state, trial=None, verified={})

    def same_weights(self, other: Checkpoint) -> bool:
        """Whether `other` is the same model with the same weights, bit for bit."""
        if self.config != other.config or self.state.keys() != other.state.keys():
            return False
        return all(torch.equal(_raw(value), _raw(other.state[name])) for name, value in self.state.items())

    def with_top_k(self, top_k: float) -> Checkpoint:
        """A copy whose image score averages `top_k` of 65,536 pixels; no threshold, and nothing verified, holds for it.

        Raises ConfigError where that is no number of pixels.
        """
        return replace(self, config=self.config.replace(top_k=top_k), calibration=None, verified={})

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
            # The sum, which is quicker, is finite only where all values are; it may overflow where they are.
            if not torch.isfinite(have.sum(dtype=torch.float32)) and not torch.isfinite(have).all():
                raise CheckpointError(f"{name}: {key} holds values that are not finite")
        elif have.dtype != want.dtype:
            raise CheckpointError(f"{name}: {key} has dtype {have.dtype}, expected {want.dtype}")


def _trial_of(tensors: dict[str, Tensor], config: ModelConfig, name: str) -> Trial:
    """The trial that `tensors` are. Raises `CheckpointError` where names, shapes, dtypes or values are not of one."""
    if set(tensors) != {"images", "anomaly_map"}:
        found = ", ".join(sorted(tensors)) or "missing"
        raise CheckpointError(f"{name}: the trial images are {found}; expected anomaly_map, images")
    size, count = config.image_size, tuple(tensors["images"].shape[:1])
    if not (count and 1 <= count[0] <= TRIAL_IMAGES):
        shape = tuple(tensors["images"].shape)
        raise CheckpointError(f"{name}: trial.images has shape {shape}, not 1 to {TRIAL_IMAGES} images")
    wanted = {
        "images": ((*count, size, size, config.channels), torch.uint8),
        "anomaly_map": ((*count, size, size), torch.float16),
    }
    for key, (shape, dtype) in wanted.items():
        found = tensors[key]
        if found.shape != shape or found.dtype != dtype:
            raise CheckpointError(
                f"{name}: trial.{key} is {found.dtype} of shape {tuple(found.shape)}, expected {dtype} of shape {shape}"
            )
    if not torch.isfinite(tensors["anomaly_map"]).all():
        raise CheckpointError(f"{name}: trial.anomaly_map holds values that are not finite")
    return Trial(**tensors)


def check_target(path: str | Path) -> None:
    """Raises `UsageError` where `path` is a file that is not a dfengine checkpoint: it would be overwritten."""
    path = Path(path)
    _check_name(path, UsageError)
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        with safe_open(str(path), framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise UsageError(f"{path}: is there already and is not a dfengine checkpoint; choose another name")


def check_output(path: str | Path, present: bool = False) -> None:
    """What a command asks of the checkpoint it is to write, better before its work than after it.

    Raises `UsageError` for a file that is none and, unless the checkpoint at `path` is meant (`present`), for one that
    is there already and a name that does not end in .safetensors; and as `check_writable`.
    """
    path = Path(path)
    if not present:
        check_suffix(path, SUFFIX)
    check_target(path)
    if not present and path.is_file() and path.stat().st_size:
        raise UsageError(f"{path}: is there already; choose another name, or remove it first")
    check_writable(path)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` atomically. Raises `CheckpointError` for weights that do not fit, `UsageError` as
    `check_target`, and `DfengineError` where the file cannot be written.

    To change what a file holds, use `update_checkpoint`.
    """
    with locked(path):
        _write(path, checkpoint)


def update_checkpoint(
    path: str | Path, seen: Checkpoint, change: Callable[[Checkpoint], Checkpoint]
) -> tuple[Checkpoint, Checkpoint]:
    """Writes `change(present)`, `present` being what the file holds now, and returns both.

    seen: what was read from it before, for the work that led to the change. Another process may have changed the file
    since: what it wrote beside the weights is in `present`, and nobody writes in between. Raises `CheckpointError`
    where the weights are not those of `seen`, so that the change would not belong to them, and as `save_checkpoint`.
    """
    with locked(path):
        present = load_checkpoint(path)
        if not present.same_weights(seen):
            raise CheckpointError(f"{path}: was given other weights meanwhile and is left as it is; run this again")
        changed = change(present)
        _write(path, changed)
    return present, changed


def _write(path: str | Path, checkpoint: Checkpoint) -> None:
    check_target(path)
    check_state(checkpoint.config, checkpoint.state, str(path))
    trial = checkpoint.trial
    tensors = dict(checkpoint.state)
    if trial is not None:
        parts = dict(images=trial.images, anomaly_map=trial.anomaly_map)
        _trial_of(parts, checkpoint.config, str(path))
        tensors |= {_TRIAL + key: value for key, value in parts.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[trial is not None],  # the oldest that can say it, so that older releases read what they can
        "config": json.dumps(checkpoint.config.to_dict()),
        "training": json.dumps(checkpoint.training),
        "calibration": json.dumps(checkpoint.calibration.to_dict() if checkpoint.calibration else None),
        "verified": json.dumps(checkpoint.verified),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata[_SUM] = _checksum(metadata, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata)


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor in memory: uint8 (N,)."""
    return tensor.reshape(-1).view(torch.uint8)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over metadata and contiguous CPU tensors, in the order of their names: of each entry its name and
    text, or its name, dtype, shape and bytes. Catches what a failing disk or copy changes; it is no signature."""
    digest = hashlib.sha256()
    texts = sorted((key, text) for key, text in metadata.items() if key != _SUM)
    digest.update(json.dumps(texts).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(memoryview(_raw(value).numpy()))
    return digest.hexdigest()


def _json(metadata: dict[str, str], key: str, path: Path) -> Any:
    try:
        return json.loads(metadata[key])
    except KeyError:
        raise CheckpointError(f"{path}: metadata field {key!r} is missing") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: metadata field {key!r} is not valid JSON") from None


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and checks a checkpoint; executes nothing from it.

    Raises `CheckpointError` with one line for a file that is missing, truncated, altered since it was written, not
    safetensors, not a dfengine checkpoint, of another version, or whose tensors do not fit its configuration.
    """
    path = _checked_path(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a dfengine checkpoint (its metadata does not name the format)")
            if metadata.get("version") not in VERSIONS:
                raise CheckpointError(
                    f"{path}: checkpoint version {metadata.get('version')!r} is not supported (this dfengine reads "
                    f"versions {' and '.join(VERSIONS)})"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError:
        raise CheckpointError(f"{path}: {_damage(path)}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {os_reason(error)}") from None
    with ThreadPoolExecutor(1) as beside:  # either takes longer than reading the file
        found = beside.submit(_checksum, metadata, tensors) if _SUM in metadata else None
        try:
            checkpoint, error = _checked(metadata, tensors, path), None
        except CheckpointError as refusal:
            checkpoint, error = None, refusal
    if found is not None and found.result() != metadata[_SUM]:  # which says more than what it led to
        raise CheckpointError(f"{path}: is damaged: its content is not what was written; {_REMEDY}")
    if error is not None:
        raise error
    return checkpoint


def _checked(metadata: Mapping[str, str], tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    """What a file of this content holds. Raises `CheckpointError` where it does not fit together."""
    try:
        config = ModelConfig.from_dict(_json(metadata, "config", path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    trial = None
    if metadata["version"] == "2":
        parts = {name: value for name, value in tensors.items() if name.startswith(_TRIAL)}
        trial = _trial_of({name.removeprefix(_TRIAL): value for name, value in parts.items()}, config, str(path))
        tensors = {name: value for name, value in tensors.items() if name not in parts}
    training = _json(metadata, "training", path)
    if not isinstance(training, dict):
        raise CheckpointError(f"{path}: metadata field 'training' is not a table of fields")
    values = _json(metadata, "calibration", path)
    try:
        calibration = None if values is None else Calibration.from_dict(values)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    verified = _json(metadata, "verified", path) if "verified" in metadata else {}
    check_records(verified, str(path))
    check_state(config, tensors, str(path))
    return Checkpoint(config, tensors, training, calibration, trial, verified)


def _checked_path(path: Any) -> Path:
    """`path` as the path of a regular file. Raises `CheckpointError`, or `ArgumentTypeError` for what is no path."""
    path = path_of("a checkpoint", path)
    try:
        kind = None if path.is_file() else "no such file"
    except OSError as error:
        raise CheckpointError(f"{str(path)!r}: {os_reason(error)}") from None
    if kind and path.is_dir():
        kind = "is a folder, not a checkpoint"
    elif kind and path.is_symlink():
        kind = "is a link to no file"
    elif kind and path.exists():
        kind = "is not a regular file"
    if kind:
        raise CheckpointError(f"{path}: {kind}")
    _check_name(path)
    return path


def _check_name(path: Path, kind: type[DfengineError] = CheckpointError) -> None:
    """Raises `kind` for a path that safetensors, which takes names as UTF-8, could not open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise kind(f"{path}: a checkpoint's name must be valid UTF-8; rename it") from None


def _damage(path: Path) -> str:
    """What is wrong with a file that safetensors does not read."""
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        return "the file is empty"
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        return "a PyTorch pickle, not a safetensors checkpoint; import DiffusionAD weights with `dfengine convert`"
    if start[8:] == b"{":
        return f"is damaged: cut short or overwritten; {_REMEDY}"
    return "not a safetensors checkpoint, or overwritten at its start"
