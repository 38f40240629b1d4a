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
from dfengine.engine.program import Op
from dfengine.kernels import OPS, CannotRunError, forced_backend
from dfengine.models import Model

MOST_PROGRAMS = 8
"""Programs kept for one detector. They share the memory of their activations, which is that of the largest."""


class ProgramRunner:
    """As `ModuleRunner`, through fused kernels; what it runs is float32 or half precision from the pixels on.

    The model is the runner's own from then on: its weights move into the programs. Raises `NotLoweredError`, and leaves
    the model as it was, for a configuration that has no program, or whose program would have to run one of its ops by
    a slow reference.
    """

    def __init__(self, model: Model, device: str | torch.device = "cpu", precision: str = "float32", seed: int = 0):
        self.config = model.config
        self.device = torch.device(device)
        self.precision = precision
        self.seed = seed
        self._lowering = Lowering(model, PRECISIONS[precision], self.device)
        self._executors: OrderedDict[int, Executor] = OrderedDict()
        self._block: Tensor | None = None
        self._threshold = torch.tensor([torch.inf], device=self.device)
        try:
            backends = self.executor(1).backends
        except CannotRunError as error:
            raise NotLoweredError(str(error)) from None
        slow = [op.name for op in self._executors[1].program.ops if _by_reference(op, backends)]
        if slow:
            raise NotLoweredError(f"{slow[0]} would run by its reference")
        self._lowering.release()

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
            self._executors[batch] = Executor(program, self.device, arena=arena, block=self._block)
        self._executors.move_to_end(batch)
        return self._executors[batch]

    def run(self, unit: np.ndarray | Tensor) -> Output:
        """Scores a batch of float32 (B, S, S, C) images in [0, 1] at model size."""
        images = torch.as_tensor(unit, dtype=torch.float32, device=self.device)
        outputs = self.executor(len(images)).run(images=images, threshold=self._threshold)
        return Output(outputs["anomaly_map"], outputs["reconstruction"].mean(dim=0), outputs["pred_score"])


def _by_reference(op: Op, backends: dict[str, str]) -> bool:
    """Whether it runs by its reference although there are better implementations; attention has no other."""
    return backends[op.name] == "reference" and len(OPS[op.kernel].implementations) > 1


def make_runner(model: Model, device: torch.device, precision: str, seed: int) -> ModuleRunner | ProgramRunner:
    """The runner that serves a detector: programs on a CPU with the compiled kernels, else the modules.

    On a GPU the modules run: no program has been measured there yet. DFENGINE_BACKEND=reference asks for the modules
    too, of which the reference kernels are a slower copy.
    """
    if device.type == "cpu" and native.available() and forced_backend(None) in (None, "cpu"):
        try:
            return ProgramRunner(model, device, precision, seed)
        except NotLoweredError:
            pass
    return ModuleRunner(model, device, precision, seed)
