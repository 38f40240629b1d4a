"""Anomaly map over image, on one fixed scale, so that pictures of different images can be compared."""

from __future__ import annotations

import functools

import cv2
import numpy as np

COLORMAP = "inferno"
OPACITY = 0.8
_CONTOUR = (0, 255, 255)


def heatmap_overlay(
    image: np.ndarray, anomaly_map: np.ndarray, vmax: float = 1.0, mask: np.ndarray | None = None
) -> np.ndarray:
    """The image in gray with the map over it: uint8 (H, W, 3).

    `image` uint8 (H, W, 3) RGB; `anomaly_map` float (h, w), resized to the image; `vmax` the value shown at full colour
    (larger ones look the same); `mask` bool (H, W) or (h, w), drawn as a cyan outline. The colours are matplotlib's
    inferno, whose lightness grows evenly; opacity grows with the square root of the value, so that normal areas still
    show the image. Raises ValueError for shapes that are not these, or a map that is not finite.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    values = np.asarray(anomaly_map, dtype=np.float32)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise ValueError(f"the anomaly map must be finite and (h, w), not {values.shape}")
    height, width = image.shape[:2]
    if values.shape != (height, width):
        values = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
    values = np.clip(values / vmax, 0, 1)
    colour = _colours()[np.rint(values * 255).astype(np.intp)]
    alpha = OPACITY * np.sqrt(values)[..., None]
    gray = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    result = np.rint(gray + alpha * (colour - gray)).astype(np.uint8)
    if mask is not None:
        mask = np.asarray(mask, dtype=bool).astype(np.uint8)
        if mask.shape != (height, width):
            mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(result, contours, -1, _CONTOUR, thickness=max(1, round(max(height, width) / 256)))
    return result


def colour_stops(count: int = 9) -> list[str]:
    """The colormap as CSS colours, from 0 to vmax, for a legend."""
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in _colours()[np.linspace(0, 255, count).astype(int)]]


@functools.cache
def _colours() -> np.ndarray:
    """Float32 (256, 3) RGB in [0, 255]."""
    import matplotlib

    return np.float32(255) * matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3].astype(np.float32)
