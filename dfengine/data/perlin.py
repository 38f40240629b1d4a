"""Perlin gradient noise: the shape of the papers' synthetic anomalies (DAD 3.3; DESIGN "Synthetic anomalies")."""

from __future__ import annotations

import numpy as np

MAX_OCTAVE = 5  # lattices have 2^0 .. 2^5 cells along an axis
MAX_ROTATION = 90.0  # degrees, to either side
THRESHOLD = 0.5


def perlin_noise(
    size: int, cells: tuple[int, int], rng: np.random.Generator, rotation: float = 0.0
) -> np.ndarray:
    """Gradient noise with `cells` = (rows, columns) lattice cells over the image, rotated by `rotation` degrees.

    The sampling grid is rotated about the image centre, not the finished picture, so the noise fills the corners too.
    The factor sqrt(2) stretches the range to about [-1, 1], as in the papers' code: the threshold 0.5 is meant for it.

    Returns float32 (size, size).
    """
    centre = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    angle = np.deg2rad(rotation)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    v = (cos * centre[:, None] + sin * centre[None, :]) * np.float32(cells[0])
    u = (cos * centre[None, :] - sin * centre[:, None]) * np.float32(cells[1])

    # Move the rotated grid to non-negative lattice coordinates; the random gradients make the origin immaterial.
    v -= v.min()
    u -= u.min()
    row, column = v.astype(np.int32), u.astype(np.int32)
    v -= row
    u -= column
    width = int(column.max()) + 2
    theta = rng.uniform(0.0, 2.0 * np.pi, (int(row.max()) + 2) * width)
    gradient_v, gradient_u = np.sin(theta).astype(np.float32), np.cos(theta).astype(np.float32)

    corner = row * width + column

    def ramp(offset: int, dv: int, du: int) -> np.ndarray:
        at = corner + offset
        return gradient_v[at] * (v - dv) + gradient_u[at] * (u - du)

    fade_v = v * v * v * (v * (v * 6 - 15) + 10)
    fade_u = u * u * u * (u * (u * 6 - 15) + 10)
    top = ramp(0, 0, 0)
    top += fade_u * (ramp(1, 0, 1) - top)
    bottom = ramp(width, 1, 0)
    bottom += fade_u * (ramp(width + 1, 1, 1) - bottom)
    top += fade_v * (bottom - top)
    return top * np.float32(np.sqrt(2.0))


def perlin_mask(size: int, rng: np.random.Generator, threshold: float = THRESHOLD) -> np.ndarray:
    """One draw of the papers' anomaly shape: lattice 2^0..2^5 for each axis, rotation within +-90 degrees, threshold.

    Returns bool (size, size); it may well be empty.
    """
    rows, columns = (2 ** int(k) for k in rng.integers(0, MAX_OCTAVE + 1, size=2))
    rotation = float(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    return perlin_noise(size, (rows, columns), rng, rotation) > threshold
