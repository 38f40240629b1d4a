from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfengine.checkpoint import load_checkpoint, shipped_checkpoint
from dfengine.cli import main
from dfengine.models import preset
from dfengine.training import loop, plan
from dfengine.training.plan import Candidate
from tests.helpers import tiny_config

QUICK = "--workers 0 --threads 1 --batch-size 2 --precision float32".split()
MODELS = tiny_config(preset="one"), tiny_config(preset="two", base=16)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def two_models(monkeypatch):
    """The choice is between two small models, of which this machine trains 100 and 5 images a second."""
    rates = dict(zip(MODELS, (100.0, 5.0), strict=True))
    monkeypatch.setattr(plan, "CANDIDATES", tuple(Candidate(model, 10) for model in MODELS))
    monkeypatch.setattr(plan, "images_per_second", lambda config, model, images, precision, world: rates[model])


def train(photos: Path, *options: str) -> int:
    return main(["train", str(photos), "--out", str(photos.parent / "net.safetensors"), *QUICK, *options])


def test_a_run_of_minutes_says_what_it_picked_and_how_good_it_is(photos, capsys):
    assert train(photos, "--minutes", "0.03") == 0
    printed = capsys.readouterr().out
    reason = (
        "picked one at 32 pixels: about 180 images in 0.03 minutes on this CPU (1 thread); two at 32 pixels would see "
        "only 9 of the 10 it needs"
    )
    assert printed.splitlines()[:4] == [
        "timing training steps, to choose the model",
        f"reading the images of {photos}",
        reason,
        "4 normal images to train on, 2 held out",
    ]
    assert "\nestimating where the objects are, and making anomalies for the validation\n" in printed
    assert "0.0% training: 0:02 left" in printed
    assert "the detector ranks a defective above a sound image in" in printed and "of 100 cases" in printed
    checkpoint = load_checkpoint(photos.parent / "net.safetensors")
    assert checkpoint.config == MODELS[0]
    assert checkpoint.training["plan"] == {"picked": reason, "expected_images": 180}


def test_a_budget_of_steps_takes_the_smallest_and_says_so(photos, capsys):
    assert train(photos, "--steps", "2") == 0
    printed = capsys.readouterr().out
    assert "picked one at 32 pixels, the smallest: a budget of steps says nothing about the time" in printed
    assert "0.0% training: 2 steps left" in printed
    assert load_checkpoint(photos.parent / "net.safetensors").config == MODELS[0]


def test_a_resumed_run_needs_no_preset_and_refuses_another(photos, capsys):
    named = preset("diff-fastener-tiny", image_size=32)
    options = ["--preset", "diff-fastener-tiny", "--image-size", "32"]
    assert train(photos, "--steps", "2", *options, "--leg-minutes", "1e-9") == 130
    assert train(photos, "--steps", "2", "--resume", "--image-size", "64") == 2
    assert "model image_size was 32 and is now 64" in capsys.readouterr().err
    assert train(photos, "--steps", "2", "--resume", "--preset", "diff-fastener-small") == 2
    assert train(photos, "--steps", "2", "--resume") == 0
    assert "picked" not in capsys.readouterr().out
    checkpoint = load_checkpoint(photos.parent / "net.safetensors")
    assert checkpoint.config == named and checkpoint.training["plan"] == {}


def test_a_run_from_the_shipped_weights_stays_near_them_and_resumes(photos, monkeypatch, capsys):
    shipped = load_checkpoint(shipped_checkpoint())
    monkeypatch.setattr(plan, "CANDIDATES", (Candidate(shipped.config),))
    assert train(photos, "--steps", "2", "--leg-minutes", "1e-9") == 130
    assert "starting from the fastener weights" in capsys.readouterr().out
    assert train(photos, "--steps", "2", "--resume", "--init", "none") == 2
    assert "training init was 'fasteners' and is now None" in capsys.readouterr().err
    assert train(photos, "--steps", "2", "--resume") == 0
    checkpoint = load_checkpoint(photos.parent / "net.safetensors")
    assert checkpoint.training["config"]["init"] == "fasteners"
    name = "reconstruction.down.1.0.in_layers.2.weight"
    change = (checkpoint.state[name] - shipped.state[name].float()).abs().mean() / shipped.state[name].abs().mean()
    assert 0 < change < 0.1


def test_weights_that_do_not_fit_a_named_preset_are_refused_in_words(photos, capsys):
    assert train(photos, "--steps", "1", "--init", "fasteners", "--preset", "diffusionad-tiny") == 2
    message = "the weights of diff-fastener-tiny at 64 pixels do not fit diffusionad-tiny at 64 pixels"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("part", ["read_normals", "RunLog"])
def test_a_signal_before_the_first_step_finds_nothing_to_save(part, number, photos, monkeypatch, capsys):
    """While the images are read; and when the first step would begin."""
    honest = getattr(loop, part)

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, part, interrupted)
        assert train(photos, "--steps", "2") == 128 + number
        when = "while it was being prepared" if part == "read_normals" else "at step 0 (0.0%)"
        said = f"dfengine: training stopped {when}; nothing to save yet: the same command starts over\n"
        assert capsys.readouterr().err == said
        # To go on without a state is refused before that.
        assert train(photos, "--steps", "2", "--resume", "--preset", "diff-fastener-tiny") == 1
        state = photos.parent / "net.run" / "state.safetensors"
        assert capsys.readouterr().err == f"dfengine: {state}: no training state to resume; start without resume\n"
    assert train(photos, "--steps", "2", "--leg-minutes", "1e-9") == 130
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(loop, part, interrupted)
        assert train(photos, "--steps", "2", "--resume") == 128 + number
        assert "; the state at step 0 is saved in" in capsys.readouterr().err
    assert train(photos, "--steps", "2", "--resume") == 0


def test_rotation_is_recorded(photos):
    assert train(photos, "--steps", "1", "--rotation", "180") == 0
    assert load_checkpoint(photos.parent / "net.safetensors").training["config"]["augment"]["rotation"] == 180


@pytest.mark.parametrize(
    "options, message",
    [
        (["--no-augment", "--rotation", "10"], "--rotation needs augmentation"),
        (["--rotation", "181"], "rotation is at most 180 degrees"),
        (["--init", "gone.safetensors"], "init gone.safetensors: no such checkpoint; give a file, fasteners or none"),
        (["--pixel-range", "odd"], "pixel_range must be one of"),
        (["--image-size", "100", "--minutes", "1"], "image_size must be"),
        (["--image-size", "100", "--resume"], "image_size must be"),
        (["--minutes", "0"], "minutes must be a positive number"),
    ],
)
def test_wrong_usage_is_one_line(photos, capsys, options, message):
    assert train(photos, *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out


def test_a_folder_of_textures_that_is_none_is_named_before_anything_is_done(photos, capsys):
    assert train(photos, "--steps", "1", "--textures", str(photos.parent / "nowhere")) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err == f"dfengine: {photos.parent / 'nowhere'}: no such folder\n"
    assert not (photos.parent / "net.run").exists()
