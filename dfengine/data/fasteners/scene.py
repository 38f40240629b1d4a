"""What is in one picture: small dataclasses, all sampled from one generator.

Lengths are in picture sides (1 is about 0.32 m); x points right (away from the rail), y down (along the rail), z to
the camera; the origin is the centre of the fastener and z = 0 the top of the sleeper. Angles are in radians. Colours
are linear-light RGB reflectances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DEFECTS = ("good", "missing", "broken", "displaced")
VARIETY = 0.4

Colour = tuple[float, float, float]

RUST = ((0.150, 0.078, 0.045), (0.105, 0.066, 0.045), (0.175, 0.100, 0.058), (0.130, 0.092, 0.066))
CONCRETE = ((0.46, 0.42, 0.35), (0.38, 0.37, 0.34), (0.31, 0.28, 0.24), (0.52, 0.49, 0.43), (0.34, 0.29, 0.22))
WOOD = ((0.17, 0.115, 0.075), (0.26, 0.22, 0.175), (0.10, 0.070, 0.050), (0.21, 0.165, 0.125))
BALLAST = ((0.27, 0.25, 0.23), (0.20, 0.20, 0.21), (0.24, 0.17, 0.13), (0.33, 0.30, 0.26), (0.17, 0.15, 0.14))
PLASTIC = ((0.030, 0.030, 0.033), (0.075, 0.140, 0.085), (0.16, 0.165, 0.15), (0.23, 0.19, 0.12), (0.10, 0.065, 0.05))
STEEL = ((0.075, 0.070, 0.067), (0.16, 0.092, 0.055), (0.13, 0.102, 0.082), (0.22, 0.19, 0.16), (0.20, 0.12, 0.065))
LEAF = ((0.20, 0.13, 0.03), (0.10, 0.14, 0.035), (0.24, 0.09, 0.025), (0.14, 0.085, 0.04))
PAINT = ((0.75, 0.74, 0.70), (0.72, 0.50, 0.05), (0.08, 0.17, 0.50), (0.60, 0.10, 0.06))


@dataclass(frozen=True)
class Pose:
    """Where the camera stands: the scene is rotated, scaled and then shifted in the picture."""

    shift: tuple[float, float]
    angle: float
    scale: float


@dataclass(frozen=True)
class Light:
    """One distant sun plus sky. `towards` is the unit vector to the sun; `softness` the penumbra as a length."""

    towards: tuple[float, float, float]
    sun: Colour
    sky: Colour
    softness: float
    bars: tuple[tuple[float, float, float, float], ...]  # shadow bands: angle, offset, half width, darkness


@dataclass(frozen=True)
class Camera:
    """From radiance to pixels: exposure (factor), white balance, vignetting, blur (picture sides) and noise (0..1)."""

    exposure: float
    balance: Colour
    vignetting: float
    haze: float
    blur: float
    noise: float


@dataclass(frozen=True)
class Track:
    """Rail, sleeper and ballast."""

    bed: str  # "concrete", "wood" or "slab"
    bed_colour: Colour
    bed_edges: tuple[float, float]  # y of the sleeper's upper and lower edge; beyond them lies ballast
    ballast_colour: Colour
    stone: float  # mean stone diameter
    foot_edge: float  # x of the edge of the rail foot
    head_edge: float  # x of the edge of the rail head
    polished: float  # 0..1, how bright the running band is
    rail_colour: Colour
    dirt: float  # 0..1
    dirt_colour: Colour
    rust_stain: float  # 0..1, rust washed out around the fastener


@dataclass(frozen=True)
class Fastener:
    """The clip and its seat."""

    kind: str  # "e" (Pandrol-like e-clip in a cast shoulder) or "w" (tension clamp under a bolt)
    stretch: tuple[float, float]
    radius: float
    clip_colour: Colour
    clip_rust: float
    gloss: float
    seat_colour: Colour  # insulator or guide plate
    shoulder_colour: Colour
    bolt_angle: float


@dataclass(frozen=True)
class Litter:
    """One harmless thing lying about: "leaf", "stone", "dirt", "paint" or "grass"."""

    kind: str
    centre: tuple[float, float]
    angle: float
    size: float
    colour: Colour


@dataclass(frozen=True)
class Defect:
    """What happened to the clip.

    Broken: the part of the centre line between `keep[0]` and `keep[1]` (fractions of its length) is left; `fragment` is
    the pose (x, y, angle) of a piece lying near, or None. Displaced: the clip is turned by `turn` about its centre,
    shifted by `shift` and lifted by `lift`. `bolt_lost` (tension clamp only): the bolt is gone as well.
    """

    kind: str
    keep: tuple[float, float] = (0.0, 1.0)
    fragment: tuple[float, float, float] | None = None
    turn: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    lift: float = 0.0
    bolt_lost: bool = False


@dataclass(frozen=True)
class Scene:
    pose: Pose
    light: Light
    camera: Camera
    track: Track
    fastener: Fastener
    litter: tuple[Litter, ...]
    defect: Defect
    texture_seed: int


class Draw:
    """Draws the parts of a normal scene; `variety` in [0, 1] narrows every range about its middle and every palette to
    its first colours: 1 is any line of any railway, small values are one line on similar days."""

    def __init__(self, rng: np.random.Generator, variety: float):
        self.rng, self.variety = rng, variety

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high], narrowed."""
        middle, half = (low + high) / 2, self.variety * (high - low) / 2
        return self.rng.uniform(middle - half, middle + half)

    def upto(self, high: float) -> float:
        """Uniform in [0, variety * high]."""
        return self.rng.uniform(0, self.variety * high)

    def normal(self, sigma: float) -> float:
        return self.rng.normal(0, self.variety * sigma)

    def chance(self, probability: float) -> bool:
        """True with `variety * probability`."""
        return bool(self.rng.random() < self.variety * probability)

    def colour(self, palette: tuple[Colour, ...], spread: float = 0.12) -> Colour:
        """A palette colour with its brightness and, less, its channels varied."""
        count = max(1, math.ceil(self.variety * len(palette)))
        base, spread = np.asarray(palette[self.rng.integers(count)]), self.variety * spread
        return tuple(base * np.exp(self.rng.normal(0, spread) + self.rng.normal(0, 0.15 * spread, 3)))


