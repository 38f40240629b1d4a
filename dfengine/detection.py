"""What a detector found: the scores, labels and maps of a batch of images (DESIGN section 3, "Results")."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dfengine.arguments import path_of
from dfengine.errors import UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.files import atomic_write, make_folder, remove
from dfengine.results import begin_results, earlier_results, list_result
from dfengine.wording import counted

log = logging.getLogger("dfengine")

UNCALIBRATED_PIXEL_THRESHOLD = 0.5
"""Where a map pixel counts as anomalous without a calibration: the map is a probability."""

ROW_FIELDS = ("name", "pred_score", "pred_score_calibrated", "pred_label", "threshold", "seed", "heatmap", "error")
"""The columns of results.csv and the keys of each line of results.jsonl."""


class Refused(NamedTuple):
    """An image that was not scored: its place in the input (from 0), its name, and why."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class ImageDetection:
    """One image of a `Detection`, with plain scalars. Fields as there, without the batch axis."""

    name: str
    pred_score: float
    pred_score_calibrated: float | None
    pred_label: bool | None
    threshold: float | None
    seed: int
    anomaly_map: np.ndarray = dataclasses.field(repr=False)
    pred_mask: np.ndarray = dataclasses.field(repr=False)
    reconstruction: np.ndarray = dataclasses.field(repr=False)
    image: np.ndarray = dataclasses.field(repr=False)

    def heatmap(self) -> np.ndarray:
        """The map over the image, the mask outlined, at the size of the map: uint8 (H, W, 3)."""
        from dfengine.report.overlay import heatmap_overlay

        height, width = self.anomaly_map.shape
        image = self.image
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return heatmap_overlay(image, self.anomaly_map, mask=self.pred_mask)


