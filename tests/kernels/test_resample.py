"""resample: every implementation against the float64 reference, on channel slices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfengine import native
from dfengine.kernels import CannotRunError, resample
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.slices import poisoned, rest_is_nan, widened

OPS = {"upsample_bilinear": resample.UPSAMPLE, "max_pool": resample.MAX_POOL}
REFERENCES = {"upsample_bilinear": resample.reference_upsample, "max_pool": resample.reference_max_pool}
# (N, h, w, C): one block; odd sizes; C that fills no vector; more than a program's channels.
SHAPES = [(1, 2, 2, 3), (3, 7, 5, 16), (2, 4, 9, 37), (1, 3, 2, 130)]


@pytest.fixture(params=launchers.names(resample.CONFIGURATIONS, cuda=False))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, resample.CONFIGURATIONS)


def make(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (-2.3 + torch.randn(shape, generator=generator)).to(dtype)


def run_into_nan(launcher, op, x, extra=0) -> torch.Tensor:
    x = widened(x.to(launcher.device), extra, extra // 2)
    y = poisoned(resample._resized(op, x), x.dtype, launcher.device, extra, extra // 3)
    launcher.run(OPS[op], x, y)
    assert rest_is_nan(y)
    return y.cpu()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", resample.TYPES, ids=str)
@pytest.mark.parametrize("extra", [0, 11])
def test_meets_the_numeric_contract(launcher, op, dtype, extra):
    for number, shape in enumerate(SHAPES):
        x = make(shape, dtype, number)
        result = run_into_nan(launcher, op, x, extra)
        if op == "max_pool":
            assert torch.equal(result, resample.reference_max_pool(x))
        else:
            assert_numeric_contract(result, resample.reference_upsample(x.double()), resample.reference_upsample(x))


def test_upsampling_single_rows_and_columns(launcher):
    for shape in ((2, 1, 1, 3), (1, 1, 4, 5), (2, 5, 1, 4)):
        x = make(shape)
        exact = resample.reference_upsample(x.double())
        assert_numeric_contract(run_into_nan(launcher, "upsample_bilinear", x), exact, resample.reference_upsample(x))


def test_corners_are_kept_and_constants_stay(launcher):
    x = make((1, 6, 7, 4))
    y = run_into_nan(launcher, "upsample_bilinear", x)
    for i, j in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(y[:, i, j], x[:, i, j])
    constant = torch.full((1, 9, 5, 4), -2.3)
    assert (run_into_nan(launcher, "upsample_bilinear", constant) + 2.3).abs().max() < 1e-6


def test_pooling_passes_nan_and_infinities_on(launcher):
    for dtype in (torch.float32, torch.float16):
        for place in range(4):
            x = make((1, 4, 6, 3), dtype)
            x[0, place // 2, place % 2, 1] = float("nan")
            x[0, 2:, 2:4, 2] = -float("inf")
            x[0, 2 + place // 2, place % 2, 0] = float("inf")
            y = run_into_nan(launcher, "max_pool", x)
            torch.testing.assert_close(y, resample.reference_max_pool(x), rtol=0, atol=0, equal_nan=True)
            assert y.isnan().sum() == 1 and y.isinf().sum() == 2


def test_upsampling_passes_nan_on(launcher):
    x = make((1, 6, 6, 3))
    x[0, 2, 3, 1] = float("nan")
    y = run_into_nan(launcher, "upsample_bilinear", x)
    assert torch.isfinite(y[..., [0, 2]]).all()
    assert y[0, ..., 1].isnan()[3:7, 5:8].any() and torch.isfinite(y[0, [0, 1, 8, 9, 10, 11], :, 1]).all()


@pytest.mark.parametrize("op", OPS)
def test_runs_agree_bit_for_bit_whatever_the_batch(launcher, op):
    x = make((4, 6, 5, 20))
    y = run_into_nan(launcher, op, x)
    assert torch.equal(y, run_into_nan(launcher, op, x))
    assert torch.equal(run_into_nan(launcher, op, x[[3, 1]]), y[[3, 1]])


@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_what_the_modules_use(op):
    x = make((2, 8, 6, 5))
    planes = x.permute(0, 3, 1, 2)
    upsample = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    want = upsample(planes) if op == "upsample_bilinear" else F.max_pool2d(planes, 2)
    assert torch.equal(REFERENCES[op](x), want.permute(0, 2, 3, 1))


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("op", OPS)
def test_cpu_threads_and_streaming_change_nothing(op, monkeypatch):
    launcher, threads, results = launchers.Launcher("cpu", "cpu"), torch.get_num_threads(), []
    try:
        for count, stream_bytes in ((1, 2**40), (3, 0), (64, 0)):
            torch.set_num_threads(count)
            monkeypatch.setattr(resample, "STREAM_BYTES", stream_bytes)
            results.append(run_into_nan(launcher, op, make((2, 14, 9, 40), torch.bfloat16), 7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("op", OPS)
def test_the_op_takes_the_best_backend_or_the_forced_one(op, monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, call = make((2, 4, 6, 8)), getattr(resample, op)
    y = torch.empty(resample._resized(op, x))
    assert OPS[op].choose(x, y) == ("cpu" if native.available() else "reference")
    torch.testing.assert_close(call(x), call(x, backend="reference"), rtol=0, atol=1e-6)
    assert call(x.double()).dtype == torch.float64
    with pytest.raises(CannotRunError, match="float64"):
        call(x.double(), backend="cpu")
    getattr(resample, f"{op}_into")(x, y)
    assert torch.equal(y, call(x))


@pytest.mark.parametrize("op", OPS)
def test_custom_op_is_registered_soundly(op):
    arguments = (make((1, 4, 5, 3)), "")
    torch.library.opcheck(getattr(torch.ops.dfengine, op), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.zeros(4, 4, 3)), r"\(N, H, W, C\)"),
        (dict(x=torch.zeros(1, 0, 4, 3)), "fewer than"),
        (dict(x=torch.zeros(1, 3, 4, 4).movedim(1, -1)), "x: strides"),
        (dict(y=torch.zeros(1, 5, 5, 3)), "y: expected"),
        (dict(y="half"), "y: expected torch.float32"),
        (dict(y="planes"), "y: strides"),
    ],
)
def test_wrong_arguments_are_refused(op, changes, message):
    x = torch.zeros(1, 4, 4, 3)
    y = torch.zeros(resample._resized(op, x))
    ys = dict(half=y.half(), planes=y.movedim(-1, 1).contiguous().movedim(1, -1))
    arguments = {"x": x, "y": y, **changes}
    if isinstance(arguments["y"], str):
        arguments["y"] = ys[arguments["y"]]
    with pytest.raises(ValueError, match=message):
        getattr(resample, f"{op}_into")(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_gpu_takes_triton_and_agrees_with_the_reference(op):
    x = make((2, 64, 64, 128))
    got, exact = getattr(resample, op)(x.cuda()).cpu(), REFERENCES[op](x.double())
    assert_numeric_contract(got, exact, REFERENCES[op](x))
