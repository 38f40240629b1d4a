"""group_norm_merge: every implementation against the float64 reference; test_group_norm_apply.py has torch itself."""

from __future__ import annotations

import pytest
import torch

from dfengine.kernels import group_norm_merge, group_norm_moments
from dfengine.kernels.group_norm_merge import OP
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.stages import assert_threads_change_nothing, poisoned, random, run

EPS = 1e-5


@pytest.fixture(params=launchers.names(group_norm_merge.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, group_norm_merge.CONFIGURATIONS)


def make(widths, pixels, tiles, batch=2, shift="full", seed=0):
    """Arguments up to groups, from random activations, of one source or two with tiles of their own."""
    sources = []
    for number, (width, tile) in enumerate(zip(widths, tiles, strict=True)):
        x = random((batch, 1, pixels, width), torch.float64, seed=seed + number)
        x = x * torch.linspace(0.5, 2, width, dtype=torch.float64) + number
        sources += [group_norm_moments.reference(x, tile).float(), group_norm_moments.tile_counts(pixels, tile)]
    sources += [None] * (4 - len(sources))
    channels = sum(widths)
    weight, bias = random((channels,), mean=1.0, seed=7), random((channels,), mean=0.0, seed=8)
    moved = {"full": random((batch, channels), seed=9), "one": random((1, channels), seed=9), "none": None}[shift]
    return [*sources, weight, bias, moved]


def merged(launcher, arguments, groups, statistics=True):
    """scale, offset, mean, rstd."""
    batch, channels = arguments[0].shape[0], arguments[4].shape[0]
    outputs = [poisoned((batch, width)) for width in (channels, channels, groups, groups)]
    if not statistics:
        outputs[2:] = [None, None]
    return run(launcher, OP, *arguments, groups, EPS, *outputs, outputs=4)


# widths, groups, pixels, tiles, shift: groups that straddle the border; one tile; unlike tiles; many; a lone group.
CASES = [
    ((12,), 3, 35, (8,), "full"),
    ((8, 16), 3, 60, (16, 7), "one"),
    ((10, 6), 2, 33, (40, 2), "full"),
    ((6,), 3, 70, (1,), "none"),
    ((5, 35), 1, 9, (4, 4), "none"),
    ((64, 32), 6, 64, (16, 16), "one"),
]


def test_numeric_contract(launcher):
    for number, (widths, groups, pixels, tiles, shift) in enumerate(CASES):
        arguments = make(widths, pixels, tiles, shift=shift, seed=number)
        results = merged(launcher, arguments, groups)
        double = [a if a is None or a.dtype == torch.int32 else a.double() for a in arguments]
        exact = group_norm_merge.reference(*double, groups, EPS)
        torchs = group_norm_merge.reference(*arguments, groups, EPS)
        for result, exact_part, torch_part in zip(results, exact, torchs, strict=True):
            assert_numeric_contract(result, exact_part, torch_part)
        if number == 0:
            without = merged(launcher, arguments, groups, statistics=False)
            assert torch.equal(without[0], results[0]) and torch.equal(without[1], results[1])


def test_agree_bit_for_bit_whatever_the_batch(launcher):
    arguments = make((8, 16), 60, (16, 7), batch=3)
    first, again = (merged(launcher, arguments, 3) for _ in range(2))
    part = [a if a is None or a.dtype == torch.int32 or a.ndim == 1 else a[[2]] for a in arguments]
    for one, two, alone in zip(first, again, merged(launcher, part, 3), strict=True):
        assert torch.equal(one, two) and torch.equal(one[[2]], alone)


def test_cpu_threads_change_nothing(monkeypatch):
    cpu = launchers.launcher("cpu-base", monkeypatch)
    arguments = make((128, 64), 60, (16, 7), batch=1)
    assert_threads_change_nothing(lambda count: merged(cpu, arguments, 3))


def test_the_custom_op_is_registered_soundly():
    arguments = (*make((8,), 24, (8,)), 2, EPS, torch.empty(2, 8), torch.empty(2, 8), None, torch.empty(2, 2), "")
    torch.library.opcheck(torch.ops.dfengine.group_norm_merge, arguments, test_utils=("test_schema", "test_faketensor"))


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
        (dict(out=(torch.zeros(2, 8), torch.zeros(2, 9))), "offset: expected"),
        (dict(statistics=(torch.zeros(2, 8), torch.zeros(2, 2))), "mean: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    counts = group_norm_moments.tile_counts(24, 8)
    arguments = dict(moments=torch.zeros(2, 3, 2, 8), counts=counts, weight=torch.ones(8), bias=torch.ones(8), groups=2)
    with pytest.raises(ValueError, match=message):
        group_norm_merge.merge(**{**arguments, **changes})
