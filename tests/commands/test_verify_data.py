from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dfengine
from dfengine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped_checkpoint
from dfengine.cli import main
from dfengine.commands import verify_data
from dfengine.data.fasteners import write_fasteners
from dfengine.data.folders import content_digest, fingerprint, open_dataset
from dfengine.errors import DfengineError, UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.precision import eight_bits
from tests.helpers import spoil_precision, tiny_model


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copy(shipped_checkpoint(), tmp_path / "model.safetensors"))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    write_fasteners(folder, train=3, test_good=5, per_defect=1, seed=11, size=64)
    return folder


@pytest.fixture
def data(rendered, tmp_path):
    return Path(shutil.copytree(rendered, tmp_path / "data"))


def verify(checkpoint, data, *more) -> int:
    return main(["verify", str(checkpoint), "--data", str(data), "--precision", "bfloat16", *more])


def test_a_pass_is_printed_and_recorded(checkpoint, data, capsys):
    assert verify(checkpoint, data) == 0
    printed = capsys.readouterr().out
    assert "8 images" in printed and "bfloat16 passes\n" in printed and "image AUROC, bfloat16" in printed
    assert load_checkpoint(checkpoint).verified == {}
    before = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, replace(before, verified={"fp8": {"date": "2026-01-01"}}))
    assert verify(checkpoint, data, "--record", "--batch-size", "3") == 0
    assert f"noted in {checkpoint}" in capsys.readouterr().out
    after = load_checkpoint(checkpoint)
    assert all((before.state[name] == after.state[name]).all() for name in before.state)
    assert after.calibration == before.calibration and set(after.verified) == {"bfloat16", "fp8"}
    record = after.verified["bfloat16"]
    files = [sample.path for sample in open_dataset(data).test]
    assert record["data"] == {"name": "data", "fingerprint": fingerprint(files), "labelled": True, "known": 0}
    assert (record["images"], record["device"], record["seed"]) == (8, "cpu", 0)
    assert 0 < record["max_map_difference"] <= record["tolerance"] == 0.05
    assert abs(record["auroc_points"]) <= 0.1 and record["date"] and record["dfengine"]


def test_eight_bits_get_their_ranges_and_are_taken_from_then_on(checkpoint, data, capsys):
    where = torch.device("cpu")
    if eight_bits(where) is None:
        pytest.skip("this machine multiplies no bytes")
    arguments = ["verify", str(checkpoint), "--data", str(data), "--precision", "int8"]
    assert main(arguments) == 0 and load_checkpoint(checkpoint).verified == {}
    with pytest.raises(UsageError, match="no ranges are kept"):
        dfengine.load(checkpoint, precision="int8")
    assert main([*arguments, "--record"]) == 0 and "int8 passes; noted" in capsys.readouterr().out
    record = load_checkpoint(checkpoint).verified["int8"]
    assert len(record["ranges"]) > 20 and record["max_map_difference"] <= record["tolerance"] == 0.05
    assert dfengine.load(checkpoint).precision == dfengine.load(checkpoint, precision="int8").precision == "int8"
    assert main(["info", str(checkpoint)]) == 0 and "int8 passed on data" in capsys.readouterr().out
    # Ranges are of normal images: without one that can be read there are none.
    for sample in (*(data / "train").rglob("*.png"), *(data / "test" / "good").glob("*.png")):
        sample.write_bytes(b"")
    assert main(arguments) == 1 and "no normal image can be read" in capsys.readouterr().err


def test_eight_bits_of_normal_images_alone(checkpoint, data, capsys):
    """Those that ranges are measured on are not compared, and others are with patches pasted in too."""
    if eight_bits(torch.device("cpu")) is None:
        pytest.skip("this machine multiplies no bytes")
    normals = sorted(data.rglob("*good*/*.png"))
    assert len(normals) == 8
    photos = data.parent / "photos"
    photos.mkdir()
    arguments = ["verify", str(checkpoint), "--data", str(photos), "--precision", "int8", "--record"]
    for count, path in enumerate([*normals, *normals]):
        shutil.copy(path, photos / f"{count}.png")
        if count in (0, 13, 14):
            assert main(arguments) == (1 if count < 14 else 0)
            printed = capsys.readouterr()
            if count == 0:
                assert "no normal image can be read" in printed.err
            elif count == 13:
                assert "7 images beside the 7 that ranges are measured on; int8 must be held to 8" in printed.err
            else:
                assert "int8 against float32, 16 images" in printed.out and "int8 passes" in printed.out
                assert "8 of these images are copies of the others with a patch pasted in" in printed.out
    assert load_checkpoint(checkpoint).verified["int8"]["data"]["labelled"] is False


