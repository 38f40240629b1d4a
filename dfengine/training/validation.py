"""Validation without test labels: fixed synthetic anomalies of the held-out normals, and the panel that shows them."""

from __future__ import annotations

import cv2
import numpy as np
import torch

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


def validate(runner: ModuleRunner, data: ValidationSet, stage: int, seed: int) -> dict[str, float]:
    """Metrics of the model in `runner`: val_noise_loss; in the joint stage also val_image_auroc, val_pixel_auroc,
    val_pixel_ap and val_score = (val_image_auroc + val_pixel_ap) / 2, by which the best weights are chosen."""
    anomalous = data.labels == 1
    result = {"val_noise_loss": _noise_loss(runner, data.images[~anomalous], seed)}
    if stage == 1 or not anomalous.any():
        return result
    maps, scores = run(runner, data.images)[::2]
    truth, values = data.masks.ravel(), maps.ravel()
    result["val_image_auroc"] = auroc(anomalous, scores.astype(np.float64))
    result["val_pixel_auroc"] = auroc(truth, values)
    result["val_pixel_ap"] = average_precision(truth, values)
    result["val_score"] = 0.5 * (result["val_image_auroc"] + result["val_pixel_ap"])
    return {key: float(value) for key, value in result.items()}


def run(runner: ModuleRunner, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(anomaly maps (N, S, S), reconstructions (N, S, S, 3) in [0, 1], scores (N,)) of uint8 images (N, S, S, 3)."""
    parts = []
    for start in range(0, len(images), BATCH):
        output = runner.run(images[start : start + BATCH].astype(np.float32) / 255)
        parts.append([t.float().cpu().numpy() for t in output])
    maps, reconstructions, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    return maps, reconstructions, scores


def panel(runner: ModuleRunner, data: ValidationSet, stage: int) -> np.ndarray:
    """The fixed panel, uint8 (rows, columns, 3): one row for each image, 3 normals and 7 anomalies at most.

    Columns: input, reconstruction x0_hat, its absolute error (x 2), and in the joint stage the anomaly map with the
    true mask outlined, and the mask. The runner's noise is the same each time, so panels of one run can be compared.
    """
    rows = [*np.flatnonzero(data.labels == 0)[:PANEL_NORMALS], *np.flatnonzero(data.labels == 1)[:PANEL_ANOMALIES]]
    maps, reconstructions, _ = run(runner, data.images[rows])
    size = data.images.shape[1]
    zoom, gap = max(1, round(128 / size)), 2
    side = zoom * size
    grid = []
    for row, anomaly_map, reconstruction in zip(rows, maps, reconstructions, strict=True):
        image, mask = data.images[row], data.masks[row]
        error = np.abs(image / 255.0 - reconstruction).mean(axis=-1, keepdims=True).repeat(3, axis=-1)
        tiles = [image, _to_uint8(reconstruction), _to_uint8(2 * error)]
        tiles = [cv2.resize(tile, (side, side), interpolation=cv2.INTER_NEAREST) for tile in tiles]
        if stage == 2:
            tiles.append(heatmap_overlay(tiles[0], anomaly_map, mask=mask))
            whole = np.repeat(mask[..., None], 3, axis=-1).astype(np.uint8) * 255
            tiles.append(cv2.resize(whole, (side, side), interpolation=cv2.INTER_NEAREST))
        tiles = [cv2.copyMakeBorder(t, 0, gap, 0, gap, cv2.BORDER_CONSTANT, value=(128,) * 3) for t in tiles]
        grid.append(np.concatenate(tiles, axis=1))
    return np.concatenate(grid)


@torch.inference_mode()
def _noise_loss(runner: ModuleRunner, images: np.ndarray, seed: int) -> float:
    config, schedule = runner.config, Schedule.of(runner.config)
    total, count = 0.0, 0
    for start in range(0, len(images), BATCH):
        pixels = torch.from_numpy(images[start : start + BATCH]).to(runner.device).permute(0, 3, 1, 2).float() / 255
        x_0 = to_model(pixels, config)
        indices = range(start, start + len(pixels))
        noises = draw_noise(TIMES, config.channels, config.image_size, seed, indices, runner.device)
        for k, noise in enumerate(noises):
            t = torch.full((len(pixels),), config.timesteps * (2 * k + 1) // (2 * TIMES), device=runner.device)
            predicted = runner.model.reconstruction(schedule.q_sample(x_0, t, noise), t)
            total += float(noise_loss(predicted, noise)) * len(pixels)
            count += len(pixels)
    return total / count


def _to_uint8(unit: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
