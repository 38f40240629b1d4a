from __future__ import annotations

import json

import pytest

from dfengine import checkpoint
from dfengine.checkpoint import load_checkpoint
from dfengine.cli import main
from dfengine.commands import demo


def test_the_shipped_checkpoint_is_small_calibrated_and_recorded():
    path = demo.shipped_checkpoint()
    assert path.stat().st_size <= 8_000_000
    loaded = load_checkpoint(path)
    assert loaded.config.preset == "diff-fastener-tiny"
    assert loaded.calibration is not None and loaded.calibration.estimated
    assert loaded.training["steps"] > 0 and loaded.training["data"]["fingerprint"]
    card = path.with_suffix(".md").read_text()
    for field in ("dfengine train", "seed", "image AUROC", "pixel AUROC", "seconds"):
        assert field in card, f"the model card does not give {field!r}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_reaches_its_goal(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    measured = json.loads((tmp_path / "demo" / "results" / "demo.json").read_text())
    assert measured["image_auroc"] >= 0.98 and measured["pixel_auroc"] >= 0.95
    assert measured["baseline_image_auroc"] <= 0.90
    metrics = json.loads((tmp_path / "demo" / "results" / "metrics.json").read_text())
    assert metrics["n_images"] == 220 and metrics["image_auroc"] == measured["image_auroc"]
    assert (tmp_path / "demo" / "results" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert f"image AUROC {measured['image_auroc']:.4f}" in printed and "report.html" in printed
    assert "misses its goal" not in printed


def test_a_missing_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "shipped_checkpoint", lambda: checkpoint.shipped_checkpoint("gone.safetensors"))
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "shipped checkpoint is missing" in capsys.readouterr().err
