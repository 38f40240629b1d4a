from __future__ import annotations

import numpy as np
import pytest

from dfengine.data.perlin import THRESHOLD, perlin_mask, perlin_noise


def reference(size, rows, columns, rng):
    """Perlin noise from its definition, one pixel at a time, for an unrotated lattice.

    The first two lattice coordinates are those of the implementation: pixel centres, moved so that the first is 0.
    """
    shape = ((size - 1) * rows // size + 2, (size - 1) * columns // size + 2)
    theta = rng.uniform(0.0, 2.0 * np.pi, shape[0] * shape[1]).reshape(shape)
    noise = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            v, u = i * rows / size, j * columns / size
            y, x = int(v), int(u)
            total = 0.0
            for dy in (0, 1):
                for dx in (0, 1):
                    angle = theta[y + dy, x + dx]
                    ramp = np.sin(angle) * (v - y - dy) + np.cos(angle) * (u - x - dx)
                    weight = 1.0
                    for t, d in ((v - y, dy), (u - x, dx)):
                        fade = 6 * t**5 - 15 * t**4 + 10 * t**3
                        weight *= fade if d else 1 - fade
                    total += weight * ramp
            noise[i, j] = np.sqrt(2) * total
    return noise


@pytest.mark.parametrize("cells", [(1, 1), (2, 8), (4, 1)])
def test_follows_the_definition(cells):
    got = perlin_noise(16, cells, np.random.default_rng(5))
    np.testing.assert_allclose(got, reference(16, *cells, np.random.default_rng(5)), atol=1e-5)


def test_rotation_by_ninety_degrees_swaps_the_axes():
    # Two cells down, none across: the noise changes quickly down the picture, and across it after a quarter turn.
    def roughness(noise):
        return np.abs(np.diff(noise, axis=0)).mean() / np.abs(np.diff(noise, axis=1)).mean()

    upright = [roughness(perlin_noise(64, (16, 1), np.random.default_rng(seed))) for seed in range(8)]
    turned = [roughness(perlin_noise(64, (16, 1), np.random.default_rng(seed), 90.0)) for seed in range(8)]
    assert min(upright) > 2
    assert max(turned) < 0.5


def test_range_is_that_of_the_threshold():
    noise = np.stack([perlin_noise(64, (8, 8), np.random.default_rng(seed), 30.0) for seed in range(20)])
    assert np.abs(noise).max() <= 1.0 + 1e-5
    assert 0.02 < (noise > THRESHOLD).mean() < 0.25


def test_masks_are_deterministic_and_varied():
    first = [perlin_mask(32, np.random.default_rng(seed)) for seed in range(30)]
    again = [perlin_mask(32, np.random.default_rng(seed)) for seed in range(30)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({mask.tobytes() for mask in first}) > 20
    assert all(mask.dtype == bool and mask.shape == (32, 32) for mask in first)
