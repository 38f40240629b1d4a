from __future__ import annotations

import json

import pytest

from dfengine.data.augment import AugmentConfig
from dfengine.errors import ConfigError, UsageError
from dfengine.models import preset
from dfengine.training import TrainConfig
from tests.helpers import tiny_config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "exactly one of minutes, steps and epochs"),
        ({"minutes": 1, "steps": 5}, "minutes and steps"),
        ({"minutes": 0}, "minutes must be a positive number"),
        ({"minutes": float("nan")}, "minutes must be a positive number"),
        ({"steps": 2.5}, "steps must be at least 1"),
        ({"steps": 1, "recipe": "mine"}, "recipe must be one of"),
        ({"steps": 1, "batch_size": 1}, "batch_size must be at least 2"),
        ({"steps": 1, "denoiser_share": 1.5}, "denoiser_share must be between 0 and 1"),
        ({"steps": 1, "learning_rate": -1.0}, "learning_rate must be positive"),
        ({"steps": 1, "precision": "int8"}, "precision must be one of"),
        ({"steps": 1, "ema_decay": 1.0}, "ema_decay"),
        ({"steps": 1, "workers": -1}, "workers"),
        ({"steps": 1, "seed": -1}, "seed"),
        ({"steps": 1, "seed": 2**64}, "seed"),
        ({"steps": 1, "holdout": 1.0}, "holdout"),
    ],
)
def test_bad_options_are_refused_with_the_reason(fields, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**fields)


def test_resolved_configuration_survives_json():
    config = TrainConfig(steps=5, minutes=None).resolve(tiny_config())
    assert None not in (config.denoiser_share, config.learning_rate, config.synthesis, config.augment, config.schedule)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_choices_are_kept_and_the_rest_follows_the_recipe():
    config = TrainConfig(steps=5, recipe="paper", learning_rate=3e-4).resolve(preset("diffusionad"))
    assert config.learning_rate == 3e-4
    assert config.segmentation_rate == 1e-5
    assert (config.denoiser_share, config.ema_decay, config.clip, config.inference_t_share) == (0, 0, 0, 0)
    assert config.augment == AugmentConfig.off()
    assert config.synthesis.recipe == "paper"
    assert config.anomaly_share == "coin"
    assert TrainConfig(steps=5, recipe="paper").resolve(preset("diff-fastener")).anomaly_share == "half"


def test_wide_networks_get_lower_rates():
    assert TrainConfig(steps=5).resolve(preset("diff-fastener")).learning_rate == pytest.approx(2.5e-4)
    assert TrainConfig(steps=5).resolve(preset("diff-fastener-tiny")).learning_rate == pytest.approx(1e-3)


def test_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="momentum"):
        TrainConfig.from_dict({"steps": 5, "momentum": 0.9})
