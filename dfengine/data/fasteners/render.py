"""One picture of a fastener, with the mask of its defect."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from dfengine.data.fasteners.canvas import Canvas
from dfengine.data.fasteners.clips import clip_tubes, draw_clip
from dfengine.data.fasteners.light import develop, expose, illuminate
from dfengine.data.fasteners.scene import DEFECTS, VARIETY, Defect, Scene, sample_scene
from dfengine.data.fasteners.track import draw_bolt, draw_litter, draw_seat, draw_track
from dfengine.errors import UsageError

SPLITS = ("train", "test")
SUPERSAMPLING = 1.5
#: Below this a rod is thinner than a pixel.
MIN_SIZE = 32
#: Smallest change of a pixel's largest channel, of 1, that counts where the clip is visible both ways.
VISIBLE_CHANGE = 0.04


@dataclass(frozen=True)
class Rendering:
    """image: noiseless photograph float32 (S, S, 3); good: the same with a sound clip (the same array when sound);
    mask: bool (S, S); camera_rng: continues the scene's stream, for the noise."""

    scene: Scene
    image: np.ndarray
    good: np.ndarray
    mask: np.ndarray
    camera_rng: np.random.Generator


def render_fastener(
    seed: int, index: int, defect: str = "good", size: int = 256, split: str = "train", variety: float = VARIETY
) -> tuple[np.ndarray, np.ndarray]:
    """Picture number `index`: (uint8 (size, size, 3) RGB, bool (size, size) mask of the defect).

    Every (seed, split, defect, index) has its own random stream, so pictures can be made in any order and the same
    arguments give the same bytes. The mask is empty for "good". `variety` in [0, 1]: how much normal scenes differ
    (`scene.Draw`). UsageError: unknown defect or split, negative seed or index, size below MIN_SIZE, or variety out of
    range.
    """
    result = render_noiseless(seed, index, defect, size, split, variety)
    return expose(result.image, result.scene.camera, result.camera_rng), result.mask


def render_noiseless(
    seed: int, index: int, defect: str, size: int, split: str = "train", variety: float = VARIETY
) -> Rendering:
    """The picture before camera noise, together with its sound twin. Same arguments and errors as render_fastener."""
    if defect not in DEFECTS:
        raise UsageError(f"unknown defect '{defect}': one of {', '.join(DEFECTS)}")
    if split not in SPLITS:
        raise UsageError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0 or size < MIN_SIZE:
        raise UsageError(f"seed {seed}, index {index}, size {size}: need seed >= 0, index >= 0, size >= {MIN_SIZE}")
    if not 0 <= variety <= 1:
        raise UsageError(f"variety {variety}: must be between 0 and 1")
    stream = SPLITS.index(split) * len(DEFECTS) + DEFECTS.index(defect)
    rng = np.random.default_rng([seed, stream, index])
    scene = sample_scene(rng, defect, variety)

    ground = Canvas.blank(round(SUPERSAMPLING * size), scene.pose, np.random.default_rng([scene.texture_seed, 0]))
    draw_track(ground, scene, np.random.default_rng([scene.texture_seed, 1]))
    draw_seat(ground, scene)
    # One exposure for both twins, so that only the defect tells them apart.
    irradiance = scene.light.sun[1] * scene.light.towards[2] + scene.light.sky[1]
    gain = 0.30 / (irradiance * (0.6 * float(np.mean(ground.albedo[:, ::8, ::8])) + 0.06))

    image, clip = _photograph(ground, scene, gain, size)
    if defect == "good":
        return Rendering(scene, image, image, np.zeros((size, size), bool), rng)
    good, good_clip = _photograph(ground, replace(scene, defect=Defect("good")), gain, size)
    outline, either = (
        cv2.resize(area.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) >= 0.5
        for area in (clip ^ good_clip, clip | good_clip)
    )
    # Where the clip is seen both ways, it counts as changed if it looks different beyond its fine texture.
    change = cv2.GaussianBlur(np.abs(image - good).max(axis=2), (0, 0), size / 150)
    return Rendering(scene, image, good, _clean(outline | (either & (change > VISIBLE_CHANGE))), rng)


def _photograph(ground: Canvas, scene: Scene, gain: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(photograph, where clip or bolt is visible at the supersampled size) with the clip in the scene's state."""
    canvas = ground.copy()
    visible = draw_clip(canvas, scene.fastener, clip_tubes(scene.fastener, scene.defect))
    if scene.fastener.kind == "w" and not scene.defect.bolt_lost:
        visible |= draw_bolt(canvas, scene)
    draw_litter(canvas, scene, np.random.default_rng([scene.texture_seed, 2]))
    return develop(illuminate(canvas, scene.light), scene.camera, gain, size), visible


def _clean(mask: np.ndarray) -> np.ndarray:
    """Close pinholes and drop specks, at the picture's own scale (small pictures have none: a rod is two pixels)."""
    side = round(mask.shape[0] / 64) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    return cv2.morphologyEx(closed, cv2.MORPH_OPEN, kernel) > 0
