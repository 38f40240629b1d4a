"""The stages of group_norm at inference: every implementation against the float64 reference, and that against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfengine.kernels import CannotRunError, group_norm_stages
from dfengine.kernels.group_norm_stages import APPLY, MERGE, MOMENTS
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract

EPS = 1e-5
CONFIGURATIONS = group_norm_stages.CONFIGURATIONS


def launcher_of(op):
    @pytest.fixture(params=launchers.names(CONFIGURATIONS[op.name]), name=op.name)
    def fixture(request, monkeypatch):
        return launchers.launcher(request.param, monkeypatch, CONFIGURATIONS[op.name])

    return fixture


moments_launcher, merge_launcher, apply_launcher = (launcher_of(op) for op in (MOMENTS, MERGE, APPLY))


def random(shape, dtype=torch.float32, mean=-2.3, seed=0, padding=0) -> torch.Tensor:
    """Off-centre values; with padding a channel slice of a wider buffer that holds NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    values = (mean + torch.randn(shape, generator=generator)).to(dtype)
    return sliced(values, padding)


def sliced(values, padding, first=None) -> torch.Tensor:
    if not padding:
        return values
    first = padding // 2 if first is None else first
    wide = torch.full((*values.shape[:3], values.shape[3] + padding), float("nan"), dtype=values.dtype)
    view = wide[..., first : first + values.shape[3]]
    view.copy_(values)
    return view


def poisoned(shape, dtype=torch.float32, padding=0) -> torch.Tensor:
    return sliced(torch.full(shape, float("nan"), dtype=dtype), padding)


def run(launcher, op, *args, outputs=1):
    """The last `outputs` arguments after the run, on the CPU; strides survive the trip to a GPU."""

    def moved(value):
        if not isinstance(value, torch.Tensor) or launcher.device == "cpu":
            return value
        whole = value._base if value._base is not None else value
        return whole.to(launcher.device).as_strided(value.shape, value.stride(), value.storage_offset())

    args = [moved(value) for value in args]
    launcher.run(op, *args)
    return [None if value is None else value.cpu() for value in args[-outputs:]]


# (N, H, W, C), tile, padding: one pixel; a short last tile; a tile longer than the sample; C that fills no vector.
MOMENTS_CASES = [
    ((1, 1, 1, 8), 4, 0),
    ((2, 5, 7, 12), 8, 4),
    ((1, 9, 11, 7), 128, 3),
    ((3, 16, 9, 32), 48, 0),
    ((1, 12, 12, 136), 100, 8),
]


