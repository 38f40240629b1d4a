"""Several training processes started by torchrun: one model replica each, gradients averaged."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from dfengine.devices import resolve_device


class World:
    """The processes of a run. Without torchrun: one process, and every method is a no-op on its argument.

    `rank`, `size`, `device`. Use as a context manager; it leaves the process group it has joined.
    """

    def __init__(self, device: str = "auto"):
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.size > 1 else 0
        self.device = _device(device)
        self._joined = False

    def __enter__(self) -> World:
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self._joined = True
        return self

    def __exit__(self, *_) -> None:
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces every gradient by its mean over the processes: one all-reduce of one flat buffer.

        All processes end with the same bits, because they receive the same reduced buffer.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [piece.view(g.shape) for piece, g in zip(pieces, gradients, strict=True)])

    def agree(self, stop: bool, seconds: float) -> tuple[bool, float]:
        """(does any process want to stop, the main process's `seconds`): the same answer on every process."""
        if self.size == 1:
            return stop, seconds
        shared = torch.tensor([float(stop), seconds if self.is_main else 0.0], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared[0]), float(shared[1])

    def alone(self) -> World:
        """This process by itself, on its device: a world of one, in which nothing waits for the others."""
        world = copy.copy(self)
        world.rank, world.size, world._joined = 0, 1, False
        return world

    def minimum(self, value: float) -> float:
        """The smallest `value` of all processes."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return float(shared)

    def from_main(self, text: str) -> str:
        """The main process's `text`."""
        if self.size == 1:
            return text
        shared = [text]
        dist.broadcast_object_list(shared)
        return shared[0]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def _device(name: str) -> torch.device:
    """The device called `name`; under torchrun, "cuda" is the GPU of this process's local rank."""
    device = resolve_device(name)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = resolve_device(f"cuda:{local if device.index is None else device.index}")
        torch.cuda.set_device(device)
    return device
