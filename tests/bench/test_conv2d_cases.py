"""bench/kernels/conv2d.py: what is timed on a GPU, with the CUDA kernel on the host in its place."""

from __future__ import annotations

import pytest
import torch

from bench.kernels import conv2d as bench
from dfengine.kernels import conv2d, conv2d_cuda, cuda_launch, group_norm_moments
from tests.kernels import cuda_on_host

LAYER = ((1, 8, 16), (16, 8), 24, 3, 1, torch.bfloat16)


@pytest.fixture
def cuda_serves(monkeypatch):
    cuda_on_host.install(monkeypatch, False)
    monkeypatch.setattr(cuda_launch, "available", lambda device: None)
    monkeypatch.setattr(conv2d.OP, "status", lambda device: {"triton": "no", "cuda": "", "cpu": ""})
    for name, value in (("capability_of", (8, 9)), ("multiprocessors_of", 128)):
        monkeypatch.setattr(conv2d_cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def test_every_layer_is_timed_in_every_batch_and_half_blocks_beside_them(cuda_serves):
    cases = list(bench.cases("cuda"))
    assert torch.backends.cudnn.benchmark
    for (_, *size), sources, outputs, *_ in bench.SHAPES:
        for batch in (1, 8, 32):
            mine = [case for case in cases if case.shape == (batch, *size, outputs) and str(sources[0]) in case.label]
            assert {case.dtype for case in mine} >= {torch.float16}
    blocks = [case for case in cases if case.label.endswith("half block")]
    assert len(blocks) == 4 * len(bench.HALF_BLOCKS)
    assert all({"kernel", "torch", "applied"} < set(case.rivals) for case in blocks)
    plain = [case for case in cases if case not in blocks]
    assert all({"kernel", "torch", "chain", "applied chain", "kernel chain"} < set(case.rivals) for case in plain)


def test_the_tiles_compute_what_the_op_does(cuda_serves):
    case = bench.convolution("cpu", *LAYER)
    (tensors,) = case.make()
    for chain in (False, True):
        conv2d.OP.implementations["reference"].run(
            tensors.x, tensors.x2, tensors.weight, tensors.bias,
            *((tensors.scale, tensors.offset, "gelu") if chain else (None, None, "none")),
            "none", None, "none", "gelu", tensors.y, None, 0,
        )  # fmt: skip
        right = tensors.y.clone()
        rivals = bench.cuda_rivals(case.shape, torch.bfloat16, 3, 1)
        assert len(rivals) == 2 * len(conv2d_cuda.TILES)
        for name, rival in rivals.items():
            if name.endswith("chain") == chain:
                tensors.y.fill_(torch.nan)
                rival(tensors)
                torch.testing.assert_close(tensors.y, right, rtol=2e-2, atol=2e-2, msg=name)


def test_half_blocks_leave_the_same_moments(cuda_serves):
    case = bench.half_block("cpu", *LAYER)
    (tensors,) = case.make()
    case.rivals["torch"](tensors)
    case.rivals["kernel"](tensors)
    right, moments = tensors.y.clone(), tensors.moments(tensors.tile_pixels).clone()
    case.rivals["applied"](tensors)
    torch.testing.assert_close(tensors.moments(tensors.tile_pixels), moments, rtol=5e-2, atol=0.2)
    tiles = bench.cuda_block_rivals(case.shape, torch.bfloat16, 3, 1)
    assert len(tiles) == len(conv2d_cuda.TILES)
    for name, rival in tiles.items():
        tensors.y.fill_(torch.nan)
        rival(tensors)
        torch.testing.assert_close(tensors.y, right, rtol=2e-2, atol=5e-2, msg=name)
        pixels = int(name.rsplit(" ", 1)[1])
        wanted = group_norm_moments.reference(tensors.y, pixels)
        torch.testing.assert_close(tensors.moments(pixels), wanted, rtol=1e-3, atol=1e-3, msg=name)
