"""The study's image sets: normals to train on, and held-out normals with synthetic anomalies to choose settings by.

No test label is read. For the real sets the held-out normals are training images (of photos that gave no image to train
on, for `rail_eclip`); for the rendered fasteners a labelled set of seeds of its own is rendered besides.

The anomalies that choose must not be made as those that train, or a detector would be rewarded for seeing the traces of
its own synthesis. `Foreign` therefore erases by other means (OpenCV's inpainting and Poisson cloning), and processes
normals in the same way where nothing is at stake (`decoy`, `transplant`): those stay normal.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dfengine.data.augment import AugmentConfig, augment_normal
from dfengine.data.fasteners import DEFECTS, render_fastener
from dfengine.data.folders import open_dataset
from dfengine.data.foreground import estimate_foreground, objects_alike
from dfengine.data.images import load_uint8
from dfengine.data.regions import Scene, centroid, grow, shape_region
from dfengine.data.synthesis import SynthesisConfig, Synthesizer
from dfengine.data.textures import TextureSource

FOLDS = 5
NORMALS = 64
"""Held-out normals after augmentation: few photos are reused under other light and pose."""

RENDERED = dict(train=320, held_out=64, labelled_good=200, per_defect=70, seed=4100, variety=1.0)
"""The rendered set; seeds 4100, 4101 and 4102 are the study's alone."""


@dataclass(frozen=True)
class StudySet:
    """train: uint8 (N, S, S, 3), written out as `names` for a folder of normals. images: uint8 (M, S, S, 3) to choose
    by, with `kinds` (M,): "normal", "normal:decoy", "normal:transplant", "own:<kind>", "foreign:<kind>",
    "small:<kind>", "texture", "real:<defect>" (rendered with its label) or "real:normal". masks: bool (M, S, S)."""

    train: list[Path]
    images: np.ndarray
    kinds: tuple[str, ...]
    masks: np.ndarray


def build(name: str, size: int, seed: int, work: Path) -> StudySet:
    """The set called `name` at `size` pixels, split `seed`. Rendered pictures are kept under `work`."""
    if name == "fasteners":
        train, held_out = rendered(work)
    else:
        train, held_out = _real(name, seed)
    images, kinds, masks = anomalies(np.stack([load_uint8(path, size) for path in held_out]), [4242, seed])
    if name == "fasteners":
        for image, mask, defect in labelled(work, size):
            images.append(image)
            kinds.append("real:normal" if defect == "good" else f"real:{defect}")
            masks.append(mask)
    return StudySet(train, np.stack(images), tuple(kinds), np.stack(masks))