def sample_scene(rng: np.random.Generator, defect: str, variety: float = VARIETY) -> Scene:
    """Draw a whole scene. `defect`, one of DEFECTS, only decides the last draws: all else is independent of it."""
    draw = Draw(rng, variety)
    track = _sample_track(draw)
    fastener = _sample_fastener(draw, track.rail_colour)
    return Scene(
        pose=Pose(
            # The fastener stands a little right of the centre, so that the rail head stays in the picture.
            shift=(draw.between(0.015, 0.095), draw.between(-0.05, 0.05)),
            angle=math.radians(draw.between(-4, 4)),
            scale=draw.between(1.07, 1.18),
        ),
        light=_sample_light(draw),
        camera=Camera(
            exposure=2.0 ** draw.between(-0.5, 0.5),
            balance=_sample_balance(draw),
            vignetting=draw.upto(0.35),
            haze=max(0.0, draw.between(-0.03, 0.01)),
            blur=draw.between(0.0008, 0.0025),
            noise=draw.between(0.004, 0.018),
        ),
        track=track,
        fastener=fastener,
        litter=tuple(_sample_litter(draw) for _ in range(rng.poisson(1.3 * variety))),
        texture_seed=int(rng.integers(2**62)),
        defect=_sample_defect(rng, defect, fastener.kind),
    )


def _sample_balance(draw: Draw) -> Colour:
    """White balance: cameras err along warm to cool, and little between green and magenta."""
    warm, green = draw.normal(0.07), draw.normal(0.015)
    return math.exp(warm), math.exp(green), math.exp(-warm)


def _sample_light(draw: Draw) -> Light:
    rng = draw.rng
    azimuth = draw.between(-0.7 - math.pi, -0.7 + math.pi)
    elevation = math.radians(draw.between(32, 75))
    overcast = rng.random() < 0.3
    sun = draw.between(0.1, 0.35) if overcast else draw.between(0.8, 1.6)
    warmth = draw.upto(0.18)
    bars = []
    if not overcast and draw.chance(0.35):
        # Half width 2 makes one edge of a large shadow; the small ones are wires and masts.
        half_width = 2.0 if rng.random() < 0.55 else rng.uniform(0.02, 0.10)
        offset = rng.uniform(-0.45, 0.45)
        side = rng.choice((-1, 1)) * half_width if half_width > 1 else 0.0
        bars.append((rng.uniform(0, math.pi), offset + side, half_width, rng.uniform(0.5, 0.9)))
    flat = math.cos(elevation)
    return Light(
        towards=(flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)),
        sun=(sun, sun * (1 - 0.4 * warmth), sun * (1 - warmth)),
        sky=tuple((draw.between(0.55, 0.75) if overcast else draw.between(0.22, 0.40)) * np.array((0.93, 0.98, 1.06))),
        softness=0.09 if overcast else draw.between(0.012, 0.03),
        bars=tuple(bars),
    )


