"""Light augmentation of normal images: small changes of pose, light and camera that leave a normal image normal."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from dfengine.errors import ConfigError

FLIPS = ("", "h", "v", "hv")


@dataclass(frozen=True)
class AugmentConfig:
    """Half-widths of the uniform draws around "no change"; 0 switches a change off.

    shift: fraction of the side, each axis. rotation: degrees. scale: relative zoom. exposure: stops (gain 2^x).
    gamma: log2 of the exponent. contrast: relative, about the image mean. white_balance: relative gain of each channel.
    blur: largest Gaussian sigma in thousandths of the side. noise: largest sigma of the added noise, in 8-bit levels.
    flip: which mirrorings a normal object allows ("h" left-right, "v" up-down), each taken with chance 1/2.
    camera_last: light, blur and noise come after a synthetic defect, as a camera sees one, and cover the traces of its
    making; else before it.
    """

    shift: float = 0.06
    rotation: float = 2.0
    scale: float = 0.03
    exposure: float = 0.2
    gamma: float = 0.15
    contrast: float = 0.1
    white_balance: float = 0.03
    blur: float = 8.0
    noise: float = 4.0
    flip: str = ""
    camera_last: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in ("flip", "camera_last"):
                continue
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"augmentation {field.name} must be a number of at least 0, not {value!r}")
        if self.rotation > 180:
            raise ConfigError(f"augmentation rotation is at most 180 degrees, not {self.rotation!r}")
        for name in ("shift", "scale", "contrast", "white_balance"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"augmentation {name} is a fraction below 1, not {getattr(self, name)!r}")
        if not isinstance(self.camera_last, bool):
            raise ConfigError(f"augmentation camera_last must be true or false, not {self.camera_last!r}")
        if self.flip not in FLIPS:
            raise ConfigError(f"augmentation flip must be h, v, hv or none, not {self.flip!r}")

    @classmethod
    def off(cls) -> AugmentConfig:
        """No augmentation at all."""
        return cls(**{field.name: 0.0 for field in dataclasses.fields(cls) if field.type == "float"})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AugmentConfig:
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown augmentation setting: {', '.join(sorted(unknown))}")
        return cls(**values)


class Augmentation:
    """One drawn augmentation: `pose` moves an image, `mask` its foreground in the same way, `camera` does the rest."""

    def __init__(self, size: int, rng: np.random.Generator, config: AugmentConfig):
        def around(width: float) -> float:
            return float(rng.uniform(-width, width))

        self.size = size
        flip_x = "h" in config.flip and rng.random() < 0.5
        flip_y = "v" in config.flip and rng.random() < 0.5
        angle, zoom = np.deg2rad(around(config.rotation)), 1.0 + around(config.scale)
        shift_x, shift_y = around(config.shift) * size, around(config.shift) * size
        linear = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        linear = linear @ np.diag([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0])
        centre = np.full(2, (size - 1) / 2)
        if not (config.rotation or config.scale):  # a whole number of pixels keeps the picture sharp
            shift_x, shift_y = round(shift_x), round(shift_y)
        self.matrix = np.column_stack([linear, centre - linear @ centre + (shift_x, shift_y)])
        self.moves = not np.array_equal(self.matrix, np.eye(2, 3))

        self.gain = 2.0 ** around(config.exposure)
        self.gamma = 2.0 ** around(config.gamma)
        self.contrast = 1.0 + around(config.contrast)
        self.balance = np.array([1.0 + around(config.white_balance) for _ in range(3)])
        # Most photos are sharp and clean: square the draw, so that strong blur and noise are rare.
        self.blur = config.blur * size / 1000 * float(rng.random()) ** 2
        sigma = config.noise * float(rng.random()) ** 2
        self.noise = sigma * rng.standard_normal((size, size, 3), dtype=np.float32) if config.noise else None

    def pose(self, image: np.ndarray) -> np.ndarray:
        """`image` uint8 (S, S, 3) flipped, turned, zoomed and shifted."""
        return self._warp(image, cv2.INTER_LINEAR) if self.moves else image

    def camera(self, image: np.ndarray, gray: bool | None = None) -> np.ndarray:
        """`image` uint8 (S, S, 3) under another light and camera: a new array. A gray picture stays gray; `gray` says
        whether it is one where a coloured defect may hide it."""
        gray = is_gray(image) if gray is None else gray
        balance = 1.0 if gray else self.balance
        if self.blur > 0.2:  # below this the kernel is a single pixel
            image = cv2.GaussianBlur(image, (0, 0), self.blur, borderType=cv2.BORDER_REFLECT_101)
        # A tone curve for each channel: gain, gamma, then contrast about the mean of the picture.
        levels = np.arange(256)[:, None] / 255.0 * (self.gain * balance * np.ones(3))
        levels = np.clip(levels, 0.0, 1.0) ** self.gamma * 255.0
        if self.contrast != 1.0:
            mean = np.mean([np.bincount(image[..., c].ravel(), minlength=256) @ levels[:, c] for c in range(3)])
            mean /= image.shape[0] * image.shape[1]
            levels = mean + self.contrast * (levels - mean)
        if self.noise is None:
            table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
            return np.stack([table[:, c][image[..., c]] for c in range(3)], axis=-1)
        toned = np.stack([levels.astype(np.float32)[:, c][image[..., c]] for c in range(3)], axis=-1)
        noise = self.noise[..., :1] if gray else self.noise
        return np.clip(np.rint(toned + noise), 0, 255).astype(np.uint8)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The bool (S, S) mask of the image, moved as the image is."""
        return self._warp(mask.astype(np.uint8), cv2.INTER_NEAREST).astype(bool) if self.moves else mask

    def _warp(self, array: np.ndarray, interpolation: int) -> np.ndarray:
        side = (self.size, self.size)
        return cv2.warpAffine(array, self.matrix, side, flags=interpolation, borderMode=cv2.BORDER_REFLECT_101)


def is_gray(image: np.ndarray) -> bool:
    """Whether the three channels of (S, S, 3) are one."""
    return np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


def augment_normal(image: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> np.ndarray:
    """A lightly augmented copy of a normal image, uint8 (S, S, 3)."""
    augmentation = Augmentation(image.shape[0], rng, config)
    return augmentation.camera(augmentation.pose(image))
