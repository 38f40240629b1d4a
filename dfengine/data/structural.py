"""Structural anomalies: parts missing, broken, displaced or foreign (DESIGN "Synthetic anomalies").

The papers' recipe pastes textures, which teaches a segmentation net to look for textures. A fastener fails otherwise:
its clip is gone, broken or moved, and what shows in its place is ordinary background. Here a region of a normal image
is erased, moved, bent or replaced so that the seam itself gives little away, and the mask is what really changed.

The tool behind all of it is `dfengine.data.fills.membrane`.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from dfengine.data.augment import Augmentation, is_gray
from dfengine.data.fills import membrane, texture_layer
from dfengine.data.foreground import fill_holes, objects_alike
from dfengine.data.regions import (
    COMPACT,
    LARGEST_PART,
    Scene,
    any_region,
    centroid,
    compactness,
    core_region,
    foreground_point,
    grow,
    ring_region,
    shape_region,
)

_WORK = 32  # side of the small pictures on which donors of background are compared
_CANDIDATES = 24  # donors compared for one fill
_UNFIT = 22.0  # cost, roughly in 8-bit levels, from which a bare texture is better than the best donor
_REFLECT = cv2.BORDER_REFLECT_101


class Structural:
    """Draws structural anomalies; other normal images serve as donors of background and of foreign parts.

    images: uint8 (N, S, S, 3). foregrounds: bool (N, S, S). area: range of the region's share of the image.
    """

    def __init__(self, images: np.ndarray, foregrounds: np.ndarray, area: tuple[float, float] = (0.008, 0.35)):
        self.images = images
        self.foregrounds = foregrounds
        self.area = area
        self._small = np.stack([_shrink(image) for image in images])
        self._small_foreground = np.stack([_shrink(mask.astype(np.float32)) for mask in foregrounds])
        self.aligned = objects_alike(images, foregrounds)

    def draw(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """One edit of the scene: (float32 (S, S, 3), kind). Whether it changed anything is for the caller to see."""
        kinds = tuple(_EDITS)
        weights = np.array([weight for weight, _ in _EDITS.values()])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        return _EDITS[kind][1](self, scene, rng), kind

    def decoy(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The same processing with nothing at stake: the picture stays normal, float32 (S, S, 3).

        Background is filled with background, or a region is blended with itself under a slight change of exposure,
        sharpness and noise. Where the object covers the image, only the latter is possible.
        """
        region = shape_region(scene, rng, self._draw_area(rng))
        background = region & ~grow(scene.foreground, scene.size // 24)
        if background.mean() > 0.5 * region.mean() and not scene.foreground.all():
            return _mix(scene.image, self._fill(scene, background, rng), background, rng)
        copy = scene.image * np.float32(rng.uniform(0.98, 1.02))
        if rng.random() < 0.5:
            copy = cv2.GaussianBlur(copy, (0, 0), rng.uniform(0.3, 0.6) * max(1.0, scene.size / 128))
        channels = 1 if is_gray(scene.image) else 3
        noise = rng.standard_normal((*copy.shape[:2], channels), dtype=np.float32)
        copy = copy + np.float32(rng.uniform(0, 2)) * noise
        return _mix(scene.image, copy, region, rng)

    def transplant(self, scene: Scene, rng: np.random.Generator, pose: Augmentation | None = None) -> np.ndarray:
        """The object of another normal image, or a part of it, in its place: normal still, float32 (S, S, 3).

        `pose` is what moved the scene: the other image is moved in the same way.
        """
        other = int(rng.integers(len(self.images)))
        picture, foreground = self.images[other], self.foregrounds[other]
        if pose is not None:
            picture, foreground = pose.pose(picture), pose.mask(foreground)
        source = picture.astype(np.float32)
        region = grow(scene.foreground | foreground, 1 + scene.size // 48)
        if rng.random() < 0.5:
            region = region & grow(shape_region(scene, rng, self._draw_area(rng)), 1)
        if not region.any():
            return scene.image
        rim = grow(region, 2 + scene.size // 32) & ~region
        if rng.random() < 0.5 and rim.any():
            source = source + membrane(scene.image - source, rim)
        elif rim.any():
            source = source + (scene.image[rim].mean(axis=0) - source[rim].mean(axis=0))
        return _mix(scene.image, source, region, rng)

    # ---- the edits -------------------------------------------------------------------------------------------------

    def _object_region(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The object, wholly or but for its middle; a large part of it where it covers too much of the image."""
        size, region = scene.size, scene.foreground
        choice = rng.random()
        if compactness(region) > COMPACT and choice < 0.3:
            return ring_region(scene, rng)
        if region.mean() > self.area[1] or (compactness(region) <= COMPACT and choice < 0.5):
            return any_region(scene, rng, self.area[1])
        if compactness(region) > COMPACT and choice < 0.6:
            core = cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, 3)
            region = region & (core < rng.uniform(0.4, 0.8) * core.max())
        return grow(region, int(rng.integers(1, 3 + size // 32)))

    def _missing(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The object erased, wholly or but for its middle: a clip is gone, what it was wound around stays."""
        region = self._object_region(scene, rng)
        return _mix(scene.image, self._fill(scene, region, rng), region, rng)

    def _bared(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The object gone but for its middle, which stands sharp, as it was or larger: a shoulder without its clip.

        What a clip is wound around is seen whole once it is gone, so the middle, turned and enlarged, is laid over what
        the clip covered.
        """
        if compactness(scene.foreground) <= COMPACT:
            return self._missing(scene, rng)
        size = scene.size
        region = grow(scene.foreground, int(rng.integers(1, 3 + size // 32)))
        bare = _mix(scene.image, self._fill(scene, region, rng), region, rng)
        core = core_region(scene, rng)
        zoom = 1.0 if rng.random() < 0.3 else rng.uniform(1.0, 1.8)
        reach = rng.uniform(-0.04, 0.04, 2) * size if zoom > 1 else (0.0, 0.0)
        angle = rng.uniform(-15, 15) if rng.random() < 0.5 else 0.0
        alpha = core.astype(np.float32)
        if rng.random() < 0.5:
            alpha = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.4, 0.8))
        part, alpha = _warp_part(scene.image, alpha, _about(centroid(core), angle, zoom, reach))
        return bare + alpha * (part - bare)

    def _replaced(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """Anything but the object in its place: another normal image, or this one, turned, mirrored and moved.

        What shows where a part is missing need not be smooth: a plate, a hole, stones.
        """
        region, size = self._object_region(scene, rng), scene.size
        other = int(rng.integers(len(self.images)))
        picture = scene.image if rng.random() < 0.3 else self.images[other].astype(np.float32)
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        middle, reach = ((size - 1) / 2, (size - 1) / 2), size * rng.uniform(0.25, 0.5)
        direction = rng.uniform(0, 2 * np.pi)
        shift = (reach * np.cos(direction), reach * np.sin(direction))
        matrix = _about(middle, rng.uniform(-180, 180), rng.uniform(0.8, 1.6), shift)
        source = cv2.warpAffine(picture, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=_REFLECT)
        rim = grow(region, 2 + size // 32) & ~region
        if rim.any():
            step = scene.image - source
            whole = rng.random() < 0.5
            source = source + (membrane(step, rim) if whole else np.float32(rng.random()) * step[rim].mean(axis=0))
        return _mix(scene.image, source, region, rng)

    def _erased(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """A part filled from its surroundings or with background from elsewhere."""
        region = any_region(scene, rng, self._draw_area(rng))
        return _mix(scene.image, self._fill(scene, region, rng), region, rng)

    def _displaced(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """A part moved and turned; what it uncovers is filled like an erased part."""
        region = any_region(scene, rng, min(self._draw_area(rng), LARGEST_PART))
        size = scene.size
        emptied = _mix(scene.image, self._fill(scene, region, rng), region, rng)
        reach = rng.uniform(0.05, 0.25) * size
        direction = rng.uniform(0, 2 * np.pi)
        shift = (reach * np.cos(direction), reach * np.sin(direction))
        angle = rng.uniform(-60, 60) if rng.random() < 0.6 else 0.0
        matrix = _about(centroid(region), angle, 1.0, shift)
        part, alpha = _warp_part(scene.image, _feather(region, rng, size), matrix)
        return emptied + alpha * (part - emptied)

    def _bent(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """The picture twisted and shifted about a point of the object, fading outwards: no seam at all."""
        size = scene.size
        x, y = foreground_point(scene, rng)
        radius = rng.uniform(0.08, 0.3) * size
        axis = np.arange(size, dtype=np.float32)
        dx, dy = axis[None, :] - np.float32(x), axis[:, None] - np.float32(y)
        fade = np.clip(1 - (dx * dx + dy * dy) / np.float32(radius) ** 2, 0, 1) ** 2
        angle = fade * np.float32(np.deg2rad(rng.uniform(20, 80) * rng.choice((-1, 1))))
        shift = rng.uniform(-0.45, 0.45, 2).astype(np.float32) * np.float32(radius)
        cos, sin = np.cos(angle), np.sin(angle)
        map_x = x + cos * dx - sin * dy - fade * shift[0]
        map_y = y + sin * dx + cos * dy - fade * shift[1]
        linear = cv2.INTER_LINEAR
        return cv2.remap(scene.image, map_x.astype(np.float32), map_y.astype(np.float32), linear, borderMode=_REFLECT)

    def _pasted(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """A part of the same or of another normal image where it does not belong, exposure-matched."""
        size = scene.size
        source = scene
        if len(self.images) > 1 and rng.random() < 0.5:
            other = int(rng.integers(len(self.images)))
            source = Scene(self.images[other].astype(np.float32), self.foregrounds[other])
        region = any_region(source, rng, min(self._draw_area(rng), LARGEST_PART))
        middle = centroid(region)
        target = foreground_point(scene, rng)
        angle = rng.uniform(-90, 90) if rng.random() < 0.6 else 0.0
        matrix = _about(middle, angle, rng.uniform(0.8, 1.25), (target[0] - middle[0], target[1] - middle[1]))
        part, alpha = _warp_part(source.image, _feather(region, rng, size), matrix)
        style = rng.random()
        if style < 0.35:  # no step at the rim
            inside = alpha[..., 0] > 0.5
            part = part + membrane(scene.image - part, ~grow(inside, 1))
        elif style < 0.7:  # half-way to the light of the place
            weight = alpha / max(float(alpha.sum()), 1e-6)
            part = part + np.float32(rng.uniform(0.3, 1.0)) * (weight * (scene.image - part)).sum(axis=(0, 1))
        return scene.image + alpha * (part - scene.image)

    # ---- fills -----------------------------------------------------------------------------------------------------

    def _draw_area(self, rng: np.random.Generator) -> float:
        low, high = np.log(self.area)
        return float(np.exp(rng.uniform(low, high)))

    def _fill(self, scene: Scene, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Background for `region`, float32 (S, S, 3); only its pixels inside the region are meant."""
        hole = grow(region, 1 + scene.size // 128)  # the half-tone rim of a part must not leak into its fill
        if rng.random() < (0.3 if hole.mean() < 0.1 else 0.6):  # large holes rarely find a donor
            source = texture_layer(scene, hole, rng)
        else:
            source = self._donor(scene, hole, rng)
        # Only a band around the hole counts: farther off, the source may well show another object.
        band = grow(hole, 2 + scene.size // 32) & ~hole
        background = band & ~grow(scene.foreground, 1)
        if 4 * background.sum() > band.sum():
            # Where background touches the hole, that alone is continued: the object ends at the cut, it does not smear.
            band = background
        return source + membrane(scene.image - source, band) if band.any() else source

    def _donor(self, scene: Scene, hole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A shifted normal image (this one or another) whose background fits the surroundings of the hole best.

        Candidates are compared small. A good donor agrees with the rim of the hole up to a constant, shows little
        foreground inside the hole and, if it is this very image, nothing of the hole itself.
        """
        small, inside = _shrink(scene.image), _shrink(hole.astype(np.float32)) > 0.25
        rim = grow(inside, 2) & ~inside
        if not rim.any() or not inside.any():
            return texture_layer(scene, hole, rng)
        own_foreground = np.maximum(_shrink(scene.foreground.astype(np.float32)), inside)
        half = _WORK // 2
        other = np.where(rng.random(_CANDIDATES) < 0.5, rng.integers(len(self.images), size=_CANDIDATES), -1)
        shift = rng.integers(-half, half + 1, (_CANDIDATES, 2))
        shift[(other >= 0) & (rng.random(_CANDIDATES) < 0.3)] = 0  # the same place of another image

        def shifted(own: np.ndarray, others: np.ndarray, where: np.ndarray) -> np.ndarray:
            """Values of the candidates at the places `where`: (candidates, places, ...)."""
            y, x = (_REFLECTED[half + at + by[:, None]] for at, by in zip(np.nonzero(where), shift.T, strict=True))
            values = others[other[:, None], y, x]
            values[other < 0] = own[y[other < 0], x[other < 0]]
            return values

        difference = shifted(small, self._small, rim) - small[rim]
        mismatch = np.abs(difference - difference.mean(axis=1, keepdims=True)).mean(axis=(1, 2))
        object_inside = shifted(own_foreground, self._small_foreground, inside).mean(axis=1)
        y, x = (at[None, :] + by[:, None] for at, by in zip(np.nonzero(inside), shift.T, strict=True))
        mirrored = ((y < 0) | (y >= _WORK) | (x < 0) | (x >= _WORK)).mean(axis=1)  # mirror images show their symmetry
        cost = mismatch + 60.0 * object_inside + 20.0 * mirrored + rng.uniform(0, 4, _CANDIDATES)
        best = int(cost.argmin())
        if cost[best] > _UNFIT:
            return texture_layer(scene, hole, rng)
        picture = scene.image if other[best] < 0 else self.images[other[best]].astype(np.float32)
        dy, dx = shift[best]
        step = scene.size / _WORK
        matrix = np.array([[1, 0, -round(dx * step)], [0, 1, -round(dy * step)]], np.float64)
        return cv2.warpAffine(picture, matrix, (scene.size, scene.size), flags=cv2.INTER_NEAREST, borderMode=_REFLECT)


_EDITS: dict[str, tuple[float, Callable[[Structural, Scene, np.random.Generator], np.ndarray]]] = {
    "missing": (0.20, Structural._missing),
    "bared": (0.20, Structural._bared),
    "replaced": (0.10, Structural._replaced),
    "erased": (0.15, Structural._erased),
    "displaced": (0.15, Structural._displaced),
    "bent": (0.10, Structural._bent),
    "pasted": (0.10, Structural._pasted),
}
STRUCTURAL_KINDS = tuple(_EDITS)

# Indices of a line of _WORK pixels reflected by half its length at either end.
_REFLECTED = np.abs(np.arange(-(_WORK // 2), _WORK + _WORK // 2))
_REFLECTED = np.where(_REFLECTED >= _WORK, 2 * _WORK - 2 - _REFLECTED, _REFLECTED)


def changed_mask(before: np.ndarray, after: np.ndarray, threshold: float = 10.0) -> np.ndarray:
    """Where two pictures (float32 (S, S, 3), 8-bit levels) really differ, bool (S, S).

    The largest channel difference, lightly smoothed, over `threshold`; specks are dropped, gaps and small holes closed.
    The middle of a ring is no hole: what the ring winds around did not change.
    """
    size = before.shape[0]
    difference = cv2.GaussianBlur(after - before, (0, 0), max(0.6, size / 256))
    changed = (np.abs(difference).max(axis=-1) > threshold).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3))
    changed = cv2.morphologyEx(changed, cv2.MORPH_CLOSE, kernel, iterations=max(1, size // 64))
    changed = fill_holes(changed.astype(bool), 0.1 * float(changed.sum())).astype(np.uint8)
    changed = cv2.morphologyEx(changed, cv2.MORPH_OPEN, kernel)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(changed, connectivity=8)
    if count == 1:
        return changed.astype(bool)
    areas = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    areas[0] = 0
    return (areas >= max(0.001 * size * size, 0.05 * areas.max()))[labels]


def _about(centre: tuple[float, float], angle: float, zoom: float, shift: tuple[float, float]) -> np.ndarray:
    """The 2x3 matrix that turns (degrees) and zooms about `centre`, then shifts."""
    matrix = cv2.getRotationMatrix2D(centre, angle, zoom)
    matrix[:, 2] += shift
    return matrix


def _warp_part(image: np.ndarray, alpha: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its alpha (S, S, 1), moved; what comes from outside the picture is transparent."""
    side = (image.shape[1], image.shape[0])
    part = cv2.warpAffine(image, matrix, side, flags=cv2.INTER_LINEAR, borderMode=_REFLECT)
    alpha = cv2.warpAffine(alpha, matrix, side, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return part, alpha[..., None]


def _feather(region: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """The region as opacity, float32 (S, S, 1) in [0, 1]: hard in one of three draws, else with a soft edge."""
    alpha = region.astype(np.float32)
    sigma = rng.uniform(0.4, max(0.8, size / 48)) if rng.random() < 2 / 3 else 0.0
    return (cv2.GaussianBlur(alpha, (0, 0), sigma) if sigma else alpha)[..., None]


def _mix(image: np.ndarray, content: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`content` over `image` inside the region, feathered."""
    return image + _feather(region, rng, image.shape[0]) * (content - image)


def _shrink(array: np.ndarray) -> np.ndarray:
    """float32 picture or mask at (_WORK, _WORK)."""
    return cv2.resize(array.astype(np.float32), (_WORK, _WORK), interpolation=cv2.INTER_AREA)
