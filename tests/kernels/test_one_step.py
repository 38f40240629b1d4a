"""one_step: every implementation against the float64 reference, and the reference against dfengine.diffusion."""

from __future__ import annotations

import pytest
import torch

from dfengine import native
from dfengine.diffusion import Schedule, norm_guided, to_unit
from dfengine.diffusion import one_step as one_step_of_modules
from dfengine.kernels import CannotRunError, one_step
from dfengine.kernels.slices import pixel_stride
from dfengine.models import ModelConfig
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.slices import poisoned, rest_is_nan, widened

SCHEDULE = Schedule()
GUIDED = one_step.coefficients(SCHEDULE.alpha_bar[[200, 400]], 0.9)
PLAIN = one_step.coefficients(SCHEDULE.alpha_bar[[400]])
KINDS = [(dtype, dtype) for dtype in one_step.TYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
# (N, H, W, C): one pixel; odd; runs of 16 bytes in every type; one channel; many.
SHAPES = [(1, 1, 1, 3), (3, 7, 11, 3), (2, 8, 12, 3), (2, 16, 24, 1), (1, 5, 6, 7), (1, 33, 37, 3)]


@pytest.fixture(params=launchers.names(one_step.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, one_step.CONFIGURATIONS)


def make(shape, kind=(torch.float32, torch.float32), scales=2, seed=0) -> list[torch.Tensor]:
    """x_t, eps, x_0, off-centre: reconstructions lie around -0.4, on both sides of -1 and of 1."""
    generator = torch.Generator().manual_seed(seed)
    x_t = -2.3 + 0.5 * torch.randn((scales, *shape), generator=generator)
    eps = -2.3 + torch.randn((scales, *shape), generator=generator)
    x_0 = -2.3 + torch.randn(shape, generator=generator)
    return [x_t.to(kind[0]), eps.to(kind[1]), x_0.to(kind[0])]


def run_into_nan(launcher, tensors, numbers, gain=2.0, offset=-1.0, extra=0, unit=True):
    """(pair, reconstruction); `extra`: channels around x_t, eps, x_0 and the pair."""
    x_t, eps, x_0 = (widened(t.to(launcher.device), extra, extra // 2) for t in tensors)
    pair = poisoned((*x_0.shape[:-1], 2 * x_0.shape[-1]), eps.dtype, launcher.device, extra, extra // 2)
    reconstruction = poisoned(x_0.shape, torch.float32, launcher.device) if unit else None
    launcher.run(one_step.OP, x_t, eps, x_0, *numbers, gain, offset, pair, reconstruction)
    assert rest_is_nan(pair)
    return pair.cpu(), reconstruction.cpu() if unit else None


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("numbers", [GUIDED, PLAIN], ids=["guided", "plain"])
@pytest.mark.parametrize("extra", [0, 5])
def test_meets_the_numeric_contract(launcher, kind, numbers, extra):
    for number, shape in enumerate(SHAPES):
        tensors = make(shape, kind, len(numbers[0]), seed=number)
        results = run_into_nan(launcher, tensors, numbers, extra=extra)
        exact = one_step.reference(*(t.double() for t in tensors), *numbers, 2.0, -1.0)
        torchs = one_step.reference(*tensors, *numbers, 2.0, -1.0)
        for result, exact_part, torch_part in zip(results, exact, torchs, strict=True):
            assert_numeric_contract(result, exact_part, torch_part)
        if launcher.backend != "triton" or launchers.GPU or kind[0] == kind[1]:  # the interpreter cuts bfloat16 off
            assert torch.equal(results[0][..., : shape[-1]], tensors[2].to(kind[1]))


def test_every_part_of_the_formula_is_reached():
    """The inputs of these tests clamp somewhere, but not everywhere, at each of the four bounds and in between."""
    x_t, eps, x_0 = (t.double() for t in make((3, 7, 11, 3)))
    a, b, weight = GUIDED
    big = (x_t[1] - b[1] * eps[1]) / a[1]
    assert 0.1 < (big < -1).float().mean() and 0.02 < (big > 1).float().mean()
    r = torch.lerp((x_t[0] - b[0] * eps[0]) / a[0], big.clamp(-1, 1), weight)
    assert 0.1 < (r.abs() < 1).float().mean() and (r > 1).any() and (r < -1).any()


@pytest.mark.parametrize("pixel_range", ["unit", "signed"])
@pytest.mark.parametrize("guidance", [1.0, 0.3])
def test_the_reference_is_the_reconstruction_of_the_modules(pixel_range, guidance):
    config = ModelConfig(pixel_range=pixel_range)
    gain, offset = (2.0, -1.0) if pixel_range == "signed" else (1.0, 0.0)
    generator = torch.Generator().manual_seed(0)
    x_0, small, big, eps_s, eps_b = (
        torch.randn((2, 3, 6, 5), dtype=torch.float64, generator=generator) for _ in range(5)
    )
    eps = torch.cat((eps_s, eps_b))
    guided = norm_guided(lambda x, t: eps, SCHEDULE, x_0, 200, 400, small, big, guidance)
    plain, _ = one_step_of_modules(lambda x, t: eps_b, SCHEDULE, x_0, 400, big)
    numbers = one_step.coefficients(SCHEDULE.alpha_bar[[200, 400]], guidance)
    for want, x_t, predicted, of in (
        (guided.reconstruction, torch.stack((guided.x_ts, guided.x_tb)), torch.stack((eps_s, eps_b)), numbers),
        (plain, guided.x_tb[None], eps_b[None], PLAIN),
    ):
        inputs = (x_t.movedim(2, -1), predicted.movedim(2, -1), x_0.movedim(1, -1))
        pair, reconstruction = one_step.reference(*inputs, *of, gain, offset)
        torch.testing.assert_close(pair, torch.cat((x_0, want), dim=1).movedim(1, -1), rtol=0, atol=1e-12)
        torch.testing.assert_close(reconstruction, to_unit(want, config).movedim(1, -1), rtol=0, atol=1e-12)


def test_the_pair_alone(launcher):
    tensors = make((2, 8, 12, 3))
    both, _ = run_into_nan(launcher, tensors, GUIDED)
    alone, _ = run_into_nan(launcher, tensors, GUIDED, unit=False)
    assert torch.equal(alone, both)


def test_nan_is_not_hidden(launcher):
    for scale in (0, 1):
        x_t, eps, x_0 = make((1, 8, 8, 3))
        eps[scale, 0, 2, 3, 1] = float("nan")
        pair, reconstruction = run_into_nan(launcher, (x_t, eps, x_0), GUIDED)
        assert pair.isnan().sum() == 1 and pair[0, 2, 3, 4].isnan()
        assert reconstruction.isnan().sum() == 1 and reconstruction[0, 2, 3, 1].isnan()


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    tensors = make((5, 16, 9, 3))
    pair, reconstruction = run_into_nan(launcher, tensors, GUIDED)
    again = run_into_nan(launcher, tensors, GUIDED)
    assert torch.equal(pair, again[0]) and torch.equal(reconstruction, again[1])
    order = [4, 1, 3]
    part = run_into_nan(launcher, (tensors[0][:, order], tensors[1][:, order], tensors[2][order]), GUIDED)
    assert torch.equal(part[0], pair[order]) and torch.equal(part[1], reconstruction[order])


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cpu_threads_and_streaming_change_nothing(kind, monkeypatch):
    launcher = launchers.Launcher("cpu", "cpu")
    tensors, threads, results = make((2, 90, 70, 3), kind), torch.get_num_threads(), []  # past SMALL_LOOP
    try:
        for count, stream_bytes in ((1, 2**40), (3, 2**40), (5, 0)):
            torch.set_num_threads(count)
            monkeypatch.setattr(one_step, "STREAM_BYTES", stream_bytes)
            results.append(run_into_nan(launcher, tensors, GUIDED))
            results.append(run_into_nan(launcher, tensors, GUIDED, extra=2))
    finally:
        torch.set_num_threads(threads)
    for pair, reconstruction in results[1:]:
        assert torch.equal(pair, results[0][0]) and torch.equal(reconstruction, results[0][1])


def test_the_op_takes_the_best_backend_or_the_forced_one(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    tensors = make((2, 8, 9, 3))
    arguments = (*tensors, *GUIDED, 1.0, 0.0, None, None)
    assert one_step.OP.choose(*arguments) == ("cpu" if native.available() else "reference")
    automatic = one_step.one_step(*tensors, *GUIDED)
    forced = one_step.one_step(*tensors, *GUIDED, backend="reference")
    for got, want in zip(automatic, forced, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    double = [t.double() for t in tensors]
    assert one_step.one_step(*double, *GUIDED)[0].dtype == torch.float64
    with pytest.raises(CannotRunError, match="float64"):
        one_step.one_step(*double, *GUIDED, backend="cpu")


@pytest.mark.parametrize("unit", [True, False])
def test_custom_op_is_registered_soundly(unit):
    tensors = make((1, 4, 5, 3))
    outputs = torch.empty((1, 4, 5, 6)), torch.empty((1, 4, 5, 3)) if unit else None
    arguments = (*tensors, *GUIDED, 1.0, 0.0, *outputs, "")
    torch.library.opcheck(torch.ops.dfengine.one_step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x_0=torch.zeros(4, 4, 3)), r"\(N, H, W, C\)"),
        (dict(a=[0.5] * 3, b=[0.5] * 3), "one or two"),
        (dict(b=[0.5]), "one or two"),
        (dict(a=[0.0, 0.5]), "zero"),
        (dict(gain=0.0), "zero"),
        (dict(x_t=torch.zeros(1, 2, 4, 4, 3)), "x_t: expected"),
        (dict(eps=torch.zeros(2, 2, 4, 4, 4)), "eps: expected"),
        (dict(x_t=torch.zeros(2, 2, 4, 4, 3).half()), "x_t: expected torch.float32"),
        (dict(x_0=torch.zeros(2, 4, 4, 3).half()), "x_0: expected torch.float32"),
        (dict(eps=torch.zeros(2, 2, 4, 4, 3).half()), "pair: expected torch.float16"),
        (dict(eps=torch.zeros(2, 2, 3, 4, 4).movedim(2, -1)), "eps: strides"),
        (dict(pair=torch.zeros(2, 4, 4, 5)), "pair: expected"),
        (dict(pair=torch.zeros(2, 4, 4, 6).half()), "pair: expected torch.float32"),
        (dict(pair=torch.zeros(2, 4, 5, 6)[:, :, :4]), "pair: strides"),
        (dict(reconstruction=torch.zeros(2, 4, 4, 6)[..., :3]), "not contiguous"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    x_t, eps, x_0 = make((2, 4, 4, 3))
    arguments = dict(x_t=x_t, eps=eps, x_0=x_0, a=[0.5, 0.5], b=[0.5, 0.5], weight=0.2, gain=1.0, offset=0.0)
    arguments |= dict(pair=torch.zeros(2, 4, 4, 6), reconstruction=None)
    with pytest.raises(ValueError, match=message):
        one_step.one_step_into(**{**arguments, **changes})


def test_pixel_strides():
    wide = torch.zeros(2, 3, 4, 8)
    assert pixel_stride("x", wide) == 8 and pixel_stride("x", wide[..., 2:5]) == 8
    assert pixel_stride("x", wide[:1, :1, :1, :3]) == 3, "one pixel: whatever the strides"
    assert pixel_stride("x", wide[:, :, :1, :3][:, :1]) == 96, "one pixel an image: images follow each other"
    for wrong in (wide[:, :, 1:], wide[:, :2], wide[..., ::2], wide.movedim(1, 2), wide[:, :1].expand(2, 3, 4, 8)):
        with pytest.raises(ValueError, match="x: strides"):
            pixel_stride("x", wrong)


@pytest.mark.gpu
def test_gpu_takes_triton_and_agrees_with_the_reference():
    tensors = make((16, 256, 256, 3))
    results = one_step.one_step(*(t.cuda() for t in tensors), *GUIDED, 2.0, -1.0)
    exact = one_step.reference(*(t.double() for t in tensors), *GUIDED, 2.0, -1.0)
    torchs = one_step.reference(*tensors, *GUIDED, 2.0, -1.0)
    for got, exact_part, torch_part in zip(results, exact, torchs, strict=True):
        assert_numeric_contract(got.cpu(), exact_part, torch_part)


@pytest.mark.parametrize("level", launchers.LEVELS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("numbers", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_a_pixel_is_the_same_bits_wherever_it_stands(level, kind, numbers, monkeypatch):
    """At the end of an image, which vectors do not fill, as in its middle; subnormal numbers too."""
    launcher = launchers.launcher(f"cpu-{level}", monkeypatch)
    for scale in (1.0, 1e-39):
        tensors = [(t.float() * scale).to(t.dtype) for t in make((1, 1, 64, 3), kind, len(numbers[0]))]
        whole = run_into_nan(launcher, tensors, numbers, gain=0.9, offset=0.37)
        for pixels in range(1, 64):
            some = [t[..., :pixels, :].contiguous() for t in tensors]
            for result, expected in zip(
                run_into_nan(launcher, some, numbers, gain=0.9, offset=0.37), whole, strict=True
            ):
                assert torch.equal(result, expected[..., :pixels, :])