def test_a_spoilt_precision_is_refused_in_one_line(checkpoint, data, capsys, monkeypatch):
    assert verify(checkpoint, data, "--record") == 0
    assert "bfloat16" in load_checkpoint(checkpoint).verified
    spoil_precision(monkeypatch, "bfloat16", lambda maps: maps[:, 3, 5].add_(0.1))
    capsys.readouterr()
    assert verify(checkpoint, data) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(r"dfengine: bfloat16 is refused: a map differs by 0.1\d* \(0.05 allowed\)", printed.err.strip())
    assert "largest map difference" in printed.out and "passes" not in printed.out
    assert "bfloat16" in load_checkpoint(checkpoint).verified  # nothing was to be recorded
    assert verify(checkpoint, data, "--record") == 1
    assert f"(noted in {checkpoint}, where before it passed on data (" in capsys.readouterr().err
    (reason,) = load_checkpoint(checkpoint).verified["bfloat16"]["refused"]
    assert reason.startswith("a map differs by 0.1")


def test_a_note_says_which_one_it_takes_the_place_of(checkpoint, data, capsys, monkeypatch):
    date = time.strftime("%Y-%m-%d", time.gmtime())
    assert verify(checkpoint, data, "--record") == 0
    assert f"bfloat16 passes; noted in {checkpoint}\n" in capsys.readouterr().out
    with monkeypatch.context() as spoilt:
        spoil_precision(spoilt, "bfloat16", lambda maps: maps[:, 3, 5].add_(0.1))
        assert verify(checkpoint, data, "--record") == 1
    refused = capsys.readouterr().err
    assert refused.endswith(f"(noted in {checkpoint}, where before it passed on data ({date}))\n")
    assert verify(checkpoint, data, "--record") == 0
    passed = capsys.readouterr()
    assert f"; noted in {checkpoint}, where before it was refused on data ({date})\n" in passed.out and not passed.err


def test_a_pass_without_labels_leaves_a_refusal_with_labels(checkpoint, data, capsys, monkeypatch):
    def record() -> dict:
        return load_checkpoint(checkpoint).verified["bfloat16"]

    normals = data / "train" / "good"
    with monkeypatch.context() as spoilt:
        spoil_precision(spoilt, "bfloat16", lambda maps: maps[:, 3, 5].add_(0.1))
        assert verify(checkpoint, normals, "--record") == 1 and not record()["data"]["labelled"]
        capsys.readouterr()
    assert verify(checkpoint, normals, "--record") == 0 and "refused" not in record()
    assert "was refused on good, without labels (" in capsys.readouterr().out
    with monkeypatch.context() as spoilt:
        spoil_precision(spoilt, "bfloat16", lambda maps: maps[:, 3, 5].add_(0.1))
        assert verify(checkpoint, data, "--record") == 1
    refused = record()
    capsys.readouterr()
    assert verify(checkpoint, normals, "--record") == 0 and record() == refused
    assert f"bfloat16 passes; not noted in {checkpoint}, where it was refused on data (" in capsys.readouterr().out
    assert verify(checkpoint, data, "--record") == 0 and "refused" not in record()


def test_images_that_the_model_was_trained_on_are_said(checkpoint, data, capsys):
    loaded, good = load_checkpoint(checkpoint), data / "test" / "good"
    trained = [content_digest(path) for path in sorted(good.iterdir())[:2]]
    save_checkpoint(checkpoint, replace(loaded, training={"data": {"trained": trained}}))
    assert verify(checkpoint, data, "--record") == 0
    assert "2 images of these the model was trained on" in capsys.readouterr().out
    assert main(["info", str(checkpoint)]) == 0
    assert "bfloat16 passed on data, 2 images of it from training" in " ".join(capsys.readouterr().out.split())
    save_checkpoint(checkpoint, replace(loaded, training={}))
    assert verify(checkpoint, data) == 0
    assert "trained on" not in capsys.readouterr().out


def test_scores_the_wrong_way_round_are_said(checkpoint, data, capsys):
    (data / "test" / "good").rename(data / "test" / "odd")
    defects = [folder for folder in (data / "test").iterdir() if folder.name != "odd"]
    (data / "test" / "good").mkdir()
    for folder in defects:
        for path in folder.iterdir():
            path.rename(data / "test" / "good" / f"{folder.name}-{path.name}")
        folder.rmdir()
    shutil.rmtree(data / "ground_truth", ignore_errors=True)
    assert verify(checkpoint, data) == 0
    printed = capsys.readouterr()
    area = float(re.search(r"image AUROC, float32 +(\S+)", printed.out)[1])
    assert area < 0.5
    assert printed.err.startswith(f"dfengine: warning: image AUROC of float32 {area:.3f}: defective images score lower")


