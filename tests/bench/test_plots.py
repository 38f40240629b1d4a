"""The speed plot shows every measured row."""

from __future__ import annotations

from PIL import Image

from bench import plots, tables


def test_a_panel_for_each_row(tmp_path):
    rows = sum(len(result["rows"]) for result in tables.results("throughput-detect"))
    assert plots.draw(tmp_path / "speed.png") == rows > 0
    with Image.open(tmp_path / "speed.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 20
