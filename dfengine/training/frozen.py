"""Training steps that leave the denoiser as it is reconstruct through the engine's kernels, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dfengine import native
from dfengine.diffusion import Schedule
from dfengine.engine.arena import plan
from dfengine.engine.execute import Executor, allocate
from dfengine.engine.lower import Lowering, NotLoweredError
from dfengine.kernels import CannotRunError
from dfengine.models import Model
from dfengine.training.config import TrainConfig
from dfengine.training.precision import Precision


class FrozenDenoiser:
    """The one-step reconstruction of a batch, at the time steps of inference, by the weights that the denoiser has.

    `forget` after every change of a weight: the program, which holds its own form of them, is lowered anew by the next
    call. A result depends on the weights and on its own sample alone, bit for bit, so that a resumed run repeats it.
    """

    def __init__(self, model: Model, precision: Precision):
        self.model, self.dtype = model, precision.dtype
        self.schedule = Schedule.of(model.config)
        self._executor: Executor | None = None
        self._block: Tensor | None = None

    @staticmethod
    def serves(model: Model, config: TrainConfig, precision: Precision) -> bool:
        """Whether the steps of a run can go this way: on a CPU with the compiled kernels, norm-guided, every joint
        sample at the time steps of inference, and of a configuration that has a program."""
        at_inference = config.inference_t_share == 1 and model.config.mode == "norm-guided"
        if not at_inference or precision.device.type != "cpu" or not native.available():
            return False
        try:
            FrozenDenoiser(model, precision)._bound(1)
        except (NotLoweredError, CannotRunError):
            return False
        return True

    def __call__(self, x_0: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 (B, C, S, S) and the noise of both scales (2, B, C, S, S), float32, in model pixels.

        Returns `pair` (B, 2C, S, S), x_0 and its reconstruction, and `eps` (2, B, C, S, S), the predicted noise, both
        in the dtype of the precision and channels-last.
        """
        config, batch = self.model.config, len(x_0)
        steps = (config.t_s, config.t_b)
        x_t = torch.cat([self.schedule.q_sample(x_0, t, drawn) for t, drawn in zip(steps, noise, strict=True)])
        if self._executor is None or self._executor.program.batch != batch:
            self._executor = self._bound(batch)
        inputs = {"x_0": x_0, "x_t": x_t}
        out = self._executor.run(**{name: x.permute(0, 2, 3, 1).to(self.dtype) for name, x in inputs.items()})
        # A copy made outside inference mode is one that a gradient can be taken through.
        pair, eps = (out[name].clone().permute(0, 3, 1, 2) for name in ("pair", "out"))
        return pair, eps.unflatten(0, (2, batch))

    def forget(self) -> None:
        """The denoiser's weights have changed."""
        self._executor = None

    def _bound(self, batch: int) -> Executor:
        program = Lowering(self.model, self.dtype).reconstruction_program(batch)
        arena = plan(program)
        if self._block is None or self._block.nbytes < arena.nbytes:
            self._block = allocate(arena.nbytes, torch.device("cpu"))
        return Executor(program, backend="cpu", arena=arena, block=self._block)
