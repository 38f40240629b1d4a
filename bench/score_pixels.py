"""How many of the map's largest pixels an image score should average, by trained checkpoints and without test labels.

    python bench/score_pixels.py --out RESULTS.json CHECKPOINT=NORMALS ... [fasteners=CHECKPOINT]

NORMALS is the folder that CHECKPOINT was trained on. Its held-out images, under other light and pose, are scored
against synthetic anomalies of them (`study_sets.anomalies`); `fasteners=` scores the study's labelled rendered set.
Writes the image AUROC of each kind of anomaly for each `top_k`, and prints their table, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study_sets  # noqa: E402

from dfengine.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from dfengine.detector import Detector  # noqa: E402
from dfengine.engine.modules import top_k_count  # noqa: E402
from dfengine.evaluation.metrics import auroc  # noqa: E402
from dfengine.training.data import read_normals  # noqa: E402

TOP_K = (50, 100, 200, 400, 800, 1600, 3200, 6400)
"""Of 65536 pixels, as `ModelConfig.top_k`."""


def aurocs(detector: Detector, images: np.ndarray, kinds: list[str], top_k: Sequence[float]) -> dict[str, list[float]]:
    """Image AUROC of each kind of anomaly against the normals, for each `top_k`; images uint8 (N, S, S, 3)."""
    maps = np.stack([image.anomaly_map.reshape(-1) for image in detector.detect(list(images))])
    ranked, side = -np.sort(-maps, axis=1), detector.config.image_size
    names = np.array(kinds)
    normal = np.char.startswith(names, "normal") | (names == "real:normal")
    found = {}
    for kind in sorted({group_of(kind) for kind in names[~normal]}):
        chosen = normal | np.array([group_of(name) == kind for name in names])
        scores = [ranked[chosen, : top_k_count(side, side, k)].mean(axis=1) for k in top_k]
        found[kind] = [float(auroc(~normal[chosen], of)) for of in scores]
    return found


def group_of(kind: str) -> str:
    """All of the training's own structural anomalies are one kind; so are textures."""
    return kind.split(":")[0] if kind.startswith(("own:", "texture:")) else kind


def sets(pairs: list[str], work: Path) -> Iterator[tuple[str, Checkpoint, np.ndarray, list[str]]]:
    """(name, checkpoint, images, kinds) of each "CHECKPOINT=NORMALS" or "fasteners=CHECKPOINT"."""
    for pair in pairs:
        left, _, right = pair.partition("=")
        if left == "fasteners":
            checkpoint, name = load_checkpoint(right), "labelled rendered fasteners"
            rows = study_sets.labelled(work, checkpoint.config.image_size)
            images, defects = np.stack([row[0] for row in rows]), [row[2] for row in rows]
            kinds = ["real:normal" if defect == "good" else f"real:{defect}" for defect in defects]
        else:
            checkpoint, folder = load_checkpoint(left), Path(right)
            name = folder.parent.name if folder.name == "normals" else folder.name
            normals = read_normals(folder, checkpoint.config.image_size, 0.1, 0)
            images, kinds, _ = study_sets.anomalies(normals.images[normals.held_out], 7)
        yield name, checkpoint, np.asarray(images), kinds


def parsed(document: str) -> argparse.Namespace:
    """The arguments of a script with this docstring: out, work, pairs."""
    parser = argparse.ArgumentParser(description=document.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/study"), help="where rendered pictures are kept")
    parser.add_argument("pairs", nargs="+", metavar="CHECKPOINT=NORMALS")
    return parser.parse_args()


def main() -> int:
    arguments, results = parsed(__doc__), []
    for name, checkpoint, images, kinds in sets(arguments.pairs, arguments.work):
        found = aurocs(Detector(checkpoint, precision="float32"), images, kinds, TOP_K)
        by_pixels = {kind: dict(zip(map(str, TOP_K), values, strict=True)) for kind, values in found.items()}
        results.append({"set": name, "images": len(kinds), "auroc": by_pixels})
        print(f"{name}: done", flush=True)
    write(arguments.out, results)
    print("| set | anomalies | " + " | ".join(map(str, TOP_K)) + " |\n" + "|---" * (len(TOP_K) + 2) + "|")
    for result in results:
        for kind, values in result["auroc"].items():
            print(f"| {result['set']} | {kind} | " + " | ".join(f"{values[str(k)]:.3f}" for k in TOP_K) + " |")
    return 0


def write(out: Path, results: list[dict]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
