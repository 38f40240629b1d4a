"""`dfengine calibrate`: which images set the threshold, what else it changes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import dfengine
from dfengine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dfengine.cli import main
from dfengine.commands.scoring import Scoring
from dfengine.data.folders import content_digest, open_dataset
from dfengine.data.images import load_uint8
from dfengine.engine.runner import make_runner
from dfengine.evaluation.calibration import calibrate
from dfengine.precision import trial_maps


def test_calibrate_leaves_out_what_was_trained_on(checkpoint, data, tmp_path, capsys):
    loaded = load_checkpoint(checkpoint)
    trained = [content_digest(data / f"train/good/{i}_d.png") for i in (0, 2, 4)]
    save_checkpoint(checkpoint, Checkpoint(loaded.config, loaded.state, {"data": {"trained": trained}}))
    # Neither a bad file nor a new name changes what is left out.
    (data / "train/good/broken.png").write_bytes(b"no image")
    (data / "train/good/0_d.png").rename(data / "train/good/renamed.png")
    arguments = ["calibrate", str(checkpoint), str(data), "--false-alarm-rate", "0.4", "--seed", "3"]
    assert main([*arguments, "--precision", "float32"]) == 3
    held_out = [data / f"train/good/{i}_d.png" for i in (1, 3)]
    scores = dfengine.load(checkpoint, precision="float32", seed=3).detect(held_out).pred_score
    calibration = load_checkpoint(checkpoint).calibration
    assert (calibration.n_normals, calibration.seed, calibration.precision) == (2, 3, "float32")
    assert calibration.threshold == pytest.approx(calibrate(scores, 0.4).threshold, abs=1e-5)
    assert "3 images that the model was trained on left out" in capsys.readouterr().out
    # Another seed than the threshold's is worth a warning.
    assert main(["detect", str(checkpoint), str(data / "test"), "--out", str(tmp_path / "out")]) == 0
    assert "the threshold was set with seed 3, but seed 0 is used" in capsys.readouterr().err
    # Another folder of normals: all of them.
    assert main(["calibrate", str(checkpoint), str(data / "test" / "good"), "--alarms-per-km", "2000"]) == 0
    calibration = load_checkpoint(checkpoint).calibration
    assert calibration.n_normals == 4 and calibration.false_alarm_rate == pytest.approx(2000 / 6667)
    # Nothing but trained images.
    for path in held_out:
        path.unlink()
    (data / "train/good/broken.png").unlink()
    assert main(["calibrate", str(checkpoint), str(data)]) == 1
    assert "was trained on all of these images" in capsys.readouterr().err


def test_calibrate_by_hand_into_another_file_keeps_the_weights(checkpoint, tmp_path):
    other = tmp_path / "other.safetensors"
    assert main(["calibrate", str(checkpoint), "--threshold", "0.25", "--out", str(other)]) == 0
    before, after = load_checkpoint(checkpoint), load_checkpoint(other)
    assert (before.calibration.threshold, after.calibration.threshold) == (0.5, 0.25)
    assert all((before.state[name] == after.state[name]).all() for name in before.state)


def test_calibrate_and_convert_leave_another_checkpoint_alone(checkpoint, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    other.write_bytes(checkpoint.read_bytes())
    before = other.read_bytes()
    (tmp_path / "public.pt").write_bytes(b"")
    calibrate = ["calibrate", str(checkpoint), "--threshold", "0.25", "--out", str(other)]
    for command in (calibrate, ["convert", str(tmp_path / "public.pt"), str(other)]):
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(f"dfengine: {other}: is there already; choose another name")
        assert other.read_bytes() == before
    assert main([*calibrate[:-1], str(checkpoint)]) == 0  # --out may name CKPT


def test_half_precision_needs_no_images_and_leaves_the_threshold(checkpoint, tmp_path, capsys):
    before, other = load_checkpoint(checkpoint), tmp_path / "half.safetensors"
    assert main(["calibrate", str(checkpoint), "--half", "--out", str(other)]) == 0
    said = "weights in half precision{} and threshold 0.5, as it was, written to {}\n"
    assert capsys.readouterr().out == said.format("", other)
    for already in ("", ", as they were already,"):
        assert main(["calibrate", str(checkpoint), "--half"]) == 0
        assert capsys.readouterr().out == said.format(already, checkpoint)
    for after in map(load_checkpoint, (checkpoint, other)):
        assert after.calibration == before.calibration and after.same_weights(before.half())
    save_checkpoint(checkpoint, before.with_calibration(None))
    assert main(["calibrate", str(checkpoint), "--half"]) == 0
    assert "no threshold" in capsys.readouterr().out and load_checkpoint(checkpoint).calibration is None


@pytest.mark.parametrize(
    "options, reason",
    [
        ([], "give a folder of normal images to set the threshold from, or --threshold, or --half"),
        (["--top-k", "50"], "--top-k changes every score: give normal images for a new threshold, or --threshold"),
        (["--half", "--top-k", "50"], "--top-k changes every score"),
        (["--half", "--alarms-per-km", "3"], "--alarms-per-km needs a folder of normal images"),
        (["{data}", "--threshold", "0.5"], "--threshold is set without images; leave out {data}"),
        (["{data}", "--fasteners-per-km", "3000"], "--fasteners-per-km goes with --alarms-per-km"),
    ],
)
def test_calibrate_says_what_its_options_lack(options, reason, checkpoint, data, capsys):
    before = checkpoint.read_bytes()
    assert main(["calibrate", str(checkpoint), *(option.format(data=data) for option in options)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"dfengine: {reason.format(data=data)}") and printed.count("\n") == 1
    assert checkpoint.read_bytes() == before


def test_calibrate_scores_nothing_for_a_file_that_cannot_be_written(checkpoint, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Scoring, "batches", None)
    assert main(["calibrate", str(checkpoint), str(data), "--out", str(data)]) == 2
    assert f"{data}: must end in .safetensors" in capsys.readouterr().err
    checkpoint.chmod(0o444)
    assert main(["calibrate", str(checkpoint), str(data)]) == 1
    assert f"{checkpoint}: cannot be written: is write-protected" in capsys.readouterr().err


def test_calibrate_sets_how_many_pixels_a_score_averages(checkpoint, data, capsys):
    image = next((data / "test" / "bent").iterdir())
    verified = {"bfloat16": {"auroc": 1.0}}
    save_checkpoint(checkpoint, replace(load_checkpoint(checkpoint), verified=verified))
    assert main(["calibrate", str(checkpoint), str(data), "--top-k", "3200", "--precision", "float32"]) == 0
    changed = load_checkpoint(checkpoint)
    assert changed.config.top_k == 3200 and not changed.verified
    assert "without what `dfengine verify --record` noted" in capsys.readouterr().err
    detector = dfengine.load(checkpoint, precision="float32")
    (found,) = detector.detect([image])
    largest = np.sort(found.anomaly_map.ravel())[-50:]  # of 32 x 32
    assert found.pred_score == pytest.approx(largest.mean(), rel=1e-5)
    normals = [sample.path for sample in open_dataset(data).train]
    scores = [normal.pred_score for normal in detector.detect(normals)]
    assert changed.calibration.threshold == pytest.approx(max(scores), abs=1e-6)
    assert main(["calibrate", str(checkpoint), str(data), "--top-k", "0"]) == 2
    assert "top_k is a number of pixels of 65536" in capsys.readouterr().err
    assert load_checkpoint(checkpoint).config.top_k == 3200


def test_calibrate_keeps_trial_images_with_the_maps_of_the_weights_beside_them(checkpoint, data, capsys):
    def agrees(loaded: Checkpoint) -> bool:
        runner = make_runner(loaded.build(), torch.device("cpu"), "float32", 0)
        return (trial_maps(runner, loaded.trial.images) - loaded.trial.anomaly_map.float()).abs().max() < 3e-4

    assert main(["calibrate", str(checkpoint), str(data), "--seed", "3", "--batch-size", "3"]) == 0
    first = load_checkpoint(checkpoint)
    paths = [sample.path for sample in open_dataset(data).train][:4]
    np.testing.assert_array_equal(first.trial.images, np.stack([load_uint8(path, 32) for path in paths]))
    assert agrees(first)
    # Rounded weights: the same images, other maps. Nothing else to score is at hand.
    verified = replace(first, verified={"bfloat16": {}})
    save_checkpoint(checkpoint, verified)
    assert main(["calibrate", str(checkpoint), "--threshold", "0.5"]) == 0
    assert load_checkpoint(checkpoint).verified == {"bfloat16": {}}
    assert main(["calibrate", str(checkpoint), "--threshold", "0.5", "--half"]) == 0
    halved = load_checkpoint(checkpoint)
    assert torch.equal(halved.trial.images, first.trial.images) and agrees(halved) and halved.verified == {}
    assert "without what `dfengine verify --record` noted" in capsys.readouterr().err
    # Weights that are halves already stay what was verified.
    save_checkpoint(checkpoint, replace(halved, verified={"bfloat16": {}}))
    assert main(["calibrate", str(checkpoint), "--half"]) == 0
    again = load_checkpoint(checkpoint)
    assert again.same_weights(halved) and again.verified == {"bfloat16": {}} and not capsys.readouterr().err
    # Without pictures there is no trial to make.
    save_checkpoint(checkpoint, replace(first, trial=None))
    assert main(["calibrate", str(checkpoint), "--threshold", "0.5", "--half"]) == 0
    assert load_checkpoint(checkpoint).trial is None


def test_calibrate_drops_copies_and_says_when_it_uses_test_images(checkpoint, data, capsys):
    (data / "test/good/copy.png").write_bytes((data / "test/good/0_d.png").read_bytes())
    for path in (data / "train").rglob("*.png"):
        path.unlink()
    assert main(["calibrate", str(checkpoint), str(data), "--false-alarm-rate", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "1 copy of another image left out" in printed and "test/good sets the threshold" in printed
    assert load_checkpoint(checkpoint).calibration.n_normals == 4
    # So few normals are worth a warning at every use.
    assert main(["calibrate", str(checkpoint), str(data), "--false-alarm-rate", "0.01"]) == 0
    assert main(["detect", str(checkpoint), str(data / "test/good"), "--out", str(data.parent / "out")]) == 0
    assert "cannot be estimated from 4 normal images" in capsys.readouterr().err
    assert main(["calibrate", str(checkpoint)]) == 2
