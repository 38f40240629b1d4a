"""Names of files and folders that are no text: every command takes them or refuses them in a line."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfengine.checkpoint import load_checkpoint
from dfengine.cli import main
from tests.odd_files import saved_checkpoint

NAMES = [os.fsdecode(b"caf\xe9.png"), "new\nline.png", "<b>x&amp;.png", "[red]x.png", "it's \"q\".png", "=1+1.png"]
FOLDER = os.fsdecode(b"ph\xf6tos")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return saved_checkpoint(tmp_path / "model.safetensors")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six images."""
    folder = tmp_path / FOLDER
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("a file system that takes only UTF-8 names")
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, format="PNG")
    return folder


def test_detect_and_calibrate(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / os.fsdecode(b"r\xe9sults")
    assert main(["detect", str(checkpoint), str(photos), "--out", str(out)]) == 0
    lines = [json.loads(line)["name"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(str(photos / name) for name in NAMES)
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"].encode() for row in rows] == [name.encode("utf-8", "backslashreplace") for name in lines]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;x&amp;amp;.png" in report and "<b>x" not in report and r"caf\udce9.png" in report
    assert main(["calibrate", str(checkpoint), str(photos), "--false-alarm-rate", "0.3"]) == 0
    assert load_checkpoint(checkpoint).calibration.n_normals == 6
    assert r"r\udce9sults/report.html" in capsys.readouterr().out


def test_evaluate_and_verify(checkpoint, photos, tmp_path):
    (tmp_path / "set" / "test").mkdir(parents=True)
    good, bad = (tmp_path / "set" / "test" / name for name in ("good", FOLDER))
    photos.rename(good)
    bad.mkdir()
    for name in NAMES[:2]:
        (good / name).rename(bad / name)
    assert main(["evaluate", str(checkpoint), str(tmp_path / "set"), "--out", str(tmp_path / "out")]) == 0
    assert {row["defect"] for row in json.loads((tmp_path / "out/metrics.json").read_text())["per_defect"]} == {FOLDER}
    assert main(["verify", str(checkpoint), "--data", str(tmp_path / "set"), "--precision", "bfloat16"]) in (0, 1)


def test_train_and_info(photos, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    options = "--steps 2 --workers 0 --threads 1 --batch-size 2 --precision float32 --preset diff-fastener-tiny".split()
    options += ["--image-size", "32", "--init", "none"]
    assert main(["train", str(photos), "--out", str(out), *options]) == 0
    assert load_checkpoint(out).training["data"]["name"] == FOLDER
    for more in ([], ["--json"]):
        assert main(["info", str(out), *more]) == 0
    named = photos / "net.safetensors"
    assert main(["train", str(photos), "--out", str(tmp_path / f"{FOLDER}.safetensors"), *options]) == 2
    named.write_bytes(out.read_bytes())
    assert main(["info", str(named)]) == 1
    assert main(["calibrate", str(out), "--threshold", "0.5", "--out", str(named)]) == 2
    assert capsys.readouterr().err.count("a checkpoint's name must be valid UTF-8; rename it\n") == 3


def test_links_in_a_circle_and_an_unreadable_image_leave_the_others(checkpoint, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")
    os.mkfifo(folder / "pipe.png")
    assert main(["detect", str(checkpoint), str(folder), "--out", str(tmp_path / "out")]) == 3
    assert main(["calibrate", str(checkpoint), str(folder), "--alarms-per-km", "2000"]) == 3
    printed = capsys.readouterr()
    assert printed.err.count("a.png: symbolic links that lead in a circle") == 2
    assert re.search("alarms a km: 2000 wanted, at most [0-9]{4} with 95% confidence", printed.out)
    command = ["verify", str(checkpoint), "--data", str(folder), "--precision", "bfloat16", "--record"]
    assert main(command) in (1, 3)  # random weights may be refused
    assert "pipe.png: not a regular file" in capsys.readouterr().err
