"""The state of a run: one safetensors file of weights, averages and optimiser moments, with JSON in its header."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dfengine.errors import CheckpointError, DfengineError, UsageError
from dfengine.files import atomic_path
from dfengine.signals import Terminated

FORMAT = "dfengine training state"
VERSION = 2
STATE_FILE = "state.safetensors"
NOTHING_YET = "nothing to save yet: the same command starts over"


class TrainingInterrupted(DfengineError):
    """Training was stopped from outside; the message says what was saved, and how to go on."""

    exit_code = 130


def interrupted_by(error: KeyboardInterrupt, text: str) -> TrainingInterrupted:
    """A `TrainingInterrupted` of that message, with the exit code of the signal which raised `error`."""
    stopped = TrainingInterrupted(text)
    stopped.exit_code = 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    return stopped


def kept_in(folder: Path, steps: int) -> str:
    """In words, what there is to go on from in a run's folder, after so many steps."""
    if not (folder / STATE_FILE).exists():
        return "nothing was saved" if steps else NOTHING_YET
    step = read_state(folder / STATE_FILE).step
    return f"the state at step {step} is saved in {folder}: the same command with --resume goes on"


@dataclass
class RunState:
    """What a run must remember besides tensors.

    `identity` is everything that must be equal for a resumed run to continue the same computation (model and training
    configuration, data fingerprint, held-out images, number of processes, type of device). `threads` is torch's
    intra-op thread count of the last process. `plan` is how the model was chosen (`Plan.record`).
    """

    identity: dict[str, Any]
    precision: str = "float32"
    step: int = 0
    elapsed: float = 0.0
    stage_steps: list[int] = field(default_factory=lambda: [0, 0])
    images_seen: int = 0
    average_updates: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    threads: int = 0
    plan: dict[str, Any] = field(default_factory=dict)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimiser's tensors as "<slot>.<parameter>"; `names` maps id(parameter) to its name."""
    return {
        f"{slot}.{names[id(parameter)]}": value
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_tensors`; moments take the memory layout of their parameter."""
    for key, value in tensors.items():
        slot, name = key.split(".", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        optimizer.state[parameter][slot] = value


def save_state(path: Path, state: RunState, tensors: dict[str, Tensor]) -> None:
    """Writes `path` atomically: a failure leaves the previous file. Raises `DfengineError` naming file and reason."""
    header = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(asdict(state))}
    flat = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(flat, str(temporary), metadata=header)


def read_state(path: Path) -> RunState:
    """What `save_state` wrote besides tensors, which are not read. Raises `CheckpointError` as `load_state` does."""
    return load_state(path, torch.device("cpu"), tensors=False)[0]


def load_state(path: Path, device: torch.device, tensors: bool = True) -> tuple[RunState, dict[str, Tensor]]:
    """Reads what `save_state` wrote; without `tensors`, none of them.

    Raises `CheckpointError` for a file that is missing, damaged or foreign.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no training state to resume; start without resume")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a training state")
            if header.get("version") != str(VERSION):
                raise CheckpointError(f"{path}: training state version {header.get('version')}, expected {VERSION}")
            state = RunState(**json.loads(header["state"]))
            names = file.keys() if tensors else ()
            return state, {name: file.get_tensor(name) for name in names}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged training state ({error})") from None


def check_identity(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raises `UsageError` that names the first difference between the saved run and the present one."""
    hint = "; repeat the options and images of the run, or remove its folder to start anew"
    for group in present:
        theirs, ours = saved.get(group), present[group]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key in sorted(ours.keys() | theirs.keys()):
                if theirs.get(key) != ours.get(key):
                    what = f"{group} {key} was {theirs.get(key)!r} and is now {ours.get(key)!r}"
                    raise UsageError(f"{path}: cannot resume: {what}{hint}")
        elif theirs != ours and group == "data fingerprint":
            raise UsageError(f"{path}: cannot resume: the training images are not those of the run{hint}")
        elif theirs != ours:
            raise UsageError(f"{path}: cannot resume: the {group} was {theirs!r} and is now {ours!r}{hint}")
