"""Channel slices for the tests: tensors inside wider buffers, poisoned or filled."""

from __future__ import annotations

import torch


def widened(tensor: torch.Tensor, extra: int, before: int = 0) -> torch.Tensor:
    """A copy of `tensor` as a channel slice, with `extra` more channels of NaN around it, `before` of them first."""
    shape = (*tensor.shape[:-1], tensor.shape[-1] + extra)
    buffer = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = buffer[..., before : before + tensor.shape[-1]]
    view.copy_(tensor)
    return view


def poisoned(shape, dtype, device="cpu", extra: int = 0, before: int = 0) -> torch.Tensor:
    """NaN of this shape, a channel slice with `extra` more channels around it."""
    return widened(torch.full(tuple(shape), float("nan"), dtype=dtype, device=device), extra, before)


def rest_is_nan(view: torch.Tensor) -> bool:
    """Whether nothing was written around a channel slice made by `poisoned`."""
    buffer = view._base.clone()
    first = view.storage_offset() % buffer.shape[-1]
    buffer[..., first : first + view.shape[-1]] = float("nan")
    return bool(buffer.isnan().all())
