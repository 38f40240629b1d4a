"""The full protocol on `rail_eclip`: five folds by photo, scores pooled.

    python bench/rail_folds.py [--out build/rail-folds] [--jobs 2] [--folds 0 1 2 3 4] [--top-k K] -- TRAIN OPTIONS ...

Each fold runs `dfengine train` on the sound crops of the four other folds, with the options after `--`, and scores
every crop of its own: 167 sound and 92 missing in all. Writes pooled.json: the AUROC of the pooled raw scores, its 95%
interval by bootstrap over photos, and each fold's AUROC; and scores.csv. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dfengine.checkpoint import load_checkpoint
from dfengine.detector import Detector
from dfengine.evaluation.metrics import auroc, bootstrap_auroc

FOLDS = (0, 1, 2, 3, 4)


def crops(root: Path) -> list[dict[str, str]]:
    """The rows of annotations.csv, each with "path"."""
    with open(root / "annotations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, "path": str(root / row["split"] / f"{row['name']}.png")} for row in rows]


def train(rows: list[dict[str, str]], fold: int, out: Path, options: list[str]) -> Path:
    """Trains the detector of a fold where it is not there yet; returns its checkpoint."""
    folder = out / f"fold{fold}"
    checkpoint = folder / "model.safetensors"
    if checkpoint.exists():
        return checkpoint
    normals = folder / "normals"
    normals.mkdir(parents=True, exist_ok=True)
    for row in rows:
        link = normals / f"{row['name']}.png"
        if row["label"] == "good" and int(row["fold"]) != fold and not link.exists():
            link.symlink_to(Path(row["path"]).resolve())
    command = [sys.executable, "-m", "dfengine", "train", str(normals), "--out", str(checkpoint), *options]
    if (folder / "model.run" / "state.safetensors").exists():
        command.append("--resume")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / "train.log", "a") as log:
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True)
    return checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/rail-folds"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folds", type=int, nargs="*", default=FOLDS)
    parser.add_argument("--top-k", type=float, help="score with this instead of the checkpoints' own")
    parser.add_argument("options", nargs="*", help="options of `dfengine train`, after --")
    arguments = parser.parse_args()
    if "DFENGINE_DATA" not in os.environ:
        parser.error("set DFENGINE_DATA to the folder that holds rail_eclip")
    rows = crops(Path(os.environ["DFENGINE_DATA"]) / "rail_eclip")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        fold_checkpoints = list(
            pool.map(lambda fold: train(rows, fold, arguments.out, arguments.options), arguments.folds)
        )
    labels, scores, photos, each, lines = [], [], [], {}, []
    for fold, checkpoint in zip(arguments.folds, fold_checkpoints, strict=True):
        own = [row for row in rows if int(row["fold"]) == fold]
        loaded = load_checkpoint(checkpoint)
        loaded = loaded if arguments.top_k is None else loaded.with_top_k(arguments.top_k)
        detection = Detector(loaded, precision="float32").detect([row["path"] for row in own])
        values = [image.pred_score for image in detection]
        missing = np.array([row["label"] == "missing" for row in own])
        each[fold] = float(auroc(missing, np.array(values)))
        labels.extend(missing)
        scores.extend(values)
        photos.extend(row["source_image"] for row in own)
        for row, value in zip(own, values, strict=True):
            lines.append([fold, row["split"], row["name"], row["label"], value])
    labels, scores = np.array(labels), np.array(scores)
    result = {
        "image_auroc": float(auroc(labels, scores)),
        "image_auroc_interval": list(bootstrap_auroc(labels, scores, photos)),
        "per_fold": each,
        "n_good": int((~labels).sum()),
        "n_missing": int(labels.sum()),
        "n_photos": len(set(photos)),
        "options": arguments.options,
    }
    with open(arguments.out / "scores.csv", "w", newline="") as file:
        csv.writer(file).writerows([["fold", "split", "name", "label", "pred_score"], *lines])
    (arguments.out / "pooled.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
