"""Float32 products are what a precision says, whichever way a user set torch's switches."""

from __future__ import annotations

import pytest
import torch

from dfengine.engine.arithmetic import float32_products

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


@pytest.fixture(autouse=True)
def kept():
    """Torch's defaults afterwards, by both ways."""
    yield
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision, CUDNN.conv.fp32_precision = "none", "tf32"
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("mine", [False, True])
def test_the_older_switches_come_back(precision, mine):
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = mine
    with pytest.raises(KeyError), float32_products(precision):
        assert MATMUL.allow_tf32 == (precision == "tf32")
        raise KeyError
    assert MATMUL.allow_tf32 == CUDNN.allow_tf32 == mine


@pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="this torch has the older switches alone")
@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("mine", ["ieee", "tf32"])
def test_the_newer_switches_come_back(precision, mine):
    MATMUL.allow_tf32, CUDNN.allow_tf32 = mine != "tf32", mine != "tf32"
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = mine  # differs from what the older way said
    with float32_products(precision):
        assert MATMUL.fp32_precision == CUDNN.conv.fp32_precision == ("tf32" if precision == "tf32" else "ieee")
    assert MATMUL.fp32_precision == CUDNN.conv.fp32_precision == mine
