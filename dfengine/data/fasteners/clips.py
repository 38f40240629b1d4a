"""The clip: a centre line in space swept with a round section, whole, broken or displaced."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.interpolate import CubicSpline

from dfengine.data.fasteners.canvas import Canvas, smoothstep
from dfengine.data.fasteners.scene import RUST, Defect, Fastener

# Centre leg in the shoulder's tunnel, round its far end to the heel on the outer side, past the near end, to the toe on
# the rail foot.
E_CLIP = (
    (0.045, 0.085, 0.045), (0.045, -0.120, 0.045), (0.060, -0.195, 0.055), (0.112, -0.232, 0.070),
    (0.160, -0.185, 0.080), (0.172, -0.050, 0.075), (0.165, 0.100, 0.075), (0.115, 0.205, 0.085),
    (0.020, 0.240, 0.105), (-0.080, 0.205, 0.120), (-0.128, 0.110, 0.125), (-0.122, 0.000, 0.118),
    (-0.100, -0.070, 0.108),
)  # fmt: skip

# Half of the tension clamp, from a toe on the rail foot to the middle loop under the washer; the other half mirrors it.
W_ARM = (
    (-0.155, 0.070, 0.100), (-0.168, 0.135, 0.110), (-0.110, 0.188, 0.112), (0.010, 0.205, 0.105),
    (0.120, 0.205, 0.092), (0.182, 0.165, 0.085), (0.165, 0.105, 0.085), (0.070, 0.078, 0.092),
    (-0.020, 0.066, 0.098), (-0.066, 0.040, 0.098),
)  # fmt: skip

#: Where a tension clamp's bolt stands.
BOLT = (0.035, 0.0)


@dataclass(frozen=True)
class Tube:
    """A swept rod. line: (N, 3) points; along: (N,) position of each on the whole clip, as a length; ends: positions
    of the two ends (the line may run a little past a broken one, which is trimmed raggedly); torn: which are broken."""

    line: np.ndarray
    along: np.ndarray
    radius: float
    ends: tuple[float, float]
    torn: tuple[bool, bool]


def clip_tubes(fastener: Fastener, defect: Defect) -> list[Tube]:
    """The rods to draw for the clip in this state: none, one, or one with a fragment."""
    if defect.kind == "missing":
        return []
    line = _centre_line(fastener)
    along = np.concatenate(([0.0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))))
    total = along[-1]
    if defect.kind == "displaced":
        pivot = np.array(BOLT) if fastener.kind == "w" else np.array((0.02, 0.0))
        line = _move(line, pivot, defect.turn, pivot + defect.shift)
        line[:, 2] += defect.lift
    start, stop = defect.keep[0] * total, defect.keep[1] * total
    tubes = [_piece(line, along, start, stop, fastener.radius, (start > 0, stop < total))]
    if defect.fragment is not None:
        x, y, angle = defect.fragment
        first = stop + 0.08 * total if stop < total else 0.0
        last = first + 0.2 * total
        lost = _piece(line, along, first, last, fastener.radius, (True, True))
        moved = _move(lost.line, lost.line[:, :2].mean(0), angle, np.array((x, y)))
        # It lies flat on the ground.
        moved[:, 2] = fastener.radius + 0.01
        tubes.append(Tube(moved, lost.along, lost.radius, lost.ends, lost.torn))
    return tubes


def draw_clip(canvas: Canvas, fastener: Fastener, tubes: list[Tube]) -> np.ndarray:
    """Draw the rods; returns where a rod is visible, bool (S, S)."""
    seen = np.zeros(canvas.height.shape, bool)
    for tube in tubes:
        window = canvas.window(tube.line[:, :2], 1.2 * tube.radius)
        part = canvas.view(window)
        if not part.x.size:
            continue
        height, fracture = _sweep(part, tube)
        colour = part.mottled(fastener.clip_colour, 0.08, 0.14, 0.10, 0.06)
        height += 0.0007 * part.noise["fine"]
        visible = part.place(height > -1, height, colour, np.float32(fastener.gloss))
        rust = fastener.clip_rust * smoothstep(-0.2, 1.0, part.noise["mottle"] + 0.5 * part.noise["cloud"]) * visible
        part.stain(rust, RUST[0])
        part.stain(0.8 * fracture * visible, (0.34, 0.32, 0.30), matt=0.5)
        seen[window] |= visible
    return seen


def _centre_line(fastener: Fastener) -> np.ndarray:
    """Points (N, 3) about 0.016 apart along the whole clip."""
    if fastener.kind == "e":
        control = np.array(E_CLIP)
    else:
        arm = np.array(W_ARM)
        control = np.concatenate((arm, arm[::-1] * (1, -1, 1)))
    control = control * (fastener.stretch[0], fastener.stretch[1], 1)
    along = np.concatenate(([0.0], np.cumsum(np.linalg.norm(np.diff(control, axis=0), axis=1))))
    return CubicSpline(along, control)(np.linspace(0, along[-1], math.ceil(along[-1] / 0.016) + 1))


def _move(line: np.ndarray, pivot: np.ndarray, angle: float, target: np.ndarray) -> np.ndarray:
    """The line turned about `pivot` in the plane, the pivot then brought to `target`."""
    cos, sin = math.cos(angle), math.sin(angle)
    plane = (line[:, :2] - pivot) @ np.array(((cos, sin), (-sin, cos))) + target
    return np.column_stack((plane, line[:, 2]))


def _piece(line, along, start: float, stop: float, radius: float, torn: tuple[bool, bool]) -> Tube:
    """The part of a line between two positions, with one radius to spare at a torn end."""
    keep = (along >= start - torn[0] * radius) & (along <= stop + torn[1] * radius)
    return Tube(line[keep], along[keep], radius, (start, stop), torn)


def _sweep(canvas: Canvas, tube: Tube) -> tuple[np.ndarray, np.ndarray]:
    """Upper surface of a rod on a canvas: height, -inf beside it, and the freshness of a fracture face, 0..1.

    Segment by segment in its own window: height = z + sqrt(radius^2 - distance^2), the highest wins. A torn end stops
    where the position along the rod, shaken by noise, passes the end.
    """
    surface = np.full(canvas.height.shape, -np.inf, np.float32)
    fracture = np.zeros(canvas.height.shape, np.float32)
    radius2 = tube.radius**2
    for (a, b), (s0, s1) in zip(
        zip(tube.line[:-1], tube.line[1:], strict=True), zip(tube.along[:-1], tube.along[1:], strict=True), strict=True
    ):
        window = canvas.window(np.stack((a[:2], b[:2])), tube.radius)
        dx, dy = canvas.x[window] - np.float32(a[0]), canvas.y[window] - np.float32(a[1])
        ux, uy = b[0] - a[0], b[1] - a[1]
        t = np.clip((dx * np.float32(ux) + dy * np.float32(uy)) * np.float32(1 / (ux * ux + uy * uy)), 0, 1)
        rest = np.float32(radius2) - np.square(dx - t * np.float32(ux)) - np.square(dy - t * np.float32(uy))
        inside = rest > 0
        if any(tube.torn):
            position = np.float32(s0) + t * np.float32(s1 - s0)
            # A slanted face, roughened.
            across = (dx * np.float32(uy) - dy * np.float32(ux)) * np.float32(0.6 / math.hypot(ux, uy))
            ragged = across + np.float32(0.22 * tube.radius) * canvas.noise["fine"][window]
            face = np.zeros_like(position)
            for end, torn, sign in zip(tube.ends, tube.torn, (1, -1), strict=True):
                if torn:
                    depth = sign * (position - np.float32(end)) + ragged
                    inside &= depth > 0
                    face = np.maximum(face, smoothstep(0.5 * tube.radius, 0.2 * tube.radius, depth))
        height = np.float32(a[2]) + t * np.float32(b[2] - a[2]) + np.sqrt(np.maximum(rest, 0))
        higher = inside & (height > surface[window])
        np.copyto(surface[window], height, where=higher)
        if any(tube.torn):
            np.copyto(fracture[window], face, where=higher)
    # Smooth the creases between segments, without bleeding over the rod's outline.
    covered = surface > -1
    sigma = 0.005 * canvas.side
    weight = cv2.GaussianBlur(covered.astype(np.float32), (0, 0), sigma)
    smooth = cv2.GaussianBlur(np.where(covered, surface, 0), (0, 0), sigma) / np.maximum(weight, 1e-3)
    return np.where(covered, smooth, surface), fracture
