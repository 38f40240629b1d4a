"""What the tests of the commands share: checkpoints, and a data set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfengine import native
from dfengine.checkpoint import Checkpoint, save_checkpoint
from dfengine.evaluation.calibration import Calibration
from tests.helpers import tiny_model


@pytest.fixture(autouse=True)
def _idle(monkeypatch):
    """What else runs on this machine warns of nothing."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


@pytest.fixture
def save_model(tmp_path, monkeypatch):
    """A function that saves the tiny model with these changes, and gives its path; no backend is forced."""
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    monkeypatch.delenv("DFENGINE_NVTX", raising=False)

    def save(name: str = "model.safetensors", **changes) -> Path:
        model = tiny_model(**changes)
        save_checkpoint(tmp_path / name, Checkpoint(model.config, model.state_dict()))
        return tmp_path / name

    return save


@pytest.fixture
def tiny(save_model) -> Path:
    """A checkpoint that runs as a program."""
    if not native.available():
        pytest.skip(native.status())
    return save_model()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = tiny_model()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(model.config, model.state_dict(), {}, Calibration.by_hand(0.5)))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """5 normal training images; 4 good and 3 + 3 defective test images of random pixels, half of them with masks."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"

    def write(name: str, array: np.ndarray) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(root / name)

    for folder, count in (("train/good", 5), ("test/good", 4), ("test/bent", 3), ("test/gone", 3)):
        for i in range(count):
            size = (40, 48, 3) if folder == "test/bent" else (32, 32, 3)
            write(f"{folder}/{i}_{folder[-1]}.png", rng.integers(0, 256, size, dtype=np.uint8))
    for i in range(3):
        mask = np.zeros((40, 48), np.uint8)
        mask[10:20, 5:30] = 255
        write(f"ground_truth/bent/{i}_t_mask.png", mask)
    return root