def _sample_track(draw: Draw) -> Track:
    bed = "concrete"
    if draw.chance(0.38):
        bed = str(draw.rng.choice(("wood", "slab"), p=(0.58, 0.42)))
    upper, lower = -draw.between(0.30, 0.56), draw.between(0.30, 0.56)
    if bed == "slab":
        upper, lower = -2.0, 2.0
    return Track(
        bed=bed,
        bed_colour=draw.colour(WOOD if bed == "wood" else CONCRETE),
        bed_edges=(upper, lower),
        ballast_colour=draw.colour(BALLAST, 0.2),
        stone=draw.between(0.10, 0.17),
        foot_edge=draw.between(-0.085, -0.055),
        head_edge=draw.between(-0.42, -0.33),
        polished=draw.between(0.35, 1.0),
        rail_colour=draw.colour(RUST, 0.2),
        dirt=draw.upto(0.9),
        dirt_colour=draw.colour(((0.16, 0.12, 0.085), (0.10, 0.085, 0.07), (0.24, 0.17, 0.11)), 0.2),
        rust_stain=draw.upto(0.8),
    )


def _sample_fastener(draw: Draw, rail_colour: Colour) -> Fastener:
    # A clip as bright as the rail and plate under it would hide in them: such a one is made brighter.
    clip_colour = draw.colour(STEEL, 0.15)
    if abs(math.log(sum(clip_colour) / sum(rail_colour))) < 0.45:
        clip_colour = tuple(1.6 * value for value in clip_colour)
    kind = "e" if draw.rng.random() < 0.6 else "w"
    return Fastener(
        kind=kind,
        stretch=(draw.between(0.96, 1.06), draw.between(0.95, 1.05)),
        radius=draw.between(0.031, 0.035) if kind == "e" else draw.between(0.026, 0.029),
        clip_colour=clip_colour,
        clip_rust=draw.upto(0.9),
        gloss=draw.between(0.1, 0.6),
        seat_colour=draw.colour(PLASTIC, 0.2),
        shoulder_colour=draw.colour(RUST, 0.25),
        bolt_angle=draw.rng.uniform(0, math.pi / 3),
    )


def _sample_litter(draw: Draw) -> Litter:
    rng = draw.rng
    kind = str(rng.choice(("leaf", "stone", "dirt", "paint", "grass"), p=(0.2, 0.3, 0.25, 0.1, 0.15)))
    palette = {"leaf": LEAF, "stone": BALLAST, "paint": PAINT, "grass": (LEAF[1], (0.24, 0.22, 0.09))}
    size = {
        "leaf": (0.05, 0.10),
        "stone": (0.025, 0.06),
        "dirt": (0.07, 0.16),
        "paint": (0.05, 0.11),
        "grass": (0.10, 0.22),
    }
    # Things lie around the clip, not on it, so that no harmless thing hides a clip.
    while True:
        centre = rng.uniform(-0.48, 0.48, 2)
        if abs(centre[0]) > 0.25 or abs(centre[1]) > 0.30:
            break
    return Litter(
        kind=kind,
        centre=tuple(centre),
        angle=rng.uniform(0, 2 * math.pi),
        size=draw.between(*size[kind]),
        colour=draw.colour(palette.get(kind, ((0.12, 0.09, 0.06), (0.05, 0.045, 0.04), (0.30, 0.24, 0.17))), 0.2),
    )


def _sample_defect(rng: np.random.Generator, defect: str, clip: str) -> Defect:
    if defect == "good":
        return Defect("good")
    if defect == "missing":
        return Defect("missing", bolt_lost=rng.random() < 0.5)
    if defect == "broken":
        # The e-clip starts with its centre leg hidden in the shoulder, so more of it must go at that end.
        if rng.random() < 0.5:
            keep = (0.0, rng.uniform(0.42, 0.62))
        else:
            keep = (rng.uniform(0.52, 0.66) if clip == "e" else rng.uniform(0.38, 0.58), 1.0)
        fragment = None
        if rng.random() < 0.4:
            side = float(rng.choice((-1, 1)))
            fragment = (rng.uniform(0.24, 0.34), side * rng.uniform(0.10, 0.34), rng.uniform(0, 2 * math.pi))
        return Defect("broken", keep=keep, fragment=fragment)
    sign = float(rng.choice((-1, 1)))
    way = rng.uniform(0, 2 * math.pi)
    if clip == "w":
        shift, bolt_lost = rng.uniform(0.0, 0.04), False
        if rng.random() < 0.4:
            shift, bolt_lost = rng.uniform(0.08, 0.15), True
        turn = sign * math.radians(rng.uniform(28, 60))
        return Defect("displaced", turn=turn, shift=_polar(shift, way), lift=0.02, bolt_lost=bolt_lost)
    if rng.random() < 0.4:  # worked out of the shoulder along the rail
        shift = (rng.uniform(-0.02, 0.04), sign * rng.uniform(0.10, 0.18))
        return Defect("displaced", turn=rng.normal(0, 0.12), shift=shift, lift=0.01)
    turn = sign * math.radians(rng.uniform(28, 120))
    return Defect("displaced", turn=turn, shift=_polar(rng.uniform(0.04, 0.13), way), lift=0.06)


def _polar(length: float, angle: float) -> tuple[float, float]:
    return length * math.cos(angle), length * math.sin(angle)