def anomalies(held_out: np.ndarray, seed: int | list[int]) -> tuple[list[np.ndarray], list[str], list[np.ndarray]]:
    """`images`, `kinds` and `masks` of a `StudySet` made of held-out normals, uint8 (N, S, S, 3)."""
    rng = np.random.default_rng(seed)
    size = held_out.shape[1]
    copies = -(-NORMALS // len(held_out))
    normals = np.concatenate([held_out] * copies)[:NORMALS]
    light = AugmentConfig()
    normals = np.stack([n if i < len(held_out) else augment_normal(n, rng, light) for i, n in enumerate(normals)])
    foregrounds = estimate_foreground(normals)
    images, kinds, masks = [], [], []

    def add(image: np.ndarray, kind: str, mask: np.ndarray | None = None) -> None:
        images.append(image)
        kinds.append(kind)
        masks.append(np.zeros((size, size), bool) if mask is None else mask)

    for image in normals:
        add(image, "normal")
    foreign = Foreign(normals, foregrounds)
    textures = TextureSource.procedural(size)
    own = Synthesizer(normals, textures, SynthesisConfig(recipe="structural"), foregrounds)
    paper = Synthesizer(normals, textures, SynthesisConfig(recipe="paper"), foregrounds)
    for i in range(NORMALS):
        add(foreign.decoy(i, rng), "normal:decoy")
        if foreign.aligned:
            add(foreign.transplant(i, rng), "normal:transplant")
        for kind in ("missing", "ring", "part"):
            image, title, mask = foreign.erase(i, kind, rng)
            if mask.any():
                add(image, title, mask)
        for synthesizer, prefix in ((own, "own:"), (paper, "texture:")):
            result = synthesizer.sample(i, rng)
            if result.kind != "normal":
                add(result.image, prefix + result.kind, result.mask)
    rng = np.random.default_rng([*np.atleast_1d(seed), 1])  # of their own: what is drawn above stays as it is
    for i in range(NORMALS):
        for damage in (foreign.scratch, foreign.dent):
            image, title, mask = damage(i, rng)
            if mask.any():
                add(image, title, mask)
    return images, kinds, masks


def _real(name: str, seed: int) -> tuple[list[Path], list[Path]]:
    root = Path(os.environ["DFENGINE_DATA"]) / name
    paths = [sample.path for sample in open_dataset(root).train]
    fold_of = {path: index % FOLDS for index, path in enumerate(paths)}
    if (root / "annotations.csv").is_file():  # folds by photo: crops of one photo share light and camera
        with open(root / "annotations.csv", newline="") as file:
            by_name = {row["name"]: int(row["fold"]) for row in csv.DictReader(file)}
        fold_of = {path: by_name[path.stem] for path in paths}
    held = seed % FOLDS
    return [p for p in paths if fold_of[p] != held], [p for p in paths if fold_of[p] == held]


def rendered(work: Path) -> tuple[list[Path], list[Path]]:
    """(training, held-out) pictures of rendered sound fasteners, made under `work` where they are not there."""
    parts = []
    for offset, (part, count) in enumerate((("train", RENDERED["train"]), ("held_out", RENDERED["held_out"]))):
        paths = [work / "fasteners" / part / f"{index:03d}.png" for index in range(count)]
        for index, path in enumerate(paths):
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                seed = RENDERED["seed"] + offset
                image, _ = render_fastener(seed, index, "good", 256, "train", RENDERED["variety"])
                cv2.imwrite(str(path.with_suffix(f".{os.getpid()}.png")), image[..., ::-1])
                os.replace(path.with_suffix(f".{os.getpid()}.png"), path)
        parts.append(paths)
    return parts[0], parts[1]


def labelled(work: Path, size: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """(image, mask, defect) of the labelled rendered set, kept under `work`."""
    path = work / "fasteners" / f"labelled-{size}.npz"
    if not path.exists():
        rows = []
        for defect in DEFECTS:
            for index in range(RENDERED["labelled_good"] if defect == "good" else RENDERED["per_defect"]):
                image, mask = render_fastener(RENDERED["seed"] + 2, index, defect, 256, "test", RENDERED["variety"])
                image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
                mask = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) > 0.5
                rows.append((image, mask, defect))
        images, masks, defects = zip(*rows, strict=True)
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, images=np.stack(images), masks=np.stack(masks), defects=np.array(defects))
        os.replace(part, path)
    with np.load(path) as file:
        return list(zip(file["images"], file["masks"], file["defects"].tolist(), strict=True))


