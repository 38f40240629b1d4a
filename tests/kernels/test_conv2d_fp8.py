"""conv2d of a weight in fp8 by the Triton kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from dfengine.kernels import CannotRunError, conv2d
from dfengine.kernels.conv2d_triton import HALF_CONFIGURATIONS
from dfengine.kernels.quantization import Quantization
from tests.kernels import launchers
from tests.kernels.conv2d_cases import EVERY_TILE, FEATURES, Case, check_contract, make, quantized, run_into_nan

CHEAP = f"triton-{len(HALF_CONFIGURATIONS) - 1}"


@pytest.fixture(params=launchers.names(HALF_CONFIGURATIONS, cpu=False, cuda=False)[1:])
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, HALF_CONFIGURATIONS)


def test_every_configuration_meets_the_numeric_contract(launcher):
    for number, case in enumerate(EVERY_TILE):
        outputs = case.outputs or launcher.options["configuration"]["BLOCK_N"]
        wide = Case(**{**vars(case), "outputs": outputs})
        check_contract(launcher, wide, torch.float16, seed=number, format="fp8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_meet_it(monkeypatch, case, dtype):
    check_contract(launchers.launcher(CHEAP, monkeypatch, HALF_CONFIGURATIONS), case, dtype, format="fp8")


def test_every_value_of_e4m3(monkeypatch):
    """An identity as 1x1 weight leaves the rounded input: normal, subnormal and cut off."""
    launcher = launchers.launcher(CHEAP, monkeypatch, HALF_CONFIGURATIONS)
    values = torch.arange(-448 * 4, 448 * 4 + 1, dtype=torch.float32)
    z = torch.cat((values / 3.7, values / 448 / 64, values / 448 / 2048)).half()
    x = torch.zeros((1, len(z), 1, 16), dtype=torch.float16)
    x[0, :, 0, 3] = z
    of = Quantization("fp8", 0, 448)  # steps of 1
    taps = torch.zeros((16, 16, 1, 1))
    taps[5, 3] = 1
    weight = conv2d.ConvWeight.pack(taps, quantization=of)
    tile = launcher.options["configuration"]["BLOCK_M"]
    y, _ = run_into_nan(launcher, (x, None, weight, *[None] * 3, "none", "none", None, "none", "none"), tile)
    torch.testing.assert_close(y[0, :, 0, 5].float(), of.input(z.float()), rtol=1e-3, atol=1e-7)


def test_who_multiplies_it(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    arguments = quantized(make(FEATURES[0], torch.float16), "fp8")
    y = torch.zeros(conv2d.output_shape(arguments[0], arguments[2], arguments[7]), dtype=torch.float16)
    triton = conv2d.OP.implementations["triton"]
    triton.can_run(*arguments, y, None, 0)
    for other, dtype, format in ((y.float(), torch.float32, "fp8"), (y, torch.float16, "int8")):
        wrong = quantized(make(FEATURES[0], dtype), format)
        with pytest.raises(CannotRunError, match=f"in {format}, which is not multiplied here"):
            triton.can_run(*wrong, other, None, 0)
