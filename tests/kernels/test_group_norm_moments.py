"""group_norm_moments: every implementation against the float64 reference, and that against each tile's moments."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dfengine.kernels import CannotRunError, group_norm_apply, group_norm_moments
from dfengine.kernels.group_norm_moments import OP
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.stages import assert_threads_change_nothing, poisoned, random, run


@pytest.fixture(params=launchers.names(group_norm_moments.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, group_norm_moments.CONFIGURATIONS)


# (N, H, W, C), tile, padding: one pixel; a short last tile; a tile longer than the sample; C that fills no vector.
CASES = [
    ((1, 1, 1, 8), 4, 0),
    ((2, 5, 7, 12), 8, 4),
    ((1, 9, 11, 7), 128, 3),
    ((3, 16, 9, 32), 48, 0),
    ((1, 12, 12, 136), 100, 8),
]


@pytest.mark.parametrize("dtype", group_norm_moments.TYPES, ids=str)
def test_numeric_contract(launcher, dtype):
    for number, (shape, tile, padding) in enumerate(CASES):
        x = random(shape, dtype, seed=number, padding=padding)
        tiles = -(-shape[1] * shape[2] // tile)
        (result,) = run(launcher, OP, x, tile, poisoned((shape[0], tiles, 2, shape[3])))
        exact = group_norm_moments.reference(x.double(), tile)
        torchs = group_norm_moments.reference(x, tile)
        for part in (0, 1):
            assert_numeric_contract(result[:, :, part], exact[:, :, part], torchs[:, :, part])


def test_the_reference_gives_those_of_each_tile():
    x = random((2, 5, 7, 3), torch.float64)
    result = group_norm_moments.reference(x, 8)
    assert result.shape == (2, 5, 2, 3)
    for n, tile, c in ((0, 0, 0), (1, 3, 2), (1, 4, 1)):
        values = x[n].reshape(35, 3)[8 * tile : 8 * tile + 8, c]
        assert result[n, tile, 0, c].item() == pytest.approx(values.mean().item())
        assert result[n, tile, 1, c].item() == pytest.approx((values - values.mean()).square().sum().item())


def test_digits_are_kept_where_the_mean_is_large(launcher):
    x = 100 + 0.1 * random((1, 16, 16, 16), mean=0.0)
    x[0, 0, 0] += 5.0  # nor may the first pixel serve as the centre of all
    (result,) = run(launcher, OP, x, 64, poisoned((1, 4, 2, 16)))
    exact = group_norm_moments.reference(x.double(), 64)
    assert ((result - exact).abs() / exact).max() < 5e-4  # sums of squares would leave errors of several per cent


def test_agree_bit_for_bit_whatever_the_batch(launcher):
    x = random((5, 9, 8, 24), torch.float32)
    results = []
    for samples in (x, x, x[[4, 0]]):
        results += run(launcher, OP, samples, 16, poisoned((len(samples), 5, 2, 24)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[0][[4, 0]])


def test_cpu_threads_change_nothing(monkeypatch):
    cpu = launchers.launcher("cpu-base", monkeypatch)
    for height in (20, 120):  # on either side of SMALL_LOOP (csrc/cpu/parallel.h)
        x, tiles = random((2, height, 6, 24), torch.bfloat16), -(-height * 6 // 16)
        assert_threads_change_nothing(lambda count, x=x, tiles=tiles: run(cpu, OP, x, 16, poisoned((2, tiles, 2, 24))))


def test_default_tiles():
    for pixels, tile in ((1, 16), (64, 16), (4096, 16), (4097, 32), (16384, 64), (65536, 256), (1 << 20, 256)):
        assert group_norm_moments.default_tile_pixels(pixels) == tile
    assert group_norm_moments.tile_counts(35, 16).tolist() == [16, 16, 3]
    assert group_norm_moments.tile_counts(32, 16).tolist() == [16, 16]


def test_counts_are_made_on_their_device():
    """A copy from the host waits for the device, and cannot be captured."""

    class Devices(TorchDispatchMode):
        found: set[str] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.found.add(result.device.type)
            return result

    with Devices() as devices:
        counts = group_norm_moments.tile_counts(35, 16, "meta")
    assert counts.shape == (3,) and counts.dtype == torch.int32
    assert devices.found == {"meta"}


def spread(height: int, width: int, channels: int, stride: int) -> torch.Tensor:
    """A channel slice without memory."""
    strides = (height * width * stride, width * stride, stride, 1)
    return torch.empty_strided((1, height, width, channels), strides, device="meta")


def test_the_gaps_between_pixels_count_where_32_bits_number_values():
    """2^27 pixels of 8 values, 16 apart."""
    far, near = spread(2**13, 2**14, 8, 16), spread(2**13, 2**14, 8, 8)
    small = torch.empty((1, 2, 2, 8), device="meta")
    group_norm_moments.can_run_on_gpu(near, near)
    for arguments in ((far,), (near, far), (near, None, far)):
        with pytest.raises(CannotRunError, match=r"2\^31"):
            group_norm_moments.can_run_on_gpu(*arguments)
    for x, x2, y in ((far, None, small), (small, far, small), (small, small, far)):
        with pytest.raises(CannotRunError, match=r"2\^31"):
            group_norm_apply.OP.implementations["triton"].can_run(x, x2, None, None, "none", "none", y)


def test_the_custom_op_is_registered_soundly():
    arguments = (random((2, 4, 6, 8), padding=4), 8, torch.empty(2, 3, 2, 8), "")
    torch.library.opcheck(
        torch.ops.dfengine.group_norm_moments, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_float64_is_for_the_reference(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x = random((1, 4, 4, 8), torch.float64)
    assert group_norm_moments.moments(x).dtype == torch.float64
    with pytest.raises(CannotRunError, match="float64"):
        group_norm_moments.moments(x, backend="cpu")


GOOD = torch.zeros(2, 4, 6, 8)


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(4, 6, 8), {}, r"\(N, H, W, C\)"),
        (GOOD.permute(0, 3, 1, 2), {}, "strides"),
        (GOOD[:, ::2], {}, "strides"),
        (GOOD[:0], {}, "holds nothing"),
        (GOOD, dict(tile_pixels=0), "below 1"),
        (GOOD, dict(tile_pixels=8, out=torch.zeros(2, 2, 2, 8)), "out: expected"),
    ],
)
def test_wrong_arguments_are_refused(x, options, message):
    with pytest.raises(ValueError, match=message):
        group_norm_moments.moments(x, **options)