class Foreign:
    """Edits that share no code with the training synthesis. `aligned`: the objects stand alike in all images, so that
    one's object fits into another's picture."""

    def __init__(self, images: np.ndarray, foregrounds: np.ndarray):
        self.images, self.foregrounds = images, foregrounds
        self.aligned = objects_alike(images, foregrounds)

    def erase(self, index: int, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, str, np.ndarray]:
        """(image, "foreign:<kind>", mask): the object gone ("missing"), gone but for its middle ("ring"), or a part of
        it ("part")."""
        image, region = self.images[index], self.foregrounds[index]
        size = len(image)
        if kind == "ring":
            depth = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 3)
            region = region & (depth < rng.uniform(0.5, 0.8) * depth.max())
        if kind == "part":
            x, y = centroid(region)
            angle = rng.uniform(0, 2 * np.pi)
            yy, xx = np.mgrid[:size, :size]
            offset = rng.uniform(-0.05, 0.12) * size
            region = region & ((xx - x) * np.cos(angle) + (yy - y) * np.sin(angle) > offset)
        region = grow(region, 1 + size // 48)
        after = self._fill(index, region, rng)
        return after, f"foreign:{kind}", region & _changed(image, after)

    def scratch(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str, np.ndarray]:
        """(image, "small:scratch", mask): a bent line on the object, brighter or darker, a twentieth to a sixth of the
        image long."""
        image = self.images[index]
        size = len(image)
        points = [self._point(index, rng)]
        angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.16) * size
        for _ in range(3):
            angle += rng.normal(0, 0.35)
            points.append(points[-1] + length / 3 * np.array([np.cos(angle), np.sin(angle)]))
        line = np.zeros((size, size), np.uint8)
        fixed_point = 4  # binary places of the coordinates
        corners = np.rint(np.array(points) * 2**fixed_point).astype(np.int32)
        thickness = max(1, round(rng.uniform(0.008, 0.025) * size))
        cv2.polylines(line, [corners], False, 255, thickness, cv2.LINE_AA, fixed_point)
        alpha = (line / 255.0 * self.foregrounds[index])[..., None]
        shade = rng.choice([-1, 1]) * rng.uniform(35, 90) + rng.normal(0, 8, image.shape)
        after = np.clip(np.rint(image + alpha * shade), 0, 255).astype(np.uint8)
        return after, "small:scratch", _changed(image, after)

    def dent(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str, np.ndarray]:
        """(image, "small:dent", mask): the picture shifted within a spot on the object's rim, as where it is bent or
        worn."""
        image, region = self.images[index], self.foregrounds[index]
        size = len(image)
        y, x = np.nonzero(region & ~cv2.erode(region.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool))
        at = int(rng.integers(len(x))) if len(x) else 0
        centre = (x[at], y[at]) if len(x) else (size / 2, size / 2)
        radius, angle = rng.uniform(0.04, 0.1) * size, rng.uniform(0, 2 * np.pi)
        yy, xx = np.mgrid[:size, :size].astype(np.float32)
        fall = np.clip(1 - ((xx - centre[0]) ** 2 + (yy - centre[1]) ** 2) / radius**2, 0, 1) ** 2
        shift = rng.uniform(0.4, 0.8) * radius * fall
        places = [a + (shift * b).astype(np.float32) for a, b in ((xx, np.cos(angle)), (yy, np.sin(angle)))]
        after = cv2.remap(image, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return after, "small:dent", _changed(image, after)

    def decoy(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """Background erased and filled with background."""
        image, foreground = self.images[index], self.foregrounds[index]
        scene = Scene(image.astype(np.float32), ~grow(foreground, len(image) // 20))
        region = shape_region(scene, rng, rng.uniform(0.02, 0.15)) & scene.foreground
        return self._fill(index, region, rng) if region.any() else image

    def transplant(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """The object of another normal image in place of this one's, in this one's light."""
        image, other = self.images[index], int(rng.integers(len(self.images)))
        region = grow(self.foregrounds[index] | self.foregrounds[other], 1)
        rim = grow(region, 3) & ~region
        target, source = image.astype(np.float32), self.images[other].astype(np.float32)
        if rim.any():
            gain = target[rim].std(axis=0) / np.maximum(source[rim].std(axis=0), 1.0)
            source = target[rim].mean(axis=0) + np.clip(gain, 0.7, 1.4) * (source - source[rim].mean(axis=0))
        alpha = cv2.GaussianBlur(region.astype(np.float32), (0, 0), 1.5)[..., None]
        return np.clip(np.rint(target + alpha * (source - target)), 0, 255).astype(np.uint8)

    def _point(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """(x, y) of a pixel of the object, of the image where none was found."""
        y, x = np.nonzero(self.foregrounds[index])
        if not len(x):
            return rng.uniform(0, len(self.images[index]), 2)
        at = int(rng.integers(len(x)))
        return np.array([x[at], y[at]], np.float64)

    def _fill(self, index: int, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = self.images[index]
        size = len(image)
        if rng.random() < 0.5:
            shifts = rng.integers(-size // 2, size // 2 + 1, (32, 2))
            taken = self.foregrounds[index]
            cost = [np.roll(taken, shift, (0, 1))[region].mean() for shift in shifts]
            dy, dx = shifts[int(np.argmin(cost))]
            matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float64)
            source = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101)
            return _clone(source, image, region)
        flag = cv2.INPAINT_TELEA if rng.random() < 0.5 else cv2.INPAINT_NS
        filled = cv2.inpaint(image, region.astype(np.uint8), 3, flag).astype(np.float32)
        grain = image.astype(np.float32) - cv2.GaussianBlur(image, (0, 0), 1.0)
        grain = grain[~region]
        noise = grain[rng.integers(len(grain), size=region.sum())] if len(grain) else 0
        filled[region] += noise
        return np.clip(np.rint(filled), 0, 255).astype(np.uint8)


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where two uint8 images (S, S, 3) differ by more than 10 levels."""
    return np.abs(after.astype(np.int16) - before).max(axis=-1) > 10


def _clone(source: np.ndarray, target: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Poisson cloning of `source` into `target` at the same place; the border of the picture is left alone."""
    inner = region.copy()
    inner[:2], inner[-2:], inner[:, :2], inner[:, -2:] = False, False, False, False
    if not inner.any():
        return target
    y, x = np.nonzero(inner)
    if min(np.ptp(y), np.ptp(x)) < 2:  # OpenCV 5 fails on less than 3 pixels, which have no inside to blend
        return np.where(inner[..., None], source, target)
    centre = (int(x.min() + x.max() + 1) // 2, int(y.min() + y.max() + 1) // 2)
    return cv2.seamlessClone(source, target, inner.astype(np.uint8) * 255, centre, cv2.NORMAL_CLONE)
