"""`dfengine detect` and `evaluate`: what they write, keep and refuse."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dfengine
from dfengine.checkpoint import load_checkpoint, save_checkpoint, shipped_checkpoint
from dfengine.cli import main
from dfengine.commands import scoring
from dfengine.commands.evaluate import print_robustness
from dfengine.commands.scoring import Scoring
from dfengine.data.fasteners import write_fasteners
from dfengine.data.folders import open_dataset
from dfengine.data.images import list_images
from dfengine.errors import DataError
from dfengine.evaluation.metrics import auroc
from dfengine.evaluation.robustness import MAX_JPEG_SIDE, PERTURBATIONS, measure_robustness, robustness_table


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


def test_rows_of_all_batches_are_in_input_order(checkpoint, data, tmp_path):
    good = sorted((data / "test" / "good").iterdir())
    inputs = [str(path) for path in (good[0], "no1.png", good[1], "no2.png", "no3.png", good[2], "no4.png")]
    out = tmp_path / "out"
    assert main(["detect", str(checkpoint), *inputs, "--out", str(out), "--batch-size", "2"]) == 3
    rows = rows_of(out / "results.csv")
    assert [row["name"] for row in rows] == inputs
    assert all(bool(row["error"]) == row["name"].startswith("no") == (not row["pred_score"]) for row in rows)


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


def test_a_folder_that_cannot_be_read_is_refused_and_the_rest_scored(checkpoint, data, tmp_path, capsys, monkeypatch):
    photos, locked, scandir, access = tmp_path / "photos", tmp_path / "photos" / "locked", os.scandir, os.access
    shutil.copytree(data / "test" / "good", photos)
    locked.mkdir()

    def refuse(path):
        if Path(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "access", lambda path, *mode, **how: Path(path) != locked and access(path, *mode, **how))
    sound = min(photos.glob("*.*"))
    scored = len(list(photos.glob("*.*")))
    for inputs, status, rows in (([photos], 3, scored + 1), ([sound, locked], 3, 2), ([locked], 1, None)):
        out = tmp_path / f"out{len(inputs)}{status}"
        assert main(["detect", str(checkpoint), *map(str, inputs), "--out", str(out)]) == status
        assert f"{locked}: permission denied\n" in capsys.readouterr().err
        if rows is not None:
            table = rows_of(out / "results.csv")
            assert len(table) == rows
            refused = [(row["name"], row["error"]) for row in table if row["error"]]
            assert refused == [(str(locked), "permission denied")]
    with pytest.raises(DataError, match="locked: permission denied"):
        list_images(photos)  # as training does


def test_a_folder_whose_names_alone_may_be_read_is_refused_and_the_rest_scored(
    checkpoint, data, tmp_path, capsys, monkeypatch
):
    photos = tmp_path / "photos"
    shutil.copytree(data / "test" / "good", photos)
    scored, masks = len(list(photos.glob("*.*"))), photos / "locked" / "Masks"
    masks.mkdir(parents=True)

    def allowed(call):  # r--: what is in "locked" has names, and nothing else
        def called(path, *arguments, **options):
            if isinstance(path, (str, os.PathLike)) and masks.parent in Path(path).parents:
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return call(path, *arguments, **options)

        return called

    monkeypatch.setattr(os, "stat", allowed(os.stat))
    monkeypatch.setattr(os, "scandir", allowed(os.scandir))
    out = tmp_path / "out"
    assert main(["detect", str(checkpoint), str(photos), "--out", str(out)]) == 3
    assert f"{masks}: permission denied\n" in capsys.readouterr().err
    table = rows_of(out / "results.csv")
    assert [(row["name"], row["error"]) for row in table if row["error"]] == [(str(masks), "permission denied")]
    assert len(table) == scored + 1
    for folder in (photos, masks):
        with pytest.raises(DataError, match="Masks: permission denied"):
            list_images(folder)


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
    (data / "test" / "bent" / "0.png").write_bytes(b"no image")  # of the first batch

    def interrupted(self, images):
        yield next(whole(self, images))
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), number)  # of the same burst: nothing of what follows is cut short

    monkeypatch.setattr(Scoring, "_detections", interrupted)
    arguments = ["detect", str(checkpoint), str(data / "test"), "--out", str(out), "--batch-size", "3"]
    assert main(arguments) == 128 + number
    assert len(rows_of(out / "results.csv")) == 3
    printed = capsys.readouterr().err
    assert "2 of 11 images scored; the results are in" in printed and printed.endswith(f"dfengine: {word}\n")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert main(arguments) == 3 and len(rows_of(out / "results.csv")) == 11


def test_an_interrupt_while_the_results_are_written_loses_none(checkpoint, data, tmp_path, monkeypatch, capsys):
    out, honest = tmp_path / "out", scoring.write_rows

    def interrupted(*arguments):
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGINT)
        honest(*arguments)

    monkeypatch.setattr(scoring, "write_rows", interrupted)
    assert main(["detect", str(checkpoint), str(data / "test"), "--out", str(out)]) == 130
    assert len(rows_of(out / "results.csv")) == 10 and (out / "report.html").is_file()
    assert "10 of 10 images scored; the results are in" in capsys.readouterr().err


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
    for name, threshold in (("quantile", table["quantile_threshold"]), ("threshold", table["threshold"])):
        recall = table[f"recall_at_{name}"]
        assert f"{threshold:.4f}" in printed.out and f"{recall:.1%} of the anomalous images exceed it" in printed.out
    assert "ratio at most 2 at clean 90%: " in printed.out
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


def test_changes_that_fail_and_that_were_not_measured_are_named_apart(capsys):
    clean = [0.1, 0.1, 0.2]
    changed = {"dim": clean, "blur": [0.3] * 3, "JPEG": [np.nan] * 3}
    for names, said in (
        (("dim",), "under every change"),
        (("dim", "JPEG"), "under every change measured; not measured under JPEG"),
        (("dim", "blur", "JPEG"), "not under blur; not measured under JPEG"),
    ):
        print_robustness(robustness_table(clean, {name: changed[name] for name in names}))
        assert capsys.readouterr().out.splitlines()[-1] == f"ratio at most 2 at clean 90%: {said}"
    print_robustness(robustness_table([0.1, 0.2], {"dim": [0.1, 0.2]}))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "too few of the 2 good images stay below clean 90% to tell whether changes keep the goal"


def test_results_that_could_not_be_removed_are_its_own_next_time(checkpoint, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["detect", str(checkpoint), str(data / "test" / "good"), "--out", str(out)]
    assert main(arguments) == 0
    stays = sorted((out / "heatmaps").iterdir())[-1]
    with monkeypatch.context() as patch:
        unlink = os.unlink

        def refuse(path, *rest, **options):
            if Path(path) == stays:
                raise PermissionError(errno.EACCES, "no")
            unlink(path, *rest, **options)

        patch.setattr(os, "unlink", refuse)
        assert main([*arguments, "--no-heatmaps"]) == 3
        assert f"{stays}: cannot be removed" in capsys.readouterr().err and stays.exists()
    assert main([*arguments, "--no-heatmaps"]) == 0 and not stays.exists()


def test_a_folder_that_dfengine_wrote_is_no_input(checkpoint, data, tmp_path, capsys):
    out = data / "test" / "good" / "results"
    assert main(["detect", str(checkpoint), str(data / "test" / "good"), "--out", str(out)]) == 0
    other = tmp_path / "other"
    assert main(["detect", str(checkpoint), str(data / "test" / "good"), "--out", str(other)]) == 0
    assert len(rows_of(other / "results.csv")) == 4
    assert {row["seed"] for row in rows_of(other / "results.csv")} == {"0"}
    capsys.readouterr()
    assert main(["detect", str(checkpoint), str(other), "--out", str(tmp_path / "more")]) == 1
    wrote = "what dfengine wrote (results or pictures of a training run)"
    refusal = f"{other}: holds {wrote}, no images to read; give another folder"
    assert capsys.readouterr().err == f"dfengine: {refusal}\n" and not (tmp_path / "more").exists()


def test_what_evaluate_says_to_give_it_takes(checkpoint, data, tmp_path, capsys):
    def evaluate(given, status):
        assert main(["evaluate", str(checkpoint), str(given), "--out", str(tmp_path / "out")]) == status
        return capsys.readouterr().err

    for part in ("test", "test/good", "test/bent", "train/good"):
        said = evaluate(data / part, 1)
        assert said == f"dfengine: {data / part}: is a part of the data set {data}; give that folder\n"
    evaluate(data, 0)
    said = evaluate(tmp_path / "out", 1)
    assert said.startswith(f"dfengine: {tmp_path / 'out'}: holds what dfengine wrote") and said.count("\n") == 1
