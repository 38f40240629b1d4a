from __future__ import annotations

import json

from dfengine.cli import main


def test_every_batch_size_has_two_rows(tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    arguments = ["bench", str(tiny), "--batch", "1", "--batch", "3", "--seconds", "0", "--out", str(out)]
    assert main([*arguments, "--precision", "float32"]) == 0
    text = capsys.readouterr().out
    assert "images/s" in text and "PyTorch modules" in text
    rows = json.loads(out.read_text())["rows"]
    assert [(row["runs"], row["batch"]) for row in rows] == [
        ("detect", 1), ("PyTorch modules", 1), ("detect", 3), ("PyTorch modules", 3)
    ]  # fmt: skip
    assert all(row["images_per_second"] > 0 and row["ms"] <= row["ms_p99"] and row["calls"] >= 5 for row in rows)


def test_wrong_usage_is_one_line(tiny, capsys):
    assert main(["bench", str(tiny), "--batch", "0"]) == 2
    assert main(["bench", str(tiny), "--precision", "float8"]) == 2
    assert main(["bench", "none.safetensors"]) == 1
    assert main(["bench", str(tiny), "--batch", "1000000000"]) == 1
    printed = capsys.readouterr().err
    assert "no memory for batches of 1000000000 images" in printed and "Traceback" not in printed
