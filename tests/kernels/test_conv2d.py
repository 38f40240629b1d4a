"""conv2d: every implementation and launch configuration against float64 through torch's own operations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dfengine import native
from dfengine.kernels import CannotRunError, conv2d, conv2d_cuda, group_norm_moments
from dfengine.kernels.conv2d_triton import CONFIGURATIONS, configuration_for, launch_options
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.conv2d_cases import (
    EVERY_TILE,
    FEATURES,
    NAN,
    Case,
    check_contract,
    make,
    moment_pixels,
    on,
    require_cuda,
    run_into_nan,
    through_torch,
)

CHEAP = f"triton-{len(CONFIGURATIONS) - 1}"
"""The configuration with the smallest tile, for what does not depend on the tile."""


@pytest.fixture(params=launchers.names(CONFIGURATIONS, cpu=False, cuda=False))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, CONFIGURATIONS)


@pytest.fixture(
    params=["reference", "library", CHEAP, *(name for name in launchers.names() if name.startswith("cuda"))]
)
def cheap_launcher(request, monkeypatch):
    dtype = request.node.callspec.params.get("dtype", torch.float16)
    if request.param.startswith("cuda") and dtype not in conv2d_cuda.NAMES:
        pytest.skip("the CUDA kernel multiplies 16-bit types")
    if request.param.startswith("cuda"):
        require_cuda()
    return launchers.launcher(request.param, monkeypatch, CONFIGURATIONS)


@pytest.mark.parametrize("dtype", conv2d.TYPES, ids=str)
def test_every_configuration_meets_the_numeric_contract(launcher, dtype):
    for number, case in enumerate(EVERY_TILE):
        outputs = case.outputs or launcher.options.get("configuration", {"BLOCK_N": 16})["BLOCK_N"]
        check_contract(launcher, replace(case, outputs=outputs), dtype, seed=number)


@pytest.mark.parametrize("dtype", conv2d.TYPES, ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_meet_the_numeric_contract(cheap_launcher, case, dtype):
    check_contract(cheap_launcher, case, dtype)


def test_many_tiles_in_groups(monkeypatch):
    """More tiles of pixels than a group holds, the last group not full, and two blocks of outputs."""
    launcher = launchers.launcher(CHEAP, monkeypatch, CONFIGURATIONS)
    check_contract(launcher, Case((3, 16, 17), (4,), 20, 1, act="gelu"), torch.float32)


def test_runs_agree_bit_for_bit_whatever_the_batch(cheap_launcher):
    dtype = torch.float16 if cheap_launcher.backend == "cuda" else torch.float32
    arguments = make(Case((3, 5, 8), (20, 12), 9, 3, 2, True, "gelu", "none", "none", "gelu"), dtype)
    tile = moment_pixels(cheap_launcher, arguments, 7)
    first, again = (run_into_nan(cheap_launcher, arguments, tile) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    if cheap_launcher.backend in ("reference", "library"):
        return  # torch's matrix products and convolutions may sum in another order for another batch
    order = [2, 0]
    part = tuple(v[order] if isinstance(v, Tensor) and v.shape[0] == 3 else v for v in arguments)
    y, moments = run_into_nan(cheap_launcher, part, tile)
    assert torch.equal(y, first[0][order]) and torch.equal(moments, first[1][order])


@pytest.mark.parametrize("act", ["gelu", "silu", "relu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activations_over_their_range(cheap_launcher, act, dtype):
    """A 1x1 kernel of one channel with weight 1: y = act(x); in float16 to its rounding and 1.6e-5 of GELU."""
    far = torch.tensor([-6e4, -200.0, -4.5, 4.5, 200.0, 6e4])
    z = torch.cat((torch.linspace(-12, 12, 1001), torch.linspace(-1e-3, 1e-3, 21), far)).to(dtype)
    x = z.view(1, 1, -1, 1)
    weight = conv2d.ConvWeight(torch.ones((1, 1, 1, 1), dtype=dtype))
    arguments = (x, None, weight, None, None, None, "none", "none", None, "none", act)
    y, _ = run_into_nan(cheap_launcher, arguments)
    exact = torch.sigmoid(z.double()) if act == "sigmoid" else getattr(F, act)(z.double())
    if dtype == torch.float32:
        allowed = 3e-7 * z.double().abs().clamp(min=1)
    else:
        allowed = 5e-4 * exact.abs() + (2e-5 if act == "gelu" else 1e-7)
    assert ((y.flatten().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("act", ["gelu", "silu", "relu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_is_not_hidden(cheap_launcher, act, dtype):
    prologue = "none" if act == "sigmoid" else act
    arguments = make(Case((1, 5, 6), (16,), 8, 3, 2, prologue=prologue, act=act), dtype)
    arguments[0][0, 1, 1, 3] = NAN
    y, _ = run_into_nan(cheap_launcher, arguments)
    seen = torch.zeros((5, 6), dtype=torch.bool)
    seen[1:4:2, 1:4:2] = True  # the pixels one of whose taps, two apart, is (1, 1)
    assert torch.equal(y[0].isnan(), seen[:, :, None].expand(5, 6, 8))


def test_reference_serves_other_kernels():
    for kernel, dilation in ((5, 1), (3, 3), (1, 4)):
        arguments = make(Case((2, 8, 7), (6,), 5, kernel, dilation, act="gelu"), torch.float64)
        torch.testing.assert_close(conv2d.reference(*arguments), through_torch(arguments, torch.float64))


def test_other_kernels_and_types_fall_back(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    for case, dtype, message, taken in (
        (Case((1, 6, 6), (4,), 3, 5), torch.float32, "5 x 5", "library"),
        (Case((1, 6, 6), (4,), 3), torch.float64, "float64", "reference"),
    ):
        x, _, weight, *_ = arguments = make(case, dtype)
        with pytest.raises(CannotRunError, match=message):
            conv2d.OP.implementations["triton"].can_run(*arguments, torch.empty_like(x[..., :3]), None, 0)
        assert torch.equal(conv2d.conv2d(x, weight), conv2d.conv2d(x, weight, backend=taken))


def test_triton_refuses_other_dilations():
    arguments = make(Case((1, 6, 6), (4,), 3, 3, 3), torch.float32)
    with pytest.raises(CannotRunError, match="dilation 3"):
        conv2d.OP.implementations["triton"].can_run(*arguments, torch.empty((1, 6, 6, 3)), None, 0)


def test_moments_of_another_tile_are_refused(monkeypatch):
    launcher = launchers.launcher(CHEAP, monkeypatch, CONFIGURATIONS)
    arguments = tuple(on(value, launcher.device) for value in make(Case((1, 6, 6), (4,), 3), torch.float32))
    y, moments = (torch.empty(shape, device=launcher.device) for shape in ((1, 6, 6, 3), (1, 1, 2, 3)))
    with pytest.raises(CannotRunError, match="36"):
        launcher.run(conv2d.OP, *arguments, y, moments, 36)
    with pytest.raises(CannotRunError, match="36"):
        conv2d.OP.choose(*arguments, y, moments, 36, backend="triton")
    assert conv2d.OP.choose(*arguments, y, moments, 64, backend="triton") == "triton"


@pytest.mark.parametrize("dtype", conv2d.TYPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 3, 16, 48, 64, 96, 128, 512])
def test_the_chosen_configuration_fits_the_shape(outputs, dtype):
    for batch, size in ((1, 1), (2, 8), (1, 64), (16, 256)):
        shape = (batch, size, size, outputs)
        chosen = configuration_for(shape, dtype)
        assert chosen in CONFIGURATIONS and chosen["BLOCK_N"] < 2 * max(outputs, 16)
        for tile in (64, 128):
            assert configuration_for(shape, dtype, tile)["BLOCK_M"] == tile
        assert conv2d.moment_tile(shape, dtype) == chosen["BLOCK_M"]


def test_small_images_get_small_tiles():
    small = configuration_for((2, 8, 8, 512), torch.float16)
    large = configuration_for((2, 256, 256, 512), torch.float16)
    assert small["BLOCK_M"] * small["BLOCK_N"] < large["BLOCK_M"] * large["BLOCK_N"]
    shallow = configuration_for((2, 256, 256, 512), torch.float16, capability=8)
    assert shallow["BLOCK_M"] == large["BLOCK_M"] and shallow["BLOCK_K"] < large["BLOCK_K"]


def test_launch_options_fill_the_blocks():
    widest = CONFIGURATIONS[0]
    assert launch_options(widest, (128,), "none", False)["BLOCK_K"] == 64
    assert launch_options(widest, (96,), "none", False)["BLOCK_K"] == 32
    assert launch_options(widest, (16,), "none", False)["BLOCK_K"] == 16
    both = launch_options(widest, (128, 64), "none", True)
    assert (both["BLOCK_M"], both["BLOCK_N"]) == (widest["BLOCK_M"], widest["BLOCK_N"] // 2)


def test_public_functions(monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    arguments = make(Case((2, 6, 5), (8, 4), 7, 3, 2, True, "silu", "none", "none", "gelu"), torch.float32)
    x, x2, weight, bias, scale, offset, _, _, residual, _, _ = arguments
    options = dict(x2=x2, scale=scale, offset=offset, prologue_act="silu", residual=residual)
    y = conv2d.dilated_conv_gelu(x, weight, bias, **options)
    assert torch.equal(y, conv2d.conv2d(x, weight, bias, act="gelu", **options))
    assert torch.equal(y, conv2d.reference(*arguments))
    into, moments = torch.full_like(y, NAN), torch.full((2, 3, 2, 7), NAN)
    conv2d.conv2d_into(*arguments, into, moments, 12)
    assert torch.equal(into, y) and torch.equal(moments, group_norm_moments.reference(y, 12))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_recorded_calls_go_through_the_custom_op(monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    x, _, weight, *_ = make(Case((1, 4, 6), (5,), 4), torch.float32)

    def call(x):
        return conv2d.conv2d(x, weight, act="gelu")

    nodes = make_fx(call)(x).graph.nodes
    assert torch.ops.dfengine.conv2d.default in {node.target for node in nodes}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert call(mode.from_tensor(x)).shape == (1, 4, 6, 4)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(x), call(x))
    assert torch.equal(torch.jit.trace(call, x)(x + 1), call(x + 1))


def test_a_released_weight_is_refused_by_what_wants_its_taps(monkeypatch):
    devices = dict(reference="cpu", triton=launchers.launcher(CHEAP, monkeypatch, CONFIGURATIONS).device)
    if native.available():
        devices["cpu"] = "cpu"
    for backend, device in devices.items():
        x, _, weight, *_ = (on(value, device) for value in make(Case((1, 4, 6), (5,), 4), torch.float32))
        with pytest.raises(ValueError, match="nothing was made"):
            weight.release()
        weight.prepacked["form"] = object()
        weight.release()
        assert weight.packed.shape == (3, 3, 5, 4) and weight.packed.dtype == torch.float32
        with pytest.raises(CannotRunError, match="released"):
            conv2d.conv2d(x, weight, backend=backend)
        with pytest.raises(CannotRunError, match="released"):
            make_fx(partial(conv2d.conv2d, weight=weight, backend=backend))(x)


def test_custom_op_is_registered_soundly():
    arguments = make(Case((2, 4, 6), (3, 5), 4, 3, 2, True, "gelu", "none", "none", "gelu"), torch.float32)
    x, x2, weight, *rest = arguments
    y, moments = torch.empty((2, 4, 6, 4)), torch.empty((2, 2, 2, 4))
    for last in ((y, moments, 12, ""), (y, None, 0, "")):
        call = (x, x2, weight.packed, weight.dilation, *rest, *last)
        torch.library.opcheck(torch.ops.dfengine.conv2d, call, test_utils=("test_schema", "test_faketensor"))


def wide(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(x=wide(4, 4, 8)), r"\(N, H, W, C\)"),
        (dict(x=wide(0, 4, 4, 8)), "none of them 0"),
        (dict(x=wide(1, 4, 4, 6)), "6 channels for a weight of 8"),
        (dict(x2=wide(1, 4, 4, 8)), "16 channels for a weight of 8"),
        (dict(x=wide(1, 4, 4, 5), x2=wide(1, 4, 5, 3)), "x2: expected"),
        (dict(x=wide(1, 8, 4, 4).permute(0, 2, 3, 1)), "x: strides"),
        (dict(x=wide(1, 4, 4, 16)[..., ::2]), "x: strides"),
        (dict(x=wide(1, 4, 4, 8).half()), "float16"),
        (dict(x=wide(1, 5, 4, 8), resample="down"), "2 x 2 means"),
        (dict(resample="sideways"), "sideways"),
        (dict(act="tanh"), "tanh"),
        (dict(prologue_act="sigmoid"), "sigmoid"),
        (dict(bias=wide(2, 6)), "bias: expected"),
        (dict(bias=wide(6).half()), "bias: torch.float16"),
        (dict(scale=wide(1, 8)), "come together"),
        (dict(scale=wide(1, 8), offset=wide(8)), "offset: expected"),
        (dict(residual=wide(1, 4, 4, 5)), "residual: expected"),
        (dict(residual=wide(1, 4, 4, 6), residual_resample="down"), r"residual: expected \(1, 8, 8, 6\)"),
        (dict(x=wide(1, 3, 4, 8), residual=wide(1, 2, 2, 6), residual_resample="up"), "twice"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    weight = conv2d.ConvWeight.pack(torch.zeros(6, 8, 3, 3))
    with pytest.raises(ValueError, match=message):
        conv2d.conv2d(**{**dict(x=wide(1, 4, 4, 8), weight=weight), **changes})


def test_outputs_must_fit():
    x, weight = wide(1, 4, 4, 8), conv2d.ConvWeight.pack(torch.zeros(6, 8, 3, 3))
    head = (x, None, weight, None, None, None, "none", "none", None, "none", "none")
    with pytest.raises(ValueError, match="y: expected"):
        conv2d.conv2d_into(*head, wide(1, 4, 4, 5))
    with pytest.raises(ValueError, match="moments: expected"):
        conv2d.conv2d_into(*head, wide(1, 4, 4, 6), wide(1, 1, 2, 6), 8)
    with pytest.raises(ValueError, match="tile_pixels"):
        conv2d.conv2d_into(*head, wide(1, 4, 4, 6), wide(1, 1, 2, 6))


@pytest.mark.parametrize(
    "make_weight, message",
    [
        (lambda: conv2d.ConvWeight(wide(3, 3, 8)), "KH, KW, C, O"),
        (lambda: conv2d.ConvWeight(wide(3, 3, 6, 8).transpose(2, 3)), "contiguous"),
        (lambda: conv2d.ConvWeight.pack(wide(6, 8, 2, 3)), "no centre"),
        (lambda: conv2d.ConvWeight.pack(wide(6, 8, 3, 3), dilation=0), "dilation 0"),
    ],
)
def test_wrong_weights_are_refused(make_weight, message):
    with pytest.raises(ValueError, match=message):
        make_weight()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", conv2d.TYPES, ids=str)
def test_gpu_takes_triton_at_the_shapes_of_the_networks(dtype, monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    launchers.launcher(CHEAP, monkeypatch, CONFIGURATIONS)  # skips without triton
    for case in (
        Case((1, 128, 128), (128,), 128, 3, 1, residual="none", act="gelu"),
        Case((2, 8, 8), (512,), 512, 3, 2, True, "gelu"),
        Case((1, 64, 64), (128, 128), 128, 3, 1, True, "gelu", "none", "down"),
        Case((1, 64, 64), (256, 128), 256, 1),
        Case((2, 64, 64), (3,), 128),
        Case((2, 64, 64), (64,), 1, act="sigmoid"),
    ):
        arguments = make(case, dtype)
        on_gpu = [on(value, "cuda") for value in arguments]
        y = torch.full((*case.size, case.outputs), NAN, dtype=dtype, device="cuda")
        assert conv2d.OP.choose(*on_gpu, y, None, 0) == "triton"
        conv2d.OP(*on_gpu, y, None, 0)
        assert_numeric_contract(y.cpu(), through_torch(arguments, torch.float64), through_torch(arguments, dtype))
