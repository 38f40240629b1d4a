"""What every test shares: without a GPU, Triton kernels run in its interpreter and GPU tests skip; the real images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported, hence here


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images that DFENGINE_DATA names; the test skips without it."""
    folder = os.environ.get("DFENGINE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DFENGINE_DATA does not name a folder of real images")
    return Path(folder)
