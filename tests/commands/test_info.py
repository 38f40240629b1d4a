"""`dfengine info` in words, within 80 columns, and as JSON; the help of the commands."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

import dfengine
from dfengine import native
from dfengine.checkpoint import load_checkpoint, save_checkpoint, shipped_checkpoint
from dfengine.cli import main
from dfengine.kernels.conv2d_cpu import default_product
from tests.helpers import tiny_model


@pytest.mark.parametrize("name", ["fastener-tiny.safetensors", "rail-eclip-tiny.safetensors"])
def test_a_checkpoint_in_words(name, capsys):
    path = shipped_checkpoint(name)
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "diff-fastener-tiny, 64x64 pixels, 3.09" in out and "image AUROC" in out
    assert f"{load_checkpoint(path).calibration.threshold:.6g}" in out
    assert "{" not in out and "None" not in out
    assert max(map(len, out.splitlines()[1:])) <= 80  # the first is the path, which can be copied


def test_the_installation_in_80_columns(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "kernels on cpu" in out and "diff-fastener-tiny" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_instructions_that_multiply_bfloat16_are_named(capsys):
    if not native.available():
        pytest.skip(native.status())
    assert main(["info"]) == 0
    usable = "yes" if default_product(torch.bfloat16) == "tiles" else "no"
    assert f", amx_bf16 {usable}" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("forced", ["cuda", "nonsense"])
def test_every_command_names_the_variable_that_forces_a_backend(forced, tmp_path, capsys, monkeypatch):
    path, photos, out = str(shipped_checkpoint()), tmp_path / "photos", str(tmp_path / "out")
    photos.mkdir()
    for name in ("0.png", "1.png", "2.png"):
        Image.effect_noise((64, 64), 50).save(photos / name)
    monkeypatch.setenv("DFENGINE_BACKEND", forced)
    plan = ["info", path, "--plan", "--no-measure"]
    detect = ["detect", path, str(photos), "--out", out]
    train = ["train", str(photos), "--out", f"{out}.safetensors", "--steps", "1", "--workers", "0"]
    for command in (plan, detect, ["verify", path], ["tune", path], ["bench", path], ["profile", path], train):
        assert main([*command, "--device", "cpu"]) == 2
        assert f"dfengine: DFENGINE_BACKEND={forced}: " in capsys.readouterr().err
    assert main(["info"]) == (0 if forced == "cuda" else 2)
    printed = capsys.readouterr()
    assert f"DFENGINE_BACKEND={forced}" in printed.out + printed.err
    if forced == "cuda" and not torch.cuda.is_available():
        assert "and serves none here: the cuda backend does not run on cpu" in printed.out


def test_a_backend_that_is_none_is_named_before_anything_is_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "nonsense")
    for command in (["train", str(tmp_path / "none"), "--out", "net.safetensors"], ["fasteners", str(tmp_path / "f")]):
        assert main(command) == 2
        printed = capsys.readouterr()
        assert not printed.out and printed.err.startswith("dfengine: DFENGINE_BACKEND=nonsense: no such backend")
    assert not list(tmp_path.iterdir())


def test_records_of_precisions_that_are_unknown_here_are_not_read_out(tmp_path, capsys):
    path, passed = tmp_path / "a.safetensors", {"data": {"name": "photos"}, "date": "2026-01-02"}
    for verified, words in (
        ({"int3": passed, "int8": passed | {"refused": ["a map"]}, "bfloat16": passed},
         "int8 was refused on photos (2026-01-02), bfloat16 passed on photos (2026-01-02);"),
        ({"int3": passed}, "no other than float32 was held to images"),
    ):  # fmt: skip
        save_checkpoint(path, replace(load_checkpoint(shipped_checkpoint()), verified=verified))
        assert main(["info", str(path)]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert words in printed and "int3" not in printed
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == {"int3": passed}


def test_a_training_record_of_another_form_is_shown_as_it_is(tmp_path, capsys):
    loaded = load_checkpoint(shipped_checkpoint())
    loaded.training.clear()
    loaded.training.update({"origin": "[bold]elsewhere", "data": 7})
    save_checkpoint(tmp_path / "foreign.safetensors", loaded)
    assert main(["info", str(tmp_path / "foreign.safetensors")]) == 0
    assert "[bold]elsewhere" in capsys.readouterr().out


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


def test_help_and_wrong_usage(capsys):
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert dfengine.__version__ in capsys.readouterr().out
    assert main(["detect", "--help"]) == 0
    assert main(["nonsense"]) == 2
    assert main(["detect"]) == 2
    assert main(["detect", "model.safetensors", "photos", "--out", ""]) == 2
    assert "Traceback" not in capsys.readouterr().err
