"""What every test shares: without a GPU, Triton kernels run in its interpreter and GPU tests skip."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported, hence here


@pytest.fixture(autouse=True)
def _own_tactics(tmp_path_factory, monkeypatch):
    """What was measured for the user's detectors changes no test, and tests leave nothing in the user's cache."""
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("DFENGINE_TACTICS", raising=False)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
