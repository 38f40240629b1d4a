"""The public DiffusionAD format: what is read arrives exactly, and what does not fit is named."""

from __future__ import annotations

import collections

import pytest
import torch

from dfengine.checkpoint import load_checkpoint
from dfengine.convert import convert
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.runner import ProgramRunner, make_runner
from dfengine.errors import CheckpointError
from dfengine.native import available
from tests.public_files import TINY, outputs, public_args, public_content, save, tiny_model


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "stream"])
@pytest.mark.parametrize("parallel", [False, True], ids=["plain", "DataParallel"])
def test_every_weight_arrives_exactly(tmp_path, options, parallel):
    content = public_content()
    if parallel:
        for name in ("unet_model_state_dict", "seg_model_state_dict"):
            content[name] = collections.OrderedDict((f"module.{key}", value) for key, value in content[name].items())
    source = save(tmp_path / "params-last.pt", content, **options)
    summary = convert(source, tmp_path / "out.safetensors")
    checkpoint = load_checkpoint(tmp_path / "out.safetensors")
    expected = tiny_model().state_dict()
    assert checkpoint.state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert checkpoint.state[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.state[name], tensor), name
    for ours, theirs in zip(outputs(checkpoint.build()), outputs(tiny_model()), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.std() > 0
    assert summary.tensors == len(expected)
    assert summary.parameters == sum(p.numel() for p in tiny_model().parameters())
    assert summary.epoch == 3000 == checkpoint.training["epochs"]
    assert checkpoint.calibration is None
    assert "diffusionad, 32x32, base 8, 2 heads, epoch 3000;" in str(summary)


def test_public_weights_run_through_the_engine_as_through_their_modules(tmp_path):
    """Shifts and scales as training leaves them: with all weights alike a map would be one value."""
    content = public_content()
    generator = torch.Generator().manual_seed(0)
    for part in ("unet_model_state_dict", "seg_model_state_dict"):
        content[part] = {
            key: torch.randn(t.shape, generator=generator) * (0.5 if t.dim() == 1 else t[0].numel() ** -0.5)
            if t.is_floating_point() and not key.endswith("running_var") else t
            for key, t in content[part].items()
        }  # fmt: skip
    convert(save(tmp_path / "in.pt", content), tmp_path / "out.safetensors")
    images = torch.rand((3, 32, 32, 3), generator=generator)
    checkpoint = load_checkpoint(tmp_path / "out.safetensors")
    want = ModuleRunner(checkpoint.build(), seed=2).run(images)
    got = make_runner(checkpoint.build(), torch.device("cpu"), "float32", 2).run(images)
    assert isinstance(make_runner(checkpoint.build(), torch.device("cpu"), "float32", 2), ProgramRunner) == available()
    assert want.anomaly_map.std() > 1e-3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_config_is_that_of_the_public_file(tmp_path):
    args = public_args(T=500, less_t_range=150, eval_normal_t=100, eval_noisier_t=300, condition_w=2)
    config = convert(save(tmp_path / "a.pt", public_content(args)), tmp_path / "a.safetensors").config
    assert load_checkpoint(tmp_path / "a.safetensors").config == config
    assert config == TINY.replace(
        preset="diffusionad", timesteps=500, beta_start=2e-4, beta_end=4e-2, tau=150, t_s=100, t_b=300, guidance=2.0,
        top_k=3200,
    )  # fmt: skip
    # 50 pixels at any size: at 32 x 32, 3200 per 65536 pixels.
    assert config.top_k * 32 * 32 / 65536 == 50


def test_args_may_be_missing(tmp_path):
    content = public_content({})
    source = save(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match="do not give 'img_size'.*set image_size"):
        convert(source, tmp_path / "a.safetensors", heads=2)
    with pytest.raises(CheckpointError, match="do not give 'num_heads'.*set heads"):
        convert(source, tmp_path / "a.safetensors", image_size=32)
    config = convert(source, tmp_path / "a.safetensors", image_size=32, heads=2).config
    assert (config.base, config.multipliers, config.attention_factors) == (8, (1, 2, 3, 4), (4, 8))
    assert (config.seg_base, config.image_size, config.heads, config.t_b) == (4, 32, 2, 400)


@pytest.mark.parametrize("mults", ["1,2,3,4", [1, 2, 3, 4], (1, 2, 3, 4)])
def test_channel_mults_spellings(tmp_path, mults):
    source = save(tmp_path / "a.pt", public_content(dict(public_args(channel_mults=mults, img_size=32))))
    assert convert(source, tmp_path / "a.safetensors").config.multipliers == (1, 2, 3, 4)


def test_half_weights_are_widened_exactly(tmp_path):
    content = public_content()
    halves = {k: v.half() if v.is_floating_point() else v for k, v in content["unet_model_state_dict"].items()}
    content["unet_model_state_dict"] = halves
    convert(save(tmp_path / "a.pt", content), tmp_path / "a.safetensors")
    state = load_checkpoint(tmp_path / "a.safetensors").state
    for name, tensor in halves.items():
        assert torch.equal(state[f"reconstruction.{name}"], tensor.float())


def test_parameters_views_and_missing_counters(tmp_path):
    content = public_content()
    unet = dict(content["unet_model_state_dict"])
    weight = unet["middle.0.in_layers.2.weight"]
    unet["middle.0.in_layers.2.weight"] = torch.nn.Parameter(weight.clone())
    shared = torch.cat([torch.zeros(5), unet["out.0.weight"]])
    unet["out.0.weight"] = shared[5:]
    unet["out.0.bias"] = torch.stack([unet["out.0.bias"], torch.ones(8)], dim=1)[:, 0]  # stride 2
    content["unet_model_state_dict"] = unet
    content["seg_model_state_dict"] = {
        k: v for k, v in content["seg_model_state_dict"].items() if not k.endswith("num_batches_tracked")
    }
    convert(save(tmp_path / "a.pt", content), tmp_path / "a.safetensors")
    state = load_checkpoint(tmp_path / "a.safetensors").state
    for name in ("middle.0.in_layers.2.weight", "out.0.weight", "out.0.bias"):
        assert torch.equal(state[f"reconstruction.{name}"], tiny_model().reconstruction.state_dict()[name])
    counters = [v for k, v in state.items() if k.endswith("num_batches_tracked")]
    assert counters and all(v.item() == 0 for v in counters)


# What does not fit is named


def changed(**changes):
    content = public_content()
    for name, change in changes.items():
        content[name] = change(dict(content[name]))
    return content


def bloated():
    """A few hundred bytes of pickle whose repr has 2**64 parts."""
    value = [0]
    for _ in range(64):
        value = [value, value]
    return collections.OrderedDict(a=value)


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


UNFIT = {
    "no unet": (lambda: {"args": {}, "seg_model_state_dict": {}}, "no unet_model_state_dict"),
    "a list": (lambda: [1, 2], "not a dictionary"),
    "a bare tensor": (lambda: torch.zeros(3), "not a dictionary"),
    "args is text": (lambda: {**public_content(), "args": "x"}, "args is not a dictionary"),
    "not a tensor": (lambda: changed(unet_model_state_dict=lambda s: {**s, "x": 3}), "other than tensors"),
    "tensor missing": (
        lambda: changed(unet_model_state_dict=without("up.3.0.in_layers.2.weight")),
        "1 tensor missing: unet up.3.0.in_layers.2.weight",
    ),
    "first conv missing": (lambda: changed(unet_model_state_dict=without("down.0.0.weight")), "unet down.0.0.weight"),
    "tensor unexpected": (
        lambda: changed(seg_model_state_dict=lambda s: {**s, "extra": torch.zeros(1)}),
        "1 tensor unexpected: seg extra",
    ),
    "wrong shape": (
        lambda: changed(seg_model_state_dict=lambda s: {**s, "decoder_segment.fin_out.0.bias": torch.zeros(2)}),
        r"wrong shape: seg decoder_segment.fin_out.0.bias \(2,\) for \(1,\)",
    ),
    "double": (
        lambda: changed(unet_model_state_dict=lambda s: {**s, "out.0.bias": s["out.0.bias"].double()}),
        "unet out.0.bias is torch.float64, which torch.float32 cannot hold exactly",
    ),
    "not finite": (
        lambda: changed(unet_model_state_dict=lambda s: {**s, "out.0.bias": s["out.0.bias"] * torch.nan}),
        "unet out.0.bias holds values that are not finite",
    ),
    "other base": (lambda: public_content(public_args(base_channels=16)), "args.'base_channels'. is 16.* have 8"),
    "other mults": (lambda: public_content(public_args(channel_mults="1,1,2,4")), "channel_mults.*have"),
    "cosine": (lambda: public_content(public_args(beta_schedule="cosine")), "beta_schedule.*cosine.*'linear'"),
    "simplex": (lambda: public_content(public_args(noise_fn="simplex")), "noise_fn.*simplex"),
    "head channels": (lambda: public_content(public_args(num_head_channels=32)), "num_head_channels"),
    "not square": (lambda: public_content(public_args(img_size=[32, 64])), "32x64; only square"),
    "size huge": (lambda: public_content(public_args(img_size=10**5000)), "img_size.*not a size"),
    "size too large": (lambda: public_content(public_args(img_size=65536)), "image_size must be"),
    "size odd": (lambda: public_content(public_args(img_size=100)), "image_size must be a multiple"),
    "mults text": (lambda: public_content(public_args(channel_mults="1,nan")), "channel_mults.*not a list of numbers"),
    "mults number": (lambda: public_content(public_args(channel_mults=3)), "channel_mults.*not a list of numbers: 3"),
    "size text": (lambda: public_content(public_args(img_size="big")), "img_size.*not a size"),
    "T text": (lambda: public_content(public_args(T="many")), "'T'.*not a number"),
    "T zero": (lambda: public_content(public_args(T=0)), "0 timesteps"),
    "T huge": (lambda: public_content(public_args(T=10**9)), "timesteps"),
    "T beyond numbers": (lambda: public_content(public_args(T=10**5000)), "'T'.*not a number in range: int"),
    "T not a number": (lambda: public_content(public_args(T=float("nan"))), "'T'.*not a number in range: nan"),
    "T printing endlessly": (lambda: public_content(public_args(T=bloated())), "'T'.*not a number in range: Ordered"),
    "name of many lines": (
        lambda: changed(unet_model_state_dict=lambda s: {**s, "a\n\udc80" + "b" * 10**5: torch.zeros(1)}),
        r"1 tensor unexpected: unet a\\n\\udc80bbb.*\.\.\.$",
    ),
    "heads": (lambda: public_content(public_args(num_heads=3)), "divisible by heads"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_named(tmp_path, case):
    content, message = UNFIT[case]
    source = save(tmp_path / "odd.pt", content())
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, tmp_path / "out.safetensors")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["odd.pt"]
