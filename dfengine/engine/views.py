"""Several views of each image: what is seen in one place of the window alone is no anomaly.

A false alarm of the segmentation network often hangs on where a structure lies on its grid of strides; a defect does
not. So the model looks at each image as it is and shifted, and a pixel of the map is the smallest that those views
give it that see it (docs/method.md, "Score").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.engine.modules import Output, image_score

SHIFT = 1 / 32
"""How far views are away from the image, of its side."""


def offsets(views: int, size: int) -> list[tuple[int, int]]:
    """(rows, columns) by which each view of an image of `size` pixels is shifted; the first is (0, 0)."""
    step = max(1, round(SHIFT * size))
    return [(0, 0), (step, 0), (-step, 0), (0, step), (0, -step)][:views]


def run_views(run: Callable[[Tensor], Output], unit: Tensor, views: int, top_k: float) -> Output:
    """What `run` gives for unit images (B, S, S, C), its maps the smallest of the views' and its scores those of
    these maps; the reconstruction is that of the image as it is. The views are run one after the other."""
    whole = run(unit)
    if views == 1:
        return whole
    size = unit.shape[1]
    least = whole.anomaly_map.clone()  # a runner may write the next result where it left this one
    reconstruction = whole.reconstruction.clone()
    for dy, dx in offsets(views, size)[1:]:
        seen = run(shifted(unit, dy, dx)).anomaly_map
        here, there = _overlap(size, dy, dx)
        least[(slice(None), *here)] = torch.minimum(least[(slice(None), *here)], seen[(slice(None), *there)])
    return Output(least, reconstruction, image_score(least, top_k))


def shifted(unit: Tensor, dy: int, dx: int) -> Tensor:
    """Images (B, S, S, C) whose pixel (y, x) is (y + dy, x + dx) of the given ones, mirrored at their edges."""
    size, reach = unit.shape[1], max(abs(dy), abs(dx))
    padded = F.pad(unit.permute(0, 3, 1, 2), (reach,) * 4, mode="reflect").permute(0, 2, 3, 1)
    top, left = reach + dy, reach + dx
    return padded[:, top : top + size, left : left + size].contiguous()


def _overlap(size: int, dy: int, dx: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where the image and a view of it show the same: rows and columns of the image, and of the view."""
    here = tuple(slice(max(0, d), min(size, size + d)) for d in (dy, dx))
    there = tuple(slice(max(0, -d), min(size, size - d)) for d in (dy, dx))
    return here, there
