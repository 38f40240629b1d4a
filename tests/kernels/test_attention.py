"""attention against its formula, written out."""

from __future__ import annotations

import pytest
import torch

from dfengine.kernels import attention
from tests.kernels.contract import assert_numeric_contract


def written_out(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    batch, height, width, channels = qkv.shape
    depth = channels // (3 * heads)
    y = torch.empty((batch, height * width, heads, depth), dtype=qkv.dtype)
    for n in range(batch):
        for head in range(heads):
            first = 3 * depth * head
            q, k, v = (qkv[n].reshape(-1, channels)[:, first + i * depth :][:, :depth] for i in range(3))
            y[n, :, head] = torch.softmax(q @ k.T / depth**0.5, dim=1) @ v
    return y.reshape(batch, height, width, heads * depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape, heads", [((1, 1, 1, 12), 2), ((2, 5, 3, 24), 4), ((3, 8, 8, 96), 1)])
def test_meets_the_numeric_contract(dtype, shape, heads):
    qkv = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) - 0.3).to(dtype)
    y = torch.full((*shape[:3], shape[3] // 3), float("nan"), dtype=dtype)
    attention.OP(qkv, heads, y)
    assert_numeric_contract(y, written_out(qkv.double(), heads), written_out(qkv, heads))
    assert torch.equal(y, attention.attention(qkv, heads))


@pytest.mark.parametrize("qkv, heads, message", [
    (torch.zeros(2, 3, 12), 1, r"\(N, H, W, 3 C\)"),
    (torch.zeros(1, 2, 2, 12), 3, "3 heads"),
    (torch.zeros(1, 12, 2, 2).permute(0, 2, 3, 1), 2, "contiguous"),
])  # fmt: skip
def test_wrong_arguments_are_refused(qkv, heads, message):
    with pytest.raises(ValueError, match=message):
        attention.attention(qkv, heads)
