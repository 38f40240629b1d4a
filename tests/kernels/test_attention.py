"""attention: every implementation, instruction set and product against its formula, written out."""

from __future__ import annotations

import pytest
import torch

from dfengine import native
from dfengine.kernels import CannotRunError, attention, attention_cpu
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract

NAN = float("nan")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COMPILED = [(f"cpu-{level}", dtype) for level in launchers.LEVELS for dtype in FLOATS]
COMPILED += [("cpu-pairs", torch.bfloat16), ("cpu-tiles", torch.bfloat16)]
TORCHS = [(backend, dtype) for backend in ("reference", "library") for dtype in FLOATS]
SHAPES = [
    # (N, H, W), heads, channels of a head: no more than a pixel; parts of blocks of 32 queries, 32 and 256 keys, and 16
    # and 32 channels; full ones
    ((1, 1, 1), 1, 8),
    ((3, 5, 3), 2, 20),
    ((1, 7, 41), 3, 16),
    ((2, 8, 8), 8, 32),
    ((1, 17, 31), 1, 64),
    ((1, 9, 5), 2, 128),
    ((3, 3, 11), 1, 1),
    ((1, 2, 3), 1, 256),
    ((1, 20, 17), 2, 264),  # past 256 channels, by a part of a block, and past 256 keys
    ((1, 5, 7), 1, 1024),
]


def ways(implementations):
    """Parametrises a test with `way`: an implementation and a type that it takes."""
    return pytest.mark.parametrize("way", implementations, ids=lambda way: f"{way[0]}-{str(way[1])[6:]}")


def launcher_of(name: str) -> launchers.Launcher:
    """Of a level with its vectors of float32, or of a product; skips with the reason where it does not run here."""
    backend, _, variant = name.partition("-")
    if backend != "cpu":
        return launchers.Launcher(backend, "cpu")
    if not native.available():
        pytest.skip(native.status())
    if variant in launchers.LEVELS:
        if not native.cpu_levels().get(variant):
            pytest.skip(f"this processor does not run {variant}")
        return launchers.Launcher("cpu", "cpu", {"level": variant, "product": "float32"})
    if not native.module.product_supported(attention_cpu.PRODUCTS[variant]):
        pytest.skip(f"this processor does not multiply {variant} of bfloat16")
    return launchers.Launcher("cpu", "cpu", {"product": variant})


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


