"""Training samples as an index-addressable endless stream, and the fixed set that chooses a checkpoint.

Everything about a sample follows from the seed and its global index: a run resumes at any step, and any number of
worker processes gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from dfengine.data.augment import Augmentation, AugmentConfig, is_gray
from dfengine.data.streams import Stream, stream
from dfengine.data.synthesis import SynthesisConfig, Synthesizer
from dfengine.data.textures import TextureSource

SHARES = ("half", "coin", "none")


class TrainingSet(Dataset):
    """Sample `global_index` of an endless stream over normal images, uint8 (N, S, S, 3).

    The stream passes through all N images in an order of its own every epoch; batch b is the samples
    [b batch_size, (b + 1) batch_size). Use it with a sampler of indices, e.g. `sampler=range(start, stop)`.

    anomaly_share: "half" makes exactly half of each batch anomalous (DF 4.2; of an odd batch, half rounded up or down
    at random), "coin" decides for each sample (DAD), "none" gives normals only. A sample drawn to be anomalous can stay
    normal (label 0, empty mask) when every draw of the synthesis was empty.
    """

    def __init__(
        self,
        images: np.ndarray,
        synthesizer: Synthesizer | None,
        augment: AugmentConfig,
        seed: int,
        batch_size: int,
        anomaly_share: str = "half",
    ):
        if anomaly_share not in SHARES:
            raise ValueError(f"anomaly_share must be one of {', '.join(SHARES)}, not {anomaly_share!r}")
        if anomaly_share != "none" and synthesizer is None:
            raise ValueError(f"anomaly_share {anomaly_share!r} needs a synthesizer")
        if anomaly_share != "none" and len(synthesizer.foregrounds) != len(images):
            raise ValueError("the synthesizer must be made of the same images")
        if batch_size < 1 or not len(images):
            raise ValueError("batch_size and the number of images must be at least 1")
        self.images = images
        self.synthesizer = synthesizer
        self.augment = augment
        self.seed = seed
        self.batch_size = batch_size
        self.anomaly_share = anomaly_share
        self._epoch: tuple[int, np.ndarray] | None = None

    def __getitem__(self, global_index: int) -> dict[str, Any]:
        """image uint8 (S, S, 3), mask uint8 (S, S) of 0 and 1, label 0 or 1, index of the normal image."""
        rng = stream(self.seed, Stream.SAMPLE, global_index)
        index = self._image_index(global_index)
        augmentation = Augmentation(self.images.shape[1], rng, self.augment)
        gray = is_gray(self.images[index])
        image = augmentation.pose(self.images[index])
        if not self.augment.camera_last:
            image = augmentation.camera(image, gray)
        mask = np.zeros(image.shape[:2], np.uint8)
        label = 0
        if self.anomaly_share != "none":
            foreground = augmentation.mask(self.synthesizer.foregrounds[index])
            if self._anomalous(global_index, rng):
                result = self.synthesizer.sample_from(image, foreground, rng)
                image, mask, label = result.image, result.mask.astype(np.uint8), int(result.kind != "normal")
            elif rng.random() < self.synthesizer.config.decoy:
                image = self.synthesizer.decoy(image, foreground, rng, augmentation)
        if self.augment.camera_last:
            image = augmentation.camera(image, gray)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image)),
            "mask": torch.from_numpy(mask),
            "label": label,
            "index": index,
        }

    def _image_index(self, global_index: int) -> int:
        epoch, position = divmod(global_index, len(self.images))
        if self._epoch is None or self._epoch[0] != epoch:
            order = stream(self.seed, Stream.EPOCH, epoch).permutation(len(self.images))
            self._epoch = (epoch, order)
        return int(self._epoch[1][position])

    def _anomalous(self, global_index: int, rng: np.random.Generator) -> bool:
        if self.anomaly_share == "coin":
            return bool(rng.random() < 0.5)
        batch, position = divmod(global_index, self.batch_size)
        batch_rng = stream(self.seed, Stream.BATCH, batch)
        count = (self.batch_size + int(batch_rng.integers(2))) // 2
        return bool(batch_rng.permutation(self.batch_size)[position] < count)


def worker_init(worker_id: int) -> None:
    """`worker_init_fn` for a DataLoader: one thread a worker, for the images are small and the workers many."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


@dataclass(frozen=True)
class ValidationSet:
    """Held-out normals and synthetic anomalies on them: images uint8 (M, S, S, 3), masks bool (M, S, S), labels int64
    (M,), kinds (M,), indices int64 (M,) of the held-out image each came from."""

    images: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    kinds: tuple[str, ...]
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


def validation_set(
    images: np.ndarray,
    textures: TextureSource,
    config: SynthesisConfig,
    seed: int,
    count: int,
    foregrounds: np.ndarray | None = None,
) -> ValidationSet:
    """Every held-out normal, untouched, followed by `count` synthetic anomalies on them (round robin over the images).

    Test labels never choose a checkpoint: this does. With the recipe "mixed" every second anomaly is structural,
    whatever `structural_share` says; the other recipes keep to their own kind. A draw that stays normal is left out.
    """
    estimate = Synthesizer(images, textures, config, foregrounds)
    recipes = ("structural", "paper") if config.recipe == "mixed" else (config.recipe,)
    drawers = [
        Synthesizer(images, textures, replace(config, recipe=recipe), estimate.foregrounds) for recipe in recipes
    ]
    results, indices = [], list(range(len(images)))
    for number in range(count):
        index = number // len(drawers) % len(images)
        rng = stream(seed, Stream.VALIDATION, number)
        result = drawers[number % len(drawers)].sample(index, rng)
        if result.kind != "normal":
            results.append(result)
            indices.append(index)
    blank = np.zeros(images.shape[:3], bool)
    return ValidationSet(
        images=np.concatenate([images, *(result.image[None] for result in results)]),
        masks=np.concatenate([blank, *(result.mask[None] for result in results)]),
        labels=np.array([0] * len(images) + [1] * len(results), np.int64),
        kinds=("normal",) * len(images) + tuple(result.kind for result in results),
        indices=np.array(indices, np.int64),
    )
