"""channel_attention: every implementation against the float64 reference, and the reference against the modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfengine import native
from dfengine.kernels import CannotRunError, channel_attention
from dfengine.kernels.channel_attention_triton import CONFIGURATIONS
from dfengine.models.blocks import ChannelAttention, SpatialAttention
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.slices import poisoned, rest_is_nan, widened

# (N, H, W, C), hidden channels. One launch on a GPU: one pixel; odd; rows of 16 bytes; several blocks of channels.
# Several launches: channels that fill no vector; a short last tile.
CASES = [
    ((1, 1, 1, 3), 1),
    ((2, 5, 7, 13), 2),
    ((2, 8, 8, 64), 4),
    ((1, 4, 6, 144), 9),
    ((1, 6, 11, 7), 1),
    ((2, 9, 8, 40), 3),
]
GATES = ["both", "channel", "spatial"]


@pytest.fixture(params=launchers.names(CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, CONFIGURATIONS)


def make_modules(channels, hidden, seed=0) -> tuple[ChannelAttention, SpatialAttention]:
    """The gates, with weights that bfloat16 and float16 hold and that keep both gates away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    channel, spatial = ChannelAttention(channels, 1), SpatialAttention()
    channel.mlp = nn.Sequential(
        nn.Linear(channels, hidden, bias=False), nn.GELU(), nn.Linear(hidden, channels, bias=False)
    )
    for module, deviation in ((channel, channels**-0.5), (spatial, 0.1)):
        for parameter in module.parameters():
            drawn = deviation * torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn.bfloat16().half().float()
    return channel, spatial


def packed(channel, spatial, gates="both") -> list[torch.Tensor | None]:
    """(w1, w2, spatial_weight, spatial_bias) of the modules, None for a gate that is switched off."""
    gate = channel_attention.pack_gate(channel.mlp[0].weight.data, channel.mlp[2].weight.data)
    maps = channel_attention.pack_spatial(spatial.conv.weight.data, spatial.conv.bias.data)
    return [*(gate if gates != "spatial" else (None, None)), *(maps if gates != "channel" else (None, None))]


