"""What is timed for the op `group_norm` with GELU (bench/kernels.py): the forward pass alone, and training."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from bench.kernels import Case
from dfengine.kernels import group_norm

SHAPES = [(1, 256, 256, 128), (1, 64, 64, 256), (1, 8, 8, 512)]
TRAINING_SHAPES = [(16, 64, 64, 16), (16, 32, 32, 32), (16, 8, 8, 64), (1, 256, 256, 32)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


def groups_of(channels: int) -> int:
    return min(32, channels // 4)


def cases(device: str):
    """Yield a `Case` of each kind.

    make() returns fresh tensors; rivals maps a name to a function of those, "kernel" being the op. At least moved by
    the forward pass: x read twice, y written; in training, both passes together: x read twice, dy read, y and dx
    written.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            weight, bias = (torch.randn(shape[-1], generator=generator).to(device) for _ in range(2))
            statistics = (torch.zeros((shape[0], groups_of(shape[-1])), device=device) for _ in range(2))
            return x, torch.zeros_like(x), weight, bias, *statistics

        rivals = {"kernel": forward, "torch": torch_forward}
        yield Case(shape, dtype, 3 * make()[0].nbytes, make, rivals)

    for shape, dtype in itertools.product(TRAINING_SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make_training(shape=shape, dtype=dtype, generator=generator):
            x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
            weight, bias = (torch.randn(shape[-1], generator=generator).to(device) for _ in range(2))
            return x, dy, torch.zeros_like(x), torch.zeros_like(x), weight, bias

        rivals = {"kernel": training, "torch": torch_training}
        yield Case(shape, dtype, 5 * make_training()[0].nbytes, make_training, rivals, "training")


def forward(x, y, weight, bias, mean, rstd) -> None:
    group_norm.OP(x, weight, bias, None, mean.shape[1], 1e-5, "gelu", y, mean, rstd)


def torch_forward(x, y, weight, bias, mean, rstd) -> None:
    """What the op replaces in torch eager; with parameters of x's dtype."""
    F.gelu(F.group_norm(x.permute(0, 3, 1, 2), mean.shape[1], weight.to(x.dtype), bias.to(x.dtype)))


def training(x, dy, y, dx, weight, bias) -> None:
    groups = groups_of(x.shape[-1])
    mean, rstd = (torch.empty((x.shape[0], groups), device=x.device) for _ in range(2))
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    group_norm.OP(x, weight, bias, None, groups, 1e-5, "gelu", y, mean, rstd)
    group_norm.BACKWARD(dy, x, weight, bias, None, mean, rstd, "gelu", dx, dweight, dbias, None)


def torch_training(x, dy, y, dx, weight, bias) -> None:
    """The same through autograd; on a device that wants one dtype, the parameters are converted."""
    if x.device.type != "cpu":
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x.permute(0, 3, 1, 2), weight, bias)]
    result = F.gelu(F.group_norm(leaves[0], groups_of(x.shape[-1]), leaves[1], leaves[2]))
    torch.autograd.grad(result, leaves, dy.permute(0, 3, 1, 2))


def compilations():
    """None of its own: on a GPU the op runs the kernels of its three stages."""
    return iter(())
