"""Everything but the clip: ballast, sleeper or slab, rail, the clip's seat, the bolt, and litter."""

from __future__ import annotations

import math

import cv2
import numpy as np

from dfengine.data.fasteners.canvas import Canvas, box_distance, lattice_noise, smoothstep, turned
from dfengine.data.fasteners.clips import BOLT
from dfengine.data.fasteners.scene import RUST, Litter, Scene, Track

RAIL_HEAD = 0.22
FOOT_EDGE_HEIGHT = 0.045
FOOT_SLOPE = 0.16


def draw_track(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Ballast, sleeper or slab, pad and rail, weathered."""
    track = scene.track
    upper, lower = track.bed_edges
    beside = track.foot_edge - 0.04
    for strip in (canvas.crop(beside, -0.8, 0.8, upper + 0.03), canvas.crop(beside, lower - 0.03, 0.8, 0.8)):
        if strip.x.size:
            _ballast(strip, track, rng)
    _bed(canvas.crop(beside, max(upper, -0.8) - 0.03, 0.8, min(lower, 0.8) + 0.03), track, rng)
    _pad(canvas.crop(beside, -0.26, 0.0, 0.26), track)
    _rail(canvas.crop(-0.8, -0.8, track.foot_edge + 0.02, 0.8), track, rng)
    # Dirt gathers in patches, and rust is washed out around the fastener.
    beside_head = canvas.crop(track.head_edge, -0.8, 0.8, 0.8)
    patches = beside_head.noise["cloud"] + 0.5 * beside_head.noise["mottle"]
    dirt = smoothstep(1.5 - 1.6 * track.dirt, 3.0 - 1.6 * track.dirt, patches)
    beside_head.stain((0.7 * dirt) * (beside_head.x > track.head_edge), track.dirt_colour)
    near = canvas.crop(-0.45, -0.45, 0.5, 0.45)
    distance = np.sqrt(np.square(near.x) + np.square(0.8 * near.y))
    rust = smoothstep(0.42, 0.12, distance + 0.05 * near.noise["cloud"] + 0.02 * near.noise["mottle"])
    near.stain(np.float32(0.6 * track.rust_stain) * rust, RUST[3])


def _ballast(strip: Canvas, track: Track, rng: np.random.Generator) -> None:
    """Crushed stones: each a flat top with a fan of slanted facets down to its outline, later ones on top.

    A facet is a plane height = a x + b y + c; the stones are painted as facet numbers, then looked up.
    """
    centres, radius = _stone_places(strip, track.stone, rng)
    count, corners = len(centres), 7
    angles = (np.arange(corners) + rng.uniform(-0.4, 0.4, (count, corners))) * (2 * math.pi / corners)
    stretch, spin = rng.uniform(0.6, 1.0, (count, 1)), rng.uniform(0, math.pi, (count, 1))
    u, v = np.cos(angles), stretch * np.sin(angles)
    offsets = np.stack((np.cos(spin) * u - np.sin(spin) * v, np.sin(spin) * u + np.cos(spin) * v), axis=-1)
    offsets *= radius[:, None, None]
    top = rng.uniform(-0.06, 0.0, (count, 1))
    tilt = rng.uniform(-0.45, 0.45, (count, 1, 2))
    ring = np.concatenate((centres[:, None] + offsets, np.empty((count, corners, 1))), axis=-1)
    ring[..., 2] = top - radius[:, None] * rng.uniform(0.3, 0.9, (count, corners))
    inner_offsets = 0.5 * offsets + rng.uniform(-0.18, 0.18, (count, 1, 2)) * radius[:, None, None]
    inner = np.concatenate((centres[:, None] + inner_offsets, np.empty((count, corners, 1))), axis=-1)
    inner[..., 2] = top + np.sum(tilt * inner_offsets, axis=-1)
    # Planes through three points each: the flat top, then one facet per edge of the outline.
    following, outer = np.roll(inner, -1, axis=1), 0.5 * (ring + np.roll(ring, -1, axis=1))
    normal = np.cross(following - inner, outer - inner)
    slope = -normal[..., :2] / normal[..., 2:]
    slope = np.concatenate((tilt, slope), axis=1)
    anchor = np.concatenate((np.concatenate((centres[:, None], top[..., None]), axis=-1), inner), axis=1)
    level = anchor[..., 2] - np.sum(slope * anchor[..., :2], axis=-1)
    table = np.concatenate((slope, level[..., None]), axis=-1).reshape(-1, 3)
    tint = np.repeat(np.exp(rng.normal(0, 0.3, count)), corners + 1)

    labels = np.zeros(strip.x.shape, np.int32)
    ring_pixels, inner_pixels = (
        np.rint(strip.to_pixels(points[..., :2].reshape(-1, 2)) * 16).astype(np.int32).reshape(count, corners, 2)
        for points in (ring, inner)
    )
    quads = np.stack((inner_pixels, np.roll(inner_pixels, -1, 1), np.roll(ring_pixels, -1, 1), ring_pixels), axis=2)
    for stone in range(count):
        first = 1 + stone * (corners + 1)
        for corner in range(corners):
            cv2.fillConvexPoly(labels, quads[stone, corner], first + 1 + corner, shift=4)
        cv2.fillConvexPoly(labels, inner_pixels[stone], first, shift=4)
    gap = ((0.0, 0.0, -0.14),)
    a, b, c = np.concatenate((gap, table)).astype(np.float32).T[:, labels]
    strip.height[...] = a * strip.x + b * strip.y + c + 0.002 * strip.noise["fine"] + 0.0005 * strip.noise["grain"]
    strip.albedo[...] = strip.mottled(track.ballast_colour, 0.06, 0.06, 0.09, 0.07)
    strip.albedo *= np.concatenate(((0.3,), tint)).astype(np.float32)[labels]


def _stone_places(strip: Canvas, stone: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Centres (N, 2) on a shaken grid over the strip, in random order, and radii (N,)."""
    step = 0.6 * stone
    low = np.array((strip.x.min(), strip.y.min())) - 0.5 * step
    high = np.array((strip.x.max(), strip.y.max())) + 0.5 * step
    grid = np.stack(np.meshgrid(*(np.arange(a, b + step, step) for a, b in zip(low, high, strict=True))), axis=-1)
    centres = rng.permutation(grid.reshape(-1, 2) + rng.uniform(-0.4, 0.4, (grid.size // 2, 2)) * step)
    return centres, 0.5 * stone * rng.uniform(0.7, 1.35, len(centres))


def _bed(bed: Canvas, track: Track, rng: np.random.Generator) -> None:
    """Concrete sleeper, wooden sleeper or slab: texture, pits or grain, cracks, a bevelled edge."""
    noise, shape, side = bed.noise, bed.x.shape, bed.side
    upper, lower = track.bed_edges
    ragged = 0.006 * noise["mottle"] + 0.003 * noise["fine"]
    edge = np.minimum(bed.y - np.float32(upper), np.float32(lower) - bed.y) + ragged
    bevel = np.minimum(edge - 0.02, 0)
    if track.bed == "wood":
        grain = lattice_noise(rng, shape, 0.35 * side, 0.010 * side)
        grain += 0.7 * lattice_noise(rng, shape, 0.12 * side, 0.007 * side)
        split = np.abs(lattice_noise(rng, shape, 0.6 * side, 0.05 * side))
        crack = smoothstep(0.11, 0.0, split) * smoothstep(0.2, 0.9, noise["cloud"])
        height = 0.0025 * grain - 0.02 * crack + 0.0006 * noise["grain"]
        colour = bed.mottled(track.bed_colour, 0.10, 0.04, 0.05, 0.06) * ((1 + 0.16 * grain) * (1 - 0.6 * crack))
    else:
        pits = smoothstep(1.5, 2.3, noise["fine"] + 0.3 * noise["cloud"])
        crack = np.float32(0)
        if rng.random() < 0.25:
            path = 0.05 * lattice_noise(rng, (shape[1], 1), 0.2 * side).T + rng.uniform(-0.4, 0.4)
            crack = smoothstep(0.0045, 0.001, np.abs(bed.y - path - 0.006 * noise["mottle"]))
        rough = 0.0006 if track.bed == "slab" else 0.0010
        height = rough * (noise["grain"] + 1.5 * noise["fine"]) - 0.007 * pits - 0.006 * crack
        colour = bed.mottled(track.bed_colour, 0.10, 0.07, 0.07, 0.07) * ((1 - 0.35 * pits) * (1 - 0.5 * crack))
    bed.place(edge > 0, height + bevel, colour, np.float32(0.02))


def _pad(part: Canvas, track: Track) -> None:
    """The rail pad's edge, looking out from under the rail foot."""
    if track.bed == "wood":
        return
    inside = box_distance(part.x, part.y, -0.35, 0, 0.35 + track.foot_edge + 0.025, 0.24, 0.01) < 0
    part.place(inside, np.float32(0.018), part.mottled((0.035, 0.034, 0.033), 0.1, 0.1, 0.1, 0.05))


def _rail(part: Canvas, track: Track, rng: np.random.Generator) -> None:
    """Foot, web fillet and head, from the fastener to the left border."""
    x, noise, side = part.x, part.noise, part.side
    streak = lattice_noise(rng, x.shape, 0.02 * side, 0.25 * side)
    foot = np.float32(track.foot_edge) + 0.0012 * noise["mottle"] - x
    web = smoothstep(track.head_edge + 0.10, track.head_edge, x)
    rise = FOOT_EDGE_HEIGHT + FOOT_SLOPE * foot + np.minimum(foot - 0.012, 0) + 0.05 * web
    rust = 0.0010 * noise["fine"] + 0.0004 * noise["grain"]
    colour = part.mottled(track.rail_colour, 0.10, 0.12, 0.10, 0.06) * (1 + 0.06 * streak)
    part.place(foot > 0, rise + rust, colour * (1 - 0.35 * web), np.float32(0.05))
    head = np.float32(track.head_edge) - x
    inside = head > 0
    # Rounded gauge corner, then the running surface; only the latter is polished by the wheels.
    top = RAIL_HEAD - 0.9 * np.square(np.maximum(0.045 - head, 0)) / 0.045 + 0.0003 * streak
    part.place(inside, top, colour * 0.8, np.float32(0.15))
    band = smoothstep(0.018, 0.045, head + 0.003 * streak) * inside * np.float32(track.polished)
    shade = np.clip(0.36 + 0.07 * streak + 0.05 * noise["cloud"] + 0.02 * noise["grain"], 0.08, 0.8)
    for plane, tint in zip(part.albedo, (0.96, 1.0, 1.05), strict=True):
        plane += band * (np.float32(tint) * shade - plane)
    part.gloss[...] += 0.4 * band


def draw_seat(canvas: Canvas, scene: Scene) -> None:
    """What the clip sits in: baseplate on wood, cast shoulder and insulator, or guide plate, with the clip's marks."""
    if scene.track.bed == "wood":
        _baseplate(canvas, scene)
    if scene.fastener.kind == "w":
        _guide_plate(canvas, scene)
        marks = tuple((x, side * y, 0.02, 0.045) for x, y in ((-0.155, 0.10), (0.165, 0.14)) for side in (-1, 1))
    else:
        _shoulder(canvas, scene)
        marks = ((-0.11, -0.02, 0.022, 0.07), (0.155, 0.0, 0.02, 0.08))
    # Rust rubbed off where the clip rests: hidden until the clip is gone.
    for cx, cy, half_x, half_y in marks:
        part = canvas.crop(cx - 0.06, cy - 0.12, cx + 0.06, cy + 0.12)
        reach = np.square((part.x - cx) / half_x) + np.square((part.y - cy) / half_y) + 0.3 * part.noise["fine"]
        part.stain(0.7 * smoothstep(1.3, 0.6, reach), RUST[0])


def _shoulder(canvas: Canvas, scene: Scene) -> None:
    """Insulator on the rail foot and cast shoulder of an e-clip."""
    fastener = scene.fastener
    # Insulator on the rail foot.
    part = canvas.crop(-0.16, -0.16, 0.06, 0.16)
    half = 0.5 * (0.01 + 0.135)
    d = box_distance(part.x, part.y, 0.01 - half, 0.0, half, 0.125, 0.018)
    colour = part.mottled(fastener.seat_colour, 0.10, 0.12, 0.08, 0.05)
    part.place(d < 0, 0.082 + np.maximum(-0.012, np.minimum(-0.6 * (d + 0.012), 0)), colour, np.float32(0.12))
    # Shoulder: flanged base, then a saddle over the tunnel that takes the clip's centre leg.
    part = canvas.crop(-0.03, -0.2, 0.21, 0.2)
    cast = part.mottled(fastener.shoulder_colour, 0.10, 0.16, 0.12, 0.07)
    rough = 0.0012 * part.noise["fine"] + 0.0004 * part.noise["grain"]
    d = box_distance(part.x, part.y, 0.085, 0.0, 0.085, 0.112, 0.02)
    part.place(d < 0, 0.040 + rough + np.minimum(-d - 0.01, 0), cast, np.float32(0.05))
    # The tunnel's mouths, seen from above as dark gaps at both ends.
    for end in (-1, 1):
        gap = np.square((part.x - 0.045) / 0.036) + np.square((part.y - end * 0.108) / 0.022) < 1
        part.place(gap, np.float32(0.0405), (0.012, 0.010, 0.009))
    across = (part.x - 0.045) / 0.062
    inside = (np.abs(across) < 1) & (np.abs(part.y) < 0.098 + 0.004 * part.noise["fine"])
    saddle = 0.055 + 0.055 * np.sqrt(np.maximum(1 - across * across, 0))
    part.place(inside, saddle + rough, cast * 1.08, np.float32(0.08))


def _guide_plate(canvas: Canvas, scene: Scene) -> None:
    """Angled guide plate of a tension clamp: a ribbed plastic plate with a raised bed along the rail foot."""
    part = canvas.crop(-0.1, -0.24, 0.26, 0.24)
    fastener = scene.fastener
    colour = part.mottled(fastener.seat_colour, 0.08, 0.08, 0.06, 0.04)
    d = box_distance(part.x, part.y, 0.075, 0.0, 0.135, 0.195, 0.02)
    height = 0.045 + np.minimum(-d - 0.01, 0)
    # A groove for the rear bends, and ribs on both sides of the bolt.
    height = height - 0.022 * smoothstep(0.03, 0.022, np.abs(part.x - 0.165))
    ribs = (np.abs(np.abs(part.y) - 0.13) < 0.016) & (np.abs(part.x - 0.05) < 0.07)
    height = height + 0.018 * ribs
    part.place(d < 0, height, colour, np.float32(0.18))
    hole = np.square(part.x - BOLT[0]) + np.square(part.y - BOLT[1])
    rim = (hole < 0.052**2) & (d < 0)
    part.place(rim, np.float32(0.052), part.mottled(RUST[1], 0.1, 0.2, 0.2, 0.1))
    part.place(hole < 0.034**2, np.float32(0.0525), (0.008, 0.007, 0.006))


def _baseplate(canvas: Canvas, scene: Scene) -> None:
    """Steel plate between rail and wooden sleeper, with two screw spikes."""
    part = canvas.crop(-0.6, -0.32, 0.36, 0.32)
    d = box_distance(part.x, part.y, -0.2, 0.0, 0.5, 0.27, 0.015)
    colour = part.mottled(scene.track.rail_colour, 0.12, 0.18, 0.10, 0.06)
    part.place(d < 0, 0.022 + 0.0009 * part.noise["fine"] + np.minimum(-d - 0.008, 0), colour, np.float32(0.06))
    for y in (-0.215, 0.215):
        _hexagon(part, (0.245, y), 0.036, 0.055, scene.fastener.bolt_angle + y, colour)


def draw_bolt(canvas: Canvas, scene: Scene) -> np.ndarray:
    """Washer and bolt head of a tension clamp; returns where they are visible, bool (S, S)."""
    window = canvas.window(np.array((BOLT,)), 0.1)
    part = canvas.view(window)
    colour = part.mottled(scene.fastener.clip_colour, 0.08, 0.16, 0.12, 0.07)
    reach = np.sqrt(np.square(part.x - BOLT[0]) + np.square(part.y - BOLT[1]))
    seen = np.zeros(canvas.height.shape, bool)
    seen[window] = part.place(reach < 0.078, 0.138 + np.minimum(0.07 - reach, 0), colour, np.float32(0.2))
    _hexagon(part, BOLT, 0.05, 0.178, scene.fastener.bolt_angle, colour * 1.1)
    return seen


def _hexagon(part: Canvas, centre, half: float, top: float, angle: float, colour) -> None:
    """A chamfered hexagon head, `half` across flats."""
    u, v = turned(part.x, part.y, centre, angle)
    d = np.abs(u)
    for turn in (math.pi / 3, 2 * math.pi / 3):
        d = np.maximum(d, np.abs(np.float32(math.cos(turn)) * u + np.float32(math.sin(turn)) * v))
    part.place(d < half, top + np.minimum(0.7 * (0.8 * half - np.sqrt(u * u + v * v)), 0), colour, np.float32(0.2))


def draw_litter(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    """Harmless things: leaves, stones, dirt, paint, grass."""
    for item in scene.litter:
        reach = 1.2 * item.size
        cx, cy = item.centre
        part = canvas.crop(cx - reach, cy - reach, cx + reach, cy + reach)
        bend = rng.uniform(-1, 1)
        if part.x.size:
            _litter(part, item, bend)


def _litter(part: Canvas, item: Litter, bend: float) -> None:
    u, v = turned(part.x, part.y, item.centre, item.angle)
    u, v = u / np.float32(item.size), v / np.float32(item.size)
    if item.kind == "leaf":
        v = v + np.float32(0.35 * bend) * u * u
        half = 0.42 * np.sqrt(np.maximum(1 - u * u, 0)) * (1 - 0.35 * u)
        rib = 1 + 0.35 * smoothstep(0.06, 0.02, np.abs(v))
        lift = part.height + 0.008 + 0.012 * v * v
        part.place(np.abs(v) < half, lift, part.mottled(item.colour, 0.1, 0.15, 0.06, 0.03) * rib, np.float32(0.12))
    elif item.kind == "stone":
        r = np.sqrt(u * u + 1.7 * v * v) + 0.16 * part.noise["mottle"]
        shape = np.minimum(0.55 * item.size, 0.9 * item.size * (1 - r) + 0.1 * item.size * u)
        part.place(r < 0.9, shape, part.mottled(item.colour, 0.1, 0.1, 0.1, 0.08), np.float32(0.03))
    elif item.kind == "grass":
        for offset in (-0.25, 0.05, 0.3):
            path = np.float32(offset * 0.5) + np.float32(0.4 * bend + offset) * u * u
            width = 0.035 * np.maximum(1 - np.abs(u), 0)
            blade = (np.abs(v - path) < width + 0.012) & (np.abs(u) < 1)
            part.place(blade, part.height + 0.012, part.mottled(item.colour, 0.1, 0.15, 0.05, 0.03), np.float32(0.1))
    elif item.kind == "paint":
        d = box_distance(u, v, 0, 0, 0.9, 0.28, 0.1) + 0.10 * part.noise["fine"] + 0.08 * part.noise["mottle"]
        on_bed = part.height < 0.03
        part.stain(0.8 * smoothstep(0.08, -0.08, d) * on_bed, item.colour)
    else:
        r = np.sqrt(u * u + 1.5 * v * v) + 0.18 * part.noise["mottle"] + 0.1 * part.noise["fine"]
        part.stain(0.8 * smoothstep(1.0, 0.55, r), item.colour)
