"""conv2d: every implementation and launch configuration against float64 through torch's own operations."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from dfengine.kernels.quantization import Quantization
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract

NAN = float("nan")
CHEAP = f"triton-{len(CONFIGURATIONS) - 1}"
"""The configuration with the smallest tile, for what does not depend on the tile."""


@dataclass(frozen=True)
class Case:
    """A call; `size` (N, H, W) is that of y."""

    size: tuple[int, int, int]
    sources: tuple[int, ...]
    outputs: int
    kernel: int = 3
    dilation: int = 1
    scaled: bool = False
    prologue: str = "none"
    resample: str = "none"
    residual: str | None = None
    act: str = "none"
    bias: str = "sample"
    aligned: bool = False  # whether pixels of the 16-bit types start at multiples of 16 bytes


EVERY_TILE = [
    # two sources that fill no block, a prologue, a residual, more than one tile of 64 pixels, a part of the outputs
    Case((1, 5, 13), (20, 36), 24, 3, 2, True, "gelu", "none", "none", "none"),
    # a tile full of outputs (the number is that of the tile)
    Case((1, 7, 5), (32,), 0, 3, 1, act="gelu"),
]
FEATURES = [
    Case((1, 1, 1), (3,), 3, act="gelu"),
    Case((3, 5, 3), (6,), 5, 3, 2, act="relu", bias="channel"),
    Case((2, 6, 7), (18,), 1, 1, act="sigmoid", bias="none"),
    Case((2, 6, 4), (16, 8), 20, 1, scaled=True, residual="none"),
    Case((1, 4, 6), (5,), 7, 3, 2, True, "gelu", "down", "down"),
    Case((2, 6, 8), (17,), 9, 3, 1, True, "silu", "up", "up", "silu"),
    Case((2, 3, 5), (4, 20), 6, 3, 2, False, "relu", "down", "none", "gelu"),
    Case((1, 6, 4), (33,), 6, 3, 2, False, "none", "up", "down", "relu"),
    Case((1, 4, 4), (7,), 17, 3, 1, True, "relu", "none", "up", "sigmoid"),
]


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
    return launchers.launcher(request.param, monkeypatch, CONFIGURATIONS)


def slice_of_wider(values: Tensor, aligned: bool = False) -> Tensor:
    """The same values as a channel slice of a buffer of NaN."""
    before, after = 8, -values.shape[3] % 8 if aligned else 3
    wide = torch.full((*values.shape[:3], before + values.shape[3] + after), NAN, dtype=values.dtype)
    view = wide[..., before : before + values.shape[3]]
    view.copy_(values)
    return view


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple:
    """The arguments of `run` up to `act`; activations are off-centre, around -2.3, and channel slices."""
    g = torch.Generator().manual_seed(seed)

    def scaled_size(size, resample):
        return {"none": size, "down": (2 * size[0], 2 * size[1]), "up": (size[0] // 2, size[1] // 2)}[resample]

    batch, size = case.size[0], case.size[1:]
    sizes = [(batch, *scaled_size(size, case.resample), c) for c in case.sources]
    xs = [slice_of_wider((torch.randn(size, generator=g) - 2.3).to(dtype), case.aligned) for size in sizes]
    channels = sum(case.sources)
    weight = torch.randn((case.outputs, channels, case.kernel, case.kernel), generator=g)
    weight = conv2d.ConvWeight.pack(weight / (channels * case.kernel**2) ** 0.5, case.dilation, dtype)
    precise = torch.promote_types(dtype, torch.float32)
    shape = {"sample": (batch, case.outputs), "channel": (case.outputs,), "none": None}[case.bias]
    bias = None if shape is None else torch.randn(shape, generator=g).to(precise)
    scale, offset = ((0.5 + torch.randn((batch, channels), generator=g)).to(precise) for _ in range(2))
    residual = None
    if case.residual is not None:
        residual = torch.randn((batch, *scaled_size(size, case.residual), case.outputs), generator=g)
        residual = slice_of_wider((residual - 2.3).to(dtype), case.aligned)
    scale, offset = (scale, offset) if case.scaled else (None, None)
    x2 = xs[1] if len(xs) == 2 else None
    names = case.prologue, case.resample, residual, case.residual or "none", case.act
    return (xs[0], x2, weight, bias, scale, offset, *names)


def moment_pixels(launcher, arguments: tuple, tile_pixels: int) -> int:
    """A tile_pixels that the implementation has: of Triton and CUDA, that of its tile."""
    if launcher.backend == "triton":
        return launcher.options["configuration"]["BLOCK_M"]
    if launcher.backend != "cuda":
        return tile_pixels
    x, _, weight, *_, resample, residual, residual_resample, _ = arguments
    y = torch.empty(conv2d.output_shape(x, weight, resample), device="meta")
    reach, shape = conv2d_cuda.geometry(weight, resample, residual, residual_resample, y)
    place = launcher.options.get("placement")
    return conv2d_cuda.moment_tile(shape, (weight.inputs,), reach, place)


def run_into_nan(
    launcher, arguments: tuple, tile_pixels: int = 0, aligned: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(y, moments); y is written into a slice, around which nothing may be written."""
    x, _, weight, *_ = arguments
    shape = conv2d.output_shape(x, weight, arguments[7])
    before, after = (8, 8 + -shape[3] % 8) if aligned else (4, 5)
    wide = torch.full((*shape[:3], before + shape[3] + after), NAN, dtype=x.dtype, device=launcher.device)
    y = wide[..., before : before + shape[3]]
    moments = None
    if tile_pixels:
        tiles = -(-shape[1] * shape[2] // tile_pixels)
        moments = torch.full((shape[0], tiles, 2, shape[3]), NAN, device=launcher.device)
    arguments = tuple(on(value, launcher.device) for value in arguments)
    conv2d._check(*arguments, y, moments, tile_pixels)
    launcher.run(conv2d.OP, *arguments, y, moments, tile_pixels)
    assert wide[..., :before].isnan().all() and wide[..., before + shape[3] :].isnan().all(), "written beside the slice"
    return y.cpu(), None if moments is None else moments.cpu()


def on(value, device: str):
    """An argument on `device`; a channel slice stays one."""
    if isinstance(value, conv2d.ConvWeight):
        unit = None if value.unit is None else value.unit.to(device)
        return conv2d.ConvWeight(value.packed.to(device), value.dilation, quantization=value.quantization, unit=unit)
    if not isinstance(value, Tensor) or device == "cpu":
        return value
    if value.ndim < 4:
        return value.to(device)
    wide = torch.full((*value.shape[:3], conv2d.pixel_stride("", value)), NAN, dtype=value.dtype, device=device)
    wide[..., : value.shape[3]] = value.to(device)
    return wide[..., : value.shape[3]]


def quantized(arguments: tuple, format: str, share: float = 0.8) -> tuple:
    """The arguments with the weight in eight bits, and its input in `share` of its range: what is beyond is cut off."""
    x, x2, weight, _, scale, offset, prologue, resample, *_ = arguments
    p = conv2d.multiplied(x, x2, scale, offset, prologue, resample)
    low, high = min(float(p.min()), 0.0) * share, max(float(p.max()), 1e-3) * share
    taps = weight.packed.permute(3, 2, 0, 1)
    rounded = conv2d.ConvWeight.pack(taps, weight.dilation, quantization=Quantization(format, low, high))
    return (*arguments[:2], rounded, *arguments[3:])


def through_torch(arguments: tuple, dtype: torch.dtype) -> Tensor:
    """y by torch's operations in `dtype`, on (N, C, H, W)."""
    x, x2, weight, bias, scale, offset, prologue, resample, residual, residual_resample, act = arguments

    def activated(z, name):
        return z if name == "none" else (z.sigmoid() if name == "sigmoid" else getattr(F, name)(z))

    def resampled(z, name):
        if name == "none":
            return z
        return F.avg_pool2d(z, 2) if name == "down" else F.interpolate(z, scale_factor=2, mode="nearest")

    p = (x if x2 is None else torch.cat((x, x2), dim=3)).permute(0, 3, 1, 2).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    if scale is not None:
        p = (p.to(precise) * scale.to(precise)[:, :, None, None] + offset.to(precise)[:, :, None, None]).to(dtype)
    p = resampled(activated(p, prologue), resample)
    taps = weight.packed.to(dtype)
    if weight.quantization is not None:
        p, taps = weight.quantization.input(p.to(precise)).to(dtype), (taps.to(precise) * weight.unit).to(dtype)
    taps = taps.permute(3, 2, 0, 1)
    padding = weight.dilation * (weight.kernel[0] // 2)
    z = F.conv2d(p, taps, padding=padding, dilation=weight.dilation)
    if bias is not None:
        z = z + bias.to(dtype).view(-1, weight.outputs, 1, 1)
    y = activated(z, act)
    if residual is not None:
        y = y + resampled(residual.permute(0, 3, 1, 2).to(dtype), residual_resample)
    return y.permute(0, 2, 3, 1)


def check_contract(
    launcher, case: Case, dtype: torch.dtype, tile_pixels: int = 7, seed: int = 0, format: str = ""
) -> tuple[Tensor, Tensor | None]:
    """Raises where y or the moments are not right; returns both. format: of a quantized weight."""
    arguments = make(case, dtype, seed)
    if format:
        arguments = quantized(arguments, format)
    tile = moment_pixels(launcher, arguments, tile_pixels)
    y, moments = run_into_nan(launcher, arguments, tile, case.aligned)
    assert_numeric_contract(y, through_torch(arguments, torch.float64), through_torch(arguments, dtype))
    if moments is not None:
        check_moments(y, moments, tile)
    return y, moments


def check_moments(y: Tensor, moments: Tensor, tile_pixels: int) -> None:
    mean, spread = group_norm_moments.reference(y.double(), tile_pixels).unbind(dim=2)
    assert torch.isfinite(moments).all()
    assert (moments[:, :, 0] - mean).abs().max() <= 2e-6 * y.abs().max()
    assert (moments[:, :, 1] - spread).abs().max() <= 1e-5 * spread.max() + 1e-9


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
        x, _, weight, *_ = make(case, dtype)
        with pytest.raises(CannotRunError, match=message):
            conv2d.conv2d(x, weight, backend="triton")
        assert torch.equal(conv2d.conv2d(x, weight), conv2d.conv2d(x, weight, backend=taken))


def test_triton_refuses_other_dilations():
    x, _, weight, *_ = make(Case((1, 6, 6), (4,), 3, 3, 3), torch.float32)
    with pytest.raises(CannotRunError, match="dilation 3"):
        conv2d.conv2d(x, weight, backend="triton")


def test_moments_of_another_tile_are_refused(monkeypatch):
    launcher = launchers.launcher(CHEAP, monkeypatch, CONFIGURATIONS)
    arguments = make(Case((1, 6, 6), (4,), 3), torch.float32)
    y, moments = torch.empty((1, 6, 6, 3)), torch.empty((1, 1, 2, 3))
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
    launchers.launcher(CHEAP, monkeypatch, CONFIGURATIONS)
    x, _, weight, *_ = make(Case((1, 4, 6), (5,), 4), torch.float32)
    with pytest.raises(ValueError, match="nothing was made"):
        weight.release()
    weight.prepacked["form"] = object()
    weight.release()
    assert weight.packed.shape == (3, 3, 5, 4) and weight.packed.dtype == torch.float32
    for backend in ("reference", "triton", "cpu") if native.available() else ("reference", "triton"):
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
