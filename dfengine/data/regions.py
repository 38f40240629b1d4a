"""Regions of a normal image for structural anomalies: along the object's own edges, or geometric (DESIGN section 1)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dfengine.data.foreground import fill_holes

LARGEST_PART = 0.15  # share of the image, for a part grown along edges, moved or pasted
COMPACT = 0.6  # an object at least so compact can have something in its middle


@dataclass(frozen=True)
class Scene:
    """One normal image with what the edits ask about it. image float32 (S, S, 3) in 8-bit levels, foreground bool."""

    image: np.ndarray
    foreground: np.ndarray

    @property
    def size(self) -> int:
        return self.image.shape[0]


def any_region(scene: Scene, rng: np.random.Generator, area: float) -> np.ndarray:
    """A region of about `area` (share of the image): along the object's own edges, or a geometric shape."""
    choice = rng.random()
    if choice < 0.35:
        return _grown_region(scene, rng, min(area, LARGEST_PART))
    if choice < 0.6:
        return _cut_region(scene, rng, area)
    if choice < 0.7 and compactness(scene.foreground) > COMPACT:
        return ring_region(scene, rng)
    return shape_region(scene, rng, area)


def _grown_region(scene: Scene, rng: np.random.Generator, area: float) -> np.ndarray:
    """A connected region grown from a point of the object over similar colours, so that cuts follow its parts."""
    size = scene.size
    work = min(size, 64)
    small = cv2.resize(scene.image, (work, work), interpolation=cv2.INTER_AREA) if work < size else scene.image
    small = cv2.GaussianBlur(small, (0, 0), 0.8)
    x, y = (min(int(v * work / size), work - 1) for v in foreground_point(scene, rng))
    colour = np.abs(small - small[y, x]).max(axis=-1)
    axis = np.arange(work, dtype=np.float32)
    distance = np.hypot(axis[None, :] - x, axis[:, None] - y) / (work * np.sqrt(area))
    cost = colour / (colour.mean() + 1e-6) + np.float32(rng.uniform(0.5, 2.0)) * distance
    near = cost <= np.quantile(cost, min(1.0, 1.3 * area))  # more than asked for: only the connected share is taken
    labels = cv2.connectedComponents(near.astype(np.uint8), connectivity=4)[1]
    part = fill_holes(labels == labels[y, x]) if near[y, x] else near
    soft = cv2.GaussianBlur(part.astype(np.float32), (0, 0), 0.7)
    soft = cv2.resize(soft, (size, size), interpolation=cv2.INTER_LINEAR)
    region = grow(soft > 0.5, int(rng.integers(1, 2 + max(1, size // 48))))
    parts = region & grow(scene.foreground, 1 + size // 32)
    return parts if parts.any() else region


def _cut_region(scene: Scene, rng: np.random.Generator, area: float) -> np.ndarray:
    """What a geometric shape holds of the object, with its rim: the end of a bar, the head of a bolt."""
    return shape_region(scene, rng, min(0.35, 2 * area)) & grow(scene.foreground, 1 + scene.size // 48)


def ring_region(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A ring, or an arc of it, about the middle of the object: bent bars and clips wind around something."""
    size = scene.size
    middle = np.array(centroid(scene.foreground)) + rng.uniform(-0.05, 0.05, 2) * size
    extent = np.sqrt(min(float(scene.foreground.mean()), 0.3) / np.pi) * size  # radius of a disc of the object's area
    radii = np.maximum(2, np.rint(extent * rng.uniform(0.5, 0.95) * rng.uniform(0.8, 1.25, 2))).astype(int)
    width = max(2, round(extent * rng.uniform(0.25, 0.65)))
    start, span = rng.uniform(0, 360), 360.0 if rng.random() < 0.4 else rng.uniform(50, 330)
    ring = np.zeros((size, size), np.uint8)
    centre = tuple(int(round(float(v))) for v in middle)
    cv2.ellipse(ring, centre, tuple(map(int, radii)), rng.uniform(0, 180), start, start + span, 1, width)
    return ring.astype(bool)


def core_region(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """What stands in the middle of the object, inside what winds around it, roughly: a box or an ellipse."""
    size = scene.size
    extent = np.sqrt(min(float(scene.foreground.mean()), 0.3) / np.pi) * size  # radius of a disc of the object's area
    x, y = np.array(centroid(scene.foreground)) + rng.uniform(-0.04, 0.04, 2) * size
    canvas = np.zeros((size, size), np.uint8)
    sides = 2 * extent * rng.uniform(0.25, 0.65, 2)
    box = ((float(x), float(y)), tuple(map(float, sides)), float(rng.uniform(-15, 15)))
    if rng.random() < 0.3:
        cv2.ellipse(canvas, box, 1, -1)
    else:
        _polygon(canvas, cv2.boxPoints(box))
    return canvas.astype(bool)


def shape_region(scene: Scene, rng: np.random.Generator, area: float) -> np.ndarray:
    """A blob, an ellipse, a rotated rectangle or a bent bar of about `area`, on a point of the object."""
    size = scene.size
    x, y = foreground_point(scene, rng)
    radius = size * np.sqrt(area / np.pi)
    canvas = np.zeros((size, size), np.uint8)
    kind = int(rng.integers(4))
    if kind == 0:
        theta = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        waves = np.arange(1, 6)
        bumps = np.cos(waves[:, None] * theta + rng.uniform(0, 2 * np.pi, (5, 1)))
        reach = radius * np.clip(1 + (rng.uniform(0, 0.5, (5, 1)) / np.sqrt(waves)[:, None] * bumps).sum(0), 0.2, 2.5)
        _polygon(canvas, np.stack([x + reach * np.cos(theta), y + reach * np.sin(theta)], axis=1))
    elif kind == 3:
        width = max(2, round(radius * rng.uniform(0.35, 0.9)))
        length = np.pi * radius**2 / width
        joints = int(rng.integers(2, 5))
        turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-0.9, 0.9, joints))
        steps = np.stack([np.cos(turns), np.sin(turns)], axis=1) * length / joints
        points = np.cumsum(np.concatenate([np.zeros((1, 2)), steps]), axis=0)
        points += np.array([x, y]) - points.mean(axis=0)
        cv2.polylines(canvas, [np.rint(points).astype(np.int32)], False, 1, width)
    else:
        stretch = np.sqrt(rng.uniform(1, 4))
        sides = (2 * radius * stretch, 2 * radius / stretch)
        box = ((float(x), float(y)), sides, float(rng.uniform(0, 180)))
        if kind == 1:
            cv2.ellipse(canvas, box, 1, -1)
        else:
            shrink = np.sqrt(np.pi) / 2
            _polygon(canvas, cv2.boxPoints((box[0], (sides[0] * shrink, sides[1] * shrink), box[2])))
    return canvas.astype(bool)


def _polygon(canvas: np.ndarray, points: np.ndarray) -> None:
    cv2.fillPoly(canvas, [np.rint(points).astype(np.int32)], 1)


def foreground_point(scene: Scene, rng: np.random.Generator) -> tuple[float, float]:
    """(x, y) of a random pixel of the object; one time in ten of any pixel."""
    if rng.random() < 0.1:
        x, y = rng.uniform(0, scene.size, 2)
        return float(x), float(y)
    pixels = np.flatnonzero(scene.foreground)
    y, x = divmod(int(pixels[rng.integers(len(pixels))]), scene.size)
    return float(x), float(y)


def centroid(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the middle of a bool mask; of the image where the mask is empty."""
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    if moments["m00"] == 0:
        return (mask.shape[1] - 1) / 2, (mask.shape[0] - 1) / 2
    return moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]


def compactness(mask: np.ndarray) -> float:
    """1 for a disc, less the longer or the more scattered the bool mask is: area over 2 pi times its mean square
    distance from its centroid."""
    moments = cv2.moments(mask.astype(np.uint8), binaryImage=True)
    spread = moments["mu20"] + moments["mu02"]
    return moments["m00"] ** 2 / (2 * np.pi * spread) if spread > 0 else 1.0


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The bool mask dilated by `pixels`."""
    if pixels < 1:
        return mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
