"""conv2d in CUDA C++: every compiled tile against float64, its shared-memory addresses, the choice of a tile, and that
the host's stand-in for a GPU finds mistakes. What all implementations share is in test_conv2d.py."""

from __future__ import annotations

import ctypes
import functools
import re
from types import SimpleNamespace

import pytest
import torch

from dfengine.kernels import CannotRunError, conv2d
from dfengine.kernels import conv2d_cuda as cuda
from tests.kernels import cuda_on_host, launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.conv2d_cases import (
    BESIDE,
    Case,
    check_contract,
    check_moments,
    make,
    moment_pixels,
    on,
    require_cuda,
    run_into_nan,
    through_torch,
)

HALVES = tuple(cuda.NAMES)
EVERY_TILE = cuda.TILES + cuda.WGMMA_TILES
ADA = (8, 9)
EDIT_WAIT = ("copy_async_wait<Tile::STAGES - 2>();", "copy_async_wait<Tile::STAGES - 1>();")
EDIT_BARRIER = (f"{EDIT_WAIT[0]}\n            __syncthreads();", EDIT_WAIT[0])
EDIT_CHUNK = ("if (taps == 1 || chunk == 0) {", "if (chunk == 0) {")


def launcher_of(monkeypatch, place: cuda.Placement | None = None, backwards: bool = False, edit=None, **options):
    """On the GPU, where one is and runs the kernel, else on the host."""
    require_cuda()
    if not launchers.GPU:
        cuda_on_host.install(monkeypatch, backwards, edit)
    options |= {} if place is None else {"placement": place}
    return launchers.Launcher("cuda", "cuda" if launchers.GPU else "cpu", options)


def placement(tile: cuda.Tile, size: tuple[int, int], reach: int) -> cuda.Placement | None:
    device = (9, 0) if tile.warpgroups else ADA
    return next(iter(cuda.placements(size, reach, device, tiles=[tile])), None)


def cases(tile: cuda.Tile) -> list[Case]:
    """For one tile: features together, sizes that leave parts of tiles and of blocks of outputs over."""
    few, more = min(tile.outputs, 24), tile.outputs + 9
    far = 2 if placement(tile, (5, 13), 2) else 1
    return [
        Case((1, 5, 13), (20, 36), few, 3, far, True, "gelu", "none", "none", "none"),
        Case((2, 18, 22), (40,), more, 3, 1, True, "silu", "none", "up", "gelu", "channel", aligned=True),
        Case((1, 3, 67), (72,), few, 1, 1, False, "relu", "none", "none", "silu", "none", aligned=True),
        Case((1, 6, 10), (8, 24), few, 3, far, True, "gelu", "down", "down", "none", aligned=True),
        Case((2, 10, 12), (48,), few, 3, 1, True, "none", "up", None, "sigmoid", aligned=True),
    ]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tile", cuda.TILES, ids=lambda tile: tile.name)
