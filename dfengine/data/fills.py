"""What fills a hole in a picture without showing its rim: a smooth surface through known pixels, and bare texture.

Filling a hole with `source + membrane(image - source)` continues the surroundings of the hole into any source
(background from elsewhere, or a bare texture) without a step at the rim, as Poisson cloning does, in a fraction of its
time.
"""

from __future__ import annotations

import cv2
import numpy as np

from dfengine.data.regions import Scene, grow


def membrane(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`values` float32 (S, S, C) where `known` (bool (S, S)), and a smooth continuation of them elsewhere.

    Push-pull: known values are averaged down a pyramid, and the coarser levels fill what the finer ones do not know.
    """
    weight = known.astype(np.float32)[..., None]
    levels = [np.concatenate([values * weight, weight], axis=-1)]
    while min(levels[-1].shape[:2]) > 1:
        height, width = levels[-1].shape[:2]
        levels.append(cv2.resize(levels[-1], ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA))
    coarse = levels[-1][..., :-1] / np.maximum(levels[-1][..., -1:], 1e-6)
    for level in reversed(levels[:-1]):
        height, width = level.shape[:2]
        coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, -1)
        # a pixel with any knowledge at a level speaks for itself: its mean is normalised by its own weight
        trust = np.minimum(1.0, 4.0 * level[..., -1:]) if level is not levels[0] else level[..., -1:]
        coarse += trust * (level[..., :-1] / np.maximum(level[..., -1:], 1e-6) - coarse)
    return coarse


def texture_layer(scene: Scene, hole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fine texture like that of a patch of background, all over the picture and without its colour, (S, S, 3).

    Spot noise: white noise filtered by the patch has the spectrum of the patch, and neither tiles nor mirrors show.
    """
    size = scene.size
    side = max(4, int(size * rng.uniform(0.15, 0.3)))
    rim = grow(hole, 1 + size // 24) & ~hole & ~scene.foreground
    colour = scene.image[rim].mean(axis=0) if rim.any() else scene.image.mean(axis=(0, 1))
    taken = cv2.integral((scene.foreground | hole).astype(np.uint8))
    sums = cv2.integral(scene.image)
    y, x = rng.integers(0, size - side + 1, (2, 24))
    covered, total = (t[y + side, x + side] - t[y, x + side] - t[y + side, x] + t[y, x] for t in (taken, sums))
    unlike = np.abs(total / side**2 - colour).mean(axis=1) + 100.0 * covered / side**2
    y, x = int(y[unlike.argmin()]), int(x[unlike.argmin()])
    patch = scene.image[y : y + side, x : x + side]
    sigma = side / 10
    patch = patch - cv2.GaussianBlur(patch, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    limit = 3.0 * float(np.median(np.abs(patch)))  # a stray edge in the patch would turn all of it into streaks
    spot = np.zeros_like(scene.image)
    spot[:side, :side] = np.clip(patch, -limit, limit) / side
    noise = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))[..., None]
    spectrum = np.fft.rfft2(spot, axes=(0, 1))
    if rng.random() < 0.7:  # the patch's grain, not its direction, which few surfaces have
        spectrum = _isotropic(spectrum)
    fine = np.fft.irfft2(noise * spectrum, s=(size, size), axes=(0, 1)).astype(np.float32)
    if rim.sum() > size // 4:  # as rough as the background around the hole, edges not counted
        around = (scene.image - cv2.GaussianBlur(scene.image, (0, 0), sigma))[rim]
        fine *= np.clip(1.5 * float(np.median(np.abs(around))) / max(float(fine.std()), 1e-3), 0.0, 1.5)
    return fine * np.float32(rng.random())  # from smooth to fully rough: neither is evidence


def _isotropic(spectrum: np.ndarray) -> np.ndarray:
    """The root mean square of a half spectrum (S, S // 2 + 1, C) over each ring of equal frequency, in its place."""
    size = spectrum.shape[0]
    fy, fx = np.fft.fftfreq(size)[:, None] * size, np.arange(spectrum.shape[1])[None, :]
    ring = np.rint(np.hypot(fy, fx)).astype(int).ravel()
    power = np.abs(spectrum).reshape(-1, spectrum.shape[2]) ** 2
    counts = np.maximum(np.bincount(ring), 1)
    mean = np.stack([np.bincount(ring, channel) / counts for channel in power.T], axis=1)
    return np.sqrt(mean)[ring].reshape(spectrum.shape)
