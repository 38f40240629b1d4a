"""ingest: every implementation against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine.kernels import CannotRunError, ingest, philox
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract

NOISE = dict(seed=2**63 + 987654321, draw=2**32 - 3, step=5)
COEFFICIENTS = dict(a=[0.81, 0.3], b=[0.586, 0.954])


@pytest.fixture(params=launchers.names(ingest.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, ingest.CONFIGURATIONS)


def make_images(dtype, shape, layout="nhwc", seed=0) -> torch.Tensor:
    """Images (B, H, W, C) over the whole range of their type; floats off-centre, around -2.3."""
    rng = np.random.default_rng(seed)
    if dtype == torch.float32:
        array = torch.from_numpy(rng.normal(-2.3, 1.0, shape).astype(np.float32))
    else:
        array = torch.from_numpy(rng.integers(0, int(ingest.LEVELS[dtype]) + 1, shape).astype(str(dtype)[6:]))
    batch, height, width, channels = shape
    if layout == "nchw":
        planes = torch.empty((batch, channels, height, width), dtype=dtype)
        planes.copy_(array.permute(0, 3, 1, 2))
        return planes.permute(0, 2, 3, 1)
    if layout == "cropped":
        outer = torch.zeros((batch, height + 3, width + 5, channels + 1), dtype=dtype)
        view = outer[:, 1 : height + 1, 2 : width + 2, :channels]
        view.copy_(array)
        return view
    return array


def run_into_nan(launcher, images, dtype, gain=2.0, offset=-1.0, a=COEFFICIENTS["a"], b=COEFFICIENTS["b"], noise=NOISE):
    images, device = images if launcher.device == "cpu" else images.to(launcher.device), launcher.device
    x_0 = torch.full(images.shape, float("nan"), dtype=dtype, device=device)
    x_t = torch.full((len(a), *images.shape), float("nan"), dtype=dtype, device=device)
    numbers = gain, offset, list(a), list(b), noise["seed"], noise["draw"], noise["step"]
    launcher.run(ingest.OP, images, x_0, x_t, *numbers)
    return x_0.cpu(), x_t.cpu()


CASES = [
    ((1, 1, 1, 3), "nhwc"),
    ((1, 17, 11, 3), "nhwc"),
    ((3, 13, 23, 3), "nchw"),
    ((2, 9, 31, 1), "cropped"),
    ((2, 5, 6, 7), "cropped"),
    ((1, 40, 41, 3), "nhwc"),  # more than a tile, of which the last ends within a vector
]


@pytest.mark.parametrize("pixels", [torch.uint8, torch.uint16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", ingest.TYPES, ids=str)
def test_meets_the_numeric_contract(launcher, pixels, dtype):
    for number, (shape, layout) in enumerate(CASES):
        images = make_images(pixels, shape, layout, seed=number)
        results = run_into_nan(launcher, images, dtype)
        arguments = dict(gain=2.0, offset=-1.0, **COEFFICIENTS, **NOISE)
        exact = ingest.reference(images, dtype=torch.float64, **arguments)
        torchs = ingest.reference(images, dtype=dtype, **arguments)
        for result, exact_part, torch_part in zip(results, exact, torchs, strict=True):
            assert_numeric_contract(result, exact_part, torch_part)


def test_integers_are_those_of_the_reference(launcher):
    """With a = 0, b = 1 the output is the noise; a word that differs anywhere moves it by far more than rounding."""
    images = make_images(torch.uint8, (2, 32, 33, 4))
    _, x_t = run_into_nan(launcher, images, torch.float32, a=[0.0, 0.0], b=[1.0, 1.0])
    for scale in (0, 1):
        noise = philox.philox_normal(NOISE["seed"], NOISE["draw"], NOISE["step"], scale, (32, 33, 4), torch.float64)
        assert (x_t[scale] - noise).abs().max() < 2e-6


def test_one_scale(launcher):
    images = make_images(torch.uint8, (2, 6, 5, 3))
    _, one = run_into_nan(launcher, images, torch.float32, a=[0.7], b=[0.4])
    _, two = run_into_nan(launcher, images, torch.float32, a=[0.7, 0.1], b=[0.4, 0.9])
    assert one.shape[0] == 1
    assert torch.equal(one[0], two[0])


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    images = make_images(torch.uint8, (11, 9, 17, 3))
    x_0, x_t = run_into_nan(launcher, images, torch.float32)
    again = run_into_nan(launcher, images, torch.float32)
    assert torch.equal(x_0, again[0]) and torch.equal(x_t, again[1])
    order = [10, 3, 7]
    part_0, part_t = run_into_nan(launcher, images[order], torch.float32)
    assert torch.equal(part_0, x_0[order]) and torch.equal(part_t, x_t[:, order])


@pytest.mark.parametrize("name", launchers.names(cuda=False))
def test_given_noise_takes_the_place_of_the_drawn(name, monkeypatch):
    launcher = launchers.launcher(name, monkeypatch)
    images = make_images(torch.uint8, (3, 9, 170, 3))
    backend = launcher.backend
    noise = ingest.draw_noise(tuple(images.shape[1:]), 2, **NOISE, backend=backend)
    assert noise.shape == (2, 9, 170, 3) and (noise[0] - noise[1]).abs().max() > 1
    results = []
    for before in (None, noise):
        x_0, x_t = torch.full(images.shape, float("nan")), torch.full((2, *images.shape), float("nan"))
        numbers = 2.0, -1.0, COEFFICIENTS["a"], COEFFICIENTS["b"], NOISE["seed"], NOISE["draw"], NOISE["step"]
        launcher.run(ingest.OP, images, x_0, x_t, *numbers, before)
        results.append((x_0, x_t))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=2e-6)


def test_backends_that_draw_refuse_given_noise():
    images = make_images(torch.uint8, (1, 4, 4, 3))
    noise = ingest.draw_noise((4, 4, 3), 2, 1)
    for backend in ("triton", "cuda"):
        with pytest.raises(CannotRunError):
            call(images, noise=noise, backend=backend)
    with pytest.raises(ValueError, match="noise: expected"):
        call(images, noise=noise[:1])


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("level", launchers.LEVELS)
@pytest.mark.parametrize("dtype", ingest.TYPES, ids=str)
def test_cpu_threads_and_streaming_change_nothing(level, dtype):
    if not native.cpu_levels().get(level):
        pytest.skip(f"this processor does not run {level}")
    images = make_images(torch.uint8, (2, 70, 50, 3))
    results = []
    for threads, stream in ((1, False), (3, False), (64, True)):
        x_0 = torch.full((images.numel() + 1,), float("nan"), dtype=dtype)[1:].view(
            images.shape
        )  # off any vector boundary
        x_t = torch.full((2, *images.shape), float("nan"), dtype=dtype)
        head = (images.data_ptr(), 0, tuple(images.shape), images.stride(), x_0.data_ptr(), x_t.data_ptr())
        coefficients = (1 / 255, 0.0, [0.5, 0.2], [0.5, 0.8])
        options = dict(seed=3, draw=0, step=0, noise=0, threads=threads, stream=stream, level=level)
        native.module.ingest(*head, ingest.TYPES[dtype], *coefficients, **options)
        results.append((x_0, x_t))
    for x_0, x_t in results[1:]:
        assert torch.equal(x_0, results[0][0]) and torch.equal(x_t, results[0][1])


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cpu_rounds_to_half_as_torch_does(dtype):
    """Every exponent, ties, subnormals, overflow, infinities and NaN; a = 1, b = 0 leaves the value alone."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 60000, dtype=np.uint32)
    ties = (np.arange(0, 2**16, dtype=np.uint32) << 16) | 0x8000
    half_ties = (np.arange(0, 2**19, 7, dtype=np.uint32) << 13) | 0x1000
    values = np.concatenate([bits, ties, half_ties]).view(np.float32)
    images = torch.from_numpy(values)[None, None, :, None]
    x_0, x_t = torch.empty(images.shape, dtype=dtype), torch.empty((1, *images.shape), dtype=dtype)
    ingest._run_cpu(images, x_0, x_t, 1.0, 0.0, [1.0], [0.0], 0, 0, 0)
    torch.testing.assert_close(x_0, images.to(dtype), rtol=0, atol=0, equal_nan=True)


