"""Foreign textures for the papers' synthetic anomalies: a folder of images (DTD layout), or procedural ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from dfengine.data.images import list_images, load_uint8
from dfengine.data.perlin import perlin_noise
from dfengine.errors import DataError, ImageError
from dfengine.wording import counted

CACHE_BYTES = 256 * 2**20  # a process keeps decoded textures up to this many bytes

_log = logging.getLogger(__name__)


class TextureSource:
    """Random texture images, uint8 RGB (size, size, 3). Build one with `from_folder` or `procedural`.

    What `sample` returns depends on the generator alone, never on the calls before it. `skipped` lists the unreadable
    files met so far as (name, reason); each is logged once as a warning.
    """

    def __init__(self, size: int, paths: tuple[Path, ...] = ()):
        self.size = size
        self.paths = paths
        self.skipped: list[tuple[str, str]] = []
        self._unreadable: set[int] = set()
        self._cache: dict[int, np.ndarray] = {}
        self._cache_limit = CACHE_BYTES // (size * size * 3)

    @classmethod
    def from_folder(cls, path: str | Path, size: int) -> TextureSource:
        """All images under `path`, nested folders included; read when first used. DataError if none can be read."""
        source = cls(size, tuple(list_images(path)))
        source._read_from(0)
        return source

    @classmethod
    def procedural(cls, size: int) -> TextureSource:
        """Textures computed from the generator; needs no files."""
        return cls(size)

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """One texture, uint8 (size, size, 3); the caller must not write into it."""
        if self.paths:
            return self._read_from(int(rng.integers(len(self.paths))))
        return procedural_texture(self.size, rng)

    def _read_from(self, first: int) -> np.ndarray:
        """The image at `first`, or the next readable one after it (cyclic)."""
        for step in range(len(self.paths)):
            index = (first + step) % len(self.paths)
            if index in self._unreadable:
                continue
            image = self._cache.get(index)
            if image is not None:
                return image
            try:
                image = load_uint8(self.paths[index], self.size)
            except ImageError as error:
                self._unreadable.add(index)
                self.skipped.append((error.name, error.reason))
                _log.warning("texture skipped: %s", error)
                continue
            if len(self._cache) < self._cache_limit:
                self._cache[index] = image
            return image
        files = counted(len(self.paths), "file")
        raise DataError(f"no readable texture image among {files}, the first is {self.paths[0]}")


def procedural_texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random texture: a scalar field of one family, coloured through a random palette. uint8 (size, size, 3)."""
    field = FAMILIES[int(rng.integers(len(FAMILIES)))](size, rng)
    low, high = float(field.min()), float(field.max())
    field = (field - low) / max(high - low, 1e-6)
    stops = int(rng.integers(2, 6))
    palette = rng.uniform(0.0, 255.0, (stops, 3)).astype(np.float32)
    if rng.random() < 0.3:  # many real textures are nearly gray
        palette = palette.mean(axis=1, keepdims=True) + 0.15 * (palette - 127.5)
    at = np.linspace(0.0, 1.0, stops)
    levels = np.linspace(0.0, 1.0, 256)
    table = np.stack([np.interp(levels, at, palette[:, channel]) for channel in range(3)], axis=1)
    colours = table.astype(np.float32)[np.rint(field * 255).astype(np.uint8)]
    grain = rng.uniform(0.0, 12.0) * rng.standard_normal((size, size, 1), dtype=np.float32)
    return np.clip(np.rint(colours + grain), 0, 255).astype(np.uint8)


def _grid(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of a randomly rotated grid over the unit square, float32 (size, size) each."""
    axis = np.arange(size, dtype=np.float32) / size
    angle = rng.uniform(0.0, 2.0 * np.pi)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * axis[:, None] + sin * axis[None, :], cos * axis[None, :] - sin * axis[:, None]


def _fractal(size: int, rng: np.random.Generator, octaves: int = 4) -> np.ndarray:
    """Perlin octaves of falling amplitude; mean about 0, amplitude about 1."""
    total = np.zeros((size, size), np.float32)
    cells, gain = 2 ** rng.integers(0, 3, size=2), rng.uniform(0.4, 0.75)
    rotation = float(rng.uniform(-90, 90))
    for octave in range(octaves):
        shape = (int(cells[0]) << octave, int(cells[1]) << octave)
        total += np.float32(gain**octave) * perlin_noise(size, shape, rng, rotation)
    return total


def _clouds(size: int, rng: np.random.Generator) -> np.ndarray:
    field = _fractal(size, rng)
    return np.abs(field) if rng.random() < 0.4 else field


def _stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    v, _ = _grid(size, rng)
    wave = np.sin(2 * np.pi * (rng.uniform(2, 20) * v + rng.random()))
    return np.tanh(wave * rng.uniform(0.5, 8.0))


def _plaid(size: int, rng: np.random.Generator) -> np.ndarray:
    v, u = _grid(size, rng)
    first, second = rng.uniform(2, 14, 2)
    return np.sin(2 * np.pi * first * v) + rng.uniform(0.3, 1.0) * np.sin(2 * np.pi * second * u)


def _checker(size: int, rng: np.random.Generator) -> np.ndarray:
    v, u = _grid(size, rng)
    first, second = rng.uniform(2, 12, 2)
    parity = (np.floor(v * first) + np.floor(u * second)) % 2
    return parity + 0.3 * _fractal(size, rng, 2)


def _cells(size: int, rng: np.random.Generator) -> np.ndarray:
    """Distance to the nearest of random points (Voronoi cells), from a distance transform."""
    count = int(rng.integers(12, 150))
    free = np.ones((size, size), np.uint8)
    free[rng.integers(0, size, count), rng.integers(0, size, count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP)
    if rng.random() < 0.5:
        return distance
    shades = rng.random(int(labels.max()) + 1, dtype=np.float32)
    return shades[labels]


def _speckle(size: int, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal((size, size), dtype=np.float32)
    sigma = rng.uniform(0.4, 3.0)
    blurred = cv2.GaussianBlur(noise, (0, 0), sigma, sigmaY=sigma * rng.uniform(0.5, 4.0))
    return np.tanh(blurred / (blurred.std() + 1e-6) * rng.uniform(0.5, 3.0))


def _grain(size: int, rng: np.random.Generator) -> np.ndarray:
    """Wood-like rings or marble-like veins: a wave bent by fractal noise."""
    v, u = _grid(size, rng)
    along = np.hypot(v - rng.uniform(-1, 1), u * rng.uniform(0.1, 1.0)) if rng.random() < 0.5 else v
    return np.sin(2 * np.pi * (rng.uniform(2, 12) * along + rng.uniform(0.2, 1.5) * _fractal(size, rng, 3)))


FAMILIES: tuple[Callable[[int, np.random.Generator], np.ndarray], ...] = (
    _clouds, _stripes, _plaid, _checker, _cells, _speckle, _grain,
)  # fmt: skip
