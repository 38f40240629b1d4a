"""The images of a run: read once, split into training and held-out normals, and the endless stream of batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dfengine.data.folders import content_digest, fingerprint, open_dataset
from dfengine.data.images import load_uint8, read_image
from dfengine.data.streams import Stream, stream
from dfengine.data.training_set import TrainingSet, worker_init
from dfengine.errors import DataError, ImageError

MIN_IMAGES = 2
MIN_HELD_OUT = 2
SIDES_READ, IMAGES_READ = 64, 8  # of a survey
HELD = (signal.SIGINT, signal.SIGTERM)
PREFETCH = 4  # batches each worker keeps ready


@dataclass(frozen=True)
class Normals:
    """The normal images of a folder at model size: uint8 (N, S, S, 3), and their names relative to the folder.

    `train` and `held_out` index them; where fewer than 4 images were given, the held-out ones are also trained on.
    `skipped` lists (name, reason) of unreadable files; `fingerprint` covers the others. `trained` holds the sorted
    digests (`content_digest`) of all images that the weights see, in this run or in that of the checkpoint it starts
    from; `overlap` is the number of held-out images among them.
    """

    images: np.ndarray
    names: tuple[str, ...]
    train: np.ndarray
    held_out: np.ndarray
    fingerprint: str
    skipped: tuple[tuple[str, str], ...]
    trained: tuple[str, ...]
    overlap: int

    @property
    def held_out_names(self) -> list[str]:
        return [self.names[i] for i in self.held_out]


def read_normals(data: Path, size: int, holdout: float, seed: int, before: dict[str, Any] | None = None) -> Normals:
    """Reads the normal training images of the folder `data` and splits them by a seeded shuffle.

    A share `holdout`, at least 2 images, is held out. `before` is the training record of the checkpoint that the run
    starts from: of the same images, those that it held out stay held out, for the weights have seen the others.
    Raises `DataError` when fewer than 2 images can be read.
    """
    dataset = open_dataset(data)
    images, paths, digests, skipped = [], [], [], []
    for sample in dataset.train:
        try:
            image = load_uint8(sample.path, size)
        except ImageError as error:
            skipped.append((_relative(sample.path, dataset.root), error.reason))
            continue
        images.append(image)
        paths.append(sample.path)
        digests.append(content_digest(sample.path))
    if len(images) < MIN_IMAGES:
        bad = f" ({len(skipped)} unreadable)" if skipped else ""
        raise DataError(f"{data}: training needs at least {MIN_IMAGES} normal images, found {len(images)}{bad}")
    names, whole = tuple(_relative(path, dataset.root) for path in paths), fingerprint(paths)
    earlier = (before or {}).get("data")
    earlier = earlier if isinstance(earlier, dict) else {}
    held_out = [names.index(name) for name in earlier.get("held_out", ()) if name in names]
    if earlier.get("fingerprint") != whole or len(held_out) < MIN_HELD_OUT:
        order = stream(seed, Stream.HOLDOUT).permutation(len(images))
        held_out = order[: max(MIN_HELD_OUT, round(holdout * len(images)))]
    held_out = np.sort(held_out)
    train = np.setdiff1d(np.arange(len(images)), held_out)
    if len(train) < MIN_HELD_OUT:
        train = np.arange(len(images))
    trained = {digests[i] for i in train} | set(map(str, earlier.get("trained", ())))
    overlap = sum(digests[i] in trained for i in held_out)
    return Normals(
        np.stack(images), names, train, held_out, whole, tuple(skipped), tuple(sorted(trained)), overlap
    )


def survey(data: Path, size: int) -> tuple[float, np.ndarray]:
    """A look at some of the normal images of the folder `data`, spread over it: the median of their shorter sides in
    pixels (NaN where none can be read), and up to 8 of them, uint8 (N, size, size, 3). Raises `DataError`."""
    paths = [sample.path for sample in open_dataset(data).train]
    paths = [paths[int(i)] for i in np.linspace(0, len(paths) - 1, min(SIDES_READ, len(paths)))]
    sides = [side for path in paths if (side := native_side(path)) is not None]
    images, stride = [], -(-len(paths) // IMAGES_READ)
    # First every stride-th of them, so that all parts are seen; neighbours stand in for those that cannot be read.
    for path in (path for first in range(stride) for path in paths[first::stride]):
        try:
            images.append(load_uint8(path, size))
        except ImageError:
            continue
        if len(images) == IMAGES_READ:
            break
    shape = (len(images), size, size, 3)
    return float(np.median(sides)) if sides else float("nan"), np.array(images, np.uint8).reshape(shape)


def native_side(path: Path) -> int | None:
    """The shorter side of an image in pixels, from its header where Pillow knows it; None where it cannot be read."""
    if not path.is_file():  # to open a pipe may take for ever
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return min(image.size)
    except Exception:  # of any type for damaged files; the deep TIFFs that Pillow does not know can be read
        try:
            return min(read_image(path).shape[:2])
        except ImageError:
            return None


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
    loader = DataLoader(
        _Indexed(dataset),
        batch_sampler=_Steps(indices_of, first_step),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        **options,
    )
    with _signals_held():
        return iter(loader)


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


@contextmanager
def _signals_held() -> Iterator[None]:
    """Keeps signals from new worker processes until `_quiet_worker` has told them what to do about them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet_worker(worker_id: int) -> None:
    # Ctrl-C reaches the workers as well, but the training process decides when to stop. SIGTERM ends a worker, for that
    # is how a DataLoader gets rid of one; with status 0, because for any other torch raises an error in whatever the
    # training process is doing at that moment. It finishes its step without them (`Trainer`).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    worker_init(worker_id)


def _relative(path: Path, root: Path) -> str:
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return path.name
