"""From a canvas to a photograph: sun, sky, cast shadows, then the camera."""

from __future__ import annotations

import math

import cv2
import numpy as np

from dfengine.data.fasteners.canvas import Canvas, smoothstep
from dfengine.data.fasteners.scene import Camera, Light

SHADOW_STEPS = 15
MAX_SLOPE = 3.0


def illuminate(canvas: Canvas, light: Light) -> np.ndarray:
    """Radiance float32 (3, S, S): Lambert sun with cast shadows, sky with ambient occlusion, a Blinn highlight."""
    side = canvas.side
    # Heights and lengths share a unit, so differences times samples per unit are slopes. Silhouettes are clipped.
    per_sample = 0.5 * side * canvas.pose.scale
    slope_x, slope_y = (
        np.clip(cv2.Sobel(canvas.height, cv2.CV_32F, *order, ksize=1) * np.float32(per_sample), -MAX_SLOPE, MAX_SLOPE)
        for order in ((1, 0), (0, 1))
    )
    upright = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    lx, ly, lz = (np.float32(v) for v in light.towards)
    lambert = np.maximum((lz - slope_x * lx - slope_y * ly) * upright, 0)
    # Half vector between the sun and the camera straight above.
    hx, hy, hz = np.array((lx, ly, lz + 1), np.float32) / np.sqrt(2 + 2 * lz)
    shine = np.maximum((hz - slope_x * hx - slope_y * hy) * upright, 0)
    for _ in range(4):
        shine *= shine

    small = cv2.resize(canvas.height, (side // 2, side // 2), interpolation=cv2.INTER_AREA)
    sunlit = 1 - cv2.resize(_cast_shadow(small, light, canvas.pose), (side, side), interpolation=cv2.INTER_LINEAR)
    for angle, offset, half_width, darkness in light.bars:
        across = np.float32(math.cos(angle)) * canvas.x + np.float32(math.sin(angle)) * canvas.y
        distance = np.abs(across - np.float32(offset)) - np.float32(half_width)
        sunlit *= 1 - np.float32(darkness) * smoothstep(0.012, -0.012, distance)
    open_sky = cv2.resize(_ambient_occlusion(small), (side, side), interpolation=cv2.INTER_LINEAR)
    open_sky *= 0.6 + 0.4 * upright

    direct = lambert * sunlit
    highlight = shine * sunlit * canvas.gloss
    radiance = np.empty_like(canvas.albedo)
    for plane, albedo, sun, sky in zip(radiance, canvas.albedo, light.sun, light.sky, strict=True):
        np.multiply(albedo, direct * np.float32(sun) + open_sky * np.float32(sky), out=plane)
        plane += highlight * np.float32(0.7 * sun)
    return radiance


def _cast_shadow(height: np.ndarray, light: Light, pose) -> np.ndarray:
    """Shadow depth 0..1: the height field looked at along the sun's ray, in growing steps."""
    side = height.shape[0]
    lx, ly, lz = light.towards
    flat = math.hypot(lx, ly)
    steepness = lz / flat
    # The sun's direction is in the picture's frame already: the pose only turns what stands on the ground.
    reach = float(height.max() - height.min()) / steepness
    blocked = np.full_like(height, -1)
    for step in range(1, SHADOW_STEPS + 1):
        distance = reach * (step / SHADOW_STEPS) ** 1.5
        pixels = distance * side * pose.scale
        move = np.array(((1, 0, pixels * lx / flat), (0, 1, pixels * ly / flat)))
        ahead = cv2.warpAffine(
            height, move, (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        ahead -= np.float32(distance * steepness)
        np.maximum(blocked, ahead, out=blocked)
    shadow = smoothstep(0.0, light.softness, blocked - height)
    return cv2.GaussianBlur(shadow, (0, 0), max(0.6, 0.25 * light.softness * side))


def _ambient_occlusion(height: np.ndarray) -> np.ndarray:
    """Open part of the sky 0..1: less where the surroundings, near and wider, stand higher."""
    side = height.shape[0]
    near = cv2.GaussianBlur(height, (0, 0), 0.012 * side)
    half = cv2.resize(height, (side // 2, side // 2), interpolation=cv2.INTER_AREA)
    wide = cv2.resize(cv2.GaussianBlur(half, (0, 0), 0.022 * side), (side, side), interpolation=cv2.INTER_LINEAR)
    closed = 9 * np.maximum(near - height, 0) + 5 * np.maximum(wide - height, 0)
    return 1 / (1 + closed)


def develop(radiance: np.ndarray, camera: Camera, gain: float, size: int) -> np.ndarray:
    """The noiseless photograph float32 (size, size, 3) in [0, 1], gamma-encoded."""
    image = cv2.resize(np.ascontiguousarray(radiance.transpose(1, 2, 0)), (size, size), interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), max(0.25, camera.blur * size))
    line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    falloff = 1 - np.float32(2 * camera.vignetting) * (line[:, None] ** 2 + line[None, :] ** 2)
    image *= falloff[..., None] * (np.float32(gain * camera.exposure) * np.asarray(camera.balance, np.float32))
    image += np.float32(camera.haze)
    # A film-like curve: a soft shoulder instead of hard clipping, a gamma near 2, slightly darkened shadows.
    encoded = np.sqrt(1 - np.exp(-1.15 * np.maximum(image, 0)))
    return encoded * (0.72 + 0.28 * encoded * (2 - encoded))


def expose(image: np.ndarray, camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Add camera noise (shared luminance part and independent colour part) and quantise: uint8 (size, size, 3)."""
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    noise += rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    return np.rint(np.clip(image + np.float32(0.7 * camera.noise) * noise, 0, 1) * 255).astype(np.uint8)
