"""Small scenes with a known object, for the tests of the synthesis."""

from __future__ import annotations

import cv2
import numpy as np


def bars(count: int, size: int = 64, seed: int = 0, clutter: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Dark bars in any rotation on a light background: uint8 (N, S, S, 3) and the true foregrounds, bool (N, S, S).

    clutter: a bright rail on the left and stripes of other shades, and the bar a ring in the middle.
    """
    rng = np.random.default_rng(seed)
    images, masks = [], []
    for _ in range(count):
        picture = np.full((size, size), 190.0) + np.linspace(0, rng.uniform(-15, 15), size)[None, :]
        mask = np.zeros((size, size), np.uint8)
        middle = tuple(int(v) for v in size / 2 + rng.uniform(-3, 3, 2))
        if clutter:
            picture[:, : size // 5] = 235
            picture[: size // 4, size // 2 :] -= 90
            picture[-size // 6 :, :] -= 60
            axes = (size // 5, size // 4)
            cv2.ellipse(mask, middle, axes, 0, 0, 360, 1, size // 10)
        else:
            box = (middle, (0.65 * size, 0.14 * size), float(rng.uniform(0, 180)))
            cv2.fillPoly(mask, [np.rint(cv2.boxPoints(box)).astype(np.int32)], 1)
        picture = np.where(mask, 60 + 15 * np.sin(np.arange(size))[None, :], picture)
        picture = picture[..., None] + rng.normal(0, 2, (size, size, 3))
        images.append(np.clip(picture, 0, 255).astype(np.uint8))
        masks.append(mask.astype(bool))
    return np.stack(images), np.stack(masks)
