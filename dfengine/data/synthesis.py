"""Synthetic anomalies from normal images, drawn while training (DF 3.5, DAD 3.3; DESIGN "Synthetic anomalies")."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from dfengine.data.augment import Augmentation
from dfengine.data.foreground import KINDS as FOREGROUND_KINDS
from dfengine.data.foreground import estimate_foreground, random_part
from dfengine.data.perlin import perlin_mask
from dfengine.data.regions import Scene
from dfengine.data.structural import STRUCTURAL_KINDS, Structural, changed_mask
from dfengine.data.textures import TextureSource
from dfengine.errors import ConfigError

RECIPES = ("mixed", "paper", "structural")
KINDS = ("normal", "texture", "self", *STRUCTURAL_KINDS)

RIM = 2  # pixels by which a structural edit may reach beyond its mask

_SHUFFLE_GRID = 8
_AUGMENTATIONS_DRAWN = 3


@dataclass(frozen=True)
class SynthesisConfig:
    """How anomalies are drawn.

    recipe: "paper" (textures blended in Perlin shapes), "structural" (parts missing, broken, displaced), or "mixed":
    structural with chance `structural_share`, else the papers'.
    beta_range: weight of the *normal* image in the papers' blend.
    foreground: "auto" (estimated from the images), "none" (the whole image), "texture" (texture classes: a random part
    of the image, and foreign textures only). A foreground passed to `Synthesizer` takes the place of the estimate.
    max_draws: empty draws after which a sample stays normal.
    area: range of a structural region's share of the image. change_threshold: 8-bit levels over which a pixel counts as
    changed. min_changed: share of the image that must have changed, else the draw counts as empty (structural only; a
    Perlin shape is empty when it has no pixel).
    decoy: chance that a *normal* training sample is processed like an anomaly without becoming one
    (`Synthesizer.decoy`), so that traces of blending are no evidence.
    transplant: chance that a decoy carries the object, or a part of it, of another normal image in its place; only
    where the objects stand alike in all images.
    """

    recipe: str = "mixed"
    structural_share: float = 0.5
    beta_range: tuple[float, float] = (0.2, 0.8)
    foreground: str = "auto"
    max_draws: int = 50
    area: tuple[float, float] = (0.008, 0.35)
    change_threshold: float = 10.0
    min_changed: float = 0.003
    decoy: float = 0.5
    transplant: float = 0.5

    def __post_init__(self) -> None:
        for name in ("beta_range", "area"):
            pair = tuple(getattr(self, name))
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= 1:
                raise ConfigError(f"synthesis {name} must be two rising numbers within [0, 1], not {pair!r}")
            object.__setattr__(self, name, (float(pair[0]), float(pair[1])))
        if self.area[0] <= 0:
            raise ConfigError(f"synthesis area must start above 0, not at {self.area[0]!r}")
        if self.recipe not in RECIPES:
            raise ConfigError(f"synthesis recipe must be one of {', '.join(RECIPES)}, not {self.recipe!r}")
        if self.foreground not in FOREGROUND_KINDS:
            known = ", ".join(FOREGROUND_KINDS)
            raise ConfigError(f"synthesis foreground must be one of {known}, not {self.foreground!r}")
        for name in ("structural_share", "min_changed", "decoy", "transplant"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"synthesis {name} must be within [0, 1], not {getattr(self, name)!r}")
        if self.max_draws < 1:
            raise ConfigError(f"synthesis max_draws must be at least 1, not {self.max_draws!r}")
        if not 0 < self.change_threshold < 255:
            raise ConfigError(f"synthesis change_threshold must be within (0, 255), not {self.change_threshold!r}")

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SynthesisConfig:
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown synthesis setting: {', '.join(sorted(unknown))}")
        return cls(**values)


@dataclass(frozen=True)
class SynthesisResult:
    """image uint8 (S, S, 3); mask bool (S, S), True = anomalous; kind one of `KINDS`, "normal" with an empty mask."""

    image: np.ndarray
    mask: np.ndarray
    kind: str


class Synthesizer:
    """Draws anomalies on normal images, uint8 (N, S, S, 3).

    foregrounds, bool (N, S, S), replaces the estimate where the objects' places are known.
    """

    def __init__(
        self,
        images: np.ndarray,
        textures: TextureSource,
        config: SynthesisConfig | None = None,
        foregrounds: np.ndarray | None = None,
    ):
        if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 (N, S, S, 3), not {images.dtype} {images.shape}")
        if not len(images):
            raise ValueError("at least one normal image is needed")
        if textures.size != images.shape[1]:
            raise ValueError(f"textures are of size {textures.size}, images of size {images.shape[1]}")
        self.images = images
        self.textures = textures
        self.config = config or SynthesisConfig()
        self.foregrounds = estimate_foreground(images, self.config.foreground) if foregrounds is None else foregrounds
        self._structural = Structural(images, self.foregrounds, self.config.area)

    def sample(self, index: int, rng: np.random.Generator) -> SynthesisResult:
        """An anomaly on the normal image at `index`."""
        return self.sample_from(self.images[index], self.foregrounds[index], rng)

    def sample_from(self, image: np.ndarray, foreground: np.ndarray, rng: np.random.Generator) -> SynthesisResult:
        """An anomaly on a given normal image, uint8 (S, S, 3), with its foreground, bool (S, S)."""
        share = {"paper": 0.0, "structural": 1.0, "mixed": self.config.structural_share}[self.config.recipe]
        draw = self._draw_structural if rng.random() < share else self._draw_texture
        if self.config.foreground == "texture":
            foreground = random_part(image.shape[0], rng)
        for _ in range(self.config.max_draws):
            result = draw(image, foreground, rng)
            if result is not None:
                return result
        return SynthesisResult(image, np.zeros(image.shape[:2], bool), "normal")

    def decoy(
        self, image: np.ndarray, foreground: np.ndarray, rng: np.random.Generator, pose: Augmentation | None = None
    ) -> np.ndarray:
        """A normal image processed as the structural anomalies are, and still normal. uint8 (S, S, 3).

        `pose` is what moved the image and its foreground, for what is brought from other images.
        """
        scene = Scene(image.astype(np.float32), foreground)
        if self._structural.aligned and rng.random() < self.config.transplant:
            return _to_uint8(self._structural.transplant(scene, rng, pose))
        return _to_uint8(self._structural.decoy(scene, rng))

    def _draw_structural(
        self, image: np.ndarray, foreground: np.ndarray, rng: np.random.Generator
    ) -> SynthesisResult | None:
        before = image.astype(np.float32)
        after, kind = self._structural.draw(Scene(before, foreground), rng)
        mask = changed_mask(before, after, self.config.change_threshold)
        if mask.mean() < max(self.config.min_changed, 1e-9):
            return None
        # What is not in the mask, its soft rim apart, is exactly the normal image.
        rim = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=RIM).astype(bool)
        return SynthesisResult(np.where(rim[..., None], _to_uint8(after), image), mask, kind)

    def _draw_texture(
        self, image: np.ndarray, foreground: np.ndarray, rng: np.random.Generator
    ) -> SynthesisResult | None:
        mask = perlin_mask(image.shape[0], rng) & foreground
        if not mask.any():
            return None
        if self.config.foreground == "texture" or rng.random() < 0.5:
            kind, appearance = "texture", augment_appearance(self.textures.sample(rng), rng)
        else:
            kind, appearance = "self", shuffle_cells(augment_appearance(image, rng), rng)
        beta = float(rng.uniform(*self.config.beta_range))
        return SynthesisResult(blend(image, appearance, mask, beta), mask, kind)


def blend(normal: np.ndarray, appearance: np.ndarray, mask: np.ndarray, beta: float) -> np.ndarray:
    """`beta N + (1 - beta) A` inside the mask, N elsewhere (DAD 3.3), rounded. uint8 (S, S, 3)."""
    mixed = beta * normal[mask].astype(np.float32) + (1.0 - beta) * appearance[mask].astype(np.float32)
    result = normal.copy()
    result[mask] = _to_uint8(mixed)
    return result


def shuffle_cells(image: np.ndarray, rng: np.random.Generator, cells: int = _SHUFFLE_GRID) -> np.ndarray:
    """The image cut on a cells x cells grid and put together in random order. uint8 (S, S, 3)."""
    size = image.shape[0]
    cell = -(-size // cells)
    pad = cell * cells - size
    if pad:  # sides that the grid does not divide: shuffle a reflected extension and cut it back
        image = cv2.copyMakeBorder(image, 0, pad, 0, pad, cv2.BORDER_REFLECT)
    tiles = image.reshape(cells, cell, cells, cell, 3).transpose(0, 2, 1, 3, 4).reshape(cells * cells, cell, cell, 3)
    tiles = tiles[rng.permutation(cells * cells)]
    image = tiles.reshape(cells, cells, cell, cell, 3).transpose(0, 2, 1, 3, 4).reshape(cells * cell, cells * cell, 3)
    return image[:size, :size]


def augment_appearance(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three different ones of the ten augmentations of DESIGN, in random order. uint8 (S, S, 3) in and out."""
    picture = Image.fromarray(image)
    for choice in rng.choice(len(APPEARANCE_AUGMENTATIONS), _AUGMENTATIONS_DRAWN, replace=False):
        picture = APPEARANCE_AUGMENTATIONS[choice](picture, rng)
    return np.asarray(picture)


