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


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(demo, "TEST_GOOD", 2)
    monkeypatch.setattr(demo, "PER_DEFECT", 1)
    monkeypatch.setattr(demo, "BASELINE_IMAGES", 2)


@pytest.mark.parametrize("linked", [False, True])
def test_the_images_of_somebody_else_are_not_written_over(linked, short, tmp_path, capsys):
    """Not even beside results of `detect`; those of an earlier demo are, and of one that was interrupted."""
    test = tmp_path / ("elsewhere" if linked else "images/test")
    photo = test / "good" / "000.png"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"mine")
    if linked:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
        (tmp_path / "images" / "test").symlink_to(test)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".dfengine-output").write_text("results.csv\n")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    reason = "holds images; choose another folder for the demo"
    assert capsys.readouterr().err == f"dfengine: {tmp_path / 'images'}: {reason}\n"
    assert photo.read_bytes() == b"mine"


def test_an_earlier_demo_is_replaced(short, tmp_path, capsys, monkeypatch):
    def interrupted(out, *_):
        (out / "test" / "good").mkdir(parents=True)
        (out / "test" / "good" / "000.png").write_bytes(b"")
        raise KeyboardInterrupt

    arguments = ["demo", "--out", str(tmp_path / "demo")]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_fasteners", interrupted)
        assert main(arguments) == 130
    capsys.readouterr()
    assert main(arguments) == 0 and "replacing" not in capsys.readouterr().out
    assert main([*arguments, "--seed", "1"]) == 0
    assert "replacing the results of an earlier run" in capsys.readouterr().out
    assert json.loads((tmp_path / "demo" / "results" / "demo.json").read_text())["seed"] == 1
    (tmp_path / "demo" / "results" / ".dfengine-output").write_text("")  # as earlier versions left it
    assert main(arguments) == 0
    assert json.loads((tmp_path / "demo" / "results" / "demo.json").read_text())["seed"] != 1


def test_two_demos_into_one_folder_are_kept_apart(short, tmp_path, capsys, monkeypatch):
    arguments, second, honest = ["demo", "--out", str(tmp_path / "demo")], [], demo.write_fasteners

    def rendered(images, *options):
        honest(images, *options)
        before = {file: file.read_bytes() for file in images.rglob("*.png")}
        second.append(main([*arguments, "--seed", "1"]))
        assert {file: file.read_bytes() for file in images.rglob("*.png")} == before

    monkeypatch.setattr(demo, "write_fasteners", rendered)
    assert main(arguments) == 0 and second == [1]
    busy = f"dfengine: {tmp_path / 'demo'}: another run is writing into it; wait for its end, or choose another --out"
    assert busy in capsys.readouterr().err.splitlines()
    assert sorted(file.name for file in (tmp_path / "demo").iterdir()) == ["images", "results"]


def test_a_missing_checkpoint_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "shipped_checkpoint", lambda: checkpoint.shipped_checkpoint("gone.safetensors"))
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "shipped checkpoint is missing" in capsys.readouterr().err
