"""The fast training modules against the plain ones, in float64 and as installed in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dfengine.models.blocks import AttentionBlock, GroupNorm, ResBlock
from dfengine.training.group_norm import FastAttentionBlock, FastBatchNorm, FastGroupNorm, FastResBlock, speed_up
from tests.helpers import tiny_model


def redrawn(module: nn.Module) -> nn.Module:
    """With random parameters: several start at zero and would hide an error."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`module` in float64, and its fast form."""
    fast = copy.deepcopy(redrawn(module))
    speed_up(fast)
    return module.double(), fast


def assert_alike(plain: nn.Module, fast: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Outputs and the gradients of inputs and parameters agree."""
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    singles = [t.detach().clone().requires_grad_() for t in inputs]
    expected, have = plain(*doubles), fast(*singles)
    dy = torch.randn(expected.shape)
    parameters = dict(plain.named_parameters())
    assert list(parameters) == [name for name, _ in fast.named_parameters()]
    want = torch.autograd.grad(expected, [*doubles, *parameters.values()], dy.double())
    got = torch.autograd.grad(have, [*singles, *fast.parameters()], dy)
    names = ["output", *(f"input {i}" for i in range(len(inputs))), *parameters]
    for name, a, b in zip(names, [have, *got], [expected, *want], strict=True):
        error = (a.double() - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), (name, error)


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("norm", [GroupNorm, nn.BatchNorm2d])
def test_a_norm_takes_in_its_activation(norm, act):
    plain, fast = pair(nn.Sequential(nn.Conv2d(3, 16, 3), norm(16), act()))
    assert isinstance(fast[1], FastGroupNorm | FastBatchNorm) and isinstance(fast[2], nn.Identity)
    assert_alike(plain, fast, torch.randn(3, 3, 9, 7).contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("options", [{}, {"resample": "down"}, {"channel_attention": True, "spatial_attention": True}])
@pytest.mark.parametrize("channels", [(8, 8), (8, 16)])
def test_residual_block(options, channels):
    plain, fast = pair(ResBlock(*channels, 12, "gelu", **options))
    assert type(fast) is FastResBlock
    assert_alike(plain, fast, torch.randn(2, 8, 6, 10) - 2.3, torch.randn(2, 12))


def test_attention_block():
    plain, fast = pair(AttentionBlock(16, 4))
    assert type(fast) is FastAttentionBlock
    x = torch.randn(2, 16, 4, 6) - 2.3
    assert_alike(plain, fast, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = fast(x.bfloat16())
    assert have.dtype == torch.bfloat16
    torch.testing.assert_close(have.double(), plain(x.double()), rtol=0.05, atol=0.05)


def test_batch_norm_keeps_the_running_statistics():
    plain, fast = pair(nn.Sequential(nn.BatchNorm2d(6), nn.GELU()))
    for step in range(3):
        x = torch.randn(2, 6, 5, 4) * (1 + step) - 2.3
        plain(x.double()), fast(x)
    for name, value in plain[0].named_buffers():
        torch.testing.assert_close(dict(fast[0].named_buffers())[name].double(), value.double(), rtol=1e-5, atol=1e-5)
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(fast.eval()(x).double(), plain.eval()(x.double()), rtol=1e-4, atol=1e-4)


def test_speed_up_keeps_names_and_outputs_of_a_model():
    model = redrawn(tiny_model().train())
    fast = copy.deepcopy(model)
    speed_up(fast)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert {type(m) for m in fast.modules() if isinstance(m, GroupNorm)} == {FastGroupNorm}
    assert {type(m) for m in fast.modules() if isinstance(m, nn.BatchNorm2d)} == {FastBatchNorm}
    pixels, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    for have, want in (
        (fast.reconstruction(pixels, t), model.reconstruction(pixels, t)),
        (fast.segmentation(torch.cat((pixels, pixels), 1)), model.segmentation(torch.cat((pixels, pixels), 1))),
    ):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@pytest.mark.parametrize("name", ["reconstruction", "segmentation"])
def test_a_model_without_the_compiled_kernels(name, monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    plain = redrawn(getattr(tiny_model().train(), name))
    fast = copy.deepcopy(plain)
    speed_up(fast)
    denoiser = name == "reconstruction"
    inputs = [torch.randn(2, 3, 32, 32), torch.tensor([3, 700])] if denoiser else [torch.randn(2, 6, 32, 32)]
    have, want = fast(*inputs), plain(*inputs)
    torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())
    have.sum().backward()
    assert all(parameter.grad is not None for parameter in fast.parameters())
