"""The images of a run: read once, split into training and held-out normals, and the endless stream of batches."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dfengine.data.folders import fingerprint, open_dataset
from dfengine.data.images import load_uint8
from dfengine.data.training_set import TrainingSet, worker_init
from dfengine.errors import DataError, ImageError

MIN_IMAGES = 2
MIN_HELD_OUT = 2
PREFETCH = 4  # batches each worker keeps ready


@dataclass(frozen=True)
class Normals:
    """The normal images of a folder at model size: uint8 (N, S, S, 3), and their names relative to the folder.

    `train` and `held_out` index them. Where fewer than 4 images were given, the held-out ones are also trained on,
    and `overlap` says so. `skipped` lists (name, reason) of unreadable files; `fingerprint` covers the others.
    """

    images: np.ndarray
    names: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray
    fingerprint: str
    skipped: tuple[tuple[str, str], ...]
    overlap: bool

    @property
    def held_out_names(self) -> list[str]:
        return [self.names[i] for i in self.held_out]


def read_normals(data: Path, size: int, holdout: float, seed: int) -> Normals:
    """Reads the normal training images of the folder `data` and splits them by a seeded shuffle.

    A share `holdout`, at least 2 images, is held out. Raises `DataError` when fewer than 2 images can be read.
    """
    dataset = open_dataset(data)
    images, paths, skipped = [], [], []
    for sample in dataset.train:
        try:
            images.append(load_uint8(sample.path, size))
            paths.append(sample.path)
        except ImageError as error:
            skipped.append((error.name, error.reason))
    if len(images) < MIN_IMAGES:
        bad = f" ({len(skipped)} unreadable)" if skipped else ""
        raise DataError(f"{data}: training needs at least {MIN_IMAGES} normal images, found {len(images)}{bad}")
    order = np.random.default_rng([seed, 0]).permutation(len(images))
    count = max(MIN_HELD_OUT, round(holdout * len(images)))
    held_out = np.sort(order[:count])
    overlap = len(images) - count < MIN_HELD_OUT
    train = np.arange(len(images)) if overlap else np.sort(order[count:])
    names = tuple(_relative(path, dataset.root) for path in paths)
    return Normals(np.stack(images), names, train, held_out, fingerprint(paths), tuple(skipped), overlap)


def batches(
    dataset: TrainingSet,
    indices_of: Callable[[int], list[list[int]]],
    first_step: int,
    workers: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `dataset` without end: the micro-batches `indices_of(step)` of `first_step` and every later step.

    Beside the samples' fields, "position" holds their places in the stream. `workers` processes prepare them ahead.
    """
    options = {}
    if workers:
        # fork shares the images, and asks nothing of the caller's main module.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        options = dict(multiprocessing_context=context, prefetch_factor=PREFETCH, worker_init_fn=_quiet_worker)
    return iter(
        DataLoader(
            _Indexed(dataset),
            batch_sampler=_Steps(indices_of, first_step),
            num_workers=workers,
            pin_memory=device.type == "cuda",
            **options,
        )
    )


class _Indexed(Dataset):
    """The samples of a `TrainingSet` with "position", their place in the stream."""

    def __init__(self, samples: TrainingSet):
        self.samples = samples

    def __getitem__(self, index: int) -> dict:
        return {**self.samples[index], "position": index}


class _Steps:
    """Batch sampler: the micro-batches of each step in turn, without end."""

    def __init__(self, indices_of: Callable[[int], list[list[int]]], first_step: int):
        self.indices_of, self.step = indices_of, first_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.step
        while True:
            yield from self.indices_of(step)
            step += 1


def _quiet_worker(worker_id: int) -> None:
    # The training process decides when to stop. Ctrl-C, and many schedulers' SIGTERM, reach its workers as well: they
    # must live until it has finished its step. They end when it closes their queue, or dies.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker_init(worker_id)


def _relative(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name