def make(shape, dtype=torch.float32, mean=-2.3, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a residual."""
    generator = torch.Generator().manual_seed(seed)
    x = (mean + torch.randn(shape, generator=generator)).to(dtype)
    return x, (0.5 + torch.randn(shape, generator=generator)).to(dtype)


@torch.no_grad()
def through_modules(x, residual, channel, spatial, gates, dtype) -> torch.Tensor:
    """y by the modules in `dtype`, as ResBlock joins them."""
    h = x.to(dtype).permute(0, 3, 1, 2)
    if gates != "spatial":
        h = h * channel.to(dtype)(h)
    if gates != "channel":
        h = h * spatial.to(dtype)(h)
    h = h.permute(0, 2, 3, 1)
    return h if residual is None else residual.to(dtype) + h


def run_into_nan(launcher, x, residual, weights, extra=0) -> torch.Tensor:
    """y; `extra`: channels around x, the residual and y."""
    device = launcher.device
    x, residual = (None if t is None else widened(t.to(device), extra, extra // 2) for t in (x, residual))
    weights = [None if t is None else t.to(device) for t in weights]
    y = poisoned(x.shape, x.dtype, device, extra, extra // 2)
    workspace = poisoned((channel_attention.workspace_size(x.shape) + 8,), torch.float32, device)
    launcher.run(channel_attention.OP, x, *weights, residual, y, workspace)
    assert rest_is_nan(y)
    assert workspace[-8:].isnan().all()
    return y.cpu()


def check_contract(launcher, shape, hidden, dtype, gates="both", with_residual=True, extra=0, seed=0):
    x, residual = make(shape, dtype, seed=seed)
    residual = residual if with_residual else None
    modules = make_modules(shape[-1], hidden, seed)
    result = run_into_nan(launcher, x, residual, packed(*modules, gates), extra)
    torchs = through_modules(x, residual, *modules, gates, dtype)
    exact = through_modules(x, residual, *modules, gates, torch.float64)
    assert_numeric_contract(result, exact, torchs)


@pytest.mark.parametrize("dtype", channel_attention.TYPES, ids=str)
@pytest.mark.parametrize("gates", GATES)
def test_meets_the_numeric_contract(launcher, dtype, gates):
    for number, (shape, hidden) in list(enumerate(CASES))[:: 1 if gates == "both" else -2]:
        check_contract(launcher, shape, hidden, dtype, gates, with_residual=number % 4 != 3, seed=number)


@pytest.mark.parametrize("extra", [8, 5])
def test_channel_slices(launcher, extra):
    for dtype, (shape, hidden) in zip(channel_attention.TYPES, CASES[2:5], strict=True):
        check_contract(launcher, shape, hidden, dtype, extra=extra)


@pytest.mark.parametrize("dtype", channel_attention.TYPES, ids=str)
@pytest.mark.parametrize("level", launchers.LEVELS)
def test_large_images_on_the_cpu(level, dtype, monkeypatch):
    """Rows are written in several steps, and sums go over many pixels."""
    check_contract(launchers.launcher(f"cpu-{level}", monkeypatch), (1, 67, 64, 48), 3, dtype)


@pytest.mark.parametrize("gates", GATES)
def test_the_reference_is_what_the_modules_compute(gates):
    modules = [module.double() for module in make_modules(24, 3)]
    x, residual = make((2, 7, 9, 24), torch.float64)
    for rest in (residual, None):
        want = through_modules(x, rest, *modules, gates, torch.float64)
        got = channel_attention.channel_attention(x, *packed(*modules, gates), rest)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_every_part_changes_the_result():
    """The inputs of these tests see both pooled vectors, both maps, the bias, every tap and the residual."""
    x, residual = (t.double() for t in make((1, 9, 11, 13)))
    weights = [t.double() for t in packed(*make_modules(13, 2))]
    exact = channel_attention.reference(x, *weights, residual)
    for tap in range(49):
        changed = weights[2].clone()
        changed.view(49, 2)[tap] *= 1.5
        y = channel_attention.reference(x, *weights[:2], changed, weights[3], residual)
        assert (y - exact).abs().max() > 1e-3
    shifted = x.clone()
    shifted[0, 4, 5] += 3  # a maximum of the channel, of which the mean moves less
    assert (channel_attention.reference(shifted, *weights, residual) - exact)[0, 0, 0].abs().max() > 1e-3
    for number in (0, 1, 3):
        changed = [*weights]
        changed[number] = 1.5 * changed[number]
        assert (channel_attention.reference(x, *changed, residual) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=["one launch", "several"])
def test_nan_spreads_as_in_torch(launcher, case):
    shape, hidden = case
    modules = make_modules(shape[-1], hidden)
    x, residual = make(shape)
    x[-1, 1, 2, 5] = float("nan")
    for gates in GATES:
        y = run_into_nan(launcher, x, residual, packed(*modules, gates))
        want = through_modules(x, residual, *modules, gates, torch.float32)
        assert torch.equal(y.isnan(), want.isnan()), gates
        assert not want.isnan().all() or shape[0] == 1


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    for shape, hidden in ((4, 8, 7, 16), 2), ((4, 6, 12, 8), 2):
        x, residual = make(shape)
        weights = packed(*make_modules(shape[-1], hidden))
        y = run_into_nan(launcher, x, residual, weights)
        assert torch.equal(run_into_nan(launcher, x, residual, weights), y)
        if launcher.backend == "reference":
            continue  # torch's products differ in their last bits with the batch
        order = [3, 1]
        assert torch.equal(run_into_nan(launcher, x[order], residual[order], weights), y[order])


@pytest.mark.parametrize("level", launchers.LEVELS)
@pytest.mark.parametrize("dtype", channel_attention.TYPES, ids=str)
def test_cpu_threads_and_streaming_change_nothing(level, dtype, monkeypatch):
    launcher = launchers.launcher(f"cpu-{level}", monkeypatch)
    threads, results = torch.get_num_threads(), []
    x, residual = make((2, 21, 13, 140), dtype)
    weights = packed(*make_modules(140, 8))
    try:
        for count, stream_bytes in ((1, 2**40), (3, 2**40), (64, 2**40), (5, 0)):
            torch.set_num_threads(count)
            monkeypatch.setattr(channel_attention, "STREAM_BYTES", stream_bytes)
            results += [run_into_nan(launcher, x, residual, weights, extra) for extra in (0, 3)]
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("pixels", [1, 16, 63, 64, 65, 512, 513, 4096, 65536, 10**6])
def test_tiles_cover_the_image_and_fit_the_merge(pixels):
    size = channel_attention.tile_pixels(pixels)
    assert size >= 16 and size & (size - 1) == 0 and -(-pixels // size) <= channel_attention.TILES


def test_the_op_takes_the_best_backend_or_the_forced_one(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, residual = make((2, 6, 5, 16))
    weights = packed(*make_modules(16, 2))
    assert channel_attention.OP.choose(x, *weights, residual, x, x) == ("cpu" if native.available() else "reference")
    automatic = channel_attention.channel_attention(x, *weights, residual)
    forced = channel_attention.channel_attention(x, *weights, residual, backend="reference")
    torch.testing.assert_close(automatic, forced, rtol=0, atol=1e-5)
    double = [t.double() for t in (x, *weights, residual)]
    assert channel_attention.channel_attention(*double).dtype == torch.float64
    with pytest.raises(CannotRunError, match="float64"):
        channel_attention.channel_attention(*double, backend="cpu")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    "shape, hidden, message",
    [((1, 2, 2, 4), 2000, "hidden"), ((70000, 1, 1, 1), 1, "beyond"), ((1, 1, 1, 5000), 1, "beyond")],
)
def test_what_the_gpu_kernels_leave_to_others(backend, shape, hidden, message):
    x, w1 = torch.zeros(shape), torch.zeros((hidden, shape[3]))
    with pytest.raises(CannotRunError, match=message):
        channel_attention.OP.implementations[backend].can_run(x, w1, w1, None, None, None, x, x)


@pytest.mark.parametrize("gates", GATES)
def test_custom_op_is_registered_soundly(gates):
    x, residual = make((1, 4, 5, 8))
    workspace = torch.empty(channel_attention.workspace_size(x.shape))
    arguments = (x, *packed(*make_modules(8, 2), gates), residual, torch.empty_like(x), workspace, "")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dfengine.channel_attention, arguments, test_utils=tests)


def test_nothing_is_written_for_an_empty_batch(launcher):
    x = torch.zeros((0, 4, 4, 8))
    assert run_into_nan(launcher, x, None, packed(*make_modules(8, 2))).shape == x.shape


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=torch.zeros(4, 4, 8)), r"\(N, H, W, C\)"),
        (dict(x=torch.zeros(2, 8, 4, 4).permute(0, 2, 3, 1)), "x: strides"),
        (dict(w2=None), "w1 and w2"),
        (dict(spatial_bias=None), "spatial_weight and spatial_bias"),
        (dict(w1=None, w2=None, spatial_weight=None, spatial_bias=None), "neither gate"),
        (dict(residual=torch.zeros(2, 4, 4, 7)), "residual: expected"),
        (dict(y=torch.zeros(2, 4, 4, 8).half()), "y: expected"),
        (dict(y=torch.zeros(2, 4, 5, 8)[:, :, :4]), "y: strides"),
        (dict(workspace=torch.zeros(10)), "workspace: expected"),
        (dict(w1=torch.zeros(3, 7)), "w1: expected"),
        (dict(w2=torch.zeros(8, 3)), "w2: expected"),
        (dict(w2=torch.zeros(8, 3).t()), "w2: not contiguous"),
        (dict(w1=torch.zeros(3, 8).half()), "w1: expected"),
        (dict(spatial_weight=torch.zeros(1, 2, 7, 7)), "spatial_weight: expected"),
        (dict(spatial_bias=torch.zeros(())), "spatial_bias: expected"),
        (dict(w1=torch.zeros(3, 8, device="meta")), "w1: on meta"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    x = torch.zeros(2, 4, 4, 8)
    arguments = dict(x=x, w1=torch.zeros(3, 8), w2=torch.zeros(3, 8), spatial_weight=torch.zeros(7, 7, 2))
    arguments |= dict(spatial_bias=torch.zeros(1), residual=None, y=torch.zeros(2, 4, 4, 8), workspace=torch.zeros(999))
    with pytest.raises(ValueError, match=message):
        channel_attention.channel_attention_into(**{**arguments, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 8, 8, 512), (4, 64, 64, 256)])
def test_gpu_takes_triton_and_agrees_with_the_reference(shape):
    x, residual = make(shape, torch.float16)
    modules = make_modules(shape[-1], shape[-1] // 16)
    weights = packed(*modules)
    y = channel_attention.channel_attention(x.cuda(), *(t.cuda() for t in weights), residual.cuda())
    torchs = through_modules(x, residual, *modules, "both", torch.float16)
    exact = through_modules(x, residual, *modules, "both", torch.float64)
    assert_numeric_contract(y.cpu(), exact, torchs)