def test_every_tile_meets_the_contract_in_both_orders(tile, dtype, monkeypatch):
    """And the same bits whatever the order of the threads: a result that depends on it misses a barrier."""
    for number, case in enumerate(cases(tile)):
        reach = case.dilation * (case.kernel // 2)
        size = (1, case.size[1] * case.size[2]) if case.kernel == 1 else case.size[1:]
        place = placement(tile, size, reach)
        both = [
            check_contract(launcher_of(monkeypatch, place, backwards), case, dtype, seed=number)
            for backwards in (False, True)
        ]
        assert all(torch.equal(*pair) for pair in zip(*both, strict=True) if pair[0] is not None)


@pytest.mark.parametrize("tile", cuda.TILES, ids=lambda tile: tile.name)
def test_tiles_beside_each_other(tile, monkeypatch):
    for number, case in enumerate(BESIDE):
        check_contract(launcher_of(monkeypatch, cuda.Placement(tile, 8)), case, torch.float16, seed=number)


@pytest.mark.parametrize("tile", cuda.TILES, ids=lambda tile: tile.name)
def test_every_shape_of_a_tile_leaves_the_moments_it_can(tile, monkeypatch):
    """Images as wide as a row of the tile, or two, with more rows than it has, or fewer: every run that is legal."""
    seen = set()
    for width in (1 << shift for shift in range(3, tile.pixels.bit_length())):
        place = cuda.Placement(tile, width)
        for size in ((place.height + 1, width), (3, 2 * width)):
            arguments = make(Case((1, *size), (8,), 8, 3, act="gelu"), torch.float16)
            for run in (16, 32, 64, 128, 256):
                if place.fits(1, ADA) and place.moment_run(size, run):
                    y, moments = run_into_nan(launcher_of(monkeypatch, place), arguments, run)
                    check_moments(y, moments, run)
                    seen.add(run)
    assert seen >= {16, tile.pixels}


def test_an_image_in_one_row_leaves_moments(monkeypatch):
    """As 1x1 kernels see every image; rows of the tile shorter than the tile, and the tile as one row."""
    tile = next(tile for tile in cuda.TILES if tile.name == "64x64")
    arguments = make(Case((2, 5, 32), (24,), 20, 1, act="gelu"), torch.float16)
    for width, runs in ((64, (16, 32, 64)), (32, (16, 32)), (16, (16,)), (8, ())):
        place = cuda.Placement(tile, width)
        assert [run for run in (16, 32, 64) if place.moment_run((1, 160), run)] == list(runs)
        for run in runs:
            y, moments = run_into_nan(launcher_of(monkeypatch, place), arguments, run)
            check_moments(y, moments, run)


def test_moments_of_tiles_in_two_dimensions(monkeypatch):
    """3x3: rows of the tile as tiles of the moments, whole rows of the image, and a tile below the image."""
    tile = next(tile for tile in cuda.TILES if tile.name == "128x64")
    every = (16, 32, 64, 128)
    for width, size, runs in ((16, (9, 48), (16,)), (16, (11, 16), every), (32, (5, 32), every)):
        place = cuda.Placement(tile, width)
        arguments = make(Case((2, *size), (12,), 20, act="gelu"), torch.bfloat16)
        for run in runs:
            y, moments = run_into_nan(launcher_of(monkeypatch, place), arguments, run)
            check_moments(y, moments, run)
        with pytest.raises(CannotRunError, match="moments of 48"):
            run_into_nan(launcher_of(monkeypatch, place), arguments, 48)
    assert cuda.Placement(tile, 16).moment_run((9, 48), 32) == 0, "two rows of the tile are not neighbours"
    assert cuda.Placement(tile, 16).moment_run((9, 40), 16) == 0, "a row would end in another tile"


def test_a_sample_does_not_depend_on_its_batch(monkeypatch):
    arguments = make(Case((3, 12, 20), (40,), 24, 3, 1, True, "gelu", "none", "none", "gelu"), torch.float16)
    launcher = launcher_of(monkeypatch, placement(cuda.TILES[1], (12, 20), 1))
    whole, _ = run_into_nan(launcher, arguments)
    order = [2, 0]
    part = tuple(v[order] if isinstance(v, torch.Tensor) and v.shape[0] == 3 else v for v in arguments)
    assert torch.equal(run_into_nan(launcher, part)[0], whole[order])


def test_float16_sums_keep_their_bound(monkeypatch):
    """Errors stay below 2^-10 of the sum of the products' magnitudes, and are larger than with float32 sums."""
    arguments = make(Case((1, 9, 17), (96,), 40, bias="none"), torch.float16)
    exact = through_torch(arguments, torch.float64)
    x, weight = arguments[0].double().abs(), arguments[2]
    absolute = conv2d.ConvWeight(weight.packed.double().abs())
    magnitudes = conv2d.reference(x, None, absolute, None, None, None, "none", "none", None, "none", "none")
    place = placement(next(tile for tile in cuda.TILES if tile.name == "128x64"), (9, 17), 1)
    errors = {}
    for half_sums in (False, True):
        y, _ = run_into_nan(launcher_of(monkeypatch, place, half_sums=half_sums), arguments)
        errors[half_sums] = (y.double() - exact).abs()
    rounding = 2.0**-11 * exact.abs() + 2.0**-24
    assert (errors[False] <= rounding + 1e-6 * magnitudes).all()
    assert (errors[True] <= rounding + 2.0**-10 * magnitudes).all()
    assert errors[True].mean() > 1.5 * errors[False].mean()
    with pytest.raises(CannotRunError, match="float16 sums"):
        run_into_nan(launcher_of(monkeypatch, placement(cuda.TILES[0], (9, 17), 1), half_sums=True), arguments)


@pytest.mark.skipif(launchers.GPU, reason="about the host's stand-in for a GPU")
def test_the_host_finds_a_missing_wait_and_a_missing_barrier(monkeypatch):
    """Copies that are not waited for have not arrived, and without a barrier the order of the threads shows."""
    tile = next(tile for tile in cuda.TILES if tile.name == "128x16")
    arguments = make(Case((1, 6, 16), (96,), 16), torch.float16)
    place = placement(tile, (6, 16), 1)
    right, _ = run_into_nan(launcher_of(monkeypatch, place), arguments)
    late, _ = run_into_nan(launcher_of(monkeypatch, place, edit=EDIT_WAIT), arguments)
    assert late.isnan().any()
    both = [run_into_nan(launcher_of(monkeypatch, place, order, EDIT_BARRIER), arguments)[0] for order in (False, True)]
    assert not all(torch.equal(y, right) for y in both)
    # With a single tap the next chunk, and its scale and offset, are the newest copies.
    arguments = make(Case((1, 3, 67), (72,), 16, 1, 1, True, "gelu", aligned=True), torch.float16)
    place = placement(tile, (1, 201), 0)
    right, _ = run_into_nan(launcher_of(monkeypatch, place), arguments)
    late, _ = run_into_nan(launcher_of(monkeypatch, place, edit=EDIT_CHUNK), arguments)
    assert right.isfinite().all() and late.isnan().any()


@pytest.fixture(scope="module")
def addresses() -> ctypes.CDLL:
    return cuda_on_host.compiled(f'#include "{cuda_on_host.HERE / "conv2d_tile_on_host.cpp"}"\n')


def test_the_table_is_that_of_the_kernel(addresses):
    addresses.tile_name.restype = ctypes.c_char_p
    names = [addresses.tile_name(i).decode() for i in range(addresses.tile_count())]
    assert sorted(names) == sorted(tile.name for tile in EVERY_TILE)
    for tile in EVERY_TILE:
        numbers = (ctypes.c_int * 12)()
        addresses.tile_numbers(names.index(tile.name), numbers)
        *table, threads, fixed, a_pixel, epilogue = numbers
        mine = [tile.pixels, tile.outputs, tile.channels, *tile.warps, tile.stages, tile.vectors]
        assert table == [*mine, tile.blocks] and threads == tile.threads
        for halo in (1, tile.pixels, 2 * tile.pixels):
            assert tile.shared_bytes(halo) == max(fixed + halo * a_pixel, epilogue)


def test_no_bank_conflicts(addresses):
    """Of the loader's stores, of ldmatrix for every tap of every legal shape, of the weights (for wgmma: of core
    matrices), and of the epilogue."""
    addresses.tile_name.restype = ctypes.c_char_p
    names = [addresses.tile_name(i).decode() for i in range(addresses.tile_count())]
    shapes = 0
    for tile in EVERY_TILE:
        number = names.index(tile.name)
        assert [addresses.tile_turns(number, which) for which in range(4)] == [1, 1, 1, 1], tile
        assert addresses.tile_turns(number, 4) == 16, "sectors of 32 bytes for 512 bytes"
        for reach in (0, 1, 2):
            for shift in range(3, tile.pixels.bit_length()):
                place = cuda.Placement(tile, 1 << shift)
                if place.fits(reach, (9, 0)):
                    assert addresses.tile_fragment_turns(number, shift, reach) == 1, (tile, shift, reach)
                    assert addresses.tile_loader_covers(number, place.halo_pixels(reach)) == 1, (tile, shift, reach)
                    shapes += 1
    assert shapes > 80


def test_packing_is_in_the_order_of_the_fragments():
    """Element by element, by the layout that the PTX manual gives for the second factor of mma.m16n8k16."""
    channels, outputs, chunk = (20, 5), 19, 32
    taps = torch.arange(1, 1 + 9 * 25 * outputs, dtype=torch.float64).view(3, 3, 25, outputs)
    packed = cuda.pack(taps, channels, chunk)
    assert packed.shape == (2, 9, 2, 2, 32, 8)
    places = (0, 4, 0, 1, 9, 2), (0, 8, 1, 0, 31, 5), (1, 0, 0, 0, 6, 1), (1, 3, 0, 1, 5, 0), (0, 1, 0, 0, 17, 7)
    for source, tap, step, pair, lane, value in places:
        fragment, register, half = value // 4, value // 2 % 2, value % 2
        channel, output = 16 * step + 8 * register + 2 * (lane % 4) + half, 16 * pair + 8 * fragment + lane // 4
        there = channel < channels[source] and output < outputs
        wanted = taps[tap // 3, tap % 3, channel + (20 if source else 0), output] if there else 0
        assert packed[source, tap, step, pair, lane, value] == wanted
    assert packed.sum() == taps.sum()


@pytest.mark.parametrize(
    "shape, channels, reach, name, width",
    [
        ((2, 256, 256, 128), (128,), 1, "128x128", 16),
        ((2, 64, 64, 256), (256,), 1, "128x128", 16),
        ((2, 32, 32, 512), (512,), 1, "128x64", 16),
        ((2, 8, 8, 512), (512,), 2, "64x64", 8),
        ((2, 256, 256, 128), (3,), 1, "128x64x16", 16),
        ((2, 256, 256, 3), (128,), 1, "128x16", 16),
        ((4, 1, 64 * 64, 256), (256, 128), 0, "128x128", 128),
        ((1, 256, 256, 64), (64,), 1, "128x64", 16),
    ],
)
def test_the_chosen_tile(shape, channels, reach, name, width):
    place = cuda.placement_for(shape, channels, reach)
    assert (place.tile.name, place.width) == (name, width)


def test_tiles_of_few_outputs_are_for_few_outputs():
    """And the number of multiprocessors decides how small a tile must be."""
    for shape, reach in (((2, 8, 8, 512), 1), ((1, 16, 16, 512), 1), ((1, 1, 64, 512), 0), ((1, 8, 8, 48), 1)):
        assert cuda.placement_for(shape, (512,), reach).tile.outputs > 16
    assert cuda.placement_for((1, 64, 64, 32), (64,), 1).tile.name == "128x16"
    shape = (2, 64, 64, 128)
    names = {count: cuda.placement_for(shape, (128,), 1, multiprocessors=count).tile.name for count in (16, 64, 128)}
    assert names == {16: "128x128", 64: "128x128", 128: "128x64"}


def test_fast_tensor_cores_take_the_tile_that_reads_less():
    shape = (2, 256, 256, 128)
    assert cuda.placement_for(shape, (128,), 1, capability=(9, 0)).tile.name == "128x128w4"
    assert cuda.placement_for(shape, (128,), 1, capability=(8, 6)).tile.name == "128x128"
    assert {tile.name: round(tile.products_of_a_read, 1) for tile in cuda.TILES[:4]} == {
        "128x128": 2.7, "128x128w4": 4.0, "256x128": 4.0, "128x64": 2.0,
    }  # fmt: skip


def test_every_chosen_tile_fits_the_device():
    for capability, limit in {**cuda.SHARED_BYTES, (12, 0): 99 * 1024}.items():
        for reach in (0, 1, 2):
            for size in ((1, 1), (5, 13), (8, 8), (31, 300), (256, 256)):
                places = list(cuda.placements(size, reach, capability))
                assert places
                for place in places:
                    halo = place.halo_pixels(reach)
                    assert place.tile.shared_bytes(halo) <= limit
                    assert -(-halo // 8) * place.tile.channels <= place.tile.vectors * place.tile.threads


def test_moments_decide_the_tile():
    shape = (2, 256, 256, 128)
    assert cuda.moment_tile(shape, (128,), 1) == 16
    assert cuda.placement_for(shape, (128,), 1, 32).width >= 32
    assert cuda.moment_tile((2, 1, 65536, 128), (128,), 0) == 128, "without taps an image is one row"
    assert cuda.moment_tile((2, 8, 8, 512), (512,), 1) == 64
    assert cuda.moment_tile((2, 32, 32, 512), (512,), 1) == 128, "as 4x32, though 8x16 reads less"
    assert cuda.placement_for((2, 32, 32, 512), (512,), 1, 128).width == 32
    assert cuda.moment_tile((2, 32, 32, 512), (512,), 1, multiprocessors=132) == 64, "with a tile of 64 pixels"
    with pytest.raises(CannotRunError, match="128 pixels for the moments"):
        cuda.placement_for(shape, (128,), 1, 128)


def test_the_op_asks_the_backend_that_serves_for_its_moments(monkeypatch):
    shape = (2, 256, 256, 128)
    assert conv2d.moment_tile(shape, torch.float16) == conv2d.configuration_for(shape, torch.float16)["BLOCK_M"]
    monkeypatch.setattr(conv2d.OP, "default", lambda device: "cuda" if device == "cuda" else "reference")
    monkeypatch.setattr(cuda, "capability_of", lambda device: ADA)
    monkeypatch.setattr(cuda, "multiprocessors_of", lambda device: 128)
    assert conv2d.moment_tile(shape, torch.float16, device="cuda") == 16
    assert conv2d.moment_tile(shape, torch.float16, (128,), 0, "cuda") == 128
    assert conv2d.moment_tile((2, 8, 8, 512), torch.bfloat16, device="cuda") == 64
    triton = conv2d.configuration_for(shape, torch.float32)["BLOCK_M"]
    assert conv2d.moment_tile(shape, torch.float32, device="cuda") == triton


@pytest.mark.parametrize(
    "case, dtype, message",
    [
        (Case((1, 6, 6), (4,), 3, 5), torch.float16, "5 x 5"),
        (Case((1, 6, 6), (4,), 3, 3, 9), torch.float16, "taps 9 pixels away"),
        (Case((1, 6, 6), (4,), 3), torch.float32, "neither float16 nor bfloat16"),
        (Case((65536, 1, 1), (4,), 3), torch.float16, "65535 samples"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_served_is_refused(case, dtype, message):
    arguments = make(case, dtype)
    y = torch.empty(conv2d.output_shape(arguments[0], arguments[2], "none"), dtype=dtype)
    with pytest.raises(CannotRunError, match=re.escape(message)):
        conv2d.OP.implementations["cuda"].can_run(*arguments, y, None, 0)


def test_every_configuration_runs_as_it_is_named(monkeypatch):
    """What tuning tries: tiles by name and width, which a file can hold."""
    require_cuda()
    case = Case((1, 8, 16), (16,), 24, 3, 1, True, "gelu")
    arguments = make(case, torch.float16)
    device = "cuda" if launchers.GPU else "cpu"
    exact, plain = (through_torch(arguments, dtype) for dtype in (torch.float64, torch.float16))
    arguments = tuple(on(value, device) for value in arguments)
    y = torch.empty((1, 8, 16, 24), dtype=torch.float16, device=device)
    moments = torch.empty((1, 8, 2, 24), device=device)
    found = conv2d.OP.implementations["cuda"].configurations(*arguments, y, moments, 16)
    assert len(found) >= 4 and len({options["tile"] for options in found}) == len(found)
    for options in found:
        launcher_of(monkeypatch, **options).run(conv2d.OP, *arguments, y.fill_(torch.nan), moments.fill_(torch.nan), 16)
        assert_numeric_contract(y.cpu(), exact, plain)
        check_moments(y.cpu(), moments.cpu(), 16)


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    of_two, current = {0: ((8, 0), 108), 1: ((8, 9), 128)}, [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_two[device][0])
    properties = {number: SimpleNamespace(multi_processor_count=count) for number, (_, count) in of_two.items()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    for cached in (cuda._capability, cuda._multiprocessors):
        monkeypatch.setattr(cuda, cached.__name__, functools.cache(cached.__wrapped__))
    for current[0] in (0, 1, 0):
        for device, number in ((torch.device("cuda"), current[0]), (torch.device("cuda", 1), 1)):
            assert (cuda.capability_of(device), cuda.multiprocessors_of(device)) == of_two[number]


def test_older_devices_are_refused(monkeypatch):
    monkeypatch.setattr(cuda, "capability_of", lambda device: (7, 5))
    arguments = make(Case((1, 6, 6), (4,), 3), torch.float16)
    with pytest.raises(CannotRunError, match="7.5 is below 8.0"):
        conv2d.OP.implementations["cuda"].can_run(*arguments, torch.empty((1, 6, 6, 3)), None, 0)


def test_the_packed_weight_is_kept_for_each_division_of_the_channels(monkeypatch):
    launcher = launcher_of(monkeypatch)
    arguments = make(Case((1, 5, 6), (24,), 8), torch.float16)
    exact, plain = (through_torch(arguments, dtype) for dtype in (torch.float64, torch.float16))
    x, _, weight, *rest = (on(value, launcher.device) for value in arguments)
    y, kept = torch.empty((1, 5, 6, 8), dtype=torch.float16, device=launcher.device), []
    for channels in (24, 10, 24, 10):
        parts = (x, None) if channels == 24 else (x[..., :10].contiguous(), x[..., 10:].contiguous())
        launcher.run(conv2d.OP, *parts, weight, *rest, y.fill_(torch.nan), None, 0)
        assert_numeric_contract(y.cpu(), exact, plain)
        kept.append(list(weight.prepacked.values()))
    assert [len(forms) for forms in kept] == [1, 2, 2, 2]
    assert all(one is other for one, other in zip(kept[1], kept[3], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gpu_meets_the_contract_at_the_shapes_of_the_networks(dtype):
    """Forced to CUDA C++, in every tile that is legal for the shape on this device; twice, with the same bits."""
    require_cuda()
    for case in (
        Case((1, 128, 128), (128,), 128, 3, 1, True, "gelu", "none", "none"),
        Case((2, 8, 8), (512,), 512, 3, 2, True, "gelu"),
        Case((1, 64, 64), (128, 128), 128, 3, 1, True, "silu", "up", "down", aligned=True),
        Case((1, 64, 64), (256, 128), 256, 1, residual="none", aligned=True),
        Case((2, 64, 64), (3,), 128),
        Case((2, 64, 64), (64,), 1, act="sigmoid"),
    ):
        reach = case.dilation * (case.kernel // 2)
        arguments = make(case, dtype)
        y = torch.empty((*case.size, case.outputs), device="meta")
        _, _, weight, *_, resample, residual, residual_resample, _ = arguments
        _, shape = cuda.geometry(weight, resample, residual, residual_resample, y)
        tiles = cuda.tiles_on(torch.device("cuda"), dtype)
        exact, plain = through_torch(arguments, torch.float64), through_torch(arguments, dtype)
        for place in cuda.placements(shape[1:3], reach, torch.cuda.get_device_capability(), tiles=tiles):
            launcher = launchers.Launcher("cuda", "cuda", {"placement": place})
            run = moment_pixels(launcher, arguments, 0)
            (first, moments), again = (run_into_nan(launcher, arguments, run, case.aligned) for _ in range(2))
            assert_numeric_contract(first, exact, plain)
            assert torch.equal(first, again[0])
            if run:
                check_moments(first, moments, run)
                assert torch.equal(moments, again[1])
