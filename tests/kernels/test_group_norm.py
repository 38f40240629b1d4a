"""group_norm and its gradient: every implementation against float64 autograd through torch's own modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfengine import native
from dfengine.kernels import CannotRunError, group_norm, group_norm_apply
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract

LAUNCHERS = (*(f"cpu-{level}" for level in launchers.LEVELS), "reference")
EPS = 1e-5
# (N, H, W, C), groups: one pixel; C that fills no vector; a short last tile; one channel a group; many channels.
CASES = [
    ((1, 1, 1, 8), 2),
    ((2, 5, 7, 12), 3),
    ((3, 33, 31, 16), 4),
    ((1, 9, 11, 7), 7),
    ((2, 40, 25, 130), 13),
    ((4, 64, 64, 4), 1),
]


@pytest.fixture(params=LAUNCHERS)
def launcher(request):
    """(forward, backward) of one implementation; skips with the reason where it does not run here."""
    name = request.param
    if name == "reference":
        return group_norm._run_reference, group_norm._run_reference_backward
    level = name.removeprefix("cpu-")
    if not native.available():
        pytest.skip(native.status())
    if not native.cpu_levels().get(level):
        pytest.skip(f"this processor does not run {level}")
    return (
        lambda *args: group_norm._run_cpu(*args, level=level),
        lambda *args: group_norm._run_cpu_backward(*args, level=level),
    )


def make(shape, dtype, shifted=True, mean=-2.3, deviation=1.0, seed=0) -> tuple[torch.Tensor | None, ...]:
    """x, dy of `dtype`; weight, bias, shift in float32."""
    generator = torch.Generator().manual_seed(seed)
    x = (mean + deviation * torch.randn(shape, generator=generator)).to(dtype)
    dy = (0.5 + torch.randn(shape, generator=generator)).to(dtype)
    weight, bias = (torch.randn(shape[-1], generator=generator) for _ in range(2))
    shift = torch.randn((shape[0], shape[-1]), generator=generator)
    return x, dy, weight, bias, shift if shifted else None


def run_into_nan(launcher, x, dy, weight, bias, shift, groups, act) -> dict[str, torch.Tensor]:
    def poisoned(like):
        return None if like is None else torch.full_like(like, float("nan"))

    forward, backward = launcher
    y, dx, dweight, dbias, dshift = (poisoned(t) for t in (x, x, weight, bias, shift))
    mean, rstd = (torch.full((x.shape[0], groups), float("nan")) for _ in range(2))
    forward(x, weight, bias, shift, groups, EPS, act, y, mean, rstd)
    backward(dy, x, weight, bias, shift, mean, rstd, act, dx, dweight, dbias, dshift)
    results = dict(y=y, mean=mean, rstd=rstd, dx=dx, dweight=dweight, dbias=dbias, dshift=dshift)
    return {name: value for name, value in results.items() if value is not None}


def through_torch(x, dy, weight, bias, shift, groups, act, dtype) -> dict[str, torch.Tensor]:
    """The same values by torch's modules and autograd in `dtype`; contiguous, where torch's statistics are exact."""
    pixels = x.permute(0, 3, 1, 2).contiguous().to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    leaves = [t.clone().requires_grad_() for t in (pixels, weight.to(precise), bias.to(precise))]
    u = leaves[0]
    if shift is not None:
        leaves.append(shift.to(precise).requires_grad_())
        u = (u + leaves[3][:, :, None, None]).to(dtype)
    z = F.group_norm(u, groups, leaves[1], leaves[2], EPS)
    y = z if act == "none" else getattr(F, act)(z)
    gradients = torch.autograd.grad(y, leaves, dy.permute(0, 3, 1, 2).to(dtype))
    values = u.detach().reshape(x.shape[0], groups, -1).to(precise)
    variance, mean = torch.var_mean(values, dim=2, correction=0)
    results = dict(y=y.detach(), mean=mean, rstd=torch.rsqrt(variance + EPS))
    results |= dict(zip(("dx", "dweight", "dbias", "dshift"), gradients, strict=False))
    return {name: value.permute(0, 2, 3, 1) if value.ndim == 4 else value for name, value in results.items()}


@pytest.mark.parametrize("act", group_norm.ACTIVATIONS)
@pytest.mark.parametrize("dtype", group_norm.TYPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_meets_the_numeric_contract(launcher, dtype, act, shifted):
    for number, (shape, groups) in enumerate(CASES):
        check_contract(launcher, make(shape, dtype, shifted, seed=number), groups, act)


@pytest.mark.parametrize(
    "dtype, act", [(torch.float32, "gelu"), (torch.bfloat16, "silu"), (torch.float16, "relu")], ids=str
)
def test_large_samples_meet_it_on_the_path_that_keeps_nothing(launcher, dtype, act):
    """More than 262,144 values a sample: the last pass computes dy act'(z) again."""
    check_contract(launcher, make((1, 160, 110, 16), dtype), 4, act)


