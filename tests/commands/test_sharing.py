"""Commands that run at the same time on one checkpoint or into one folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfengine.checkpoint import load_checkpoint, save_checkpoint, update_checkpoint
from dfengine.cli import main
from dfengine.commands.scoring import Scoring
from dfengine.evaluation.calibration import Calibration
from tests.helpers import tiny_model
from tests.odd_files import saved_checkpoint


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return saved_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def meanwhile(monkeypatch, act) -> None:
    """Does `act` once, between the first batch of the next scoring and what follows."""
    whole = Scoring.batches

    def batches(self, images):
        monkeypatch.setattr(Scoring, "batches", whole)
        yield from whole(self, images)
        act()

    monkeypatch.setattr(Scoring, "batches", batches)


def test_calibrate_keeps_what_verify_noted_meanwhile(checkpoint, photos, monkeypatch, capsys):
    def note():
        seen = load_checkpoint(checkpoint)
        update_checkpoint(checkpoint, seen, lambda present: replace(present, verified={"bfloat16": {"images": 3}}))

    meanwhile(monkeypatch, note)
    assert main(["calibrate", str(checkpoint), str(photos), "--false-alarm-rate", "0.3"]) == 0
    after = load_checkpoint(checkpoint)
    assert after.verified == {"bfloat16": {"images": 3}} and after.calibration.n_normals == 4
    assert len(after.trial.images) == 4 and capsys.readouterr().err == ""


def test_verify_keeps_the_threshold_that_was_set_meanwhile(checkpoint, photos, monkeypatch):
    meanwhile(monkeypatch, lambda: main(["calibrate", str(checkpoint), "--threshold", "0.125"]))
    # Random weights may be refused in bfloat16: that is noted too, and takes nothing else away.
    main(["verify", str(checkpoint), "--data", str(photos), "--precision", "bfloat16", "--record"])
    assert load_checkpoint(checkpoint).calibration == Calibration.by_hand(0.125)


def test_the_later_of_two_thresholds_holds_and_says_so(checkpoint, photos, monkeypatch, capsys):
    meanwhile(monkeypatch, lambda: main(["calibrate", str(checkpoint), "--threshold", "0.125"]))
    assert main(["calibrate", str(checkpoint), str(photos), "--false-alarm-rate", "0.3"]) == 0
    assert load_checkpoint(checkpoint).calibration.n_normals == 4
    assert f"warning: {checkpoint}: another run set a threshold meanwhile" in capsys.readouterr().err


def test_a_threshold_is_not_written_beside_other_weights(checkpoint, photos, monkeypatch, capsys):
    def train():
        save_checkpoint(checkpoint, replace(load_checkpoint(checkpoint), state=tiny_model(1).state_dict()))

    meanwhile(monkeypatch, train)
    assert main(["calibrate", str(checkpoint), str(photos), "--false-alarm-rate", "0.3"]) == 1
    assert "was given other weights meanwhile" in capsys.readouterr().err
    assert load_checkpoint(checkpoint).calibration is None


@pytest.mark.parametrize("command", ["detect", "evaluate"])
def test_two_runs_into_one_folder_are_kept_apart(command, checkpoint, photos, tmp_path, monkeypatch, capsys):
    data = tmp_path / "set" / "test" / "good"
    data.parent.mkdir(parents=True)
    photos.rename(data)
    source = data if command == "detect" else tmp_path / "set"
    arguments = [command, str(checkpoint), str(source), "--out", str(tmp_path / "out")]
    second = []
    meanwhile(monkeypatch, lambda: second.append(main(arguments)))
    assert main(arguments) == 0 and second == [1]
    refusals = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    busy = f"dfengine: {tmp_path / 'out'}: another run is writing into it; wait for its end, or choose another --out"
    assert refusals == [busy]
    assert main(arguments) == 0
    assert not list((tmp_path / "out").glob(".*.lock"))
