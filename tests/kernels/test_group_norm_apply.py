"""group_norm_apply: every implementation against the float64 reference; the three stages together against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfengine.kernels import group_norm_apply, group_norm_merge, group_norm_moments
from dfengine.kernels.group_norm_apply import OP
from dfengine.kernels.group_norm_moments import TYPES
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.slices import rest_is_nan
from tests.kernels.stages import assert_threads_change_nothing, poisoned, random, run


@pytest.fixture(params=launchers.names(group_norm_apply.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, group_norm_apply.CONFIGURATIONS)


# (N, H, W), channels of each source, padding of x, x2 and y, act, resample. The last three take several blocks of
# pixels, of channels, and of both, in every configuration.
CASES = [
    ((1, 1, 1), (8,), (0, 0), "gelu", "none"),
    ((2, 5, 7), (12,), (4, 8), "silu", "none"),
    ((2, 5, 6), (16, 8), (8, 16, 8), "gelu", "none"),
    ((2, 4, 6), (7, 5), (0, 3, 1), "relu", "down"),
    ((1, 6, 4), (24,), (8, 0), "gelu", "down"),
    ((2, 3, 5), (8, 16), (0, 8, 24), "silu", "up"),
    ((1, 3, 4), (5,), (2, 2), "gelu", "up"),
    ((3, 7, 11), (4,), (0, 0), "gelu", "none"),
    ((1, 3, 6), (80, 72), (0, 0, 8), "relu", "none"),
    ((1, 9, 8), (136,), (0, 0), "none", "none"),
]


def make(sizes, widths, padding, dtype, resample, seed=0):
    inputs = [random((*sizes, w), dtype, seed=seed + k, padding=padding[k]) for k, w in enumerate(widths)]
    x, x2 = (inputs + [None])[:2]
    scale, offset = random((sizes[0], sum(widths)), mean=1.0, seed=5), random((sizes[0], sum(widths)), seed=6, mean=2.0)
    factor = {"none": 1, "down": 0.5, "up": 2}[resample]
    shape = (sizes[0], int(sizes[1] * factor), int(sizes[2] * factor), sum(widths))
    return x, x2, scale, offset, poisoned(shape, dtype, padding[-1])


@pytest.mark.parametrize("level", launchers.LEVELS)
def test_subnormal_bfloat16_is_kept_but_by_the_instruction_that_makes_0_of_it(level, monkeypatch):
    launcher = launchers.launcher(f"cpu-{level}", monkeypatch)
    x = torch.full((1, 2, 3, 40), 1e-39, dtype=torch.bfloat16)
    (result,) = run(launcher, OP, x, None, None, None, "none", "none", torch.full_like(x, torch.nan))
    assert (result == (0 if level == "avx512_bf16" else x)).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_numeric_contract(launcher, dtype):
    for number, (sizes, widths, padding, act, resample) in enumerate(CASES):
        x, x2, scale, offset, y = make(sizes, widths, padding, dtype, resample, seed=number)
        (result,) = run(launcher, OP, x, x2, scale, offset, act, resample, y)
        double = [None if t is None else t.double() for t in (x, x2, scale, offset)]
        exact = group_norm_apply.reference(*double, act, resample)
        torchs = group_norm_apply.reference(x, x2, scale, offset, act, resample)
        assert_numeric_contract(result, exact, torchs)
        if launcher.device == "cpu":
            assert rest_is_nan(y)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_resampling_alone(launcher, dtype):
    x = random((2, 4, 6, 24), dtype, padding=8)
    channels_first = x.permute(0, 3, 1, 2).double()
    (pooled,) = run(launcher, OP, x, None, None, None, "none", "down", poisoned((2, 2, 3, 24), dtype, 8))
    mean = F.avg_pool2d(channels_first, 2).permute(0, 2, 3, 1)
    assert_numeric_contract(pooled, mean, mean.to(dtype))
    (enlarged,) = run(launcher, OP, x, None, None, None, "none", "up", poisoned((2, 8, 12, 24), dtype, 8))
    assert torch.equal(enlarged.double(), F.interpolate(channels_first, scale_factor=2).permute(0, 2, 3, 1))


@pytest.mark.parametrize("act", ["gelu", "silu", "relu"])
def test_activations_over_their_range(launcher, act):
    far = torch.tensor([-1e4, -200.0, 200.0, 1e4])
    z = torch.cat((torch.linspace(-30, 30, 2867), torch.linspace(-1e-3, 1e-3, 201), far)).view(1, 1, -1, 128)
    (result,) = run(launcher, OP, z, None, None, None, act, "none", poisoned(z.shape))
    error = (result.double() - getattr(F, act)(z.double())).abs() / z.double().abs().clamp(min=1)
    assert error.max() < 5e-7  # on a GPU the power and the quotient of silu are of 2 ulp each


def test_nan_is_not_hidden(launcher):
    x = torch.zeros(1, 1, 2, 8)
    x[0, 0, 1, 3] = float("nan")
    for act in ("none", "gelu", "silu", "relu"):
        (result,) = run(launcher, OP, x, None, None, None, act, "none", torch.zeros_like(x))
        assert result.isnan().sum() == 1 and result[0, 0, 1, 3].isnan(), act


def test_agree_bit_for_bit_whatever_the_batch(launcher):
    x, _, scale, offset, _ = make((3, 5, 4), (24,), (0, 0), torch.float32, "none")
    y = []
    for i in ([0, 1, 2], [0, 1, 2], [2]):
        y += run(launcher, OP, x[i], None, scale[i], offset[i], "gelu", "none", poisoned(x[i].shape))
    assert torch.equal(y[0], y[1]) and torch.equal(y[2][0], y[0][2])


def test_cpu_threads_and_streaming_change_nothing(monkeypatch):
    cpu = launchers.launcher("cpu-base", monkeypatch)
    x, x2, scale, offset, _ = make((2, 100, 6), (24, 8), (0, 8, 0), torch.bfloat16, "none")  # past SMALL_LOOP

    def compute(count):
        monkeypatch.setattr(group_norm_apply, "STREAM_BYTES", 0 if count == 64 else 2**30)
        results = []
        for resample, size in (("none", (100, 6)), ("down", (50, 3)), ("up", (200, 12))):
            y = poisoned((2, *size, 32), torch.bfloat16, 5)
            results += run(cpu, OP, x, x2, scale, offset, "gelu", resample, y)
        return results

    assert_threads_change_nothing(compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_stages_are_a_group_norm_of_a_concatenation(dtype, monkeypatch):
    """Through the public functions, into a slice of a wider buffer, with the default backend."""
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, x2 = random((2, 8, 6, 24), dtype, padding=8), random((2, 8, 6, 8), dtype, seed=1)
    weight, bias, shift = random((32,), seed=2), random((32,), seed=3), random((2, 32), seed=4)
    tiles = [
        (group_norm_moments.moments(t, size), group_norm_moments.tile_counts(48, size))
        for t, size in ((x, 16), (x2, 20))
    ]
    scale, offset = group_norm_merge.merge(*tiles[0], weight, bias, 2, 1e-5, shift, tiles[1])
    y = poisoned((2, 4, 3, 32), dtype, 32)
    assert group_norm_apply.apply(x, scale, offset, act="gelu", resample="down", x2=x2, y=y) is y

    def through_torch(dtype, precise):
        u = torch.cat((x, x2), dim=3).to(dtype).permute(0, 3, 1, 2).contiguous() + shift[:, :, None, None].to(dtype)
        z = F.gelu(F.group_norm(u, 2, weight.to(precise), bias.to(precise), 1e-5))
        return F.avg_pool2d(z, 2).permute(0, 2, 3, 1)

    assert_numeric_contract(y, through_torch(torch.float64, torch.float64), through_torch(dtype, torch.float32))


def test_the_custom_op_is_registered_soundly():
    arguments = (random((2, 4, 6, 8), padding=4), None, None, None, "none", "up", torch.empty(2, 8, 12, 8), "")
    torch.library.opcheck(torch.ops.dfengine.group_norm_apply, arguments, test_utils=("test_schema", "test_faketensor"))


GOOD = torch.zeros(2, 4, 6, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=GOOD[0]), r"\(N, H, W, C\)"),
        (dict(x=GOOD[:, ::2]), "strides"),
        (dict(act="tanh"), "tanh"),
        (dict(resample="half"), "half"),
        (dict(x=GOOD[:, :3], resample="down"), "2x2"),
        (dict(scale=torch.ones(2, 8)), "both"),
        (dict(scale=torch.ones(8), offset=torch.ones(8)), "scale: expected"),
        (dict(x2=GOOD[:1]), "x2: expected"),
        (dict(x2=GOOD.half()), "x2"),
        (dict(y=GOOD[:1]), "y: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        group_norm_apply.apply(**{**dict(x=GOOD, scale=None, offset=None), **changes})


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
        tiles = group_norm_moments.moments(there[0], backend=backend)
        counts = group_norm_moments.tile_counts(64 * 64, group_norm_moments.default_tile_pixels(64 * 64), device)
        scale, offset = group_norm_merge.merge(tiles, counts, *there[1:], 32, backend=backend)
        y = group_norm_apply.apply(there[0], scale, offset, act="gelu", resample="up", backend=backend)
        results.append(y.cpu())
    assert_numeric_contract(*results)
