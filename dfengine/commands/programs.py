"""What the commands that look inside a detector share: its bound program, or one line that says why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from dfengine import native
from dfengine.checkpoint import Checkpoint, load_checkpoint
from dfengine.commands.scoring import warn
from dfengine.detector import Detector
from dfengine.devices import hardware_name, resolve_device
from dfengine.engine.execute import Executor
from dfengine.engine.lower import NotLoweredError
from dfengine.engine.runner import ProgramRunner
from dfengine.errors import DfengineError
from dfengine.kernels import CannotRunError, forced_backend
from dfengine.wording import counted


def load_average() -> float | None:
    """How many processes ran or waited for a processor, in the last minute; None where the system does not say it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def warn_of_load() -> float | None:
    """`load_average`, before something is timed; with a warning where it is above half of the processors."""
    load, processors = load_average(), os.cpu_count() or 1
    if load is not None and load > processors / 2:
        beside = f"load average {load:.1f} on {counted(processors, 'processor')}"
        warn(f"{beside}: beside other work times are longer than they could be, and comparisons doubtful")
    return load


@dataclass(frozen=True)
class Bound:
    """A detector's program for one batch size, ready to run. path: of its checkpoint."""

    path: Path
    checkpoint: Checkpoint
    runner: ProgramRunner
    executor: Executor

    def facts(self) -> dict:
        """What runs where, as JSON values."""
        program, device = self.executor.program, self.executor.device
        facts = {
            "file": str(self.path),
            "preset": self.runner.config.preset,
            "image_size": self.runner.config.image_size,
            "batch": program.batch,
            "precision": self.runner.precision,
            "device": str(device),
            "hardware": hardware_name(device),
        }
        if device.type == "cpu":
            facts["threads"] = torch.get_num_threads()
            if (load := load_average()) is not None:  # what else runs shows in the times
                facts["load_average"] = load
        return facts

    @property
    def title(self) -> str:
        """The facts in a line."""
        facts = self.facts()
        where = facts["hardware"]
        where += f", threads: {facts['threads']}" if "threads" in facts else ""
        where += f", load average: {facts['load_average']:.1f}" if "load_average" in facts else ""
        return f"{facts['preset']}, batch {facts['batch']}, {facts['precision']} on {facts['device']} ({where})"


@contextmanager
def bound_program(
    path: Path,
    batch: int,
    device: str,
    precision: str,
    seed: int = 0,
    tactics: str = "default",
    tuning_seconds: float | None = None,
    timed: bool = False,
) -> Iterator[Bound]:
    """For `with`: the program that detection with this checkpoint runs. Raises DfengineError where it runs none.

    timed: whether it will be, so that `warn_of_load` has to be said for a CPU.
    """
    checkpoint = load_checkpoint(path)
    if timed and resolve_device(device).type == "cpu":
        warn_of_load()
    detector = Detector(checkpoint, device, precision, seed, tactics, tuning_seconds)
    chosen = torch.cuda.device(detector.device) if detector.device.type == "cuda" else nullcontext()
    with chosen, detector.program_runner() as runner:
        if runner is None:
            raise DfengineError(f"{path}: runs as torch modules, not as a program: {_reason(checkpoint, detector)}")
        yield Bound(path, checkpoint, runner, runner.executor(runner.program_batch(batch)))


def _reason(checkpoint: Checkpoint, detector: Detector) -> str:
    if forced_backend(None) == "reference":
        return "DFENGINE_BACKEND=reference"
    if detector.device.type == "cpu" and not native.available():
        return native.status()
    try:
        ProgramRunner(checkpoint.build(), detector.device, detector.precision, detector.seed)
    except (NotLoweredError, CannotRunError) as error:
        return str(error)
    return f"no tactics were measured on {detector.device}: dfengine tune does that"
