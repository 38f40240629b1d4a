"""The surface that is drawn on: a height field with a colour and a gloss at each point, and ways to put things on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from dfengine.data.fasteners.scene import Colour, Pose

#: Noise fields of a canvas: lattice cell in picture sides. A further one, "grain", is independent in each sample.
NOISE_CELLS = {"cloud": 0.22, "mottle": 0.05, "fine": 0.014}


@dataclass
class Canvas:
    """Samples of the scene on a pixel grid of S x S; drawing functions change height, albedo and gloss in place.

    side: samples along a whole picture; origin: (row, column) of this canvas in it.
    x, y, height, gloss: float32 (S, S), lengths in picture sides; albedo: float32 (3, S, S), linear RGB, planar so
    that a (S, S) field multiplies it without a stride-3 inner loop. noise: name -> float32 (S, S), mean 0, deviation
    about 1. `crop` gives a canvas whose arrays are views, for things that cover a small part.
    """

    pose: Pose
    side: int
    origin: tuple[int, int]
    x: np.ndarray
    y: np.ndarray
    height: np.ndarray
    albedo: np.ndarray
    gloss: np.ndarray
    noise: dict[str, np.ndarray]

    @classmethod
    def blank(cls, side: int, pose: Pose, rng: np.random.Generator) -> Canvas:
        """An empty ground of `side` samples a side, seen with `pose`, with fresh noise fields."""
        line = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
        column, row = (line - pose.shift[0]) / pose.scale, (line - pose.shift[1]) / pose.scale
        cos, sin = math.cos(pose.angle), math.sin(pose.angle)
        noise = {name: lattice_noise(rng, (side, side), side * cell) for name, cell in NOISE_CELLS.items()}
        noise["grain"] = rng.standard_normal((side, side), dtype=np.float32)
        return cls(
            pose=pose,
            side=side,
            origin=(0, 0),
            x=np.float32(cos) * column[None, :] + np.float32(sin) * row[:, None],
            y=np.float32(cos) * row[:, None] - np.float32(sin) * column[None, :],
            height=np.full((side, side), -1, np.float32),
            albedo=np.zeros((3, side, side), np.float32),
            gloss=np.zeros((side, side), np.float32),
            noise=noise,
        )

    def copy(self) -> Canvas:
        """A canvas that can be drawn on without changing this one."""
        return replace(self, height=self.height.copy(), albedo=self.albedo.copy(), gloss=self.gloss.copy())

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Scene points (N, 2) -> this canvas' sample coordinates (N, 2), (column, row)."""
        cos, sin = math.cos(self.pose.angle), math.sin(self.pose.angle)
        turned = points @ np.array(((cos, sin), (-sin, cos)))
        whole = (turned * self.pose.scale + self.pose.shift + 0.5) * self.side - 0.5
        return whole - np.array((self.origin[1], self.origin[0]))

    def window(self, points: np.ndarray, margin: float = 0.0) -> tuple[slice, slice]:
        """The slices (rows, columns) of the samples within `margin` of the box of scene points (N, 2); maybe empty."""
        pixels = self.to_pixels(points)
        pad = margin * self.pose.scale * self.side
        limit = self.x.shape[::-1]
        left, top = np.clip(np.floor(pixels.min(0) - pad), 0, limit).astype(int)
        right, bottom = np.clip(np.ceil(pixels.max(0) + pad) + 1, 0, limit).astype(int)
        return slice(top, bottom), slice(left, right)

    def crop(self, x0: float, y0: float, x1: float, y1: float) -> Canvas:
        """The part of this canvas that holds the scene rectangle, as views; possibly empty."""
        return self.view(self.window(np.array(((x0, y0), (x1, y0), (x0, y1), (x1, y1)))))

    def view(self, window: tuple[slice, slice]) -> Canvas:
        """The part of this canvas in a window, as views."""
        rows, columns = window
        return replace(
            self,
            origin=(self.origin[0] + rows.start, self.origin[1] + columns.start),
            x=self.x[window],
            y=self.y[window],
            height=self.height[window],
            albedo=self.albedo[:, rows, columns],
            gloss=self.gloss[window],
            noise={name: field[window] for name, field in self.noise.items()},
        )

    def place(self, inside: np.ndarray, height, colour, gloss=0.0) -> np.ndarray:
        """Put a solid thing: where `inside` (bool) and above what is there. Returns where it is visible (bool)."""
        visible = inside & (height > self.height)
        np.copyto(self.height, height, where=visible, casting="same_kind")
        for plane, value in zip(self.albedo, colour, strict=True):
            np.copyto(plane, value, where=visible, casting="same_kind")
        np.copyto(self.gloss, gloss, where=visible, casting="same_kind")
        return visible

    def stain(self, opacity: np.ndarray, colour: Colour, matt: float = 1.0) -> None:
        """Blend a thin layer (dirt, rust, paint) over what is there; `matt` is how much of the gloss it takes."""
        for plane, value in zip(self.albedo, colour, strict=True):
            plane += opacity * (np.float32(value) - plane)
        self.gloss *= 1 - np.float32(matt) * opacity

    def mottled(self, colour: Colour, cloud: float, mottle: float, fine: float, grain: float) -> np.ndarray:
        """A colour (3, ...) whose brightness follows the noise fields by the given amounts."""
        field = 1 + cloud * self.noise["cloud"] + mottle * self.noise["mottle"]
        field += fine * self.noise["fine"] + grain * self.noise["grain"]
        np.clip(field, 0.25, 2.5, out=field)
        return np.asarray(colour, np.float32)[:, None, None] * field


def lattice_noise(rng: np.random.Generator, shape: tuple[int, int], cell_x: float, cell_y: float = 0) -> np.ndarray:
    """Smooth noise float32 `shape`: normal values on a lattice, interpolated. Cells in samples; cell_y 0 = cell_x."""
    cell_y = cell_y or cell_x
    rows, columns = math.ceil(shape[0] / cell_y) + 3, math.ceil(shape[1] / cell_x) + 3
    lattice = rng.standard_normal((rows, columns), dtype=np.float32)
    scale = np.array(((cell_x, 0, -cell_x), (0, cell_y, -cell_y)))
    flags = cv2.INTER_CUBIC if cell_x > 12 else cv2.INTER_LINEAR
    return 1.35 * cv2.warpAffine(lattice, scale, shape[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT_101)


def smoothstep(low: float, high: float, value: np.ndarray) -> np.ndarray:
    """0 below `low`, 1 above `high` (or the reverse where low > high), smooth between."""
    t = (value - np.float32(low)) * np.float32(1 / (high - low))
    np.clip(t, 0, 1, out=t)
    rest = 3 - 2 * t
    rest *= t
    rest *= t
    return rest


def box_distance(x, y, cx: float, cy: float, half_x: float, half_y: float, corner: float = 0.0) -> np.ndarray:
    """Signed distance to a rectangle with rounded corners, negative inside."""
    dx, dy = np.abs(x - cx) - (half_x - corner), np.abs(y - cy) - (half_y - corner)
    outside = np.sqrt(np.square(np.maximum(dx, 0)) + np.square(np.maximum(dy, 0)))
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def turned(x, y, centre: tuple[float, float], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in the frame of a thing that lies at `centre`, turned by `angle`."""
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    return cos * dx + sin * dy, cos * dy - sin * dx
