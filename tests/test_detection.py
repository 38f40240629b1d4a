"""Detection: access, slicing, what is derived from the scores, and what `save` writes."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfengine.detection import ROW_FIELDS, Detection, ImageDetection, Refused, resize_map
from dfengine.errors import UsageError
from dfengine.evaluation.calibration import Calibration

S = 16


HALF = Calibration.by_hand(0.5)


def make(names=("a.png", "b.png", "c.png", "d.png"), calibration=HALF, errors=(), original=False, start=0):
    n = len(names)
    rng = np.random.default_rng(0)
    scores = np.linspace(0.2, 0.8, n, dtype=np.float32) if n else np.empty(0, np.float32)
    maps = rng.random((n, S, S), dtype=np.float32) * scores[:, None, None]
    if original:
        maps = [resize_map(m, (20 + i, 30)) for i, m in enumerate(maps)]
    return Detection(
        names=tuple(names),
        pred_score=scores,
        anomaly_map=maps,
        reconstruction=rng.random((n, S, S, 3), dtype=np.float32),
        image=rng.integers(0, 256, (n, S, S, 3), dtype=np.uint8),
        calibration=calibration,
        seed=7,
        errors=tuple(errors),
        start=start,
    )


def test_calibrated():
    detection = make()
    assert detection.threshold == 0.5 and detection.seed == 7 and len(detection) == 4
    assert detection.pred_label.dtype == bool
    assert detection.pred_label.tolist() == [False, False, True, True]
    calibrated = detection.pred_score_calibrated
    assert (np.diff(calibrated) > 0).all() and ((calibrated > 0.5) == detection.pred_label).all()
    assert detection.pred_mask.shape == (4, S, S) and detection.pred_mask.dtype == bool
    np.testing.assert_array_equal(detection.pred_mask, detection.anomaly_map > 0.5)


def test_the_mask_follows_the_calibrated_threshold():
    detection = make(calibration=Calibration.by_hand(0.1))
    np.testing.assert_array_equal(detection.pred_mask, detection.anomaly_map > 0.1)
    assert detection.pred_mask[detection.pred_label].any(axis=(1, 2)).all()
    assert make(calibration=None).pixel_threshold == 0.5


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (S, S), (S + 1, S + 3), (40, 8)])
def test_an_alarm_has_a_mask_at_every_size(size):
    """One bright pixel makes the alarm, and vanishes from the map when its neighbours are averaged in."""
    maps = np.zeros((2, S, S), np.float32)
    maps[:, 6, 9] = 0.6
    resized = [resize_map(m, size) for m in maps]
    detection = dataclasses.replace(
        make(("alarm", "normal")), anomaly_map=resized, pred_score=np.array([0.6, 0.4], np.float32)
    )
    assert size == (S, S) or resized[0].max() < 0.5
    mask = detection.pred_mask[0]
    assert mask.shape == size and mask.dtype == bool and 1 <= mask.sum() <= 6
    row, column = np.argwhere(mask).mean(axis=0) + 0.5
    assert row / size[0] == pytest.approx(6.5 / S, abs=0.07) and column / size[1] == pytest.approx(9.5 / S, abs=0.07)
    np.testing.assert_array_equal(detection.pred_mask[1], resized[1] > 0.5)
    np.testing.assert_array_equal(detection[:1].pred_mask[0], mask)


def test_an_alarm_has_a_mask_where_the_mean_rounds_above_its_largest_pixel():
    value = np.float32(0.3)
    above = np.nextafter(value, np.float32(1))
    detection = dataclasses.replace(
        make(("a",), calibration=Calibration.by_hand(float(value))),
        anomaly_map=np.full((1, S, S), value),
        pred_score=np.array([above]),
    )
    assert detection.pred_label.all() and detection.pred_mask.shape == (1, S, S) and detection.pred_mask.all()


def test_a_score_at_the_threshold_is_no_alarm():
    detection = make(calibration=Calibration.by_hand(float(np.float32(0.4))))
    assert detection.pred_score[1] == np.float32(0.4)
    assert detection.pred_label.tolist() == [False, False, True, True]
    assert detection.pred_score_calibrated[1] == 0.5


def test_uncalibrated():
    detection = make(calibration=None)
    assert detection.threshold is None
    assert detection.pred_label is None and detection.pred_score_calibrated is None
    assert "not calibrated" in detection.note and "not calibrated" in repr(detection)
    np.testing.assert_array_equal(detection.pred_mask, detection.anomaly_map > 0.5)
    image = detection[0]
    assert image.pred_label is None and image.pred_score_calibrated is None and image.threshold is None
    assert make().note != detection.note


@pytest.mark.parametrize("original", [False, True])
def test_index_slice_iterate(original):
    detection = make(errors=[Refused(4, "bad.png", "truncated")], original=original)
    for i, image in enumerate(detection):
        assert isinstance(image, ImageDetection)
        assert image.name == detection.names[i] == detection[i].name == detection[i - 4].name
        assert type(image.pred_score) is float and image.pred_score == detection.pred_score[i]
        assert type(image.pred_score_calibrated) is float and type(image.pred_label) is bool
        assert image.pred_label == detection.pred_label[i]
        for field in ("anomaly_map", "pred_mask", "reconstruction", "image"):
            np.testing.assert_array_equal(getattr(image, field), getattr(detection, field)[i])
    assert detection[np.int64(2)].name == "c.png"
    for key, names in (
        (slice(1, 3), ("b.png", "c.png")),
        (slice(None, None, -1), ("d.png", "c.png", "b.png", "a.png")),
        (slice(9, None), ()),
        ([3, 0], ("d.png", "a.png")),
        (detection.pred_label, ("c.png", "d.png")),
    ):
        part = detection[key]
        assert isinstance(part, Detection) and part.names == names and part.errors == ()
        assert part.seed == 7 and part.threshold == 0.5
        for name, image in zip(names, part, strict=True):
            original_image = detection[detection.names.index(name)]
            assert image.pred_score == original_image.pred_score
            np.testing.assert_array_equal(image.anomaly_map, original_image.anomaly_map)
            np.testing.assert_array_equal(image.pred_mask, original_image.pred_mask)
    for key in (4, -5):
        with pytest.raises(IndexError):
            detection[key]


@pytest.mark.parametrize("original", [False, True])
def test_concatenate(original):
    whole = make(errors=[Refused(9, "x", "y")], original=original)
    parts = [whole[:1], whole[1:1], whole[1:], make((), errors=[Refused(0, "p", "q")], original=original)]
    joined = Detection.concatenate(parts)
    assert joined.names == whole.names and joined.errors == (Refused(4, "p", "q"),)
    np.testing.assert_array_equal(joined.pred_score, whole.pred_score)
    for ours, theirs in zip(joined.anomaly_map, whole.anomaly_map, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_cannot_be_joined_is_refused():
    for parts in ([], (), make(), None, [make(), None], iter([])):
        with pytest.raises(UsageError, match="^parts: expected "):
            Detection.concatenate(parts)
    for other in (make(calibration=Calibration.by_hand(0.7)), make(calibration=None)):
        with pytest.raises(UsageError, match="^parts: of detectors with different thresholds"):
            Detection.concatenate([make(), other])
    with pytest.raises(UsageError, match="^parts: with maps of different sizes"):
        Detection.concatenate([make(), make(original=True)])
    assert len(Detection.concatenate(make() for _ in range(2))) == 8


def test_what_is_joined_counts_on():
    def part(names, refused, start):
        return make(names, errors=[Refused(start + len(names), refused, "r")], start=start)

    inputs = ["a", "b", "no1", "c", "no2"]
    for starts in ((0, 3), (0, 0), (7, 7)):  # parts of one stream, results of two calls, a part of each of two streams
        joined = Detection.concatenate([part("ab", "no1", starts[0]), part("c", "no2", starts[1])])
        assert [row["name"] for row in joined.rows()] == inputs and joined.start == starts[0]
        assert [error.index - joined.start for error in joined.errors] == [2, 4]
    again = Detection.concatenate([joined, part("d", "no3", 0)])
    assert [row["name"] for row in again.rows()] == [*inputs, "d", "no3"]


def test_repr():
    text = repr(make(errors=[Refused(4, "bad.png", "truncated")]))
    assert text == (
        "Detection(4 images, pred_score 0.2000 to 0.8000, 2 above the threshold 0.5000, maps 16x16, 1 refused, seed 7)"
    )
    assert repr(make((), calibration=None)) == "Detection(0 images, not calibrated, maps 16x16, seed 7)"
    assert "original size" in repr(make(original=True))
    assert "array" not in repr(make()[0]) and "a.png" in repr(make()[0])


def test_fields_of_different_length_are_a_mistake():
    with pytest.raises(ValueError, match="differ in length"):
        Detection(("a",), np.zeros(2), np.zeros((1, S, S)), np.zeros((1, S, S, 3)), np.zeros((1, S, S, 3)))


@pytest.mark.parametrize("original", [False, True])
def test_save(tmp_path, original):
    detection = make(errors=[Refused(2, 'odd,"name".png', "the file is truncated")], original=original)
    out = detection.save(tmp_path / "new" / "out")
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(table) == len(lines) == 5
    assert tuple(table[0]) == ROW_FIELDS == tuple(lines[0])
    row, line = table.pop(2), lines.pop(2)
    assert line == dict.fromkeys(ROW_FIELDS) | {"name": 'odd,"name".png', "error": "the file is truncated"}
    assert row["name"] == 'odd,"name".png' and row["pred_score"] == ""
    for i, (row, line) in enumerate(zip(table, lines, strict=True)):
        assert row["name"] == line["name"] == detection.names[i]
        assert float(row["pred_score"]) == line["pred_score"] == detection.pred_score[i]
        assert line["pred_score_calibrated"] == detection.pred_score_calibrated[i]
        assert row["pred_label"] == str(line["pred_label"]) == str(bool(detection.pred_label[i]))
        assert line["threshold"] == 0.5 and line["error"] is None and row["error"] == ""
        with Image.open(out / line["heatmap"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), detection[i].heatmap())
            assert picture.size == detection.anomaly_map[i].shape[::-1]
    assert sorted(p.name for p in out.iterdir()) == [".dfengine-output", "heatmaps", "results.csv", "results.jsonl"]
    assert len(list((out / "heatmaps").iterdir())) == 4


def test_rows_are_in_input_order():
    errors = [Refused(10, "x", "r"), Refused(11, "y", "r"), Refused(15, "z", "r")]
    rows = make(errors=errors, start=10).rows(["0", None, "2", None])
    a, b, c, d = make().names
    assert [row["name"] for row in rows] == ["x", "y", a, b, c, "z", d]
    assert [row["heatmap"] for row in rows] == [None, None, "0", None, "2", None, None]
    assert [row["error"] is None for row in rows] == [False, False, True, True, True, False, True]


def test_save_uncalibrated_and_empty(tmp_path):
    line = json.loads((make(("a",), calibration=None).save(tmp_path / "a") / "results.jsonl").read_text())
    assert line["pred_label"] is None and line["threshold"] is None and line["pred_score"] == pytest.approx(0.2)
    empty = make((), errors=[Refused(0, "x", "y")]).save(tmp_path / "b")
    assert [p.name for p in sorted(empty.iterdir())] == [".dfengine-output", "results.csv", "results.jsonl"]


def test_odd_names_stay_apart_and_inside(tmp_path):
    names = (
        "a/clip.png", "b/clip.png", "../../escape.png", "/etc/passwd", "..", "", "C:\\x\\y.png", "batch[3]",
        "new\nline\0.png", "long" * 200 + ".png", "schräg.png", os.fsdecode(b"caf\xe9.png"),
        ".hidden", "CON", "a.b.c.jpeg",
    )  # fmt: skip
    out = make(names).save(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    files = sorted(p.name for p in (out / "heatmaps").iterdir())
    assert len(files) == len(names)
    assert files[:3] == ["00000_clip.png", "00001_clip.png", "00002_escape.png"]
    assert files[5] == "00005_image.png" and files[14] == "00014_a.b.c.png"
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert tuple(line["name"] for line in lines) == names
    assert all((out / line["heatmap"]).is_file() for line in lines)
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(names)


def test_numbering_goes_on_over_batches(tmp_path):
    detection = make()
    first = detection[:2].save_heatmaps(tmp_path)
    second = detection[2:].save_heatmaps(tmp_path, first=len(first))
    assert [p.name for p in first + second] == ["00000_a.png", "00001_b.png", "00002_c.png", "00003_d.png"]


def test_save_replaces_its_own_results_and_nothing_else(tmp_path):
    out = make(("a", "b")).save(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    make(("c",)).save(out)
    assert [path.name for path in (out / "heatmaps").iterdir()] == ["00000_c.png"]
    assert (out / "notes.txt").read_text() == "mine" and len((out / "results.jsonl").read_text().splitlines()) == 1
    for theirs in ("photo.JPG", "site/photo.png", "heatmaps/00000_a.png", "results.csv"):
        folder = tmp_path / theirs.replace("/", "-")
        (folder / theirs).parent.mkdir(parents=True)
        (folder / theirs).write_text("a photo")
        with pytest.raises(UsageError, match="choose another folder"):
            make().save(folder)
        assert [path for path in folder.rglob("*") if path.is_file()] == [folder / theirs]


@pytest.mark.parametrize("theirs", ["metrics.json", "heatmaps/00000_mine.png", "report.html"])
def test_save_leaves_what_somebody_put_beside_its_results(tmp_path, theirs, caplog):
    out = make(("a",)).save(tmp_path / "out")
    assert not caplog.records
    make(("b",)).save(out)
    assert "replacing the results of an earlier run" in caplog.text
    (out / theirs).write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=f"holds {theirs}, not written by dfengine"):
        make(("c",)).save(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_of_an_earlier_version_is_written_into_again(tmp_path):
    out = make(("a",)).save(tmp_path / "out")
    (out / ".dfengine-output").write_text("")
    make(("b",)).save(out)
    assert [path.name for path in (out / "heatmaps").iterdir()] == ["00000_b.png"]


def test_save_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="file: cannot be written: is a file, not a folder$"):
        make().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "heatmaps").write_text("kept")
    with pytest.raises(UsageError, match="out: holds heatmaps, not a folder"):
        make().save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heatmaps"]


def test_save_where_nobody_can_make_a_file(tmp_path, monkeypatch):
    """As in /proc: with no folder to make, and with one that is there."""

    def refuse(*_arguments, **_options):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match=f"^{tmp_path}: cannot be written: no file can be made there$"):
        make().save(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="x: cannot be written: no file can be made there$"):
        make().save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(S, S), (40, 8), (8, 40), (33, 70), (8, 8)])
def test_resize_map(size):
    rng = np.random.default_rng(1)
    constant = np.full((S, S), 0.3, np.float32)
    np.testing.assert_allclose(resize_map(constant, size), np.full(size, 0.3), atol=1e-6)
    random = rng.random((S, S), dtype=np.float32)
    resized = resize_map(random, size)
    assert resized.shape == size and resized.dtype == np.float32
    assert resized.min() >= random.min() - 1e-6 and resized.max() <= random.max() + 1e-6
    blob = np.zeros((S, S), np.float32)
    blob[3:5, 10:12] = 1  # what is at a place stays there: centre (4, 11) of 16
    weights = resize_map(blob, size)
    rows, columns = np.indices(size) + 0.5
    assert (weights * rows).sum() / weights.sum() / size[0] == pytest.approx(4 / 16, abs=0.04)
    assert (weights * columns).sum() / weights.sum() / size[1] == pytest.approx(11 / 16, abs=0.04)


def test_the_map_is_copied():
    anomaly_map = np.zeros((S, S), np.float32)
    resize_map(anomaly_map, (S, S))[0, 0] = 1
    assert anomaly_map.max() == 0
