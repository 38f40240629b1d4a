"""The baseline that a trained detector is compared with: mean and standard deviation of each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from dfengine.engine.modules import top_k_count

MIN_STD = 1 / 255
"""One 8-bit step: a pixel that never changes in training must not turn rounding into an anomaly."""


def top_mean(anomaly_map: np.ndarray, top_k: float = 50) -> float:
    """Image score: mean of the `top_k_count` largest pixels of a (H, W) map, as a detector's."""
    values = np.asarray(anomaly_map, dtype=np.float64).ravel()
    count = top_k_count(*np.shape(anomaly_map), top_k)
    return float(np.partition(values, -count)[-count:].mean())


class MeanStdBaseline:
    """Scores a pixel by its distance from the training mean, in training standard deviations.

    `images`: normal images, N x (H, W, 3), uint8 or float in [0, 1] (an array or any iterable; at least two).
    Raises ValueError for fewer than two images or images of different shapes.
    """

    def __init__(self, images: Iterable[np.ndarray]):
        count, mean, squares = 0, None, None
        for image in images:
            unit = _unit(image)
            if mean is None:
                mean, squares = np.zeros_like(unit), np.zeros_like(unit)
            elif unit.shape != mean.shape:
                raise ValueError(f"image {count} has shape {unit.shape}, the others {mean.shape}")
            count += 1
            delta = unit - mean  # Welford's update: one pass, no cancellation
            mean += delta / count
            squares += delta * (unit - mean)
        if count < 2:
            raise ValueError(f"a standard deviation needs at least two images, not {count}")
        self.mean = mean
        self.std = np.maximum(np.sqrt(squares / (count - 1)), MIN_STD)

    def score(self, images: Sequence[np.ndarray], top_k: float = 50) -> tuple[np.ndarray, np.ndarray]:
        """Image scores float64 (N,) and maps float32 (N, H, W): the root mean square z-score over the channels.

        `top_k`: how many pixels of 65536 the image score averages (`ModelConfig.top_k` of the detector compared with).
        """
        maps = np.empty((len(images), *self.mean.shape[:2]), dtype=np.float32)
        for index, image in enumerate(images):
            z = (_unit(image) - self.mean) / self.std
            maps[index] = np.sqrt(np.mean(z * z, axis=2))
        return np.array([top_mean(image, top_k) for image in maps], dtype=np.float64), maps


def _unit(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image must be (H, W, 3), not {image.shape}")
    return image / 255.0 if image.dtype == np.uint8 else image.astype(np.float64)
