"""Public op functions: direct in eager mode, through the registered op wherever torch looks on, with equal results."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from dfengine.kernels import (
    channel_attention,
    conv2d,
    group_norm,
    group_norm_apply,
    group_norm_merge,
    group_norm_moments,
    ingest,
    one_step,
    registry,
    resample,
    reverse_step,
    score,
)
from dfengine.kernels.conv_weight import ConvWeight


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) - 2.3


X = drawn(2, 4, 6, 8)
WEIGHT = ConvWeight(drawn(3, 3, 8, 4))
COUNTS = group_norm_moments.tile_counts(24, 16)
MOMENTS = group_norm_moments.moments(X, 16, backend="reference")
AFFINE = drawn(8, seed=1), drawn(8, seed=2)
SCALE, OFFSET = drawn(2, 8, seed=3), drawn(2, 8, seed=4)
NOISE = drawn(2, 4, 6, 8, seed=5)
GATE = drawn(7, 7, 2, seed=6), drawn(1, seed=7)
THRESHOLD = score.threshold_tensor(0.5)
PAIR = torch.stack((X, NOISE))
NUMBERS = dict(gain=1.0, offset=0.0, a=[0.8, 0.6], b=[0.6, 0.8], seed=2**63 + 1)
STEP = (0.8, 0.6, 0.3, 0.7, 0.1, 2**64 - 1, 0, 5)

CALLS = {
    "conv2d": (X, lambda x: conv2d.conv2d(x, WEIGHT, act="gelu")),
    "group_norm_moments": (X, lambda x: group_norm_moments.moments(x, 16)),
    "group_norm_merge": (MOMENTS, lambda m: group_norm_merge.merge(m, COUNTS, *AFFINE, 4)),
    "group_norm_apply": (X, lambda x: group_norm_apply.apply(x, SCALE, OFFSET, act="silu")),
    "channel_attention": (X, lambda x: channel_attention.channel_attention(x, None, None, *GATE)),
    "ingest": (X, lambda x: ingest.ingest(x, **NUMBERS)),
    "one_step": (PAIR + 1, lambda x_t: one_step.one_step(x_t, PAIR, X, [0.8, 0.6], [0.6, 0.8], 0.3)),
    "reverse_step": (X, lambda x: reverse_step.reverse_step(x, NOISE, *STEP)),
    "upsample_bilinear": (X, lambda x: resample.upsample_bilinear(x)),
    "max_pool": (X, lambda x: resample.max_pool(x)),
    "score": (drawn(1, 2, 4, 6), lambda logits: score.score(logits, THRESHOLD, 3)),
}
"""Custom op -> its first tensor, and the public function of this tensor alone."""

every_op = pytest.mark.parametrize("x, call", CALLS.values(), ids=CALLS)


def assert_equal(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def refused(*_arguments):
    raise AssertionError("the registered op was called")


def test_every_custom_op_is_here():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    assert set(CALLS) == {name for library, name in names if library == "dfengine"}


def events(call, x) -> set[str]:
    """Those of dfengine's ops that torch dispatches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    return {event.key for event in profile.key_averages() if event.key.startswith("dfengine::")}


@every_op
def test_eager_calls_are_direct_and_recorded_ones_give_the_same(x, call, monkeypatch):
    direct = call(x)
    assert not events(call, x)
    assert_equal(call(torch.nn.Parameter(x, requires_grad=False)), direct)
    with torch.no_grad():
        assert_equal(call(torch.nn.Parameter(x)), direct)
    with torch.inference_mode():
        assert_equal(call(x), direct)
    monkeypatch.setattr(registry, "recorded", lambda _tensors: True)
    assert len(events(call, x)) == 1
    assert_equal(call(x), direct)


@every_op
def test_negated_tensors_are_read_as_what_they_mean_and_zeros_without_memory_are_refused(x, call):
    assert_equal(call(torch._neg_view(-x)), call(x))
    with pytest.raises((RuntimeError, ValueError), match="without memory|contiguous"):
        call(torch._efficientzerotensor(x.shape))


def test_group_norm_reads_negated_tensors_as_what_they_mean():
    x, (weight, bias) = X.movedim(-1, 1), AFFINE
    expected = group_norm.group_norm(x, weight, bias, 4)
    assert_equal(group_norm.group_norm(torch._neg_view(-x), torch._neg_view(-weight), bias, 4), expected)


@every_op
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_calls_are_the_same(x, call):
    assert_equal(torch.jit.trace(call, x)(x + 1), call(x + 1))


@every_op
def test_fx_records_the_custom_op(x, call):
    graph = make_fx(call)(x)
    assert "dfengine" in {getattr(node.target, "namespace", None) for node in graph.graph.nodes}
    assert_equal(graph(x + 1), call(x + 1))


@every_op
def test_fake_tensors_get_the_same_form(x, call):
    direct = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x))
    results = zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (fake, direct)), strict=True)
    for found, expected in results:
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@every_op
def test_compiled_calls_are_the_same(x, call):
    torch.compiler.reset()
    assert_equal(torch.compile(call, backend="eager", fullgraph=True)(x), call(x))


@every_op
def test_derivatives_and_transforms_are_refused(x, call):
    def total(x):
        result = call(x)
        return (result if isinstance(result, torch.Tensor) else result[0]).sum()

    with pytest.raises(RuntimeError, match="no autograd formula|has no gradient"):
        total(x.clone().requires_grad_()).backward()
    with pytest.raises(RuntimeError, match="functorch transforms|has no gradient"):
        torch.func.grad(total)(x)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        call(forward_ad.make_dual(x, x))


@every_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_right_or_refused(x, call):
    try:
        mapped = torch.func.vmap(call)(torch.stack((x, x + 1)))
    except RuntimeError as error:
        assert "Batching rule not implemented" in str(error)
        return
    separate = call(x), call(x + 1)
    if not isinstance(mapped, torch.Tensor):
        mapped, separate = list(mapped), [torch.stack(parts) for parts in zip(*separate, strict=True)]
    assert_equal(mapped, separate if isinstance(separate, list) else torch.stack(separate))


def test_function_modes_and_subclasses_see_the_op():
    class Kept(torch.Tensor):
        pass

    class Listing(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    seen = []
    with Listing():
        resample.max_pool(X)
    assert any("max_pool" in name for name in seen)
    assert registry.recorded((X.as_subclass(Kept),)) and not registry.recorded((X, None))


@pytest.mark.parametrize("into", ["conv2d", "group_norm_apply"])
def test_autograd_refuses_a_tensor_that_was_written_into(into):
    y = torch.zeros(2, 4, 6, 8)
    factor = torch.ones(2, 4, 6, 8, requires_grad=True)
    product = factor * y
    if into == "conv2d":
        weight = ConvWeight(drawn(1, 1, 8, 8))
        conv2d.conv2d_into(X, None, weight, None, None, None, "none", "none", None, "none", "none", y)
    else:
        group_norm_apply.apply(X, SCALE, OFFSET, y=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_group_norm_without_a_gradient_to_come_is_no_autograd_function(monkeypatch):
    x, (weight, bias) = X.movedim(-1, 1), AFFINE
    wanted = group_norm.group_norm(x.clone().requires_grad_(), weight, bias, 4, act="gelu")
    assert wanted.grad_fn is not None
    monkeypatch.setattr(group_norm._GroupNorm, "apply", refused)
    assert_equal(group_norm.group_norm(x, weight, bias, 4, act="gelu"), wanted.detach())
