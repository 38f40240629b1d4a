from __future__ import annotations

import functools

import torch
from PIL import Image

from dfengine.cli import main
from dfengine.commands import roofline
from dfengine.engine.measure import measure
from dfengine.engine.timing import Ceilings


def test_a_png_and_a_summary(tiny, tmp_path, capsys, monkeypatch):
    ceilings = Ceilings({torch.float32: 1e11}, {2**18: 5e10, 2**28: 1e10})
    monkeypatch.setattr(roofline, "measure", functools.partial(measure, seconds=0.0, ceilings=ceilings))
    out = tmp_path / "new" / "roofline.png"
    assert main(["roofline", str(tiny), "--out", str(out), "--batch", "2", "--precision", "float32"]) == 0
    with Image.open(out) as image:
        assert image.format == "PNG"
    text = capsys.readouterr().out
    assert "batch 2, float32 on cpu" in text and "% of the roofline" in text and str(out) in text
    assert main(["roofline", str(tiny), "--out", str(out), "--precision", "float32"]) == 0  # over its own
    assert "batch 1, float32 on cpu" in capsys.readouterr().out
    Image.new("RGB", (32, 32)).save(out)
    photo = out.read_bytes()
    assert main(["roofline", str(tiny), "--out", str(out), "--precision", "float32"]) == 2
    reason = "is there already and does not show that this command wrote it; choose another name"
    assert capsys.readouterr().err == f"dfengine: {out}: {reason}\n" and out.read_bytes() == photo


def test_another_kind_of_file_is_refused_before_anything_runs(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "bound_program", None)
    assert main(["roofline", str(tiny), "--out", str(tmp_path / "roofline.svg")]) == 2
    assert "roofline.svg: must end in .png" in capsys.readouterr().err


def test_no_picture_is_drawn_under_ceilings_that_cannot_be_true(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(roofline, "measure", functools.partial(measure, seconds=0.0))
    low = Ceilings({torch.float32: 1.0}, {2**18: 1.0})
    monkeypatch.setattr(Ceilings, "measured", lambda *_: low)
    out = tmp_path / "roofline.png"
    assert main(["roofline", str(tiny), "--out", str(out), "--precision", "float32"]) == 1
    printed = capsys.readouterr()
    assert "ops ran far above the ceilings" in printed.err and "no picture is drawn" in printed.err
    assert not printed.out and not out.exists()
