"""What every test shares: without a GPU, Triton kernels run in its interpreter and GPU tests skip."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are first imported, hence here
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # Of a shell's background job, which would hand it down to the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