def make(size, heads: int, depth: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Off-centre, around -2.3 times the scale."""
    noise = torch.randn((*size, 3 * heads * depth), generator=torch.Generator().manual_seed(depth))
    return ((noise - 2.3) * scale).to(dtype)


def run(way, qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """y, written into a slice of a wider buffer, around which nothing may be written."""
    channels = qkv.shape[3] // 3
    wide = torch.full((*qkv.shape[:3], channels + 7), NAN, dtype=qkv.dtype)
    y = wide[..., 4 : 4 + channels]
    launcher_of(way[0]).run(attention.OP, qkv, heads, y)
    assert wide[..., :4].isnan().all() and wide[..., 4 + channels :].isnan().all(), "written beside the slice"
    return y.contiguous()


def check_contract(way, qkv: torch.Tensor, heads: int) -> None:
    plain = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype)
    attention.run_library(qkv, heads, plain)
    assert_numeric_contract(run(way, qkv, heads), written_out(qkv.double(), heads), plain)


@ways(COMPILED + TORCHS)
@pytest.mark.parametrize("size, heads, depth", SHAPES)
def test_meets_the_numeric_contract(way, size, heads, depth):
    check_contract(way, make(size, heads, depth, way[1]), heads)


@ways([way for way in COMPILED + TORCHS if way[1] != torch.float16])
@pytest.mark.parametrize("scale", [4, 40])
def test_meets_the_numeric_contract_where_few_keys_count(way, scale):
    """Scores to 1e4 and beyond: there are no exponentials of them; 600 keys, so that the largest is found in turns."""
    qkv = make((1, 20, 30), 2, 16, way[1], scale)
    q, k = (qkv.double()[..., first : first + 16].reshape(-1, 16) for first in (0, 16))
    assert (q @ k.T / 4).max() > (100 if scale == 4 else 1e4)
    check_contract(way, qkv, 2)


@ways(COMPILED + TORCHS)
def test_equal_scores_give_the_mean_and_a_distant_key_nothing(way):
    """Each of 300 keys counts once, those that fill the last block not at all; nor does one of a far smaller score."""
    qkv = torch.zeros((1, 1, 300, 3 * 8), dtype=way[1])
    qkv[..., 16:] = torch.arange(300, dtype=torch.float32).view(1, 1, 300, 1).to(way[1])
    values = qkv[0, 0, :, 16:].double()
    close = dict(rtol={torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[way[1]], atol=0)
    torch.testing.assert_close(run(way, qkv, 1).double()[0, 0], values.mean(dim=0).expand(300, 8), **close)
    qkv[..., :8] = 30
    qkv[0, 0, 299, 8:16] = -30
    wanted = values[:299].mean(dim=0).expand(300, 8)
    torch.testing.assert_close(run(way, qkv, 1).double()[0, 0], wanted, **close)


@ways(COMPILED)
@pytest.mark.parametrize("scale", [0.5, 8])
def test_not_a_number_reaches_what_it_reaches_in_the_formula(way, scale):
    """In a query its row, in a key every row of its head, in a value its channel."""
    every = slice(None)
    for channel, reached in ((0, (slice(70, 71), slice(0, 8))), (8, (every, slice(0, 8))), (16, (every, 0))):
        qkv = make((1, 1, 290), 2, 8, way[1], scale)
        qkv[0, 0, 70, channel] = NAN
        wanted = torch.zeros((290, 16), dtype=torch.bool)
        wanted[reached] = True
        assert torch.equal(run(way, qkv, 2)[0, 0].isnan(), wanted)


@ways([way for way in COMPILED + TORCHS if way[1] != torch.float16])
def test_huge_values_stay_finite(way):
    qkv = make((1, 8, 8), 1, 16, way[1])
    qkv[..., 32:] *= 2.0**110
    check_contract(way, qkv, 1)


@ways(COMPILED)
@pytest.mark.parametrize("scale", [1, 6])
def test_threads_batch_and_neighbours_change_no_bit(way, scale):
    qkv = make((3, 10, 15), 4, 20, way[1], scale)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(way, qkv, 4))
    torch.set_num_threads(threads)
    results.append(torch.cat([run(way, sample[None], 4) for sample in qkv]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_bound_calls_follow_their_buffers():
    if not native.available():
        pytest.skip(native.status())
    qkv, y = make((2, 6, 6), 2, 16, torch.bfloat16), torch.empty((2, 6, 6, 32), dtype=torch.bfloat16)
    call = attention.OP.implementations["cpu"].bound(qkv, 2, y)
    for scale in (1, 3):
        qkv *= scale
        y.fill_(NAN)
        call()
        assert torch.equal(y, attention.attention(qkv, 2, backend="cpu"))


@pytest.mark.parametrize("shape, heads, dtype, chosen", [
    ((1, 2, 3, 48), 2, torch.bfloat16, "cpu"),
    ((1, 2, 3, 48), 2, torch.float64, "library"),
    ((1, 2, 3, 3 * 1032), 1, torch.float32, "library"),
])  # fmt: skip
def test_what_serves(shape, heads, dtype, chosen):
    qkv, y = torch.zeros(shape, dtype=dtype), torch.zeros((*shape[:3], shape[3] // 3), dtype=dtype)
    assert attention.OP.choose(qkv, heads, y) == (chosen if native.available() else "library")
    if native.available() and chosen != "cpu":
        with pytest.raises(CannotRunError, match="float64|1032 channels of a head"):
            attention.OP.choose(qkv, heads, y, backend="cpu")


@pytest.mark.parametrize("qkv, heads, message", [
    (torch.zeros(2, 3, 12), 1, r"\(N, H, W, 3 C\)"),
    (torch.zeros(1, 2, 2, 12), 3, "3 heads"),
    (torch.zeros(1, 12, 2, 2).permute(0, 2, 3, 1), 2, "contiguous"),
])  # fmt: skip
def test_wrong_arguments_are_refused(qkv, heads, message):
    with pytest.raises(ValueError, match=message):
        attention.attention(qkv, heads)