def test_auto_keeps_from_a_refused_precision(checkpoint, data, capsys, caplog, monkeypatch):
    monkeypatch.setattr("dfengine.precision.cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("dfengine.precision.default_product", lambda dtype: "pairs")
    assert dfengine.load(checkpoint).precision == "bfloat16"
    with monkeypatch.context() as spoilt:
        spoil_precision(spoilt, "bfloat16", lambda maps: maps[:, 3, 5].add_(0.1))
        assert verify(checkpoint, data, "--record") == 1
    assert dfengine.load(checkpoint).precision == "float32"
    assert not caplog.records
    assert dfengine.load(checkpoint, precision="bfloat16").precision == "bfloat16"  # asked for by name
    (record,) = caplog.records
    assert re.fullmatch(
        r"precision bfloat16 was refused on data \(\d{4}-\d\d-\d\d\): a map differs by 0\.1\d* \(0\.05 allowed\); "
        r'it runs as asked, "auto" avoids it',
        record.getMessage(),
    )
    caplog.clear()
    assert main(["info", str(checkpoint)]) == 0
    assert "bfloat16 was refused on data" in capsys.readouterr().out
    assert verify(checkpoint, data, "--record") == 0 and not caplog.records
    assert dfengine.load(checkpoint, precision="bfloat16").precision == "bfloat16" and not caplog.records
    assert dfengine.load(checkpoint).precision == "bfloat16"
    refused = replace(load_checkpoint(checkpoint), verified={"bfloat16": {"device": "cuda", "refused": ["a map"]}})
    save_checkpoint(checkpoint, refused)
    assert dfengine.load(checkpoint).precision == "bfloat16"  # another device says nothing of this one


def test_a_comparison_that_ends_early_is_no_pass(checkpoint, data, capsys, monkeypatch):
    calls = []

    def fails(maps):
        calls.append(len(maps))
        if len(calls) == 2:
            raise DfengineError("cpu: out of memory")

    spoil_precision(monkeypatch, "float32", fails)
    assert verify(checkpoint, data, "--record", "--batch-size", "4") == 1
    printed = capsys.readouterr()
    assert "out of memory" in printed.err and "did not score all images" in printed.err and "passes" not in printed.out
    assert load_checkpoint(checkpoint).verified == {}


def test_maps_within_the_tolerance_that_rank_otherwise_are_refused(data, tmp_path, capsys, monkeypatch):
    """Weights that give all images nearly one score."""
    model, path = tiny_model(), tmp_path / "flat.safetensors"
    save_checkpoint(path, Checkpoint(model.config, model.state_dict(), {}, Calibration.by_hand(0.5)))
    spoil_precision(monkeypatch, "bfloat16", lambda maps: maps.copy_(maps.flip(0) * 0.99))
    assert verify(path, data) == 1
    assert re.search(r"refused: image AUROC moves by [+-]\d+\.\d+ points \(0.1 allowed\)\n", capsys.readouterr().err)


def test_normals_alone_give_no_auroc(checkpoint, data, capsys):
    assert verify(checkpoint, data / "train" / "good", "--record") == 0
    printed = capsys.readouterr().out
    areas = [line.split()[-1] for line in printed.splitlines() if "AUROC" in line]
    assert "3 images" in printed and areas == ["-", "-"]
    record = load_checkpoint(checkpoint).verified["bfloat16"]
    assert record["auroc"] is None and not record["data"]["labelled"]
    (data / "train" / "good" / "000.png").write_bytes(b"no image")
    assert verify(checkpoint, data / "train" / "good") == 3
    printed = capsys.readouterr()
    assert printed.err.count("000.png") == 1 and "2 images" in printed.out


def test_wrong_usage(checkpoint, data, tmp_path, capsys, monkeypatch):
    arguments = ["verify", str(checkpoint)]
    for more, code, message in (
        (["--record"], 2, "--record needs --data"),
        (["--batch-size", "3"], 2, "--batch-size goes with --data"),
        (["--data", str(data), "--batch", "3"], 2, "--batch is of the comparison without --data"),
        (["--data", str(data), "--precision", "float32"], 2, "float32 is what a precision is compared with"),
        (["--data", str(data), "--precision", "int4"], 2, "precision must be one of"),
        (["--data", str(data), "--precision", "fp8"], 2, "precision fp8 needs a GPU"),
        (["--data", str(tmp_path / "none"), "--precision", "bfloat16"], 1, "none: no such folder"),
    ):
        assert main([*arguments, *more]) == code
        assert message in capsys.readouterr().err
    monkeypatch.setattr(verify_data, "half_precision", lambda device: None)
    assert main([*arguments, "--data", str(data)]) == 2
    assert "cpu has no precision that is faster than float32" in capsys.readouterr().err
    monkeypatch.setattr(verify_data, "half_precision", lambda device: "bfloat16")
    assert main([*arguments, "--data", str(data)]) == 0
    assert "bfloat16 against float32, 8 images" in capsys.readouterr().out
