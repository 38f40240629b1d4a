"""report.html: one self-contained file that shows what a run found (inline style, images as data, no other file)."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from dfengine.evaluation.calibration import Calibration
from dfengine.evaluation.plots import score_histogram
from dfengine.files import atomic_write
from dfengine.report.overlay import colour_stops, heatmap_overlay

GOOD = "good"
THUMBNAIL = 256
"""Longest side of a picture, in pixels."""

MAX_PICTURE_CHARS = 14_000_000
"""Of all pictures together; with the table rows the file stays below 20 MB."""

MAX_ROWS = 10_000

_METRICS = (
    ("image_auroc", "Image AUROC", "chance that a defect scores higher than a good image"),
    ("image_ap", "Image AP", "precision averaged over all recalls"),
    ("image_f1_max", "Image F1-max (oracle)", "the best F1 that any threshold could give on these labels"),
    ("recall", "Recall", "share of the defects that raise an alarm"),
    ("precision", "Precision", "share of the alarms that are defects"),
    ("f1", "F1", "harmonic mean of recall and precision"),
    ("false_alarm_rate", "False-alarm rate", "share of the good images that raise an alarm"),
    ("pixel_auroc", "Pixel AUROC", "the same as image AUROC, over all pixels"),
    ("pixel_ap", "Pixel AP", "precision averaged over all recalls, over all pixels"),
    ("aupro", "AUPRO", "overlap with each defect region, up to 30% false-positive pixels"),
)


@dataclass
class ReportItem:
    """One scored image.

    name: shown as it is; score: raw; calibrated: in (0, 1), threshold at 0.5; label: the verdict, True = alarm;
    truth: None where unknown, "good", or the kind of defect; image and reconstruction: uint8 (S, S, 3);
    anomaly_map: float (S, S); mask: true defect, bool (S, S), outlined in the heatmap.
    """

    name: str
    score: float
    calibrated: float
    label: bool
    truth: str | None
    image: np.ndarray
    reconstruction: np.ndarray
    anomaly_map: np.ndarray
    mask: np.ndarray | None = None


@dataclass
class _Row:
    """What is kept of each item. `pictures`: data URLs of image, reconstruction and heatmap, for those with a card."""

    name: str
    score: float
    calibrated: float
    label: bool
    truth: str | None
    pictures: tuple[str, str, str] | None = None

    @property
    def mistake(self) -> str:
        """What is wrong: "missed", "false alarm", or "" where the verdict is right or the truth unknown."""
        if self.truth is None or self.label == (self.truth != GOOD):
            return ""
        return "false alarm" if self.label else "missed"

    @property
    def priority(self) -> tuple[bool, float]:
        return bool(self.mistake), self.score


def write_report(
    out_dir: str | Path,
    items: Iterable[ReportItem],
    bad: Sequence[tuple[str, str]],
    threshold: float,
    meta: Mapping[str, object],
    metrics: Mapping[str, object] | None = None,
    calibration: Calibration | None = None,
    limit: int = 200,
    vmax: float = 1.0,
    title: str = "Fastener inspection",
) -> Path:
    """Writes `out_dir`/report.html and returns its path.

    `items` is read once, so a generator keeps memory low; `bad` (name, reason) of the refused files; `threshold` raw;
    `meta` what is shown about the run (checkpoint, seed, version, time ...); `metrics` as `evaluate` returns them;
    `calibration` says what the threshold means. At most `limit` items, and 14 MB, get pictures: wrong verdicts first,
    then the highest scores; the others are table rows. `vmax` is the map value at full heatmap colour.
    Raises DfengineError where the file cannot be written.
    """
    rows = _collect(items, limit, vmax)
    cards = [row for row in rows if row.pictures]
    others = [row for row in rows if not row.pictures]
    truths = [row.truth for row in rows]
    known = bool(rows) and None not in truths
    histogram = None
    if rows:
        anomalous = [truth != GOOD for truth in truths] if known else None
        histogram = _data_url("png", score_histogram([row.calibrated for row in rows], anomalous, threshold))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # file names can hold HTML
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    html = environment.get_template("template.html.j2").render(
        title=title,
        meta=dict(meta),
        threshold=threshold,
        meaning=calibration.message if calibration else None,
        n_scored=len(rows),
        n_alarms=sum(row.label for row in rows),
        n_missed=sum(row.mistake == "missed" for row in rows) if known else None,
        n_false_alarms=sum(row.mistake == "false alarm" for row in rows) if known else None,
        bad=list(bad),
        histogram=histogram,
        cards=cards,
        rows=others[:MAX_ROWS],
        n_rows=len(others),
        max_rows=MAX_ROWS,
        n_left_out=max(0, len(others) - MAX_ROWS),
        metrics=metrics,
        metric_names=_METRICS,
        colours=", ".join(colour_stops()),
        vmax=vmax,
    )
    path = Path(out_dir) / "report.html"
    atomic_write(path, html)
    return path


def _collect(items: Iterable[ReportItem], limit: int, vmax: float) -> list[_Row]:
    """Rows by falling score. Pictures stay with the `limit` rows of highest priority, as far as the size allows."""
    rows: list[_Row] = []
    shown: list[tuple[tuple[bool, float], int]] = []  # a heap: the least important picture first
    for item in items:
        row = _Row(item.name, float(item.score), float(item.calibrated), bool(item.label), item.truth)
        rows.append(row)
        entry = (row.priority, -len(rows))  # of equal ones the earlier stays
        if limit <= 0 or (len(shown) >= limit and entry < shown[0]):
            continue
        row.pictures = _pictures(item, vmax)
        if len(shown) < limit:
            heapq.heappush(shown, entry)
        else:
            rows[-heapq.heapreplace(shown, entry)[1] - 1].pictures = None
    size = 0
    for _, number in sorted(shown, reverse=True):
        row = rows[-number - 1]
        size += sum(map(len, row.pictures))
        if size > MAX_PICTURE_CHARS:
            row.pictures = None
    return sorted(rows, key=lambda row: -row.score)


def _pictures(item: ReportItem, vmax: float) -> tuple[str, str, str]:
    overlay = heatmap_overlay(item.image, item.anomaly_map, vmax, item.mask)
    return _thumbnail(item.image), _thumbnail(item.reconstruction), _thumbnail(overlay)


def _thumbnail(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _data_url("jpeg", buffer.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
