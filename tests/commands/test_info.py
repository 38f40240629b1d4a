"""`dfengine info` in words, within 80 columns."""

from __future__ import annotations

import pytest

from dfengine.checkpoint import load_checkpoint, save_checkpoint, shipped_checkpoint
from dfengine.cli import main


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


def test_a_training_record_of_another_form_is_shown_as_it_is(tmp_path, capsys):
    loaded = load_checkpoint(shipped_checkpoint())
    loaded.training.clear()
    loaded.training.update({"origin": "[bold]elsewhere", "data": 7})
    save_checkpoint(tmp_path / "foreign.safetensors", loaded)
    assert main(["info", str(tmp_path / "foreign.safetensors")]) == 0
    assert "[bold]elsewhere" in capsys.readouterr().out
