from __future__ import annotations

import pytest
import torch

from dfengine.models.blocks import GroupNorm
from dfengine.training.group_norm import FastGroupNorm, speed_up
from tests.helpers import tiny_model


def norms(channels: int) -> tuple[GroupNorm, FastGroupNorm]:
    torch.manual_seed(0)
    plain, fast = GroupNorm(channels), FastGroupNorm(channels)
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (3, 16, 8, 8), (1, 48, 1, 1)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_against_float64(shape, layout):
    plain, fast = norms(shape[1])
    x = (torch.randn(shape) - 2.3).contiguous(memory_format=layout).requires_grad_()
    dy = torch.randn(shape)
    dx, dweight, dbias = torch.autograd.grad(fast(x), (x, fast.weight, fast.bias), dy)
    exact, x64 = plain.double(), x.detach().double().requires_grad_()
    expected = torch.autograd.grad(exact(x64), (x64, exact.weight, exact.bias), dy.double())
    assert torch.equal(fast(x), GroupNorm.forward(fast, x))
    for have, want in zip((dx, dweight, dbias), expected, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-4)


def test_bfloat16_gradients_stay_as_close_as_rounding_allows():
    plain, fast = norms(16)
    x = (torch.randn(2, 16, 8, 8) - 2.3).bfloat16().requires_grad_()
    dy = torch.randn(x.shape).bfloat16()
    (dx,) = torch.autograd.grad(fast(x), x, dy)
    exact, x64 = plain.double(), x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(x64), x64, dy.double())
    assert dx.dtype == torch.bfloat16
    assert (dx.double() - expected).abs().max() < 8e-3 * expected.abs().max()


def test_gradients_keep_their_digits_where_the_mean_is_large():
    """Contiguous: torch's own statistics of a channels-last tensor are not exact there."""
    plain, fast = norms(16)
    x = (100 + 0.1 * torch.randn(4, 16, 32, 32)).requires_grad_()
    dy = torch.randn(x.shape)
    dx, dweight, _ = torch.autograd.grad(fast(x), (x, fast.weight, fast.bias), dy)
    exact, x64 = plain.double(), x.detach().double().requires_grad_()
    expected_dx, expected_dweight = torch.autograd.grad(exact(x64), (x64, exact.weight), dy.double())
    assert (dx - expected_dx).abs().max() < 1e-5 * expected_dx.abs().max()
    assert (dweight - expected_dweight).abs().max() < 1e-4 * expected_dweight.abs().max()


def test_speed_up_changes_every_norm_and_no_output():
    model = tiny_model()
    pixels, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    before, names = model.reconstruction(pixels, t), list(model.state_dict())
    speed_up(model)
    kinds = {type(m) for m in model.modules() if isinstance(m, GroupNorm)}
    assert kinds == {FastGroupNorm}
    assert torch.equal(model.reconstruction(pixels, t), before)
    assert list(model.state_dict()) == names
