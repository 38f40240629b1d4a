"""copy: y = x, converted to y's type; x may have one row for all rows of y.

Shapes: x and y (N, ...), or x (1, ...) for every N. Layouts: any. Types: any that torch converts.
The copy is torch's. The engine takes it where a loop of a program (mode "iterative") brings values of a step to a
fixed place, and where the float32 image of the reverse chain becomes the input of a half-precision network.
Backends: reference (any device).
"""

from __future__ import annotations

from torch import Tensor

from dfengine.kernels import registry
from dfengine.kernels.registry import Op


def _run_reference(x: Tensor, y: Tensor) -> None:
    y.copy_(x)


OP = Op("copy")
OP.register("reference", _run_reference, registry.always, registry.always)
