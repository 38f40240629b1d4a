"""Validation without test labels: fixed synthetic anomalies of the held-out normals, and the panel that shows them."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dfengine.data.streams import Stream
from dfengine.data.training_set import ValidationSet
from dfengine.diffusion import Schedule, to_model
from dfengine.engine.modules import ModuleRunner
from dfengine.evaluation.metrics import auroc, average_precision
from dfengine.report.overlay import heatmap_overlay
from dfengine.training.draws import draw_noise
from dfengine.training.losses import noise_loss

TIMES = 4  # time steps at which the validation noise loss is taken, spread over (0, T)
BATCH = 32
PANEL_NORMALS, PANEL_ANOMALIES = 3, 7
GAP = 2  # pixels between the panel's tiles
DOUBTFUL = 0.85  # image AUROC on synthetic anomalies below which a detector comes with a warning
MIN_TOLERANCE = 0.005


def validate(runner: ModuleRunner, data: ValidationSet, stage: int, seed: int) -> tuple[dict[str, float], np.ndarray]:
    """Metrics and panel of the model in `runner`.

    Metrics: val_noise_loss; in the joint stage also val_image_auroc, val_pixel_auroc, val_pixel_ap and
    val_score = (val_image_auroc + val_pixel_ap) / 2, by which the best weights are chosen. The panel is `panel`'s.
    """
    anomalous = data.labels == 1
    metrics = {"val_noise_loss": _noise_loss(runner, data.images[~anomalous], seed)}
    shown = np.concatenate([np.flatnonzero(~anomalous)[:PANEL_NORMALS], np.flatnonzero(anomalous)[:PANEL_ANOMALIES]])
    if stage == 1 or not anomalous.any():
        _, reconstructions, _ = run(runner, data.images[shown])
        return metrics, panel(data.images[shown], reconstructions, data.labels[shown])
    maps, reconstructions, scores = run(runner, data.images)
    truth, values = data.masks.ravel(), maps.ravel()
    metrics["val_image_auroc"] = float(auroc(anomalous, scores.astype(np.float64)))
    metrics["val_pixel_auroc"] = float(auroc(truth, values))
    metrics["val_pixel_ap"] = average_precision(truth, values)
    metrics["val_score"] = 0.5 * (metrics["val_image_auroc"] + metrics["val_pixel_ap"])
    seen = data.images[shown], reconstructions[shown], data.labels[shown]
    return metrics, panel(*seen, scores[shown], maps[shown], data.masks[shown])


def tolerance(best: float, normals: int) -> float:
    """By how much a later validation score may be worse than the best one and still take its place.

    One standard error of an AUROC of `best` on so many normals (the one-standard-error rule of Breiman et al., 1984):
    on a dozen images the score is noisy; of weights that score alike, those trained longer are the better ones.
    """
    return max(MIN_TOLERANCE, math.sqrt(max(0.0, best * (1 - best)) / max(1, normals)))


def verdict(metrics: dict[str, float], trained: int = 0) -> list[str]:
    """Lines that tell a layman how good the detector is, from the `metrics` of `validate`.

    `trained` held-out images were also trained on, which is said.
    """
    share = metrics.get("val_image_auroc")
    if share is None:
        return ["no verdict on quality: these weights were never tried on synthetic defects"]
    cases = int(100 * share + 1e-9)  # rounded down: 100 of 100 is said of no detector that ever fails
    lines = [
        "on held-out images with synthetic defects the detector ranks a defective above a sound image in "
        f"{cases} of 100 cases" + (f" (optimistic: the weights have seen {trained} of them)" if trained else "")
    ]
    if share < DOUBTFUL:
        lines.append(
            "dfengine: warning: that is not reliable; more minutes or more images would help; look at the last panel "
            "before trusting it"
        )
    return lines


def run(runner: ModuleRunner, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(anomaly maps (N, S, S), reconstructions (N, S, S, 3) in [0, 1], scores (N,)) of uint8 images (N, S, S, 3)."""
    parts = []
    for start in range(0, len(images), BATCH):
        output = runner.run(images[start : start + BATCH].astype(np.float32) / 255)
        parts.append([t.float().cpu().numpy() for t in output])
    maps, reconstructions, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    return maps, reconstructions, scores


