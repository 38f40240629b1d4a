"""How values become eight bits and what these mean."""

from __future__ import annotations

import math

import pytest
import torch

from dfengine.kernels.quantization import FORMATS, Quantization

RANGES = [(-0.17, 5.5), (0.0, 3.0), (-2.0, 0.0), (-7.0, 7.0), (-1e-3, 1e4)]


@pytest.mark.parametrize("low, high", RANGES)
def test_bytes_are_steps_of_the_range_and_hold_zero(low, high):
    of = Quantization("int8", low, high)
    p = torch.linspace(low, high, 1001, dtype=torch.float64)
    assert (of.input(p) - p).abs().max() <= of.step * (1 + 1e-9)  # half a step, and as much at an end
    inside = (p > low + of.step) & (p < high - of.step)
    assert (of.input(p) - p)[inside].abs().max() <= of.step / 2 + 1e-12
    assert 0 <= of.zero <= 255 and of.input(torch.zeros(1)).item() == 0
    assert torch.equal(of.input(of.input(p)), of.input(p)) and of.input(p).unique().numel() <= 256
    far = torch.tensor([-1e9, 1e9])
    assert torch.equal(of.input(far), of.input(torch.tensor([low, high])))


@pytest.mark.parametrize("low, high", RANGES)
def test_fp8_keeps_digits(low, high):
    of = Quantization("fp8", low, high)
    p = torch.linspace(low, high, 1001, dtype=torch.float64)
    large = p.abs() > of.step  # below, steps are even
    assert ((of.input(p) - p).abs() <= p.abs() / 16 + 1e-9)[large].all() and of.zero == 0
    assert of.input(torch.tensor([1e9])).item() == pytest.approx(max(high, -low))


@pytest.mark.parametrize("format", FORMATS)
def test_weights_have_a_scale_for_each_output(format):
    taps = torch.randn((3, 3, 8, 5), generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 30, 0, 1e-12])
    rounded, unit = Quantization(format, -1, 1).weight(taps)
    assert rounded.dtype == (torch.int8 if format == "int8" else torch.float8_e4m3fn) and unit.shape == (5,)
    error = (rounded.float() * unit - taps).abs().amax(dim=(0, 1, 2))
    largest = taps.abs().amax(dim=(0, 1, 2))
    assert (error <= largest / (254 if format == "int8" else 27)).all() and not error[3]
    reached = (rounded.float() * unit).abs().amax(dim=(0, 1, 2))
    torch.testing.assert_close(reached, largest)


@pytest.mark.parametrize("low, high", [(1, 2), (-2, -1), (0, 0), (-math.inf, 1), (0, math.nan), (0, 1e-323)])
def test_what_is_no_range_is_refused(low, high):
    with pytest.raises(ValueError, match="no range around 0"):
        Quantization("int8", low, high)
    with pytest.raises(ValueError, match="none of int8, fp8"):
        Quantization("int4", -1, 1)
