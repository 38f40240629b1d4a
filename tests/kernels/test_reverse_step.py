"""reverse_step: every implementation against the float64 reference, and the chain against dfengine.diffusion."""

from __future__ import annotations

import pytest
import torch

from dfengine import native
from dfengine.diffusion import Schedule, iterative
from dfengine.kernels import CannotRunError, one_step, philox, reverse_step
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.slices import poisoned, rest_is_nan, widened

SCHEDULE = Schedule()
NOISE = (2**63 + 987654321, 2**32 - 3, 5)
KINDS = [(dtype, dtype) for dtype in one_step.TYPES] + [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]
SHAPES = [(1, 1, 1, 3), (3, 17, 11, 3), (11, 5, 6, 1), (2, 4, 3, 7)]


def numbers_of(t: int) -> tuple[float, ...]:
    return reverse_step.coefficients(SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[t - 1], SCHEDULE.beta[t])


NUMBERS = numbers_of(400)


@pytest.fixture(params=launchers.names(reverse_step.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, reverse_step.CONFIGURATIONS)


def make(shape, kind=(torch.float32, torch.float32), seed=0) -> list[torch.Tensor]:
    """x_t and eps, off-centre: x0_hat lies around -0.4, on both sides of -1 and of 1."""
    generator = torch.Generator().manual_seed(seed)
    x_t = -2.3 + 0.5 * torch.randn(shape, generator=generator)
    eps = -2.3 + torch.randn(shape, generator=generator)
    return [x_t.to(kind[0]), eps.to(kind[1])]


def run_into_nan(launcher, tensors, numbers=NUMBERS, noise=NOISE, extra=0) -> torch.Tensor:
    x_t, eps = (widened(t.to(launcher.device), extra, extra // 2) for t in tensors)
    out = poisoned(x_t.shape, x_t.dtype, launcher.device, extra, extra // 2)
    launcher.run(reverse_step.OP, x_t, eps, *numbers, *noise, out)
    assert rest_is_nan(out)
    return out.cpu()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("extra", [0, 5])
def test_meets_the_numeric_contract(launcher, kind, extra):
    for number, shape in enumerate(SHAPES):
        tensors = make(shape, kind, seed=number)
        result = run_into_nan(launcher, tensors, extra=extra)
        exact = reverse_step.reference(*(t.double() for t in tensors), *NUMBERS, *NOISE)
        torchs = reverse_step.reference(*tensors, *NUMBERS, *NOISE)
        assert_numeric_contract(result, exact, torchs)


def test_its_noise_is_that_of_ingest(launcher):
    """With sigma = 1 and nothing else the result is the noise."""
    tensors = make((2, 32, 33, 4))
    out = run_into_nan(launcher, tensors, (1.0, 0.0, 0.0, 0.0, 1.0))
    noise = philox.philox_normal(*NOISE, 1, (32, 33, 4), torch.float64)
    assert (out - noise).abs().max() < 2e-6


def test_in_place(launcher):
    for extra in (0, 3):
        tensors = make((2, 19, 21, 3))
        apart = run_into_nan(launcher, tensors)
        x_t, eps = (widened(t.to(launcher.device), extra) for t in tensors)
        launcher.run(reverse_step.OP, x_t, eps, *NUMBERS, *NOISE, x_t)
        assert torch.equal(x_t.cpu(), apart)


def test_nan_is_not_hidden(launcher):
    x_t, eps = make((1, 8, 8, 3))
    eps[0, 2, 3, 1] = float("nan")
    out = run_into_nan(launcher, (x_t, eps))
    assert out.isnan().sum() == 1 and out[0, 2, 3, 1].isnan()


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    x_t, eps = make((11, 9, 7, 3))
    out = run_into_nan(launcher, (x_t, eps))
    assert torch.equal(out, run_into_nan(launcher, (x_t, eps)))
    order = [10, 3, 7]
    assert torch.equal(run_into_nan(launcher, (x_t[order], eps[order])), out[order])


def test_steps_and_draws_differ(launcher):
    tensors = make((1, 4, 4, 3))
    results = [run_into_nan(launcher, tensors, noise=noise) for noise in ((1, 0, 5), (1, 0, 6), (1, 1, 5), (2, 0, 5))]
    for number, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:number])


def test_the_chain_is_that_of_the_modules():
    """The whole chain from t = 12 in float64: `reverse_step` and at the end `one_step` with one scale."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.rand((2, 3, 5, 4), dtype=torch.float64, generator=generator)
    seed, draw, start = 7, 3, 12

    def noise(t):
        return philox.philox_normal(seed, draw, t, 1, (5, 4, 3), torch.float64).permute(2, 0, 1)

    def predict(x, t):
        return torch.sin(3 * x)

    want = iterative(predict, SCHEDULE, x_0, start, noise(0), noise)
    x_t = SCHEDULE.q_sample(x_0, start, noise(0)).movedim(1, -1).contiguous()
    for t in range(start, 0, -1):
        x_t = reverse_step.reverse_step(x_t, predict(x_t, t), *numbers_of(t), seed, draw, t)
    numbers = one_step.coefficients(SCHEDULE.alpha_bar[:1])
    pair, _ = one_step.one_step(x_t[None], predict(x_t, 0)[None], x_0.movedim(1, -1).contiguous(), *numbers)
    torch.testing.assert_close(pair[..., 3:], want.movedim(1, -1), rtol=0, atol=1e-12)


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_cpu_threads_change_nothing():
    launcher = launchers.Launcher("cpu", "cpu")
    tensors, threads, results = make((2, 70, 50, 3)), torch.get_num_threads(), []
    try:
        for count in (1, 3, 64):
            torch.set_num_threads(count)
            results.append(run_into_nan(launcher, tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_op_takes_the_best_backend_or_the_forced_one(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x_t, eps = make((2, 8, 9, 3))
    rest = (*NUMBERS, *NOISE)
    assert reverse_step.OP.choose(x_t, eps, *rest, None) == ("cpu" if native.available() else "reference")
    automatic = reverse_step.reverse_step(x_t, eps, *rest)
    forced = reverse_step.reverse_step(x_t, eps, *rest, backend="reference")
    torch.testing.assert_close(automatic, forced, rtol=0, atol=1e-5)
    with pytest.raises(CannotRunError, match="float64"):
        reverse_step.reverse_step(x_t.double(), eps.double(), *rest, backend="cpu")


def test_custom_op_is_registered_soundly():
    arguments = (*make((1, 4, 5, 3)), *NUMBERS, -3, 0, 5, "")
    torch.library.opcheck(torch.ops.dfengine.reverse_step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x_t=torch.zeros(4, 4, 3)), r"\(N, H, W, C\)"),
        (dict(eps=torch.zeros(2, 4, 4, 4)), "eps: expected"),
        (dict(eps=torch.zeros(2, 4, 4, 3).half(), x_t=torch.zeros(2, 4, 4, 3).bfloat16()), "x_t: expected"),
        (dict(eps=torch.zeros(2, 3, 4, 4).movedim(1, -1)), "eps: strides"),
        (dict(a=0.0), "a: "),
        (dict(seed=-1), "seed"),
        (dict(draw=2**32), "draw"),
        (dict(step=2**31), "step"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    x_t, eps = make((2, 4, 4, 3))
    arguments = dict(x_t=x_t, eps=eps, a=0.5, b=0.5, from_x0=0.1, from_xt=0.9, sigma=0.1, seed=0, draw=0, step=1)
    with pytest.raises(ValueError, match=message):
        reverse_step.reverse_step(**{**arguments, **changes})


@pytest.mark.gpu
def test_gpu_takes_triton_and_agrees_with_the_reference():
    tensors = make((16, 256, 256, 3))
    out = reverse_step.reverse_step(*(t.cuda() for t in tensors), *NUMBERS, *NOISE)
    exact = reverse_step.reference(*(t.double() for t in tensors), *NUMBERS, *NOISE)
    assert_numeric_contract(out.cpu(), exact, reverse_step.reference(*tensors, *NUMBERS, *NOISE))
