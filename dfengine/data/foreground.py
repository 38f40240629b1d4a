"""Where the object is, estimated from normal images alone: synthetic anomalies belong on it (DESIGN section 1)."""

from __future__ import annotations

import cv2
import numpy as np

KINDS = ("auto", "none", "texture")

_BORDER = 0.05  # width of the frame that is taken for background, as a share of the side
_OUTSIDE = 0.92  # share of the frame that must fall on the background side of the threshold
_ALIKE = 0.6  # mean overlap (intersection over union) of the objects with their common place
_EDGES_ALIKE = 0.25  # mean correlation of edges: noise 0.01, rail clips 0.47, rendered fasteners 0.46
_PLAUSIBLE = (0.01, 0.8)  # area of an object as a share of the image


def estimate_foreground(images: np.ndarray, kind: str = "auto") -> np.ndarray:
    """Object masks, bool (N, S, S), of normal images uint8 (N, S, S, 3); no mask is empty.

    "auto" asks first whether the objects lie on a plain background: a plane of colour fitted to the frame of each image
    explains that frame, and the distance from it splits in two (Otsu). Where most images say yes, the far pixels are
    the object. Otherwise (crops out of a cluttered scene) the object is what is in the middle and rich in edges
    throughout the set. "none" and "texture" return whole images; `random_part` serves the latter sample by sample.
    """
    count, size = images.shape[:2]
    if kind not in KINDS:
        raise ValueError(f"foreground kind must be one of {', '.join(KINDS)}, not {kind!r}")
    whole = np.ones((count, size, size), bool)
    if kind != "auto" or count == 0:
        return whole
    plain = [_on_plain_background(image) for image in images]
    if 2 * sum(mask is not None for mask in plain) > count:
        return np.stack([whole[0] if mask is None else mask for mask in plain])
    return _in_clutter(images)


def objects_alike(images: np.ndarray, foregrounds: np.ndarray) -> bool:
    """Whether one image's object fits into the place of another's: the masks bool (N, S, S) overlap, and in that place
    the edges of each image uint8 (N, S, S, 3) go with those of the others. Never for whole images (textures)."""
    common = foregrounds.mean(axis=0) > 0.5
    if len(images) < 2 or not common.any() or common.all():
        return False
    union = (foregrounds | common).sum(axis=(1, 2))
    if np.mean((foregrounds & common).sum(axis=(1, 2)) / union) < _ALIKE:
        return False
    edges = np.stack([_small_edges(image) for image in images])
    side = edges.shape[1]
    place = cv2.resize(common.astype(np.uint8), (side, side), interpolation=cv2.INTER_AREA)
    place = cv2.dilate(place, np.ones((3, 3), np.uint8)) > 0
    others = (edges.sum(axis=0) - edges) / (len(edges) - 1)
    own, others = edges[:, place], others[:, place]
    own, others = (e - e.mean(axis=1, keepdims=True) for e in (own, others))
    scale = np.sqrt((own**2).sum(axis=1) * (others**2).sum(axis=1))
    return bool(np.mean((own * others).sum(axis=1) / np.maximum(scale, 1e-9)) > _EDGES_ALIKE)


def _small_edges(image: np.ndarray, side: int = 32) -> np.ndarray:
    gray = cv2.cvtColor(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
    gray = gray.astype(np.float32)
    return cv2.GaussianBlur(np.hypot(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)), (0, 0), 1.5)