@pytest.mark.parametrize("dtype", group_norm_stages.TYPES, ids=str)
def test_moments_meet_the_numeric_contract(group_norm_moments, dtype):
    for number, (shape, tile, padding) in enumerate(MOMENTS_CASES):
        x = random(shape, dtype, seed=number, padding=padding)
        tiles = -(-shape[1] * shape[2] // tile)
        (result,) = run(group_norm_moments, MOMENTS, x, tile, poisoned((shape[0], tiles, 2, shape[3])))
        exact = group_norm_stages.reference_moments(x.double(), tile)
        torchs = group_norm_stages.reference_moments(x, tile)
        for part in (0, 1):
            assert_numeric_contract(result[:, :, part], exact[:, :, part], torchs[:, :, part])


def test_moments_of_the_reference_are_those_of_each_tile():
    x = random((2, 5, 7, 3), torch.float64)
    result = group_norm_stages.reference_moments(x, 8)
    assert result.shape == (2, 5, 2, 3)
    for n, tile, c in ((0, 0, 0), (1, 3, 2), (1, 4, 1)):
        values = x[n].reshape(35, 3)[8 * tile : 8 * tile + 8, c]
        assert result[n, tile, 0, c].item() == pytest.approx(values.mean().item())
        assert result[n, tile, 1, c].item() == pytest.approx((values - values.mean()).square().sum().item())


def test_moments_keep_their_digits_where_the_mean_is_large(group_norm_moments):
    x = 100 + 0.1 * random((1, 16, 16, 16), mean=0.0)
    x[0, 0, 0] += 5.0  # nor may the first pixel serve as the centre of all
    (result,) = run(group_norm_moments, MOMENTS, x, 64, poisoned((1, 4, 2, 16)))
    exact = group_norm_stages.reference_moments(x.double(), 64)
    assert ((result - exact).abs() / exact).max() < 5e-4  # sums of squares would leave errors of several per cent


def make_merge(widths, pixels, tiles, batch=2, shift="full", seed=0, dtype=torch.float32):
    """Arguments of MERGE up to eps, from random activations, of one source or two with tiles of their own."""
    sources = []
    for number, (width, tile) in enumerate(zip(widths, tiles, strict=True)):
        x = random((batch, 1, pixels, width), torch.float64, seed=seed + number)
        x = x * torch.linspace(0.5, 2, width, dtype=torch.float64) + number
        sources += [group_norm_stages.reference_moments(x, tile), group_norm_stages.tile_counts(pixels, tile)]
    sources += [None] * (4 - len(sources))
    channels = sum(widths)
    weight, bias = random((channels,), mean=1.0, seed=7), random((channels,), mean=0.0, seed=8)
    moved = {"full": random((batch, channels), seed=9), "one": random((1, channels), seed=9), "none": None}[shift]
    args = [*sources, weight, bias, moved]
    return [a if a is None or a.dtype == torch.int32 else a.to(dtype) for a in args]


# widths, groups, pixels, tiles, shift: groups that straddle the border; one tile; unlike tiles; many; a lone group.
MERGE_CASES = [
    ((12,), 3, 35, (8,), "full"),
    ((8, 16), 3, 60, (16, 7), "one"),
    ((10, 6), 2, 33, (40, 2), "full"),
    ((6,), 3, 70, (1,), "none"),
    ((5, 35), 1, 9, (4, 4), "none"),
    ((64, 32), 6, 64, (16, 16), "one"),
]


def run_merge(launcher, arguments, groups, statistics=True):
    batch, channels = arguments[0].shape[0], arguments[4].shape[0]
    outputs = [poisoned((batch, width)) for width in (channels, channels, groups, groups)]
    if not statistics:
        outputs[2:] = [None, None]
    return run(launcher, MERGE, *arguments, groups, EPS, *outputs, outputs=4)


def test_merge_meets_the_numeric_contract(group_norm_merge):
    for number, (widths, groups, pixels, tiles, shift) in enumerate(MERGE_CASES):
        arguments = make_merge(widths, pixels, tiles, shift=shift, seed=number)
        results = run_merge(group_norm_merge, arguments, groups)
        double = [a if a is None or a.dtype == torch.int32 else a.double() for a in arguments]
        exact = group_norm_stages.reference_merge(*double, groups, EPS)
        torchs = group_norm_stages.reference_merge(*arguments, groups, EPS)
        for result, exact_part, torch_part in zip(results, exact, torchs, strict=True):
            assert_numeric_contract(result, exact_part, torch_part)
        if number == 0:
            without = run_merge(group_norm_merge, arguments, groups, statistics=False)
            assert torch.equal(without[0], results[0]) and torch.equal(without[1], results[1])


# (N, H, W), channels of each source, padding of x, x2 and y, act, resample.
APPLY_CASES = [
    ((1, 1, 1), (8,), (0, 0), "gelu", "none"),
    ((2, 5, 7), (12,), (4, 8), "silu", "none"),
    ((2, 5, 6), (16, 8), (8, 16, 8), "gelu", "none"),
    ((2, 4, 6), (7, 5), (0, 3, 1), "relu", "down"),
    ((1, 6, 4), (24,), (8, 0), "gelu", "down"),
    ((2, 3, 5), (8, 16), (0, 8, 24), "silu", "up"),
    ((1, 3, 4), (5,), (2, 2), "gelu", "up"),
    ((2, 9, 8), (136,), (0, 0), "none", "none"),
    ((3, 17, 9), (4,), (0, 0), "gelu", "none"),
    ((1, 3, 6), (80, 72), (0, 0, 8), "relu", "none"),
]


def make_apply(sizes, widths, padding, dtype, resample, seed=0):
    inputs = [random((*sizes, w), dtype, seed=seed + k, padding=padding[k]) for k, w in enumerate(widths)]
    x, x2 = (inputs + [None])[:2]
    scale, offset = random((sizes[0], sum(widths)), mean=1.0, seed=5), random((sizes[0], sum(widths)), seed=6, mean=2.0)
    factor = {"none": 1, "down": 0.5, "up": 2}[resample]
    shape = (sizes[0], int(sizes[1] * factor), int(sizes[2] * factor), sum(widths))
    return x, x2, scale, offset, poisoned(shape, dtype, padding[-1])


@pytest.mark.parametrize("dtype", group_norm_stages.TYPES, ids=str)
def test_apply_meets_the_numeric_contract(group_norm_apply, dtype):
    for number, (sizes, widths, padding, act, resample) in enumerate(APPLY_CASES):
        x, x2, scale, offset, y = make_apply(sizes, widths, padding, dtype, resample, seed=number)
        (result,) = run(group_norm_apply, APPLY, x, x2, scale, offset, act, resample, y)
        double = [None if t is None else t.double() for t in (x, x2, scale, offset)]
        exact = group_norm_stages.reference_apply(*double, act, resample)
        torchs = group_norm_stages.reference_apply(x, x2, scale, offset, act, resample)
        assert_numeric_contract(result, exact, torchs)
        if padding[-1] and group_norm_apply.device == "cpu":  # nothing is written beside the slice
            assert y._base.isnan().sum() == y._base.numel() - y.numel()


@pytest.mark.parametrize("dtype", group_norm_stages.TYPES, ids=str)
def test_resampling_alone(group_norm_apply, dtype):
    x = random((2, 4, 6, 24), dtype, padding=8)
    channels_first = x.permute(0, 3, 1, 2).double()
    (pooled,) = run(group_norm_apply, APPLY, x, None, None, None, "none", "down", poisoned((2, 2, 3, 24), dtype, 8))
    mean = F.avg_pool2d(channels_first, 2).permute(0, 2, 3, 1)
    assert_numeric_contract(pooled, mean, mean.to(dtype))
    (enlarged,) = run(group_norm_apply, APPLY, x, None, None, None, "none", "up", poisoned((2, 8, 12, 24), dtype, 8))
    assert torch.equal(enlarged.double(), F.interpolate(channels_first, scale_factor=2).permute(0, 2, 3, 1))


@pytest.mark.parametrize("act", ["gelu", "silu", "relu"])
def test_activations_over_their_range(group_norm_apply, act):
    far = torch.tensor([-1e4, -200.0, 200.0, 1e4])
    z = torch.cat((torch.linspace(-30, 30, 3001), torch.linspace(-1e-3, 1e-3, 201), far)).view(1, 1, 1, -1)
    (result,) = run(group_norm_apply, APPLY, z, None, None, None, act, "none", poisoned(z.shape))
    error = (result.double() - getattr(F, act)(z.double())).abs() / z.double().abs().clamp(min=1)
    assert error.max() < 3e-7


def test_nan_is_not_hidden(group_norm_apply):
    x = torch.zeros(1, 1, 2, 8)
    x[0, 0, 1, 3] = float("nan")
    for act in ("none", "gelu", "silu", "relu"):
        (result,) = run(group_norm_apply, APPLY, x, None, None, None, act, "none", torch.zeros_like(x))
        assert result.isnan().sum() == 1 and result[0, 0, 1, 3].isnan(), act


def test_moments_agree_bit_for_bit_whatever_the_batch(group_norm_moments):
    x = random((5, 9, 8, 24), torch.float32)
    results = []
    for samples in (x, x, x[[4, 0]]):
        results += run(group_norm_moments, MOMENTS, samples, 16, poisoned((len(samples), 5, 2, 24)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[0][[4, 0]])


def test_merge_and_apply_agree_bit_for_bit_whatever_the_batch(group_norm_merge, group_norm_apply):
    arguments = make_merge((8, 16), 60, (16, 7), batch=3)
    first, again = (run_merge(group_norm_merge, arguments, 3) for _ in range(2))
    part = [a if a is None or a.dtype == torch.int32 or a.ndim == 1 else a[[2]] for a in arguments]
    for one, two, alone in zip(first, again, run_merge(group_norm_merge, part, 3), strict=True):
        assert torch.equal(one, two) and torch.equal(one[[2]], alone)
    x = random((3, 5, 4, 24))
    y = []
    for i in ([0, 1, 2], [0, 1, 2], [2]):
        scale, offset = first[0][i], first[1][i]
        y += run(group_norm_apply, APPLY, x[i], None, scale, offset, "gelu", "none", poisoned(x[i].shape))
    assert torch.equal(y[0], y[1]) and torch.equal(y[2][0], y[0][2])


def test_cpu_threads_and_streaming_change_nothing(monkeypatch):
    launcher = launchers.launcher("cpu-base", monkeypatch)
    threads, results = torch.get_num_threads(), []
    x, x2, scale, offset, _ = make_apply((2, 20, 6), (24, 8), (0, 8, 0), torch.bfloat16, "none")
    arguments = make_merge((128, 64), 60, (16, 7), batch=1)
    try:
        for count, limit in ((1, 2**30), (3, 2**30), (64, 0)):
            torch.set_num_threads(count)
            monkeypatch.setattr(group_norm_stages, "STREAM_BYTES", limit)
            mine = run(launcher, MOMENTS, x, 16, poisoned((2, 8, 2, 24))) + run_merge(launcher, arguments, 3)
            for resample, size in (("none", (20, 6)), ("down", (10, 3)), ("up", (40, 12))):
                y = poisoned((2, *size, 32), torch.bfloat16, 5)
                mine += run(launcher, APPLY, x, x2, scale, offset, "gelu", resample, y)
            results.append(mine)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_stages_are_a_group_norm_of_a_concatenation(dtype, monkeypatch):
    """Through the public functions, into a slice of a wider buffer, with the default backend."""
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, x2 = random((2, 8, 6, 24), dtype, padding=8), random((2, 8, 6, 8), dtype, seed=1)
    weight, bias, shift = random((32,), seed=2), random((32,), seed=3), random((2, 32), seed=4)
    tiles = [
        (group_norm_stages.moments(t, size), group_norm_stages.tile_counts(48, size)) for t, size in ((x, 16), (x2, 20))
    ]
    scale, offset = group_norm_stages.merge(*tiles[0], weight, bias, 2, EPS, shift, tiles[1])
    y = poisoned((2, 4, 3, 32), dtype, 32)
    assert group_norm_stages.apply(x, scale, offset, act="gelu", resample="down", x2=x2, y=y) is y

    def through_torch(dtype, precise):
        u = torch.cat((x, x2), dim=3).to(dtype).permute(0, 3, 1, 2).contiguous() + shift[:, :, None, None].to(dtype)
        z = F.gelu(F.group_norm(u, 2, weight.to(precise), bias.to(precise), EPS))
        return F.avg_pool2d(z, 2).permute(0, 2, 3, 1)

    assert_numeric_contract(y, through_torch(torch.float64, torch.float64), through_torch(dtype, torch.float32))


def test_default_tiles():
    for pixels, tile in ((1, 16), (64, 16), (4096, 16), (4097, 32), (16384, 64), (65536, 256), (1 << 20, 256)):
        assert group_norm_stages.default_tile_pixels(pixels) == tile
    assert group_norm_stages.tile_counts(35, 16).tolist() == [16, 16, 3]
    assert group_norm_stages.tile_counts(32, 16).tolist() == [16, 16]


@pytest.mark.parametrize("op", [MOMENTS, MERGE, APPLY], ids=lambda op: op.name)
def test_custom_ops_are_registered_soundly(op):
    x = random((2, 4, 6, 8), padding=4)
    arguments = {
        MOMENTS.name: (x, 8, torch.empty(2, 3, 2, 8), ""),
        MERGE.name: (
            *make_merge((8,), 24, (8,)),
            2,
            EPS,
            torch.empty(2, 8),
            torch.empty(2, 8),
            None,
            torch.empty(2, 2),
            "",
        ),
        APPLY.name: (x, None, None, None, "none", "up", torch.empty(2, 8, 12, 8), ""),
    }[op.name]
    function = getattr(torch.ops.dfengine, op.name)
    torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


def test_float64_is_for_the_reference(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x = random((1, 4, 4, 8), torch.float64)
    assert group_norm_stages.moments(x).dtype == torch.float64
    with pytest.raises(CannotRunError, match="float64"):
        group_norm_stages.moments(x, backend="cpu")


GOOD = torch.zeros(2, 4, 6, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: group_norm_stages.moments(torch.zeros(4, 6, 8)), r"\(N, H, W, C\)"),
        (lambda: group_norm_stages.moments(GOOD.permute(0, 3, 1, 2)), "strides"),
        (lambda: group_norm_stages.moments(GOOD[:, ::2]), "strides"),
        (lambda: group_norm_stages.moments(GOOD, 0), "holds nothing"),
        (lambda: group_norm_stages.moments(GOOD, 8, out=torch.zeros(2, 2, 2, 8)), "out: expected"),
        (lambda: group_norm_stages.apply(GOOD, None, None, act="tanh"), "tanh"),
        (lambda: group_norm_stages.apply(GOOD, None, None, resample="half"), "half"),
        (lambda: group_norm_stages.apply(GOOD[:, :3], None, None, resample="down"), "2x2"),
        (lambda: group_norm_stages.apply(GOOD, torch.ones(2, 8), None), "both"),
        (lambda: group_norm_stages.apply(GOOD, torch.ones(8), torch.ones(8)), "scale: expected"),
        (lambda: group_norm_stages.apply(GOOD, None, None, x2=GOOD[:1]), "x2: expected"),
        (lambda: group_norm_stages.apply(GOOD, None, None, x2=GOOD.half()), "x2"),
        (lambda: group_norm_stages.apply(GOOD, None, None, y=GOOD[:1]), "y: expected"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(groups=5), "5 groups"),
        (dict(weight=torch.ones(9)), "moments of 8 channels"),
        (dict(bias=torch.ones(7)), "bias: expected"),
        (dict(bias=torch.ones(8).half()), "bias: expected"),
        (dict(shift=torch.ones(3, 8)), "shift: expected"),
        (dict(counts=torch.tensor([8, 8, 8])), "int32"),
        (dict(counts=torch.tensor([24], dtype=torch.int32)), "int32"),
        (dict(second=(torch.zeros(1, 3, 2, 8), torch.ones(3, dtype=torch.int32))), "second: expected"),
    ],
)
def test_wrong_arguments_of_merge_are_refused(changes, message):
    counts = group_norm_stages.tile_counts(24, 8)
    arguments = dict(moments=torch.zeros(2, 3, 2, 8), counts=counts, weight=torch.ones(8), bias=torch.ones(8), groups=2)
    with pytest.raises(ValueError, match=message):
        group_norm_stages.merge(**{**arguments, **changes})


@pytest.mark.gpu
def test_gpu_takes_triton_and_agrees_with_the_reference():
    x = random((4, 64, 64, 256), torch.bfloat16)
    weight, bias = random((256,)), random((256,))
    results = []
    for device, dtype, backend in (
        ("cuda", torch.bfloat16, None),
        ("cpu", torch.float64, "reference"),
        ("cpu", torch.bfloat16, "reference"),
    ):
        precise = torch.promote_types(dtype, torch.float32)
        there = [t.to(device, dtype if t is x else precise) for t in (x, weight, bias)]
        tiles = group_norm_stages.moments(there[0], backend=backend)
        counts = group_norm_stages.tile_counts(64 * 64, group_norm_stages.default_tile_pixels(64 * 64), device)
        scale, offset = group_norm_stages.merge(tiles, counts, *there[1:], 32, backend=backend)
        results.append(
            group_norm_stages.apply(there[0], scale, offset, act="gelu", resample="up", backend=backend).cpu()
        )
    assert_numeric_contract(*results)
