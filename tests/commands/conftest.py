"""What the tests of the commands that look inside a program share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dfengine import native
from dfengine.checkpoint import Checkpoint, save_checkpoint
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
