"""conv2d on the CPU: every instruction set and product against float64, on the cases of conv2d_cases.py and larger."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfengine import native
from dfengine.kernels import conv2d, conv2d_cpu, group_norm_moments
from tests.kernels import launchers
from tests.kernels.conv2d_cases import FEATURES, NAN, Case, check_contract, make, run_into_nan

LAUNCHERS = [f"{level}-float32" for level in launchers.LEVELS]
LAUNCHERS += [f"{level}-{product}" for level in ("avx512", "avx512_bf16") for product in ("pairs", "tiles")]
LARGER = [
    # one row of tiles to a band and more; outputs that fill no block; a tile of moments to a row
    (Case((1, 45, 40), (24,), 40, 3, 1, True, "gelu", residual="none"), 40),
    # tiles of moments that cross bands
    (Case((2, 64, 33), (16, 16), 33, 3, 2, True, "silu", act="relu"), 50),
    # channels that divide into steps of 30, 20, 22 and 24 values of a tile
    (Case((1, 9, 33), (10,), 16, 3), 33),
    (Case((1, 5, 9), (40,), 32, 3, 2), 45),
    (Case((1, 5, 9), (88,), 16, 3, 2), 9),
    (Case((2, 9, 17), (48,), 48, 3, residual="none"), 17),
    # a 1x1 kernel that reads x where it lies, but for the last pixels
    (Case((2, 15, 17), (24,), 40, 1, residual="none"), 17),
    (Case((1, 3, 5), (6,), 16, 1), 5),
    # more weights than stay in the cache beside the band, taken in parts
    (Case((1, 5, 9), (328,), 192, 3, 1, True, "relu"), 45),
    (Case((2, 24, 24), (20,), 160, 1, 1, True, "gelu", "up", "down"), 24 * 8),
    # taps further apart, in bands whose common rows are more than their own, and beyond the image
    (Case((2, 40, 33), (24, 16), 20, 3, 3, True, "gelu", residual="none"), 33),
    (Case((1, 30, 64), (256,), 24, 3, 4, act="gelu"), 64),
    (Case((2, 3, 2), (6,), 17, 3, 4, True, "silu"), 5),
    # up to four outputs, summed in lanes of channels
    (Case((2, 21, 33), (32,), 3, 3, 1, True, "gelu"), 33),
    (Case((1, 13, 17), (16, 32), 1, 3, 2, True, "silu", residual="none", act="sigmoid"), 17),
    (Case((2, 15, 17), (48,), 2, 1, residual="none"), 17),
    (Case((1, 5, 9), (64,), 4, 3, 1, act="gelu"), 45),
]


@pytest.fixture(params=LAUNCHERS)
def launcher(request):
    """An implementation; skips with the reason where it does not run here."""
    level, product = request.param.split("-")
    if not native.available():
        pytest.skip(native.status())
    if not native.cpu_levels().get(level):
        pytest.skip(f"this processor does not run {level}")
    if not native.module.product_supported(conv2d_cpu.PRODUCTS[product]):
        pytest.skip(f"this processor does not have the instructions of {product}")
    return launchers.Launcher("cpu", "cpu", dict(level=level, product=product))


def dtypes_of(launcher) -> tuple[torch.dtype, ...]:
    return tuple(conv2d.TYPES) if launcher.options["product"] == "float32" else (torch.bfloat16,)


@pytest.mark.parametrize("case", FEATURES, ids=str)
def test_features_meet_the_numeric_contract(launcher, case):
    for dtype in dtypes_of(launcher):
        check_contract(launcher, case, dtype)


@pytest.mark.parametrize("case, tile_pixels", LARGER, ids=str)
def test_larger_cases_meet_it(launcher, case, tile_pixels):
    for number, dtype in enumerate(dtypes_of(launcher)):
        check_contract(launcher, case, dtype, tile_pixels, seed=number)


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    for dtype in dtypes_of(launcher):
        arguments = make(Case((5, 19, 23), (16, 8), 24, 3, 2, True, "gelu", "none", "none", "gelu"), dtype)
        first, again = (run_into_nan(launcher, arguments, 23) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        order = [4, 0, 2]
        of_samples = (0, 1, 3, 4, 5, 8)  # x, x2, bias, scale, offset, residual
        part = tuple(conv2d_part(value, order) if i in of_samples else value for i, value in enumerate(arguments))
        y, moments = run_into_nan(launcher, part, 23)
        assert torch.equal(y, first[0][order]) and torch.equal(moments, first[1][order])


def conv2d_part(values: torch.Tensor, order: list[int]) -> torch.Tensor:
    return values[order].contiguous()


@pytest.mark.parametrize(
    "case, tile_pixels",
    [
        (Case((1, 70, 50), (24,), 48, 3, 1, True, "gelu", residual="none"), 50),
        (Case((2, 40, 50), (24,), 48, 3, 2, True, "gelu"), 77),
        (Case((1, 8, 8), (64,), 96, 3), 64),  # threads share the outputs of one band
    ],
    ids=str,
)
def test_threads_change_nothing(launcher, case, tile_pixels):
    threads = torch.get_num_threads()
    for dtype in dtypes_of(launcher):
        arguments, results = make(case, dtype), []
        try:
            for count in (1, 2, 3, 64):
                torch.set_num_threads(count)
                results.append(run_into_nan(launcher, arguments, tile_pixels))
        finally:
            torch.set_num_threads(threads)
        for y, moments in results[1:]:
            assert torch.equal(y, results[0][0]) and torch.equal(moments, results[0][1])


@pytest.mark.parametrize("act", conv2d.ACTIVATIONS)
def test_activations_over_their_range(launcher, act):
    """An identity as 1x1 weight leaves act(bias) and, as a prologue, act(x)."""
    far = torch.tensor([-1e4, -200.0, 200.0, 1e4])
    z = torch.cat((torch.linspace(-30, 30, 6001), torch.linspace(-1e-3, 1e-3, 201), far))
    dtype = dtypes_of(launcher)[0]
    x = torch.zeros((1, len(z), 1, 1), dtype=dtype)
    weight = conv2d.ConvWeight.pack(torch.ones((1, 1, 1, 1), dtype=dtype))
    exact = z.to(dtype).double()
    want = exact if act == "none" else exact.sigmoid() if act == "sigmoid" else getattr(F, act)(exact)
    bound = 4e-7 if dtype == torch.float32 else 5e-3
    y = torch.full_like(x, float("nan"))
    before = (None, weight, None, None, None)
    inputs = z.to(dtype).view(1, -1, 1, 1)
    launcher.run(conv2d.OP, inputs, *before, "none", "none", None, "none", act, y, None, 0)
    results = [y.flatten()]
    if act in conv2d.PROLOGUE_ACTIVATIONS:
        launcher.run(conv2d.OP, inputs, *before, act, "none", None, "none", "none", y, None, 0)
        results.append(y.flatten())
    for result in results:
        error = (result.double() - want).abs() / exact.abs().clamp(min=1)
        assert error.max() < bound


def test_taps_beyond_the_image_cost_nothing(launcher):
    """Zeros as far out as the dilation says would fill no memory."""
    dtype = dtypes_of(launcher)[0]
    x, _, weight, *_ = make(Case((2, 9, 7), (20,), 17), dtype)
    far = conv2d.ConvWeight(weight.packed, 10**6)
    centre = conv2d.ConvWeight(weight.packed[1:2, 1:2])
    of_far, of_centre = torch.full((2, 2, 9, 7, 17), float("nan"), dtype=dtype)
    for taps, y in ((far, of_far), (centre, of_centre)):
        launcher.run(conv2d.OP, x, None, taps, *[None] * 3, "none", "none", None, "none", "none", y, None, 0)
    assert torch.allclose(of_far.float(), of_centre.float(), rtol=8e-3, atol=1e-5)


@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_nan_spreads_to_its_neighbours_and_no_further(launcher, dilation):
    dtype = dtypes_of(launcher)[0]
    x = torch.randn((1, 12, 14, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 5, 6, 3] = float("nan")
    weight = conv2d.ConvWeight.pack(torch.ones((8, 16, 3, 3), dtype=dtype), dilation)
    acts = [(act, "none") for act in conv2d.PROLOGUE_ACTIVATIONS] + [("none", act) for act in conv2d.ACTIVATIONS]
    for before, after in acts:
        y = torch.zeros((1, 12, 14, 8), dtype=dtype)
        launcher.run(conv2d.OP, x, None, weight, None, None, None, before, "none", None, "none", after, y, None, 0)
        near = torch.zeros((12, 14), dtype=torch.bool)
        near[5 - dilation : 6 + dilation : dilation, 6 - dilation : 7 + dilation : dilation] = True
        assert torch.equal(y[0].isnan().any(dim=2), near) and torch.equal(y[0].isnan().all(dim=2), near)


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_other_users_of_tiles_are_not_disturbed():
    """torch's library keeps the shapes of tiles between its calls."""
    a, b = (torch.randn((200, 200), generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    before = a @ b
    arguments = make(Case((1, 8, 8), (6,), 6, 3), torch.bfloat16)
    run_into_nan(launchers.Launcher("cpu", "cpu"), arguments)
    assert torch.equal(a @ b, before)


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_is_taken_on_a_cpu_and_packs_once(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    arguments = make(FEATURES[0], torch.float32)
    weight = arguments[2]
    y = torch.full((1, 1, 1, 3), float("nan"))
    rest = (*arguments, y, None, 0)
    assert conv2d.OP.choose(*rest) == "cpu"
    conv2d.OP(*rest)
    packed = next(iter(weight.prepacked.values()))
    conv2d.OP(*rest)
    assert len(weight.prepacked) == 1 and next(iter(weight.prepacked.values())) is packed
    large = conv2d.ConvWeight.pack(torch.ones((3, 3, 5, 5)))
    assert conv2d.OP.choose(arguments[0], None, large, *arguments[3:], y, None, 0) == "library"


def test_the_public_function_packs_once(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    x, _, weight, *_ = make(FEATURES[0], torch.float32)
    y = conv2d.dilated_conv_gelu(x, weight)
    (packed,) = weight.prepacked.values()
    assert torch.equal(conv2d.dilated_conv_gelu(x, weight), y)
    assert next(iter(weight.prepacked.values())) is packed


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_a_disposable_weight_is_held_once():
    arguments = make(Case((1, 5, 6), (16,), 24, act="gelu"), torch.bfloat16)
    full = arguments[2].packed
    weight, y = conv2d.ConvWeight(full, disposable=True), torch.full((2, 1, 5, 6, 24), float("nan")).bfloat16()
    cpu = conv2d.OP.implementations["cpu"]
    run, again = (cpu.bind(*arguments[:2], weight, *arguments[3:], to, None, 0) for to in y)
    run()
    again()
    assert weight.packed.is_meta and weight.packed.shape == full.shape and len(weight.prepacked) == 1
    want = torch.empty_like(y[0])
    cpu.bind(*arguments, want, None, 0)()
    assert arguments[2].packed is full  # of a weight that is somebody's
    assert torch.equal(y[0], want) and torch.equal(y[1], want)
    assert torch.equal(conv2d.conv2d(arguments[0], weight, *arguments[3:4], act="gelu"), want)


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_every_product_of_this_processor_is_a_configuration():
    half, single = (make(FEATURES[0], dtype) for dtype in (torch.bfloat16, torch.float32))
    configurations = conv2d.OP.implementations["cpu"].configurations
    products = [options["product"] for options in configurations(*half)]
    assert products[0] == conv2d_cpu.default_product(torch.bfloat16) and "float32" in products
    assert len(set(products)) == len(products) and configurations(*single) == [{}]


@pytest.mark.parametrize("product", ["float32", "pairs", "tiles"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ["border", "first", "guessed", "offset"])
def test_moments_of_runs_with_an_outlier(product, fused, case):
    """Values at the ends of a run, or among those by which its mean is guessed, that differ from all others."""
    if not native.available() or not native.module.product_supported(conv2d_cpu.PRODUCTS[product]):
        pytest.skip("this processor does not have the product")
    dtype = torch.float32 if product == "float32" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    x = 1 + 0.01 * torch.randn(2, 24, 96, 16, generator=generator)
    if case == "first":
        x[:, :, 0] = 100
    elif case == "guessed":
        x[:, :, [12, 36, 60, 84]] = 100
    elif case == "offset":
        x += 300
    kernel = 3 if case == "border" else 1
    weight = torch.ones(32, 16, kernel, kernel) / (16 * kernel**2) + 0.01 * torch.randn(
        32, 16, kernel, kernel, generator=generator
    )
    tile = 96 if fused else 71
    y = torch.full((2, 24, 96, 32), NAN, dtype=dtype)
    moments = torch.full((2, -(-24 * 96 // tile), 2, 32), NAN)
    packed = conv2d.ConvWeight.pack(weight, 1, dtype, False)
    conv2d_cpu.run_native(
        x.to(dtype), None, packed, None, None, None, "none", "none", None, "none", "none", y, moments, tile,
        product=product,
    )  # fmt: skip
    mean, spread = group_norm_moments.reference(y.double(), tile).unbind(dim=2)
    assert (moments[:, :, 0] - mean).abs().max() <= 2e-6 * y.double().abs().max()
    limit = 5e-3 if case == "offset" else 4e-6  # merged means of 300 have few digits left for a deviation of 0.002
    assert (moments[:, :, 1] - spread).abs().max() <= limit * spread.max()
