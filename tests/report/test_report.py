from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dfengine.errors import DfengineError
from dfengine.evaluation.calibration import calibrate
from dfengine.evaluation.evaluate import evaluate
from dfengine.evaluation.robustness import robustness_table
from dfengine.report import ReportItem, report, write_report

META = {"checkpoint": "model.safetensors", "seed": 7}


def item(name, score, truth=None, size=32, label=None):
    rng = np.random.default_rng(len(name))
    image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return ReportItem(
        name, score, score, score > 0.5 if label is None else label, truth, image, image, rng.random((size, size))
    )


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not nest."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def cards(self):
        return [attrs for tag, attrs in self.tags if tag == "article"]

    def further(self):
        return [attrs for tag, attrs in self.tags if tag == "tr" and "data-name" in attrs]


def page(tmp_path, items, bad=(), **options):
    path = write_report(tmp_path, items, bad, 0.5, META, **options)
    assert path == tmp_path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_nothing_scored(tmp_path):
    result = page(tmp_path, [], [("a.png", "the file is empty")])
    assert "No image was scored." in result.text and "a.png the file is empty" in result.text
    assert result.cards() == []


def test_one_item_without_truth(tmp_path):
    result = page(tmp_path, [item("a.png", 0.75)])
    assert "1 image scored" in result.text and "1 alarm (100.0% of the images)" in result.text
    assert "truth" not in result.text and "missed" not in result.text
    assert "checkpoint model.safetensors seed 7" in result.text


