"""The numeric contract of every kernel (DESIGN section 3, Numerics)."""

from __future__ import annotations

import torch

FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_numeric_contract(result: torch.Tensor, exact: torch.Tensor, torch_result: torch.Tensor) -> None:
    """`result` and `torch_result` are of one dtype, `exact` is float64; allows twice torch's error plus the floor."""
    assert result.dtype == torch_result.dtype and exact.dtype == torch.float64
    assert torch.isfinite(result).all(), "an output element was not written"
    error = (result.double().cpu() - exact.cpu()).abs().max().item()
    torch_error = (torch_result.double().cpu() - exact.cpu()).abs().max().item()
    allowed = 2 * torch_error + FLOOR[result.dtype] * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g} (torch: {torch_error:.3g})"
