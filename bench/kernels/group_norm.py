"""What is timed for the op `group_norm` with GELU: the forward and the backward pass together (bench/kernels.py)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from dfengine.kernels import group_norm

SHAPES = [(16, 64, 64, 16), (16, 32, 32, 32), (16, 8, 8, 64), (1, 256, 256, 32)]
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
CHANNELS_OF_A_GROUP = 4


def cases(device: str):
    """Yield (shape, dtype, bytes moved at least, make, rivals).

    make() returns fresh tensors (x, dy, y, dx, weight, bias); rivals maps a name to a function of those, "kernel" being
    the op. At least moved: x read twice, dy read, y and dx written.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
            weight, bias = (torch.randn(shape[-1], generator=generator).to(device) for _ in range(2))
            return x, dy, torch.zeros_like(x), torch.zeros_like(x), weight, bias

        yield shape, dtype, 5 * make()[0].nbytes, make, {"kernel": kernel, "torch": torch_autograd}


def kernel(x, dy, y, dx, weight, bias) -> None:
    groups = x.shape[-1] // CHANNELS_OF_A_GROUP
    mean, rstd = (torch.empty((x.shape[0], groups), device=x.device) for _ in range(2))
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    group_norm.OP(x, weight, bias, None, groups, 1e-5, "gelu", y, mean, rstd)
    group_norm.BACKWARD(dy, x, weight, bias, None, mean, rstd, "gelu", dx, dweight, dbias, None)


def torch_autograd(x, dy, y, dx, weight, bias) -> None:
    """What the op replaces in torch eager; on a device that wants one dtype, the parameters are converted."""
    if x.device.type != "cpu":
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    leaves = [t.detach().requires_grad_() for t in (x.permute(0, 3, 1, 2), weight, bias)]
    result = F.gelu(F.group_norm(leaves[0], x.shape[-1] // CHANNELS_OF_A_GROUP, leaves[1], leaves[2]))
    torch.autograd.grad(result, leaves, dy.permute(0, 3, 1, 2))


def compilations():
    """Nothing yet: the op has no Triton kernel."""
    return iter(())