def test_cards_are_sorted_and_self_contained(tmp_path):
    result = page(tmp_path, (item(f"{i}.png", s) for i, s in enumerate([0.1, 0.9, 0.4])))
    assert [card["data-name"] for card in result.cards()] == ["1.png", "2.png", "0.png"]
    assert [card["class"] for card in result.cards()] == ["card alarm", "card normal", "card normal"]
    sources = [attrs["src"] for tag, attrs in result.tags if tag == "img"]
    assert len(sources) == 1 + 3 * 3 and "without pictures" not in result.text
    for source in sources:
        kind, content = source.split(",", 1)
        assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
        Image.open(io.BytesIO(base64.b64decode(content))).load()
    assert not [tag for tag, attrs in result.tags if tag == "link" or "href" in attrs]
    html = (tmp_path / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and "url(" not in html


def test_pictures_are_those_of_the_item(tmp_path):
    one = item("a.png", 0.9)
    one.image = np.full((300, 500, 3), (200, 30, 30), np.uint8)
    one.reconstruction = np.full((300, 500, 3), (30, 30, 200), np.uint8)
    one.anomaly_map = np.zeros((300, 500))
    result = page(tmp_path, [one])
    pictures = {}
    for tag, attrs in result.tags:
        if tag == "img" and "loading" in attrs:
            picture = Image.open(io.BytesIO(base64.b64decode(attrs["src"].split(",")[1])))
            assert picture.size == (256, 154)
            pictures[attrs["alt"].split()[0]] = np.asarray(picture).mean(axis=(0, 1))
    assert pictures["image"] == pytest.approx([200, 30, 30], abs=3)
    assert pictures["reconstruction"] == pytest.approx([30, 30, 200], abs=3)
    assert np.ptp(pictures["heatmap"]) < 3


def test_names_cannot_inject_html(tmp_path):
    evil = "<script>alert(1)</script>\"onload='x'.png"
    result = page(tmp_path, [item(evil, 0.9, truth=evil), item("b", 0.1, "good")], [(evil, evil)], limit=1, title=evil)
    assert [tag for tag, _ in result.tags].count("script") == 1
    assert result.cards()[0]["data-name"] == evil
    assert not [attrs for _, attrs in result.tags if "onload" in attrs]


def test_name_that_is_not_utf8(tmp_path):
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert "caf\\udce9.png" in page(tmp_path, [item(name, 0.9)]).text


def test_truth_counts_mistakes_and_keeps_their_pictures(tmp_path):
    right = [item("hit", 0.9, "missing"), item("fine", 0.3, "good")]
    wrong = [item("lost", 0.1, "broken"), item("cry", 0.8, "good")]
    result = page(tmp_path, right + wrong, limit=2)
    assert "1 defect missed" in result.text and "1 false alarm" in result.text
    assert [(card["data-name"], card["data-mistake"]) for card in result.cards()] == [
        ("cry", "false alarm"),
        ("lost", "missed"),
    ]
    rows = result.text[result.text.index("Further images") :]
    assert rows.index("hit") < rows.index("fine") and "lost" not in rows


def test_equal_scores_keep_the_order_given(tmp_path):
    result = page(tmp_path, [item(f"{i}.png", 0.9) for i in range(6)], limit=3)
    assert [card["data-name"] for card in result.cards()] == ["0.png", "1.png", "2.png"]


def test_metrics_and_calibration_are_shown(tmp_path):
    items = [item("a", 0.9, "missing"), item("b", 0.3, "good"), item("c", 0.2, "good")]
    metrics = evaluate([0.9, 0.3, 0.2], [1, 0, 0], ["missing", "good", "good"], None, None, 0.5)
    result = page(tmp_path, items, metrics=metrics, calibration=calibrate([0.1, 0.5], 0.01))
    assert "1.000 image AUROC" in result.text and "no ground-truth masks" in result.text
    assert "cannot be estimated from 2 normal images" in result.text
    assert "missing 1 1.0000 1 (100.0%)" in result.text


def test_robustness_is_shown_where_it_was_measured(tmp_path):
    items = [item("b", 0.3, "good"), item("c", 0.2, "good")]
    metrics = evaluate([0.3, 0.2], [0, 0], ["good", "good"], None, None, 0.5)
    assert "Robustness" not in page(tmp_path, items, metrics=metrics).text
    changed = {"dim": [0.28, 0.1, 0.06], "blur": [0.9, 0.9, 0.6], "gone": [np.nan] * 3}
    metrics["robustness"] = robustness_table([0.3, 0.2, 0.1], changed, 0.7)
    text = page(tmp_path, items, metrics=metrics).text
    assert "of the anomalous images" not in text
    assert "none 1 of 3 (33.3%) 0.8% to 90.6% 1 – 0 (0.0%) – +0.0000 –" in text
    assert "dim 1 of 3 (33.3%) 0.8% to 90.6% 1 pass 0 (0.0%) – -0.0533 –" in text
    assert "blur 3 of 3 (100.0%) 29.2% to 100.0% 3 fail 2 (66.7%) – +0.6000 –" in text
    assert "gone – – – – – – – –" in text
    metrics["robustness"] = robustness_table([0.3, 0.2, 0.1], changed, 0.7, [0.9, 0.5, 0.26, 0.0])
    text = page(tmp_path, items, metrics=metrics).text
    assert "75.0% of the anomalous images exceed it)" in text and "25.0% of the anomalous images exceed it" in text


def test_metrics_of_one_class(tmp_path):
    metrics = evaluate([0.3, 0.2], [0, 0], ["good", "good"], None, None, 0.5)
    result = page(tmp_path, [item("b", 0.3, "good"), item("c", 0.2, "good")], metrics=metrics)
    assert "no anomalous image" in result.text


def test_a_thousand_items_stay_small(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_ROWS", 300)
    result = page(tmp_path, (item(f"{i:04d}.png", i / 1000) for i in range(1000)), limit=20)
    assert "1000 images scored" in result.text and len(result.cards()) == 20
    above, table = result.text.split("Further images")
    assert "300 images without pictures are in the table below them, the 680 of lowest score in" in above
    assert "980 images without pictures" in table and "The lowest 680 are left out" in table
    assert 'count + " of 1000 shown"' in table
    names = [attrs["data-name"] for attrs in result.further()]  # what the search looks at
    assert names == [f"{i:04d}.png" for i in range(979, 679, -1)]
    assert [attrs["class"] for attrs in result.further()] == ["alarm"] * 300
    assert "0979.png" in result.text and "0679.png" not in result.text


def test_picture_budget(tmp_path, monkeypatch):
    one = sum(map(len, report._pictures(item("0000.png", 0.5), 1.0)))
    monkeypatch.setattr(report, "MAX_PICTURE_CHARS", int(5.5 * one))
    result = page(tmp_path, [item(f"{i:04d}.png", i / 10) for i in range(10)])
    assert [card["data-name"] for card in result.cards()] == [f"{i:04d}.png" for i in (9, 8, 7, 6, 5)]
    assert "5 images without pictures" in result.text


def test_no_cards(tmp_path):
    result = page(tmp_path, [item("a.png", 0.9)], limit=0)
    assert result.cards() == [] and "a.png" in result.text


def test_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DfengineError, match="cannot be written"):
        write_report(tmp_path / "file", [], [], 0.5, META)
