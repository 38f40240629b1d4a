"""Without triton the kernel files still import, and the implementations that do not need it run."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["triton"] = None
import torch
import dfengine.engine.modules
from dfengine import kernels
from dfengine.kernels import ingest, triton_import
assert triton_import.MISSING and "triton cannot be imported" in kernels.table("cpu")[0]["triton"]
images = torch.full((2, 5, 3, 3), 100, dtype=torch.uint8)
options = dict(gain=2.0, offset=-1.0, a=[0.8, 0.3], b=[0.6, 0.9], seed=7)
expected = ingest.ingest(images, backend="reference", **options)
for ours, theirs in zip(ingest.ingest(images, **options), expected):
    torch.testing.assert_close(ours, theirs)
try:
    ingest.ingest(images, backend="triton", **options)
except kernels.CannotRunError as error:
    assert "cannot be imported" in str(error)
else:
    raise AssertionError("triton ran")
"""


def test_everything_else_works_without_triton(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