def check_contract(launcher, inputs, groups, act) -> None:
    shape, dtype = inputs[0].shape, inputs[0].dtype
    results = run_into_nan(launcher, *inputs, groups, act)
    exact = through_torch(*inputs, groups, act, torch.float64)
    torchs = through_torch(*inputs, groups, act, dtype)
    for name, result in results.items():
        if name == "dshift":  # a difference that nearly cancels: its terms are sums of dy
            scale = rough_scale(inputs[1], exact["rstd"], inputs[2])
            bound = 1e-5 * scale if dtype == torch.float32 else 1e-2 * scale
            assert (result.double() - exact[name]).abs().max() <= bound, (name, shape)
        else:
            assert_numeric_contract(result, exact[name], torchs[name].to(result.dtype))


@pytest.mark.parametrize("name", [n for n in launchers.names([{}], cpu=False) if n != "reference"])
@pytest.mark.parametrize("dtype", group_norm.TYPES, ids=str)
def test_the_forward_pass_in_stages_meets_the_numeric_contract(name, dtype, monkeypatch):
    """The triton and cuda backends; their stages have tests of their own."""
    launcher = launchers.launcher(name, monkeypatch, [{}])
    forward = group_norm.OP.implementations[launcher.backend].run
    cases = [((2, 5, 7, 12), 3, "gelu"), ((1, 33, 16, 16), 4, "silu"), ((2, 1, 1, 6), 1, "none")]
    for number, (shape, groups, act) in enumerate(cases):
        x, dy, *small = make(shape, dtype, seed=number)
        results = dict(y=x, mean=torch.empty(shape[0], groups), rstd=torch.empty(shape[0], groups))
        outputs = [torch.full_like(t, float("nan"), device=launcher.device) for t in results.values()]
        forward(*(t.to(launcher.device) for t in (x, *small)), groups, EPS, act, *outputs)
        exact = through_torch(x, dy, *small, groups, act, torch.float64)
        torchs = through_torch(x, dy, *small, groups, act, dtype)
        for key, result in zip(results, outputs, strict=True):
            assert_numeric_contract(result.cpu(), exact[key], torchs[key].to(result.dtype))


def rough_scale(dy, rstd, weight) -> torch.Tensor:
    return dy.double().abs().sum(dim=(1, 2)).max() * rstd.max() * weight.abs().max()


