"""Exponential moving average of weights."""

from __future__ import annotations

import torch
from torch import nn


class Ema:
    """Keeps `average`, a module of the same structure, as the moving average of `source`.

    The decay of update k is min(`decay`, (1 + k) / (10 + k)): the horizon is about a tenth of the updates so far, so
    that short runs are not held back by their random start. Floating-point buffers (BatchNorm statistics) are averaged
    with the same decay, because statistics that belong to averaged weights are closest to averaged statistics.
    With `decay` 0, `update` does nothing.
    """

    def __init__(self, source: nn.Module, average: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        ours, theirs = _floats(average), _floats(source)
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            raise ValueError("the averaged module has another structure than its source")
        self._pairs = ours, theirs

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average one step towards the source's present weights."""
        if not self.decay:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(*self._pairs, 1 - decay)


def _floats(module: nn.Module) -> list[torch.Tensor]:
    buffers = (b for b in module.buffers() if b.is_floating_point())
    return [p.detach() for p in module.parameters()] + list(buffers)
