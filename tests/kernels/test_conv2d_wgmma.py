"""conv2d with wgmma, on the host: every tile against float64, which mistakes the host finds, and that only measuring
takes it. The stand-in for wgmma itself is tested in test_wgmma_on_host.py, addresses in test_conv2d_cuda.py."""

from __future__ import annotations

import pytest
import torch

from dfengine.kernels import CannotRunError, conv2d, cuda_launch
from dfengine.kernels import conv2d_cuda as cuda
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.conv2d_cases import (
    BESIDE,
    Case,
    check_contract,
    check_moments,
    make,
    on,
    require_cuda,
    run_into_nan,
    through_torch,
)
from tests.kernels.test_conv2d_cuda import HALVES, cases, launcher_of, placement

HOPPER = (9, 0)
TILE = {tile.name: tile for tile in cuda.WGMMA_TILES}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
    require_cuda(cuda.WGMMA_TILES[0])
    if not launchers.GPU:
        monkeypatch.setattr(cuda, "capability_of", lambda device: HOPPER)


def size_of(case: Case) -> tuple[int, int]:
    return (1, case.size[1] * case.size[2]) if case.kernel == 1 else case.size[1:]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", cuda.WGMMA_TILES, ids=lambda tile: tile.name)
def test_every_tile_meets_the_contract_in_both_orders(tile, dtype, monkeypatch):
    """With moments, odd sizes, borders, both dilations, two sources, resampled inputs and residuals, several samples
    and blocks of outputs; and the same bits whatever the order of the threads."""
    for number, case in enumerate([*cases(tile), Case((1, 9, 11), (130,), 17, 3, 2, aligned=True)]):
        place = placement(tile, size_of(case), case.dilation * (case.kernel // 2))
        both = [
            check_contract(launcher_of(monkeypatch, place, backwards), case, dtype, seed=number)
            for backwards in (False, True)
        ]
        assert all(torch.equal(*pair) for pair in zip(*both, strict=True) if pair[0] is not None)


@pytest.mark.parametrize("tile", cuda.WGMMA_TILES, ids=lambda tile: tile.name)
def test_tiles_beside_each_other(tile, monkeypatch):
    for number, case in enumerate(BESIDE):
        check_contract(launcher_of(monkeypatch, cuda.Placement(tile, 8)), case, torch.float16, seed=number)


@pytest.mark.parametrize("tile", cuda.WGMMA_TILES, ids=lambda tile: tile.name)
def test_every_shape_of_a_tile_leaves_the_moments_it_can(tile, monkeypatch):
    seen = set()
    for width in (1 << shift for shift in range(3, tile.pixels.bit_length())):
        place = cuda.Placement(tile, width)
        size = (place.height + 1, width)
        arguments = make(Case((1, *size), (8,), 8, 3, act="gelu"), torch.float16)
        runs = [run for run in (16, 32, 64, 128, 256) if place.fits(1, HOPPER) and place.moment_run(size, run)]
        for run in runs[:1] + runs[-1:]:
            y, moments = run_into_nan(launcher_of(monkeypatch, place), arguments, run)
            check_moments(y, moments, run)
            seen.add(run)
    assert seen >= {16, tile.pixels}


def test_a_sample_does_not_depend_on_its_batch(monkeypatch):
    arguments = make(Case((3, 6, 20), (72,), 24, 3, 1, True, "gelu", "none", "none", "gelu"), torch.float16)
    launcher = launcher_of(monkeypatch, placement(TILE["wgmma_128x64"], (6, 20), 1))
    whole, _ = run_into_nan(launcher, arguments)
    order = [2, 0]
    part = tuple(v[order] if isinstance(v, torch.Tensor) and v.shape[0] == 3 else v for v in arguments)
    assert torch.equal(run_into_nan(launcher, part)[0], whole[order])


PART = "block.loader.finish(chunk + 1, next, part * RUNS / PARTS, (part + 1) * RUNS / PARTS);"
CHUNK = f"tap >= AHEAD && more) {{\n                    const unsigned part = tap - AHEAD;\n                    {PART}"
EARLY = CHUNK.replace(">= AHEAD", "== 0").replace(PART, "block.loader.finish(chunk + 1, next);")
MISTAKES = {
    "no wait for the sums": ("    wgmma_wait<0>();\n", ""),
    "pixels loaded while they are multiplied": ("wgmma_wait<1>();", "wgmma_wait<2>();"),
    "no fence before the products": ("                wgmma_fence();\n", ""),
    "weights not shown to the products": ("            async_proxy_fence();\n", ""),
    "a place of the ring too early": (" 2 ? ring + STAGES - 2 : ring - 2", " 1 ? ring + STAGES - 1 : ring - 1"),
    "weights not waited for": ("copy_async_wait<AHEAD - 1>();", "copy_async_wait<AHEAD>();"),
    "a chunk finished before it has arrived": (CHUNK, EARLY),
    "a chunk not finished": (PART, ""),
    "a chunk of a single tap not waited for": ("if (taps == 1 || chunk == 0) {", "if (chunk == 0) {"),
}


@pytest.mark.skipif(launchers.GPU, reason="about the host's stand-in for a GPU")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_host_finds(mistake, monkeypatch):
    kernel = 1 if "single tap" in mistake else 3
    case = Case((1, 6, 16), (200,), 16, kernel, 1, True, "gelu", aligned=True)
    arguments = make(case, torch.float16)
    place = placement(TILE["wgmma_128x64"], size_of(case), kernel // 2)
    right, wrong, other = (
        run_into_nan(launcher_of(monkeypatch, place, order, edit), arguments)[0]
        for order, edit in ((False, None), (False, MISTAKES[mistake]), (True, MISTAKES[mistake]))
    )
    assert right.isfinite().all()
    assert not all(torch.allclose(y, right, rtol=1e-2, atol=1e-2) for y in (wrong, other))


def test_packing_is_in_core_matrices():
    channels, outputs, chunk = (20, 5), 19, 64
    taps = torch.arange(1, 1 + 9 * 25 * outputs, dtype=torch.float64).view(3, 3, 25, outputs)
    packed = cuda.pack(taps, channels, chunk, warpgroups=True)
    assert packed.shape == (2, 9, 4, 2, 32, 8)
    places = (0, 4, 0, 1, 2, 2), (0, 8, 1, 0, 19, 3), (1, 0, 0, 0, 6, 1), (1, 3, 0, 1, 5, 0), (0, 1, 0, 0, 27, 7)
    for source, tap, step, pair, run, value in places:
        channel, output = 16 * step + run // 8 % 2 * 8 + value, 16 * pair + run // 16 * 8 + run % 8
        there = channel < channels[source] and output < outputs
        wanted = taps[tap // 3, tap % 3, channel + (20 if source else 0), output] if there else 0
        assert packed[source, tap, step, pair, run, value] == wanted
    assert packed.sum() == taps.sum()


def test_it_is_never_taken_by_rule():
    for shape in ((2, 256, 256, 128), (8, 64, 64, 256), (2, 8, 8, 512), (4, 1, 4096, 256)):
        for reach in (0, 1):
            assert not cuda.placement_for(shape, (128,), reach, capability=HOPPER).tile.warpgroups


def test_tactics_try_it_where_it_runs(monkeypatch):
    case = Case((1, 8, 16), (16,), 24, 3, 1, True, "gelu")
    arguments = make(case, torch.float16)
    device = "cuda" if launchers.GPU else "cpu"
    exact, plain = (through_torch(arguments, dtype) for dtype in (torch.float64, torch.float16))
    arguments = tuple(on(value, device) for value in arguments)
    y = torch.empty((1, 8, 16, 24), dtype=torch.float16, device=device)
    moments = torch.empty((1, 8, 2, 24), device=device)
    implementation, asked = conv2d.OP.implementations["cuda"], []

    def names(runs: bool) -> set[str]:
        with monkeypatch.context() as patch:
            patch.setattr(cuda_launch, "refusal", lambda kernel, device: asked.append(kernel) or ("" if runs else "no"))
            return {options["tile"] for options in implementation.configurations(*arguments, y, moments, 16)}

    assert names(True) >= set(TILE) and not names(False) & set(TILE)
    assert set(asked) == {f"conv2d_float16_{name}" for name in TILE}
    launcher_of(monkeypatch, tile="wgmma_64x128", width=16).run(conv2d.OP, *arguments, y, moments, 16)
    assert_numeric_contract(y.cpu(), exact, plain)
    check_moments(y.cpu(), moments.cpu(), 16)
    launcher = launcher_of(monkeypatch, cuda.Placement(TILE["wgmma_64x128"], 8))
    monkeypatch.setattr(cuda, "capability_of", lambda device: (8, 9))
    assert not names(True) & set(TILE)
    with pytest.raises(CannotRunError, match="does not fit this device"):
        run_into_nan(launcher, arguments)
