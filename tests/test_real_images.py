"""The documented numbers on real images, from the checkpoints that ship; needs the evaluation data (DFENGINE_DATA)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dfengine.checkpoint import shipped_checkpoint
from dfengine.cli import main
from dfengine.data.folders import open_dataset


@pytest.fixture
def rail_eclip() -> Path:
    data = os.environ.get("DFENGINE_DATA")
    if not data or not (Path(data) / "rail_eclip").is_dir():
        pytest.skip("DFENGINE_DATA does not name a folder with rail_eclip")
    return Path(data) / "rail_eclip"


def test_evaluate_on_the_documented_run_gives_the_documented_number(rail_eclip, tmp_path):
    checkpoint = shipped_checkpoint("rail-eclip-tiny.safetensors")
    arguments = ["evaluate", str(checkpoint), str(rail_eclip), "--out", str(tmp_path), "--group-by", "^([0-9]+)_"]
    assert main(arguments) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["image_auroc"] == pytest.approx(0.9781, abs=0.002)
    assert metrics["image_auroc_interval"] == pytest.approx([0.957, 0.997], abs=0.005)
    assert (metrics["n_good"], metrics["n_anomalous"], metrics["n_groups"]) == (58, 26, 20)
    assert metrics["pixel_auroc"] is None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_everyday_path_on_real_photos(rail_eclip, tmp_path):
    """train, calibrate, detect and evaluate as documented, on a budget that only shows that they fit together."""
    checkpoint = tmp_path / "rail.safetensors"
    train = ["train", str(rail_eclip), "--out", str(checkpoint), "--preset", "diff-fastener-tiny", "--steps", "4"]
    assert main([*train, "--batch-size", "4", "--precision", "float32", "--workers", "0"]) == 0
    assert list((tmp_path / "rail.run" / "panels").glob("*.png")) and (tmp_path / "rail.run" / "loss.png").is_file()
    assert main(["calibrate", str(checkpoint), str(rail_eclip), "--false-alarm-rate", "0.2"]) == 0
    assert main(["detect", str(checkpoint), str(rail_eclip / "test" / "missing"), "--out", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out" / "heatmaps").glob("*.png"))) == 26
    assert main(["evaluate", str(checkpoint), str(rail_eclip), "--out", str(tmp_path / "evaluation")]) == 0
    assert len(open_dataset(rail_eclip).train) == 109
