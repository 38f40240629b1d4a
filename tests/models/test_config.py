from __future__ import annotations

import pytest

from dfengine.errors import ConfigError
from dfengine.models import PRESETS, ModelConfig, preset


def test_presets_round_trip_through_json_values():
    for name, config in PRESETS.items():
        assert config.preset == name
        assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("method", ["diff-fastener", "diffusionad", "diffusionad-v1", "iterative"])
def test_each_method_has_three_sizes(method):
    assert preset(method).base == 128 and preset(method).image_size == 256
    small, tiny = preset(method + "-small"), preset(method + "-tiny")
    assert (small.base, small.seg_base, small.image_size) == (32, 16, 256)
    assert (tiny.base, tiny.seg_base, tiny.image_size, tiny.multipliers) == (16, 16, 64, (1, 2, 3, 4))
    assert small.mode == tiny.mode == preset(method).mode


def test_a_new_size_brings_its_multipliers():
    assert [preset("diff-fastener-tiny", image_size=size).top_k for size in (64, 128, 256)] == [800, 200, 50]
    assert preset("diff-fastener-tiny", image_size=128, top_k=7).top_k == 7
    assert [preset("diff-fastener", image_size=size).top_k for size in (256, 512)] == [50, 50]
    assert preset("diff-fastener", image_size=512).multipliers == (0.5, 1, 1, 2, 2, 4, 4)
    assert preset("diff-fastener", image_size=128).multipliers == (1, 1, 2, 3, 4)
    assert preset("diff-fastener", image_size=128, multipliers=(1, 2)).multipliers == (1, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(image_size=100), "image size must be one of 32, 64"),
        (dict(image_size=100, multipliers=(1, 2)), "multiple of 32"),
        (dict(activation="tanh"), "activation"),
        (dict(mode="magic"), "mode"),
        (dict(pixel_range="byte"), "pixel_range"),
        (dict(t_s=400, t_b=400), "t_s < tau <= t_b"),
        (dict(t_b=1000), "below timesteps"),
        (dict(skip_every=0), "skip_every"),
        (dict(heads=3), "divisible by heads"),
        (dict(base=6), "multiples of 4"),
        (dict(base="128"), "base must be int"),
        (dict(channel_attention=1), "channel_attention must be bool"),
        (dict(beta_end=1.5), "beta"),
        (dict(channels=4), "channels"),
        (dict(guidance=-1.0), "guidance"),
        (dict(guidance=float("inf")), "guidance"),
        (dict(guidance=float("nan")), "guidance"),
        (dict(image_size=0, multipliers=(1, 2)), "image_size"),
        (dict(image_size=-64, multipliers=(1, 2)), "image_size"),
        (dict(top_k=70_000), "top_k"),
        (dict(multipliers=(1e15,)), "at most 16384"),
        (dict(multipliers=("1",)), "multipliers must be numbers"),
        (dict(base=5, multipliers=(4,)), "base must be even"),
        (dict(blocks=4096), "blocks must be between 1 and 16"),
        (dict(t_s=500, t_b=600), "t_s < tau <= t_b"),
    ],
)
def test_bad_fields_are_refused_with_the_reason(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        ModelConfig(**changes)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown preset 'nope'; known: diff-fastener"):
        preset("nope")
    with pytest.raises(ConfigError, match="unknown model configuration fields: colour"):
        ModelConfig.from_dict({"colour": 1})
    with pytest.raises(ConfigError, match="not a table"):
        ModelConfig.from_dict([1])
