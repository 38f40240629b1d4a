"""Runs detection through programs: one for each batch size, made when it is first needed."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from dfengine import native
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering, NotLoweredError
from dfengine.engine.modules import PRECISIONS, ModuleRunner, Output
from dfengine.kernels import forced_backend
from dfengine.models import Model

MOST_PROGRAMS = 8
"""Programs kept for one detector; each holds the activations of its batch size."""


class ProgramRunner:
    """As `ModuleRunner`, through fused kernels; what it runs is float32 or half precision from the pixels on.

    Raises `NotLoweredError` for a configuration that has no program.
    """

    def __init__(self, model: Model, device: str | torch.device = "cpu", precision: str = "float32", seed: int = 0):
        self.config = model.config
        self.device = torch.device(device)
        self.precision = precision
        self.seed = seed
        self._lowering = Lowering(model, PRECISIONS[precision], self.device)
        self._executors: OrderedDict[int, Executor] = OrderedDict()
        self._threshold = torch.tensor([torch.inf], device=self.device)

    def executor(self, batch: int) -> Executor:
        """The bound program for `batch` images; the least recently used is dropped beyond `MOST_PROGRAMS`."""
        if batch not in self._executors:
            self._executors[batch] = Executor(self._lowering.program(batch, self.seed), self.device)
        self._executors.move_to_end(batch)
        while len(self._executors) > MOST_PROGRAMS:
            self._executors.popitem(last=False)
        return self._executors[batch]

    def run(self, unit: np.ndarray | Tensor) -> Output:
        """Scores a batch of float32 (B, S, S, C) images in [0, 1] at model size."""
        images = torch.as_tensor(unit, dtype=torch.float32, device=self.device)
        outputs = self.executor(len(images)).run(images=images, threshold=self._threshold)
        return Output(outputs["anomaly_map"], outputs["reconstruction"].mean(dim=0), outputs["pred_score"])


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
