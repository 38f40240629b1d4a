"""The speed plot shows the rows of models at their own sizes."""

from __future__ import annotations

from PIL import Image

from bench import plots, tables


def test_a_panel_for_each_row(tmp_path):
    rows = [row for result in tables.results("throughput-detect") for row in result["rows"]]
    shown = [row for row in rows if (row["size"], row["batch"]) in ((64, 1), (64, 16), (256, 1), (256, 16))]
    assert plots.draw(tmp_path / "speed.png") == len(shown) > 0
    with Image.open(tmp_path / "speed.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 20
