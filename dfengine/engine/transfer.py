"""Batches to the device of a runner and results back, without waiting where the device can copy by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

Arrays = tuple[np.ndarray, ...]


class HostTransfer:
    """On a CPU nothing is copied; a batch is done when `download` has returned."""

    depth = 1
    """How many batches may be under way before the first is waited for."""

    def within(self) -> AbstractContextManager:
        """What a thread that runs batches, or prepares images for them, works in."""
        return nullcontext()

    def upload(self, images: Sequence[Tensor]) -> Tensor:
        """Images (S, S, 3) as one batch."""
        return torch.stack(tuple(images))

    def download(self, tensors: Sequence[Tensor]) -> Callable[[], Arrays]:
        """A function that gives `tensors` as arrays, which may share memory with them."""
        arrays = tuple(tensor.numpy() for tensor in tensors)
        return lambda: arrays


class CudaTransfer:
    """Copies on two streams of their own, through pinned memory, beside the work of the caller's current stream.

    A result is waited for only where it is read. torch keeps pinned and device memory from being used again before
    the copies that read them are done.
    """

    depth = 2

    def __init__(self, device: torch.device):
        self._device = device
        self._compute = torch.cuda.current_stream(device)
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def within(self) -> AbstractContextManager:
        return torch.cuda.stream(self._compute)

    def upload(self, images: Sequence[Tensor]) -> Tensor:
        """Images (S, S, 3), in host memory or on any device, as one batch on the device."""
        if any(image.device.type != "cpu" for image in images):
            return torch.stack([image.to(self._device) for image in images])
        pinned = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype, pin_memory=True)
        torch.stack(tuple(images), out=pinned)
        with torch.cuda.stream(self._up):
            batch = pinned.to(self._device, non_blocking=True)
        self._compute.wait_stream(self._up)
        batch.record_stream(self._compute)
        return batch

    def download(self, tensors: Sequence[Tensor]) -> Callable[[], Arrays]:
        """A function that waits for `tensors` and gives them as arrays in pinned memory: copy what is kept."""
        self._down.wait_stream(self._compute)
        with torch.cuda.stream(self._down):
            copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        for tensor in tensors:
            tensor.record_stream(self._down)
        done = self._down.record_event()

        def arrays() -> Arrays:
            done.synchronize()
            return tuple(copy.numpy() for copy in copies)

        return arrays


def transfer_of(device: torch.device) -> HostTransfer | CudaTransfer:
    """How batches reach `device`, in the order of the caller's current stream."""
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer()