@dataclass(frozen=True, eq=False, repr=False)
class Detection:
    """The scored images of a batch, in input order; NumPy arrays that no later call changes.

    names: what was scored (B,): the path as given, or a description of the array.
    pred_score: float32 (B,), the raw score in [0, 1].
    anomaly_map: float32 (B, S, S) in [0, 1] at model size S; with `original_size`, a list of float32 (H, W).
    reconstruction: float32 (B, S, S, 3) RGB, the nearest normal image as the model sees it; [0, 1] but for overshoot.
    image: uint8 (B, S, S, 3) RGB, the input as the model saw it.
    calibration: None for a model that was never calibrated; then `threshold`, `pred_label` and
        `pred_score_calibrated` are None, and `note` says so.
    seed: of the diffusion noise.
    errors: the images that were refused, by rising index, and are in none of the arrays.
    start: the place in the input of the first image here, refused ones counted: above 0 in the later parts of a
        `Detector.stream`. `errors` count from the start of the input.

    `len`, iteration and `detection[3]` give images (`ImageDetection`); a slice, a boolean array (B,) or a sequence of
    integers gives the `Detection` of those images, without `errors`.
    """

    names: tuple[str, ...]
    pred_score: np.ndarray
    anomaly_map: np.ndarray | list[np.ndarray]
    reconstruction: np.ndarray
    image: np.ndarray
    calibration: Calibration | None = None
    seed: int = 0
    errors: tuple[Refused, ...] = ()
    start: int = 0

    def __post_init__(self):
        fields = (self.names, self.pred_score, self.anomaly_map, self.reconstruction, self.image)
        if len({len(field) for field in fields}) != 1:
            raise ValueError(f"the fields of a Detection differ in length: {[len(field) for field in fields]}")

    @classmethod
    def concatenate(cls, parts: Sequence[Detection]) -> Detection:
        """One Detection of all images and errors of `parts` (at least one; the same detector and options), as if they
        had been one input: errors are numbered on from the first part's start. Raises `UsageError` for other parts."""
        if isinstance(parts, Detection) or not isinstance(parts, Iterable):
            raise UsageError("parts: expected a list of Detections")
        parts = list(parts)
        if not parts or not all(isinstance(part, Detection) for part in parts):
            raise UsageError("parts: expected Detections, one at least")
        first = parts[0]
        maps = [part.anomaly_map for part in parts]
        if any((part.calibration, part.seed) != (first.calibration, first.seed) for part in parts):
            raise UsageError("parts: of detectors with different thresholds or seeds; their labels cannot be joined")
        if len({of.shape[1:] if isinstance(of, np.ndarray) else "original" for of in maps}) > 1:
            raise UsageError("parts: with maps of different sizes")
        start, errors = parts[0].start, []
        for part in parts:
            errors += [error._replace(index=error.index - part.start + start) for error in part.errors]
            start += len(part) + len(part.errors)
        return dataclasses.replace(
            first,
            names=tuple(name for part in parts for name in part.names),
            pred_score=np.concatenate([part.pred_score for part in parts]),
            anomaly_map=sum(maps, []) if isinstance(maps[0], list) else np.concatenate(maps),
            reconstruction=np.concatenate([part.reconstruction for part in parts]),
            image=np.concatenate([part.image for part in parts]),
            errors=tuple(errors),
        )

    @property
    def threshold(self) -> float | None:
        """The raw score above which an image is an alarm."""
        return None if self.calibration is None else self.calibration.threshold

    @property
    def pixel_threshold(self) -> float:
        """The map value above which a pixel is in `pred_mask`: `threshold`, or 0.5 without a calibration."""
        return UNCALIBRATED_PIXEL_THRESHOLD if self.calibration is None else self.calibration.threshold

    @cached_property
    def pred_score_calibrated(self) -> np.ndarray | None:
        """float64 (B,) in (0, 1): rises with the raw score, 0.5 at the threshold."""
        return None if self.calibration is None else self.calibration.apply(self.pred_score)

    @cached_property
    def pred_label(self) -> np.ndarray | None:
        """bool (B,): True where the score is above the threshold."""
        return None if self.calibration is None else self.calibration.decide(self.pred_score)

    @cached_property
    def pred_mask(self) -> np.ndarray | list[np.ndarray]:
        """bool, like `anomaly_map`: True where the map is above `pixel_threshold`.

        The mask of an image whose score is above `pixel_threshold`, an alarm, is never empty. The score is a mean of
        pixels of the map at model size, so one of them is above the threshold too, but the mean may round up, and a
        peak may be averaged away when the map is resized to the original: then the largest pixels are the mask.
        """
        masks = [self._mask(m, score) for m, score in zip(self.anomaly_map, self.pred_score, strict=True)]
        if isinstance(self.anomaly_map, list):
            return masks
        return np.array(masks, dtype=bool).reshape(self.anomaly_map.shape)

    def _mask(self, anomaly_map: np.ndarray, score: float) -> np.ndarray:
        mask = np.float64(anomaly_map) > self.pixel_threshold
        if np.float64(score) > self.pixel_threshold and not mask.any():
            return anomaly_map == anomaly_map.max()
        return mask

    @property
    def note(self) -> str:
        """One sentence on what the labels are worth."""
        if self.calibration is None:
            return "No threshold: the model is not calibrated (run `dfengine calibrate`), so there are no labels."
        return self.calibration.message

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key) -> ImageDetection | Detection:
        positions = np.arange(len(self))[key]
        if positions.ndim == 0:
            return self._image(int(positions))
        maps = self.anomaly_map
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in positions),
            pred_score=self.pred_score[positions],
            anomaly_map=[maps[i] for i in positions] if isinstance(maps, list) else maps[positions],
            reconstruction=self.reconstruction[positions],
            image=self.image[positions],
            errors=(),
            start=0,
        )

    def __iter__(self) -> Iterator[ImageDetection]:
        return (self._image(i) for i in range(len(self)))

    def _image(self, i: int) -> ImageDetection:
        return ImageDetection(
            name=self.names[i],
            pred_score=float(self.pred_score[i]),
            pred_score_calibrated=None if self.calibration is None else float(self.pred_score_calibrated[i]),
            pred_label=None if self.calibration is None else bool(self.pred_label[i]),
            threshold=self.threshold,
            seed=self.seed,
            anomaly_map=self.anomaly_map[i],
            pred_mask=self.pred_mask[i],
            reconstruction=self.reconstruction[i],
            image=self.image[i],
        )

    def __repr__(self) -> str:
        parts = [counted(len(self), "image")]
        if len(self):
            parts.append(f"pred_score {self.pred_score.min():.4f} to {self.pred_score.max():.4f}")
        if self.calibration is None:
            parts.append("not calibrated")
        else:
            parts.append(f"{int(self.pred_label.sum())} above the threshold {self.threshold:.4f}")
        if isinstance(self.anomaly_map, list):
            parts.append("maps at original size")
        else:
            parts.append("maps {}x{}".format(*self.anomaly_map.shape[1:]))
        if self.errors:
            parts.append(f"{len(self.errors)} refused")
        return f"Detection({', '.join(parts)}, seed {self.seed})"

    def rows(self, heatmaps: Sequence[str | Path | None] | None = None) -> list[dict]:
        """One dict of `ROW_FIELDS` (plain JSON values) per image, scored or refused, in input order.

        heatmaps: the file of each scored image (None where it has none), for the column of that name.
        """
        rows: list[dict] = []
        for i, image in enumerate(self):
            row = dict.fromkeys(ROW_FIELDS)
            row.update((field, getattr(image, field)) for field in ROW_FIELDS[:6])
            heatmap = heatmaps[i] if heatmaps is not None else None
            row["heatmap"] = Path(heatmap).as_posix() if heatmap is not None else None
            rows.append(row)
        for error in self.errors:  # by rising index, so the rows before it are all there
            row = dict.fromkeys(ROW_FIELDS) | {"name": error.name, "error": error.reason}
            rows.insert(error.index - self.start, row)
        return rows

    def save_heatmaps(self, folder: str | Path, first: int = 0) -> list[Path]:
        """Write each image's overlay as `<folder>/<number>_<name>.png`, numbered from `first`; returns the files.

        The number keeps inputs that share a file name apart, and only the letters, digits, `.`, `-` and `_` of the
        name's last part are kept, so that no name leads out of `folder`. Raises `DfengineError` when one cannot be
        written.
        """
        from PIL import Image

        folder = path_of("a folder", folder)
        files = []
        for number, image in enumerate(self, start=first):
            encoded = io.BytesIO()
            Image.fromarray(image.heatmap()).save(encoded, format="PNG")
            files.append(folder / heatmap_name(number, image.name))
            atomic_write(files[-1], encoded.getvalue())
        return files

    def save(self, folder: str | Path) -> Path:
        """Write `heatmaps/*.png`, `results.csv` and `results.jsonl` into `folder`, which is made; returns it.

        Results that dfengine wrote there before, its commands' too, are replaced, with a warning. Raises `UsageError`
        for what is no folder, and one that holds images, or files of somebody else under the names of results, and
        `DfengineError` naming the folder or file that cannot be written.
        """
        folder = path_of("a folder", folder)
        leftovers = earlier_results(folder)
        make_folder(folder)
        if leftovers:
            log.warning("replacing the results of an earlier run in %s", folder)
        for leftover in leftovers:
            remove(leftover)
        begin_results(folder, ("results.csv", "results.jsonl"))
        list_result(folder, *(f"heatmaps/{heatmap_name(i, name)}" for i, name in enumerate(self.names)))
        files = self.save_heatmaps(folder / "heatmaps")
        write_rows(folder, self.rows([file.relative_to(folder) for file in files]))
        return folder


def write_rows(folder: Path, rows: Sequence[dict]) -> None:
    """Write `Detection.rows` as `results.csv` and `results.jsonl` (UTF-8; empty or null where there is no value)."""
    table = io.StringIO()
    writer = csv.DictWriter(table, ROW_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(Path(folder) / "results.csv", table.getvalue())
    atomic_write(Path(folder) / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def resize_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An anomaly map float32 (S, S) at `size` (H, W): bilinear where it grows, area means where it shrinks."""
    height, width = size
    if (height, width) == anomaly_map.shape:
        return anomaly_map.copy()
    shrinks = height * width < anomaly_map.size
    return cv2.resize(anomaly_map, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def heatmap_name(number: int, name: str) -> str:
    """The file of the overlay of image `name`."""
    last = re.split(r"[\\/]", name)[-1]
    stem = re.sub(r"[^\w.-]+", "_", re.sub(r"\.\w{1,5}$", "", last)).strip("._")
    stem = stem.encode("utf-8", "ignore")[:120].decode("utf-8", "ignore") or "image"
    return f"{number:05d}_{stem}.png"
