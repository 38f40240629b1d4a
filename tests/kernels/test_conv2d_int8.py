"""conv2d of a quantized weight on the CPU: both products of bytes against float64, on the cases of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dfengine import native
from dfengine.kernels import CannotRunError, conv2d, conv2d_cpu
from dfengine.kernels.quantization import Quantization
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.conv2d_cases import FEATURES, Case, check_contract, make, quantized, run_into_nan, through_torch
from tests.kernels.test_conv2d_cpu import LARGER

STEPS = [
    # channels that divide into steps of 48, 60, 36 and 64 bytes of a tile, and that fill no word
    (Case((1, 9, 33), (16,), 16, 3), 33),
    (Case((1, 5, 9), (20,), 32, 3), 45),
    (Case((1, 5, 9), (36,), 16, 3, 2), 9),
    (Case((2, 9, 17), (64,), 48, 3, residual="none"), 17),
    (Case((2, 9, 17), (7,), 5, 3, 2, True, "gelu"), 17),
    # a 1x1 kernel, whose input cannot be read where it lies
    (Case((2, 15, 17), (64,), 40, 1, residual="none"), 17),
]
AFTER = ("none", "gelu", "silu", "relu", "sigmoid")


@pytest.fixture(params=conv2d_cpu.BYTE_PRODUCTS)
def launcher(request):
    """A product of bytes; skips with the reason where it does not run here."""
    if not native.available():
        pytest.skip(native.status())
    if request.param not in conv2d_cpu.byte_products():
        pytest.skip(f"this processor does not have the instructions of {request.param}")
    return launchers.Launcher("cpu", "cpu", dict(product=request.param))


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_meet_the_numeric_contract(launcher, case):
    check_contract(launcher, case, torch.bfloat16, format="int8")


@pytest.mark.parametrize("case, tile_pixels", LARGER + STEPS, ids=str)
def test_larger_cases_meet_it(launcher, case, tile_pixels):
    check_contract(launcher, case, torch.bfloat16, tile_pixels, format="int8")


@pytest.mark.parametrize("act", AFTER)
@pytest.mark.parametrize("residual", [None, "none", "up"])
def test_what_follows_the_sums(launcher, act, residual):
    case = Case((2, 16, 18), (24,), 40, 3, 1, True, "silu", residual=residual, act=act)
    check_contract(launcher, case, torch.bfloat16, 18, format="int8")


@pytest.mark.parametrize("prologue", ["gelu", "silu"])
@pytest.mark.parametrize("spread, place", [(1.0, -2.0), (1.0, -4.0), (0.3, -4.0), (0.01, 0.0)])
def test_activations_have_the_digits_of_a_small_range(launcher, prologue, spread, place):
    """Where all inputs are negative a range is narrow, and a step of it far less than an error of 1e-3."""
    x, x2, weight, bias, _, _, _, *rest = make(Case((1, 12, 17), (32,), 16, 3, 1, True, prologue), torch.bfloat16)
    scale, offset = torch.full((1, 32), spread), torch.full((1, 32), place + 2.3 * spread)
    arguments = quantized((x, x2, weight, None, scale, offset, prologue, *rest), "int8", share=1.0)
    y, _ = run_into_nan(launcher, arguments)
    assert_numeric_contract(y, through_torch(arguments, torch.float64), through_torch(arguments, torch.bfloat16))


def test_sums_that_would_not_fit_are_refused():
    of = Quantization("int8", -1, 1)
    for channels, fits in ((7360, True), (7376, False)):
        x = torch.zeros((1, 1, 1, channels), dtype=torch.bfloat16)
        weight = conv2d.ConvWeight.pack(torch.ones((16, channels, 3, 3)), quantization=of)
        y = torch.zeros((1, 1, 1, 16), dtype=torch.bfloat16)
        rest = (x, None, weight, None, None, None, "none", "none", None, "none", "none", y, None, 0)
        if fits and native.available() and conv2d_cpu.byte_products():
            conv2d.OP.implementations["cpu"].can_run(*rest)
        else:
            with pytest.raises(CannotRunError, match="do not fit int32" if not fits else ""):
                conv2d.OP.implementations["cpu"].can_run(*rest)


def test_y_agrees_bit_for_bit_between_products_and_batches(launcher):
    """Sums of integers are exact; moments are merged by the blocks of a product."""
    case = Case((5, 19, 23), (16, 8), 24, 3, 2, True, "gelu", "none", "none", "gelu")
    arguments = quantized(make(case, torch.bfloat16), "int8")
    first, again = (run_into_nan(launcher, arguments, 23) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    for product in conv2d_cpu.byte_products():
        other = run_into_nan(replace(launcher, options=dict(product=product)), arguments, 23)
        assert torch.equal(other[0], first[0])
    order = [4, 0, 2]
    of_samples = (0, 1, 3, 4, 5, 8)  # x, x2, bias, scale, offset, residual
    part = tuple(v[order].contiguous() if i in of_samples else v for i, v in enumerate(arguments))
    y, moments = run_into_nan(launcher, part, 23)
    assert torch.equal(y, first[0][order]) and torch.equal(moments, first[1][order])


def test_threads_change_nothing(launcher):
    threads, results = torch.get_num_threads(), []
    arguments = quantized(
        make(Case((1, 70, 50), (24,), 96, 3, 1, True, "gelu", residual="none"), torch.bfloat16), "int8"
    )
    try:
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            results.append(run_into_nan(launcher, arguments, 50))
    finally:
        torch.set_num_threads(threads)
    for y, moments in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(moments, results[0][1])


def test_a_byte_for_each_of_256_values(launcher):
    """An identity as 1x1 weight leaves the rounded input, and its ends of what is beyond."""
    of = Quantization("int8", -100, 155)  # steps of 1, which bfloat16 holds
    z = torch.cat((torch.linspace(-120, 180, 4001), torch.tensor([-1e4, 1e4])))
    x = z.bfloat16().view(1, -1, 1, 1)
    weight = conv2d.ConvWeight.pack(torch.ones((1, 1, 1, 1)), quantization=of)
    y = torch.full_like(x, float("nan"))
    launcher.run(conv2d.OP, x, None, weight, None, None, None, "none", "none", None, "none", "none", y, None, 0)
    torch.testing.assert_close(y.float(), of.input(x.float()), rtol=0, atol=1e-5)
    assert y.unique().numel() == 256


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_a_disposable_weight_is_held_once():
    if not conv2d_cpu.byte_products():
        pytest.skip("this processor has no product of bytes")
    arguments = quantized(make(Case((1, 5, 6), (16,), 24, act="gelu"), torch.bfloat16), "int8")
    weight, y = replace_weight(arguments[2]), torch.full((2, 1, 5, 6, 24), float("nan")).bfloat16()
    cpu = conv2d.OP.implementations["cpu"]
    run, again = (cpu.bind(*arguments[:2], weight, *arguments[3:], to, None, 0) for to in y)
    run()
    again()
    assert weight.packed.is_meta and torch.equal(y[0], y[1]) and y.isfinite().all()
    with pytest.raises(CannotRunError, match="released"):
        weight.taps()


def replace_weight(weight: conv2d.ConvWeight) -> conv2d.ConvWeight:
    return conv2d.ConvWeight(weight.packed.clone(), weight.dilation, True, weight.quantization, weight.unit)


def test_who_multiplies_a_quantized_weight():
    arguments = quantized(make(FEATURES[0], torch.bfloat16), "int8")
    y = torch.zeros(conv2d.output_shape(arguments[0], arguments[2], arguments[7]), dtype=torch.bfloat16)
    rest = (*arguments, y, None, 0)
    served = native.available() and conv2d_cpu.byte_products()
    assert conv2d.OP.choose(*rest) == ("cpu" if served else "reference")
    with pytest.raises(CannotRunError, match="in int8, which is not multiplied here"):
        conv2d.OP.choose(*rest, backend="library")
    if served:
        assert [c["product"] for c in conv2d.OP.implementations["cpu"].configurations(*rest)] == [
            *conv2d_cpu.byte_products()
        ]
        single = quantized(make(FEATURES[0], torch.float32), "int8")
        assert conv2d.OP.choose(*single, y.float(), None, 0) == "reference"
        other = quantized(make(FEATURES[0], torch.bfloat16), "fp8")
        with pytest.raises(CannotRunError, match="fp8 needs a GPU"):
            conv2d.OP.choose(*other, y, None, 0, backend="cpu")


def test_a_recorded_call_refuses_it():
    arguments = quantized(make(FEATURES[0], torch.bfloat16), "int8")

    @torch.compile(backend="eager", fullgraph=False)
    def recorded(x):
        return conv2d.conv2d(x, arguments[2])

    with pytest.raises(Exception, match="in int8, which is not multiplied here"):
        recorded(arguments[0])
