"""A folder of small normal images, and the smallest run on it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console


@pytest.fixture(scope="session")
def normals(tmp_path_factory) -> Path:
    """12 images of a disc on a gradient, 40x40, in a plain folder."""
    folder = tmp_path_factory.mktemp("normals")
    rng = np.random.default_rng(0)
    for number in range(12):
        image = np.linspace(60, 120, 40)[None, :, None].repeat(40, 0).repeat(3, 2) + rng.normal(0, 4, (40, 40, 3))
        centre = tuple(int(v) for v in rng.integers(16, 24, 2))
        image = cv2.circle(np.clip(image, 0, 255).astype(np.uint8), centre, 8, (200, 120, 80), -1)
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread: on a busy machine several wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lines() -> Console:
    """A console without a terminal; `lines.file.getvalue()` is what was printed."""
    return Console(file=io.StringIO(), width=200)
