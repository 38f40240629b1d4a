"""Runs detection through programs: one for each batch size, made when it is first needed."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from dfengine import native
from dfengine.engine.arena import plan
from dfengine.engine.execute import Executor, allocate
from dfengine.engine.lower import Lowering, NotLoweredError
from dfengine.engine.modules import PRECISIONS, ModuleRunner, Output
from dfengine.engine.program import Program
from dfengine.kernels import CannotRunError, forced_backend
from dfengine.models import Model

MOST_PROGRAMS = 8
"""Programs kept for one detector. They share the memory of their activations, which is that of the largest."""


class ProgramRunner:
    """As `ModuleRunner`, through fused kernels; what it runs is float32 or half precision from the pixels on.

    The model is the runner's own from then on: its weights move into the programs. backend: the implementation of every
    op but attention, which is torch's. Raises `NotLoweredError` for a configuration that has no program and
    `CannotRunError` where the backend does not serve one of its ops, and leaves the model as it was.
    """

    def __init__(
        self,
        model: Model,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        seed: int = 0,
        backend: str = "cpu",
    ):
        self.config = model.config
        self.device = torch.device(device)
        self.precision = precision
        self.seed = seed
        self.backend = backend
        self._executors: OrderedDict[int, Executor] = OrderedDict()
        self._block: Tensor | None = None
        self._threshold = torch.full((1,), torch.inf, dtype=torch.float32, device=self.device)
        with self._plain():
            self._lowering = Lowering(model, PRECISIONS[precision], self.device, backend)
            self.executor(1)
            self._lowering.release()

    def _plain(self):
        """A caller's autocast changes nothing."""
        return torch.autocast(self.device.type, enabled=False)

    def executor(self, batch: int) -> Executor:
        """The bound program for `batch` images; the least recently used is dropped beyond `MOST_PROGRAMS`."""
        if batch not in self._executors:
            program = self._lowering.program(batch, self.seed)
            arena = plan(program)
            if self._block is None or self._block.nbytes < arena.nbytes:
                self._executors.clear()
                self._block = None  # freed before the larger one is asked for
                self._block = allocate(arena.nbytes, self.device)
            if len(self._executors) == MOST_PROGRAMS:
                self._executors.popitem(last=False)
            self._executors[batch] = Executor(program, self.device, self.backend, arena, self._block)
        self._executors.move_to_end(batch)
        return self._executors[batch]

    def twin(self, model: Model, batch: int) -> Program:
        """The program for `batch` images lowered anew, from another copy of the model: its packed weights are whole,
        where those of a bound program may be left only in the form of one backend."""
        of = self._lowering
        with self._plain():
            return Lowering(model, of.dtype, of.device, of.backend, of.fusion).program(batch, self.seed)

    def run(self, unit: np.ndarray | Tensor) -> Output:
        """Scores a batch of float32 (B, S, S, C) images in [0, 1] at model size."""
        images = torch.as_tensor(unit, dtype=torch.float32, device=self.device)
        with self._plain():
            outputs = self.executor(len(images)).run(images=images, threshold=self._threshold)
        return Output(outputs["anomaly_map"], outputs["reconstruction"].mean(dim=0), outputs["pred_score"])


def make_runner(model: Model, device: torch.device, precision: str, seed: int) -> ModuleRunner | ProgramRunner:
    """The runner that serves a detector: programs on a CPU with the compiled kernels, else the modules.

    On a GPU the modules run: no program has been measured there yet. A backend forced by DFENGINE_BACKEND, which is
    read here once, runs its programs or raises with the reason (CannotRunError, NotLoweredError); "reference" stands
    for the modules, of which the reference kernels are a slower copy.
    """
    forced = forced_backend(None)
    if forced not in (None, "reference"):
        return ProgramRunner(model, device, precision, seed, forced)
    if forced is None and device.type == "cpu" and native.available():
        try:
            return ProgramRunner(model, device, precision, seed)
        except (NotLoweredError, CannotRunError):
            pass
    return ModuleRunner(model, device, precision, seed)
