"""All metrics of one test run, as one dictionary and as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from dfengine.evaluation.metrics import UndefinedMetric, auroc, bootstrap_auroc, image_metrics, pixel_metrics
from dfengine.evaluation.plots import pr_plot, roc_plot
from dfengine.files import atomic_write
from dfengine.wording import counted

NO_MASKS = "no ground-truth masks"


def evaluate(
    scores,
    labels,
    defects: Sequence[str],
    maps: Sequence[np.ndarray] | None,
    masks: Sequence[np.ndarray | None] | None,
    threshold: float | None,
    groups: Sequence | None = None,
    seed: int = 0,
) -> dict:
    """Metrics of a scored test set of N images.

    `scores` (N,) raw; `labels` (N,) True = anomalous; `defects` N names ("good", "missing", ...); `maps` N x float
    (H, W); `masks` N x bool (H, W) of the shape of the map, or None: a good image without a mask is normal everywhere,
    an anomalous one is left out of the pixel metrics and counted in "notes"; `groups` (N,) what the bootstrap resamples
    (photos); `threshold` raw, an alarm is score > threshold.

    Returns image_auroc, image_auroc_interval ([low, high], 95%), image_ap, pixel_auroc, pixel_ap, aupro, image_f1_max
    (oracle), precision, recall, f1, false_alarm_rate, threshold, n_images, n_good, n_anomalous, n_groups,
    per_defect (see `per_defect_table`), undefined (metric -> reason for each one that is None), notes (sentences) and
    curves ({"roc": {fpr, tpr}, "pr": {recall, precision}}, either None where undefined).
    Raises DataError for scores or maps that are not finite and for masks of another shape than their map.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if not len(scores) == len(labels) == len(defects):
        raise ValueError(f"{len(scores)} scores, {len(labels)} labels and {len(defects)} defect names")
    image = image_metrics(labels, scores, threshold)
    undefined, notes = image.pop("undefined"), []

    interval = None
    try:
        interval = list(bootstrap_auroc(labels, scores, groups, seed=seed))
        if interval[0] == interval[1]:
            notes.append("The bootstrap interval has no width: the sample holds no error, which does not mean none.")
    except UndefinedMetric as reason:
        undefined["image_auroc_interval"] = str(reason)

    pixel = dict.fromkeys(("pixel_auroc", "pixel_ap", "aupro"))
    usable = _usable_masks(labels, maps, masks)
    without_mask = int(labels.sum()) - sum(bool(labels[i]) for i, _ in usable)
    if usable and masks is not None and any(mask is not None for mask in masks):
        pixel = pixel_metrics([mask for _, mask in usable], [maps[i] for i, _ in usable])
        undefined |= pixel.pop("undefined")
        if without_mask:
            notes.append(f"Left out of the pixel metrics: {counted(without_mask, 'anomalous image')} without a mask.")
    else:
        undefined |= dict.fromkeys(pixel, NO_MASKS)

    return {
        "image_auroc": image["image_auroc"],
        "image_auroc_interval": interval,
        "image_ap": image["image_ap"],
        **pixel,
        "image_f1_max": image["image_f1_max"],
        "precision": image["precision"],
        "recall": image["recall"],
        "f1": image["f1"],
        "false_alarm_rate": image["false_alarm_rate"],
        "threshold": None if threshold is None else float(threshold),
        "n_images": int(labels.size),
        "n_good": int((~labels).sum()),
        "n_anomalous": int(labels.sum()),
        "n_groups": None if groups is None else len(set(groups)),
        "per_defect": per_defect_table(scores, labels, defects, threshold),
        "undefined": undefined,
        "notes": notes,
        "curves": _curves(labels, scores),
    }


def per_defect_table(scores: np.ndarray, labels: np.ndarray, defects: Sequence[str], threshold: float | None) -> list:
    """One row per kind of defect, in the order of its name: {defect, n, image_auroc, alarms, recall}.

    The AUROC is against all good images (None where there is none); `alarms` counts images above the threshold and
    `recall` is their share (both None without a threshold).
    """
    defects, rows = np.asarray(defects, dtype=object), []
    for defect in sorted(set(defects[labels])):
        chosen = labels & (defects == defect)
        against_good = chosen | ~labels
        alarms = None if threshold is None else int((scores[chosen] > float(threshold)).sum())
        rows.append(
            {
                "defect": str(defect),
                "n": int(chosen.sum()),
                "image_auroc": None if labels.all() else auroc(labels[against_good], scores[against_good]),
                "alarms": alarms,
                "recall": None if alarms is None else alarms / int(chosen.sum()),
            }
        )
    return rows


def write_metrics(out_dir: str | Path, result: dict) -> dict[str, Path]:
    """Writes what `evaluate` returned; returns name -> path of the files written.

    metrics.json (all but the curves), per_defect.csv, roc.png and pr.png where both classes are there, and
    robustness.csv where `result` also holds a `robustness_table` as "robustness".
    Raises DfengineError where a file cannot be written.
    """
    out_dir = Path(out_dir)
    numbers = {name: value for name, value in result.items() if name != "curves"}
    contents: dict[str, bytes | str] = {
        "metrics.json": json.dumps(numbers, indent=2, allow_nan=False) + "\n",
        "per_defect.csv": _csv(("defect", "n", "image_auroc", "alarms", "recall"), result["per_defect"]),
    }
    if "robustness" in result:
        rows = result["robustness"]["rows"]
        contents["robustness.csv"] = _csv(list(rows[0]), rows)
    if roc := result["curves"]["roc"]:
        contents["roc.png"] = roc_plot(roc["fpr"], roc["tpr"], _title("Image AUROC", result, "image_auroc"))
    if pr := result["curves"]["pr"]:
        share = result["n_anomalous"] / result["n_images"]
        contents["pr.png"] = pr_plot(pr["recall"], pr["precision"], share, _title("Image AP", result, "image_ap"))
    for name, content in contents.items():
        atomic_write(out_dir / name, content)
    return {name: out_dir / name for name in contents}


def _usable_masks(labels, maps, masks) -> list[tuple[int, np.ndarray]]:
    """(index, mask) of the images that the pixel metrics can use."""
    if maps is None or masks is None:
        return []
    if not len(maps) == len(masks) == len(labels):
        raise ValueError(f"{len(maps)} maps and {len(masks)} masks for {len(labels)} images")
    usable = []
    for index, mask in enumerate(masks):
        if mask is not None:
            usable.append((index, mask))
        elif not labels[index]:
            usable.append((index, np.zeros(np.shape(maps[index]), dtype=bool)))
    return usable


def _curves(labels: np.ndarray, scores: np.ndarray) -> dict:
    if labels.all() or not labels.any():
        return {"roc": None, "pr": None}
    fpr, tpr, _ = roc_curve(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "roc": {"fpr": fpr.tolist(), "tpr": tpr.tolist()},
        # From recall 0 to 1: up to its recall a point's precision holds, as the average precision sums it.
        "pr": {"recall": recall[::-1].tolist(), "precision": precision[::-1].tolist()},
    }


def _title(name: str, result: dict, key: str) -> str:
    title = f"{name} {result[key]:.4f}"
    interval = result["image_auroc_interval"] if key == "image_auroc" else None
    return title + (f"  (95%: {interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def _csv(fields: Sequence[str], rows: list[dict]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