@pytest.mark.parametrize("act", ["none", "gelu"])
def test_keeps_its_digits_where_the_mean_is_large(launcher, act):
    inputs = make((2, 32, 32, 16), torch.float32, shifted=False, mean=100.0, deviation=0.1)
    results = run_into_nan(launcher, *inputs, 4, act)
    exact = through_torch(*inputs, 4, act, torch.float64)
    inexact = 1e-5 if act == "none" else 1e-4  # act' sees the rounding of the mean
    for name, bound in dict(y=1e-5, mean=1e-7, rstd=1e-6, dx=inexact, dweight=inexact, dbias=inexact).items():
        error = (results[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < bound, (name, error)


@pytest.mark.parametrize("every", [8, 16, 64])
def test_keeps_its_digits_where_a_few_rows_lie_apart(launcher, every):
    """The variance must not lose digits to where in a tile the mean is guessed from."""
    x, dy, weight, bias, _ = make((2, 31, 33, 16), torch.float32, deviation=0.1)
    x.view(2, -1, 16)[:, ::every] += 50.0
    results = run_into_nan(launcher, x, dy, weight, bias, None, 4, "none")
    exact = through_torch(x, dy, weight, bias, None, 4, "none", torch.float64)
    for name, bound in dict(y=2e-6, mean=1e-6, rstd=1e-6).items():
        error = (results[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < bound, (name, error)


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    x, dy, weight, bias, shift = make((5, 31, 33, 24), torch.float32)
    first = run_into_nan(launcher, x, dy, weight, bias, shift, 6, "gelu")
    again = run_into_nan(launcher, x, dy, weight, bias, shift, 6, "gelu")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    order = [4, 0, 2]
    part = run_into_nan(launcher, x[order], dy[order], weight, bias, shift[order], 6, "gelu")
    for name in ("y", "mean", "rstd", "dx", "dshift"):
        assert torch.equal(part[name], first[name][order]), name


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("dtype", group_norm.TYPES, ids=str)
def test_cpu_threads_and_streaming_change_nothing(dtype, monkeypatch):
    inputs = make((2, 70, 50, 24), dtype)
    threads, results = torch.get_num_threads(), []
    launchers = group_norm._run_cpu, group_norm._run_cpu_backward
    try:
        for count in (1, 2, 3, 64):  # whole samples a thread for 1 and 2, tiles for 3 and 64
            torch.set_num_threads(count)
            monkeypatch.setattr(group_norm_apply, "STREAM_BYTES", 0 if count in (2, 64) else 2**30)
            results.append(run_into_nan(launchers, *inputs, 6, "gelu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("act", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", launchers.LEVELS)
def test_activations_over_their_range(level, dtype, act):
    """Weight 0 and bias z make y = act(z) and dbias = act'(z); for bfloat16 y is rounded, and GELU has the digits that
    this leaves."""
    if not native.cpu_levels().get(level):
        pytest.skip(f"this processor does not run {level}")
    far = torch.tensor([-3e37, -1e4, -200.0, 200.0, 1e4, 3e37])
    z = torch.cat((torch.linspace(-30, 30, 6001), torch.linspace(-1e-3, 1e-3, 201), far))
    x, weight = torch.zeros((1, 1, 1, len(z)), dtype=dtype), torch.zeros(len(z))
    launcher = (
        lambda *args: group_norm._run_cpu(*args, level=level),
        lambda *args: group_norm._run_cpu_backward(*args, level=level),
    )
    results = run_into_nan(launcher, x, torch.ones_like(x), weight, z, None, 1, act)
    exact = z.double().requires_grad_()
    y = getattr(F, act)(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    half = dtype == torch.bfloat16
    allowed = 5e-5 + 1.1 * 2**-8 * y.detach().abs() if half else 3e-7 * z.double().abs().clamp(min=1)
    assert ((results["y"].flatten().double() - y.detach()).abs() < allowed).all()
    assert (results["dbias"].double() - slope).abs().max() < (1e-4 if half else 4e-7)


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_nan_is_not_hidden():
    x, dy, weight, bias, _ = make((2, 4, 4, 8), torch.float32)
    x[1, 2, 3, 5] = float("nan")
    y = group_norm.group_norm(x.permute(0, 3, 1, 2), weight, bias, 2, EPS, "gelu")
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1, 4:]).all()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_reach_every_tensor(layout, dtype, monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, dy, weight, bias, shift = make((3, 6, 5, 8), dtype)
    pixels = x.permute(0, 3, 1, 2).contiguous(memory_format=layout).requires_grad_()
    leaves = [pixels, weight.requires_grad_(), bias.requires_grad_(), shift.to(dtype).requires_grad_()]
    y = group_norm.group_norm(*leaves[:3], 2, EPS, "gelu", leaves[3])
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(y, leaves, dy.permute(0, 3, 1, 2))
    exact = through_torch(x, dy, weight.detach(), bias.detach(), leaves[3].detach(), 2, "gelu", torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, gradient, leaf in zip(("dx", "dweight", "dbias", "dshift"), gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        want = exact[name].permute(0, 3, 1, 2) if name == "dx" else exact[name]
        torch.testing.assert_close(gradient.double(), want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("act", group_norm.ACTIVATIONS)
def test_gradcheck_of_the_reference(act):
    x, _, weight, bias, shift = (t.double() for t in make((2, 3, 2, 4), torch.float64, seed=3))
    arguments = [t.requires_grad_() for t in (x.permute(0, 3, 1, 2), weight, bias, shift)]

    def call(x, weight, bias, shift):
        return group_norm.group_norm(x, weight, bias, 2, EPS, act, shift)

    assert torch.autograd.gradcheck(call, arguments)


def test_the_op_takes_the_best_backend_or_the_forced_one(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, _, weight, bias, _ = make((1, 4, 4, 8), torch.float32)
    arguments = (weight, bias, None, 2, EPS, "gelu", None, None, None)
    assert group_norm.OP.choose(x, *arguments) == ("cpu" if native.available() else "reference")
    assert group_norm.OP.choose(x.double(), *arguments) == "reference"
    assert group_norm.OP.choose(x, *arguments, backend="reference") == "reference"
    if native.available():
        with pytest.raises(CannotRunError, match="float64"):
            group_norm.OP.choose(x.double(), *arguments, backend="cpu")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.zeros(8, 4, 4)), r"\(N, C, H, W\)"),
        (dict(x=torch.zeros(0, 8, 4, 4)), "holds nothing"),
        (dict(groups=3), "3 groups"),
        (dict(act="tanh"), "tanh"),
        (dict(weight=torch.ones(4)), "weight"),
        (dict(shift=torch.ones(8)), "shift"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = dict(x=torch.zeros(2, 8, 4, 4), weight=torch.ones(8), bias=torch.zeros(8), groups=2)
    with pytest.raises(ValueError, match=message):
        group_norm.group_norm(**{**arguments, **changes})


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
@pytest.mark.parametrize("act", group_norm.ACTIVATIONS)
@pytest.mark.parametrize("dtype", group_norm.TYPES, ids=str)
@pytest.mark.parametrize("level", launchers.LEVELS)
def test_not_a_number_stays_one(level, dtype, act):
    """In its own group, wherever in a row it lies, and nowhere else."""
    if not native.cpu_levels().get(level):
        pytest.skip(f"this processor does not run {level}")
    launcher = (
        lambda *args: group_norm._run_cpu(*args, level=level),
        lambda *args: group_norm._run_cpu_backward(*args, level=level),
    )
    for pixel in (0, 5, 34):
        inputs = make((2, 5, 7, 12), dtype)
        inputs[0].view(2, 35, 12)[1, pixel, 5] = float("nan")
        results = run_into_nan(launcher, *inputs, 3, act)
        for name in ("y", "dx"):
            groups = results[name].view(2, 35, 3, 4)
            assert groups[1, :, 1].isnan().all(), (name, pixel)
            assert groups[0].isfinite().all() and groups[1, :, ::2].isfinite().all(), (name, pixel)