def panel(
    images: np.ndarray,
    reconstructions: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None = None,
    maps: np.ndarray | None = None,
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """A grid with captions, uint8 (H, W, 3), one row of it for each image.

    Columns: input uint8 (S, S, 3), reconstruction x0_hat in [0, 1], its absolute error (x 2), and, where `scores`,
    `maps` and `masks` are given, the anomaly map over the image with the true mask outlined, and the mask. Rows are
    called by their label (0 or 1) and score. The runner's noise is the same each time, so panels of one run can be
    compared.
    """
    size = images.shape[1]
    side = max(1, round(128 / size)) * size
    heads = ["photo", "reconstruction", "difference\n(times 2)"]
    if maps is not None:
        heads += ["anomaly map,\ndefect outlined", "the defect\nput in"]
    names = ["synthetic\ndefect" if label else "sound" for label in labels]
    if scores is not None:
        names = [f"{name}\nscore {score:.3f}" for name, score in zip(names, scores, strict=True)]
    grid = []
    for row, (image, reconstruction) in enumerate(zip(images, reconstructions, strict=True)):
        error = np.abs(image / 255.0 - reconstruction).mean(axis=-1, keepdims=True).repeat(3, axis=-1)
        tiles = [_tile(image, side), _tile(_to_uint8(reconstruction), side), _tile(_to_uint8(2 * error), side)]
        if maps is not None:
            tiles.append(heatmap_overlay(tiles[0], maps[row], mask=masks[row]))
            tiles.append(_tile(masks[row][..., None].repeat(3, axis=-1).astype(np.uint8) * 255, side))
        grid.append(np.concatenate([cv2.copyMakeBorder(t, 0, GAP, 0, GAP, 0, value=(128,) * 3) for t in tiles], axis=1))
    return _captioned(np.concatenate(grid), heads, names, side + GAP)


def _captioned(grid: np.ndarray, heads: list[str], names: list[str], step: int) -> np.ndarray:
    """The grid of tiles, each `step` pixels further, below `heads` and right of `names`."""
    font = ImageFont.load_default(min(16, max(11, step // 10)))
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(measure.multiline_textbbox((0, 0), text, font)[2] for text in names)
    top = max(measure.multiline_textbbox((0, 0), text, font)[3] for text in heads)
    left, top = math.ceil(left) + 4 * GAP, math.ceil(top) + 4 * GAP
    canvas = Image.new("RGB", (left + grid.shape[1], top + grid.shape[0]), "white")
    canvas.paste(Image.fromarray(grid), (left, top))
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(heads):
        draw.multiline_text((left + column * step + GAP, GAP), text, "black", font)
    for row, text in enumerate(names):
        draw.multiline_text((GAP, top + row * step + GAP), text, "black", font)
    return np.array(canvas)


def _tile(image: np.ndarray, side: int) -> np.ndarray:
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)


@torch.inference_mode()
def _noise_loss(runner: ModuleRunner, images: np.ndarray, seed: int) -> float:
    config, schedule = runner.config, Schedule.of(runner.config)
    total, count = 0.0, 0
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(images[start : start + BATCH]).to(runner.device).permute(0, 3, 1, 2).float() / 255
        x_0 = to_model(pixels, config)
        indices = range(start, start + len(pixels))
        size, tag = config.image_size, Stream.VALIDATION_NOISE
        noises = draw_noise(TIMES, config.channels, size, seed, indices, runner.device, tag)
        for k, noise in enumerate(noises):
            t = torch.full((len(pixels),), config.timesteps * (2 * k + 1) // (2 * TIMES), device=runner.device)
            predicted = runner.model.reconstruction(schedule.q_sample(x_0, t, noise), t)
            total += float(noise_loss(predicted, noise)) * len(pixels)
            count += len(pixels)
    return total / count


def _to_uint8(unit: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
