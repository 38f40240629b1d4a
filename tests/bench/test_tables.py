"""The measured tables of the pages are those of the results."""

from __future__ import annotations

import pytest

from bench import tables


def test_the_pages_say_what_the_results_say(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().out


def test_another_result_makes_a_page_stale(monkeypatch, capsys, tmp_path):
    for name in tables.TABLES:
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_bytes((tables.ROOT / name).read_bytes())
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    page = tmp_path / "README.md"
    right = page.read_text()
    own = right.split("<!-- speed: begin -->")[1].split("images/s")[0]
    page.write_text(right.replace(own, own.replace(" ms", "0 ms", 1)))
    assert tables.main() == 1
    assert "README.md: not what" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 0 and page.read_text() == right


def test_a_page_without_its_marker_is_an_error():
    with pytest.raises(ValueError, match="no marker <!-- speed: begin -->"):
        tables.written("text", "speed", "table")


def test_a_share_of_another_type_than_the_rows_says_so():
    row = {"precision": "int8", "percent_of_matmul": 57.3}
    assert tables.of_matmul(row) == "57% of bfloat16"
    assert tables.of_matmul(row | {"matmul": "int8"}) == "57%"
    assert tables.of_matmul(row | {"precision": "bfloat16", "matmul": "bfloat16"}) == "57%"


def test_the_short_table_is_of_a_device_with_every_rival_if_there_is_one(monkeypatch):
    def row(ms, *rivals, **changes):
        runners = {"dfengine": {"ms": ms, "images_per_second": 1e3 / ms}}
        runners |= {f"{name} bfloat16": {"ms": 2 * ms} for name in rivals}
        case = {"preset": "diff-fastener-tiny", "size": 64, "batch": 1, "precision": "bfloat16", "runners": runners}
        return case | changes

    every = tuple(tables.SHORT_RIVALS)
    found = [
        {"device": "a", "rows": [row(10, "OpenVINO"), row(5, *every, precision="int8"), row(3, *every, batch=4)]},
        {"device": "b", "rows": [row(20, "OpenVINO")]},
        {"device": "b", "rows": [row(40, *every)]},
    ]
    monkeypatch.setattr(tables, "results", lambda name: found)
    whole = tables.short_table()
    assert "a:" not in whole and "20.0" not in whole
    assert "| tiny, 64 pixels, batch 1 | 40.0 ms, 25.0 images/s | 80.0 ms | 80.0 ms | 80.0 ms | 80.0 ms |\n" in whole
    found.pop()
    found.append({"device": "c", "rows": [row(9, *every, precision="fp8")]})
    parts = tables.short_table()
    assert "c:" not in parts
    assert "| tiny, 64 pixels, batch 1 | 10.0 ms, 100.0 images/s | 20.0 ms | not measured |" in parts
    assert "a:" in parts and "b:" in parts and "batch 4" not in parts and "5.0 ms" not in parts