def call(images, **changes):
    return ingest.ingest(images, **{"gain": 1.0, "offset": 0.0, **COEFFICIENTS, "seed": 1, **changes})


def test_the_op_takes_the_best_backend_or_the_forced_one(monkeypatch):
    images = make_images(torch.uint8, (2, 8, 9, 3))
    expected = "cpu" if native.available() else "reference"
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    outputs = torch.empty(images.shape), torch.empty((2, *images.shape))
    arguments = (*outputs, 1.0, 0.0, [0.5, 0.5], [0.5, 0.5], 1, 0, 0)
    assert ingest.OP.choose(images, *arguments) == expected
    assert ingest.OP.choose(images, *arguments, backend="reference") == "reference"
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    assert ingest.OP.choose(images, *arguments) == "reference"
    automatic, forced = call(images), call(images, backend="reference")
    for got, want in zip(automatic, forced, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=3e-6)


def test_the_default_falls_back_where_the_compiled_backends_do_not_serve(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    images = make_images(torch.uint8, (1, 4, 4, 3))
    assert call(images, dtype=torch.float64)[1].dtype == torch.float64
    with pytest.raises(CannotRunError, match="float64"):
        call(images, dtype=torch.float64, backend="cpu")


def test_custom_op_is_registered_soundly():
    images = make_images(torch.uint8, (1, 4, 5, 3))
    arguments = (
        images,
        torch.empty(images.shape),
        torch.empty((2, *images.shape)),
        1.0,
        0.0,
        [0.5, 0.5],
        [0.5, 0.5],
        -3,
        0,
        0,
        None,
        "",
    )
    torch.library.opcheck(torch.ops.dfengine.ingest, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "images, changes, message",
    [
        (torch.zeros(4, 4, 3, dtype=torch.uint8), {}, r"\(B, H, W, C\)"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.int32), {}, "int32"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"seed": -1}, "seed"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"seed": 2**64}, "seed"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"draw": 2**32}, "draw"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"step": 2**31}, "step"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"a": [1.0] * 3, "b": [1.0] * 3}, "3 scales"),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"a": [1.0]}, "differ in length"),
    ],
)
def test_wrong_arguments_are_refused(images, changes, message):
    with pytest.raises(ValueError, match=message):
        call(images, **changes)


def test_outputs_must_fit():
    images = make_images(torch.uint8, (1, 4, 4, 3))
    good, arguments = torch.empty((2, *images.shape)), dict(gain=1.0, offset=0.0, **COEFFICIENTS, seed=0)
    with pytest.raises(ValueError, match="x_0: expected"):
        ingest.ingest_into(images, torch.empty(1, 4, 4, 4), good, **arguments)
    with pytest.raises(ValueError, match="not contiguous"):
        ingest.ingest_into(images, torch.empty(1, 3, 4, 4).permute(0, 2, 3, 1), good, **arguments)
    with pytest.raises(ValueError, match="differs"):
        ingest.ingest_into(images, torch.empty(1, 4, 4, 3), good.half(), **arguments)


@pytest.mark.gpu
def test_gpu_takes_triton_and_agrees_with_the_reference():
    images = make_images(torch.uint8, (16, 256, 256, 3))
    x_0, x_t = call(images.cuda(), dtype=torch.float32)
    exact = call(images, dtype=torch.float64, backend="reference")
    torchs = call(images, dtype=torch.float32, backend="reference")
    for got, exact_part, torch_part in zip((x_0, x_t), exact, torchs, strict=True):
        assert_numeric_contract(got.cpu(), exact_part, torch_part)