def _gamma(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Exponent within [0.5, 2], each channel its own."""
    exponents = 2.0 ** rng.uniform(-1, 1, 3)
    levels = np.arange(256) / 255.0
    table = np.concatenate([np.rint(255 * levels**exponent) for exponent in exponents])
    return picture.point(table.astype(int).tolist())


def _brightness(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A factor within [0.8, 1.2] and an offset of up to 30 levels."""
    table = np.clip(np.rint(np.arange(256) * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)), 0, 255)
    return picture.point(table.astype(int).tolist() * 3)


def _sharpness(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageEnhance.Sharpness(picture).enhance(float(rng.uniform(0.0, 4.0)))


def _hue_saturation(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Hue and saturation moved by up to 50 of 255 steps."""
    hue, saturation, value = picture.convert("HSV").split()
    turn, strengthen = (int(v) for v in rng.integers(-50, 51, 2))
    hue = hue.point([(level + turn) % 256 for level in range(256)])
    saturation = saturation.point([min(255, max(0, level + strengthen)) for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _solarize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.solarize(picture, int(rng.integers(32, 129)))


def _posterize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.posterize(picture, int(rng.integers(2, 6)))


def _invert(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.invert(picture)


def _auto_contrast(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.equalize(picture)


def _rotate(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Within +-45 degrees; the corners are filled by reflection."""
    size = picture.width
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), float(rng.uniform(-45, 45)), 1.0)
    return Image.fromarray(cv2.warpAffine(np.asarray(picture), matrix, (size, size), borderMode=cv2.BORDER_REFLECT_101))


APPEARANCE_AUGMENTATIONS: tuple[Callable[[Image.Image, np.random.Generator], Image.Image], ...] = (
    _gamma, _brightness, _sharpness, _hue_saturation, _solarize,
    _posterize, _invert, _auto_contrast, _equalize, _rotate,
)  # fmt: skip


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
