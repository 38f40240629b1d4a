from __future__ import annotations

import csv
import errno
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dfengine
from dfengine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped_checkpoint
from dfengine.cli import main
from dfengine.commands.scoring import Scoring
from dfengine.data.fasteners import write_fasteners
from dfengine.data.folders import content_digest, open_dataset
from dfengine.data.images import load_uint8
from dfengine.engine.runner import make_runner
from dfengine.evaluation.calibration import Calibration, calibrate
from dfengine.evaluation.metrics import auroc
from dfengine.evaluation.robustness import MAX_JPEG_SIDE, PERTURBATIONS, measure_robustness
from dfengine.precision import trial_maps
from tests.helpers import tiny_model


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = tiny_model()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(model.config, model.state_dict(), {}, Calibration.by_hand(0.5)))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """5 normal training images; 4 good and 3 + 3 defective test images of random pixels, half of them with masks."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"

    def write(name: str, array: np.ndarray) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / name)

    for folder, count in (("train/good", 5), ("test/good", 4), ("test/bent", 3), ("test/gone", 3)):
        for i in range(count):
            size = (40, 48, 3) if folder == "test/bent" else (32, 32, 3)
            write(f"{folder}/{i}_{folder[-1]}.png", rng.integers(0, 256, size, dtype=np.uint8))
    for i in range(3):
        mask = np.zeros((40, 48), np.uint8)
        mask[10:20, 5:30] = 255
        write(f"ground_truth/bent/{i}_t_mask.png", mask)
    return root


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_detect_writes_what_the_api_returns(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["detect", str(checkpoint), str(data / "test"), "--out", str(out), "--batch-size", "3"]) == 0
    detection = dfengine.load(checkpoint).detect(data / "test")
    rows = rows_of(out / "results.csv")
    assert [row["name"] for row in rows] == list(detection.names) and len(rows) == 10
    np.testing.assert_allclose([float(row["pred_score"]) for row in rows], detection.pred_score, atol=1e-5)
    assert [row["pred_label"] == "True" for row in rows] == detection.pred_label.tolist()
    assert all((out / row["heatmap"]).is_file() for row in rows)
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == list(detection.names)
    html = (out / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and html.count("data:image/jpeg") == 30
    assert f"{int(detection.pred_label.sum())} alarms" in capsys.readouterr().out


def test_a_full_disk_loses_nothing_that_can_be_written(checkpoint, data, tmp_path, capsys, monkeypatch):
    out, replace = tmp_path / "out", os.replace

    def full(source, target):
        if "heatmaps" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert main(["detect", str(checkpoint), str(data / "test"), "--out", str(out)]) == 3
    printed = capsys.readouterr().err
    assert "no space left on device" in printed and "10 output files could not be written" in printed
    rows = rows_of(out / "results.csv")
    assert len(rows) == 10 and all(row["pred_score"] and not row["heatmap"] for row in rows)
    assert (out / "report.html").is_file()
    assert not list(out.rglob(".tmp-*"))


@pytest.mark.parametrize("theirs", ["metrics.json", "heatmaps/00000_mine.png"])
def test_files_put_beside_results_stay(checkpoint, data, tmp_path, capsys, theirs):
    arguments = ["detect", str(checkpoint), str(data / "test" / "good"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (tmp_path / "out" / theirs).write_text("mine")
    assert main(arguments) == 2
    assert f"holds {theirs}, not written by dfengine" in capsys.readouterr().err
    assert (tmp_path / "out" / theirs).read_text() == "mine"


def test_heatmaps_of_an_earlier_run_are_not_scored(checkpoint, data, capsys):
    folder = data / "test" / "good"
    arguments = ["detect", str(checkpoint), str(folder), "--out", str(folder / "results")]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("4 images scored")
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("replacing the results")
    # Fewer images the next time: nothing of the run before is left.
    (folder / "0_d.png").unlink()
    assert main(arguments) == 0
    results = folder / "results"
    assert f"replacing the results of an earlier run in {results}\n" in capsys.readouterr().out
    assert len(rows_of(results / "results.csv")) == len(list((results / "heatmaps").iterdir())) == 3
    assert main(["detect", str(checkpoint), str(folder), "--out", str(folder)]) == 2
    assert "choose another folder" in capsys.readouterr().err


def test_images_given_twice_are_said(checkpoint, data, tmp_path, capsys):
    good = data / "test" / "good"
    assert main(["detect", str(checkpoint), str(good), str(good / "0_d.png"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "dfengine: warning: 1 image given more than once, and counted each time\n"
    assert printed.out.startswith("5 images scored")
    assert main(["detect", str(checkpoint), str(good), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("theirs", ["results.csv", "heatmaps/00000_a.png", "site1/gray.png"])
def test_a_folder_of_somebody_elses_is_refused_and_left(checkpoint, data, tmp_path, theirs, capsys):
    """The marker of results would hide its images from later runs."""
    out = tmp_path / "own"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("my inspection")
    assert main(["detect", str(checkpoint), str(data / "test"), "--out", str(out)]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path for path in out.rglob("*") if path.is_file()] == [out / theirs]
    assert (out / theirs).read_text() == "my inspection"


@pytest.mark.parametrize("number, word", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_an_interrupted_run_keeps_what_was_scored(number, word, checkpoint, data, tmp_path, monkeypatch, capsys):
    out, whole, before = tmp_path / "out", Scoring._detections, signal.getsignal(number)

    def interrupted(self, images):
        yield next(whole(self, images))
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(Scoring, "_detections", interrupted)
    arguments = ["detect", str(checkpoint), str(data / "test"), "--out", str(out), "--batch-size", "3"]
    assert main(arguments) == 128 + number
    assert len(rows_of(out / "results.csv")) == 3
    printed = capsys.readouterr().err
    assert "3 of 10 images scored; the results are in" in printed and printed.endswith(f"dfengine: {word}\n")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert main(arguments) == 0 and len(rows_of(out / "results.csv")) == 10


def test_an_uncalibrated_checkpoint_is_used_with_a_warning(checkpoint, data, tmp_path, capsys):
    save_checkpoint(checkpoint, load_checkpoint(checkpoint).with_calibration(None))
    out = tmp_path / "out"
    assert main(["detect", str(checkpoint), str(data / "test"), "--out", str(out), "--no-heatmaps"]) == 0
    assert "not calibrated" in capsys.readouterr().err
    assert {row["threshold"] for row in rows_of(out / "results.csv")} == {"0.5"}
    assert not (out / "heatmaps").exists()


def test_evaluate_agrees_with_the_scores(checkpoint, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", str(checkpoint), str(data), "--out", str(out), "--group-by", "^([0-9]+)_"]
    assert main(arguments) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    samples = {str(sample.path): sample for sample in open_dataset(data).test}
    rows = rows_of(out / "results.csv")
    scores = np.array([float(row["pred_score"]) for row in rows])
    labels = np.array([bool(samples[row["name"]].label) for row in rows])
    assert metrics["image_auroc"] == pytest.approx(auroc(labels, scores))
    assert metrics["n_images"] == 10 and metrics["n_groups"] == 4 and metrics["threshold"] == 0.5
    assert [row["defect"] for row in metrics["per_defect"]] == ["bent", "gone"]
    assert 0 <= metrics["aupro"] <= 1 and 0 <= metrics["pixel_auroc"] <= 1
    assert "3 anomalous images without a mask" in " ".join(metrics["notes"])
    assert {path.name for path in out.iterdir()} == {
        "metrics.json", "per_defect.csv", "roc.png", "pr.png", "report.html", "results.csv", "results.jsonl",
        ".dfengine-output",
    }  # fmt: skip
    assert f"image AUROC {metrics['image_auroc']:.4f}" in capsys.readouterr().out


def test_evaluate_measures_robustness(tmp_path, capsys):
    data, out, shipped = tmp_path / "data", tmp_path / "out", shipped_checkpoint()
    write_fasteners(data, train=0, test_good=4, per_defect=1, seed=11, size=96)
    broken = data / "test" / "good" / "broken.png"
    broken.write_bytes(b"no image")
    arguments = ["evaluate", str(shipped), str(data), "--out", str(out), "--batch-size", "5"]
    assert main([*arguments, "--robustness"]) == 3
    printed = capsys.readouterr()
    assert printed.err.count("broken.png") == 1 and "7 images scored, 1 refused" in printed.out
    table = json.loads((out / "metrics.json").read_text())["robustness"]
    assert [row["change"] for row in table["rows"]] == ["none", *(change.name for change in PERTURBATIONS)]
    assert {row["n"] for row in table["rows"]} == {4} and table["n_anomalous"] == 3
    assert [float(row["rate"]) for row in rows_of(out / "robustness.csv")] == [row["rate"] for row in table["rows"]]
    for row in table["rows"]:
        assert f"{row['change']} " in printed.out and f"{row['alarms']}/4" in printed.out
    assert f"at the clean 90% quantile {table['quantile_threshold']:.4f}, false alarms at most 2 times" in printed.out
    assert "<h2>Robustness</h2>" in (out / "report.html").read_text()
    # From Python the same, and the unchanged images are those of the results.
    anomalous = [sample.path for sample in open_dataset(data).test if sample.label]
    from_python = measure_robustness(dfengine.load(shipped), data / "test" / "good", anomalous)
    for row, other in zip(table["rows"], from_python["rows"], strict=True):
        assert other["mean_shift"] == pytest.approx(row["mean_shift"], abs=2e-5)
        assert other["image_auroc"] == row["image_auroc"] and other["n"] == 4
    assert len({row["mean_shift"] for row in table["rows"]}) > len(PERTURBATIONS) / 2
    assert table["rows"][0]["alarms"] == 1 and table["threshold"] == from_python["threshold"]
    # A later run without it leaves no table that could pass for its own.
    broken.unlink()
    assert main(arguments) == 0
    assert not (out / "robustness.csv").exists() and "robustness" not in capsys.readouterr().out
    assert "robustness" not in json.loads((out / "metrics.json").read_text())


def test_what_is_refused_beside_the_images_is_reported_apart(checkpoint, data, tmp_path, capsys):
    """A changed image that JPEG cannot hold, and a mask: both of images that are scored."""
    out = tmp_path / "out"
    Image.new("RGB", (MAX_JPEG_SIDE + 1, 8), (90, 90, 90)).save(data / "test" / "good" / "long.png")
    (data / "ground_truth" / "bent" / "0_t_mask.png").write_bytes(b"no image")
    assert main(["evaluate", str(checkpoint), str(data), "--out", str(out), "--robustness"]) == 3
    printed = capsys.readouterr()
    assert "11 images scored" in printed.out and " refused" not in printed.out
    assert "long.png (" in printed.err and "0_t_mask.png" in printed.err
    report = (out / "report.html").read_text()
    assert "long.png (" in report and "0_t_mask.png" in report


def test_robustness_needs_good_test_images(checkpoint, data, tmp_path, capsys):
    arguments = ["evaluate", str(checkpoint), str(data), "--out", str(tmp_path / "out"), "--robustness"]
    good = sorted((data / "test/good").iterdir())
    for path in good:
        path.write_bytes(b"no image")
    assert main(arguments) == 3
    printed = capsys.readouterr()
    assert "no good image could be scored: robustness is not measured" in printed.err
    assert "no good image" in printed.out and not (tmp_path / "out" / "robustness.csv").exists()
    for path in good:
        path.unlink()
    assert main(arguments) == 1
    assert capsys.readouterr().err == (
        f"dfengine: {data}: no good test images, which --robustness needs (expected test/good)\n"
    )


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
    assert f"threshold 0.5, as it was, written to {other}" in capsys.readouterr().out
    assert main(["calibrate", str(checkpoint), "--half"]) == 0
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


def test_info_describes_a_checkpoint_and_the_installation(checkpoint, capsys, monkeypatch):
    assert main(["info", str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["image_size"] == 32 and facts["calibration"]["threshold"] == 0.5
    assert facts["parameters"] == sum(p.numel() for p in tiny_model().parameters())
    lines = {}
    for arguments in (["info", str(checkpoint)], ["info"]):
        monkeypatch.setenv("COLUMNS", "80")
        assert main(arguments) == 0
        lines[len(arguments)] = printed = capsys.readouterr().out
        assert max(len(line) for line in printed.splitlines() if str(checkpoint) not in line) <= 80
    assert re.search(r"^threshold +0.5$", lines[2], re.M) and "{" not in lines[2] and "None" not in lines[2]
    assert "diff-fastener-tiny" in printed and "ingest" in printed and "dfengine._native" in printed


def test_a_folder_that_dfengine_wrote_is_no_input(checkpoint, data, tmp_path, capsys):
    out = data / "test" / "good" / "results"
    assert main(["detect", str(checkpoint), str(data / "test" / "good"), "--out", str(out)]) == 0
    other = tmp_path / "other"
    assert main(["detect", str(checkpoint), str(data / "test" / "good"), "--out", str(other)]) == 0
    assert len(rows_of(other / "results.csv")) == 4
    assert {row["seed"] for row in rows_of(other / "results.csv")} == {"0"}


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


def test_fasteners_are_not_mixed_with_others(tmp_path, capsys):
    counts = ["--train", "1", "--test-good", "0", "--per-defect", "0", "--size", "32"]
    arguments = ["fasteners", str(tmp_path / "f"), *counts]
    assert main(arguments) == 0 and main(arguments) == 2
    assert "holds a data set already" in capsys.readouterr().err
    photos = tmp_path / "photos"
    (photos / "site").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(photos / "site" / "000.png")
    assert main(["fasteners", str(photos), *counts]) == 2
    assert "photos: holds images; choose another folder for a data set" in capsys.readouterr().err
    assert [path.name for path in photos.iterdir()] == ["site"]


def test_help_and_wrong_usage(capsys):
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert dfengine.__version__ in capsys.readouterr().out
    assert main(["detect", "--help"]) == 0
    assert main(["nonsense"]) == 2
    assert main(["detect"]) == 2
    assert main(["detect", "model.safetensors", "photos", "--out", ""]) == 2
    assert "Traceback" not in capsys.readouterr().err