def random_part(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of an image without an object (a texture class): a rotated rectangle, bool (size, size)."""
    side = size * np.sqrt(rng.uniform(0.1, 0.6))
    stretch = np.sqrt(rng.uniform(0.5, 2.0))
    box = (tuple(map(float, rng.uniform(0.2, 0.8, 2) * size)), (side * stretch, side / stretch), rng.uniform(0, 180))
    part = np.zeros((size, size), np.uint8)
    cv2.fillPoly(part, [np.rint(cv2.boxPoints(box)).astype(np.int32)], 1)
    return part.astype(bool)


def fill_holes(mask: np.ndarray, largest: float = np.inf) -> np.ndarray:
    """The bool (H, W) mask with its holes of at most `largest` pixels closed; no hole touches the image border."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    left, top, width, height, area = stats.T
    inner = (left > 0) & (top > 0) & (left + width < mask.shape[1]) & (top + height < mask.shape[0])
    inner &= area <= largest
    inner[0] = True  # label 0 is the mask itself
    return inner[labels]


def _largest(mask: np.ndarray, share: float) -> np.ndarray:
    """The connected parts of a bool mask that have at least `share` of the area of the largest."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    return mask & (areas >= share * areas.max())[labels]


def _frame(size: int) -> np.ndarray:
    width = max(2, round(_BORDER * size))
    frame = np.ones((size, size), bool)
    frame[width:-width, width:-width] = False
    return frame


def _on_plain_background(image: np.ndarray) -> np.ndarray | None:
    """The object of one image, bool (S, S), or None where the frame is no plain background."""
    size = image.shape[0]
    lab = cv2.cvtColor(cv2.GaussianBlur(image, (0, 0), max(0.5, size / 200)), cv2.COLOR_RGB2LAB).astype(np.float32)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    plane = np.stack(np.broadcast_arrays(np.float32(1), axis[:, None], axis[None, :]), axis=-1)
    frame = _frame(size)
    known = frame.copy()
    for _ in range(2):  # the second fit leaves out what the first did not explain: an object that touches the frame
        weights = np.linalg.lstsq(plane[known], lab[known], rcond=None)[0]
        distance = np.linalg.norm(lab - plane @ weights, axis=-1)
        known = frame & (distance <= np.quantile(distance[frame], 0.9))
    levels = np.minimum(distance * (255.0 / max(float(distance.max()), 1e-6)), 255).astype(np.uint8)
    threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    threshold = 0.75 * threshold  # Otsu lies midway between the classes; lean to the object, whose rim is half-tone
    far = levels > threshold
    if (levels[frame] <= threshold).mean() < _OUTSIDE:
        return None
    # The background must be plain by itself: its spread small beside the distance of the object.
    if far.any() and distance[frame].mean() > 0.25 * distance[far].mean():
        return None
    kernel = np.ones((3, 3), np.uint8)
    mask = cv2.morphologyEx(far.astype(np.uint8), cv2.MORPH_CLOSE, kernel, iterations=max(1, size // 64))
    mask = fill_holes(_largest(mask.astype(bool), 0.1))
    mask = cv2.dilate(mask.astype(np.uint8), kernel, iterations=size // 96).astype(bool)
    return mask if _PLAUSIBLE[0] <= mask.mean() <= _PLAUSIBLE[1] else None


def _in_clutter(images: np.ndarray) -> np.ndarray:
    """Objects in the middle of cluttered crops: a prior of place and of edges common to the set, times the image's own.

    The common part finds what is there in every image (the edges of a fastener do not average out; stones do); the
    image's own edges then follow its pose.
    """
    count, size = images.shape[:2]
    scale = min(1.0, 64 / size)
    work = max(8, round(size * scale))
    axis = np.linspace(-1, 1, work, dtype=np.float32)
    centre = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 0.45**2))
    edges = np.empty((count, work, work), np.float32)
    for image, out in zip(images, edges, strict=True):
        gray = cv2.cvtColor(cv2.resize(image, (work, work), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        gray = gray.astype(np.float32)
        strength = np.hypot(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1))
        strength = np.minimum(strength, np.quantile(strength, 0.95))  # one bright rail edge must not decide
        strength = cv2.GaussianBlur(strength, (0, 0), work / 24)
        out[:] = strength / max(float(strength.mean()), 1e-6)
    common = centre * edges.mean(axis=0)
    result = np.empty((count, size, size), bool)
    for own, out in zip(edges, result, strict=True):
        score = common * (0.5 + own)
        levels = (score * (255.0 / max(float(score.max()), 1e-6))).astype(np.uint8)
        threshold, _ = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        low, high = np.quantile(score, [0.55, 0.85]) * (255.0 / max(float(score.max()), 1e-6))
        mask = (levels > np.clip(threshold, low, high)).astype(np.float32)
        mask = cv2.resize(cv2.GaussianBlur(mask, (0, 0), work / 32), (size, size), interpolation=cv2.INTER_LINEAR)
        out[:] = _largest(fill_holes(mask > 0.5), 0.3)
        if not out.any():
            out[:] = True
    return result
