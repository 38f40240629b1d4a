"""The thread pool of the CPU kernels (csrc/cpu/parallel.cpp): a fork at any moment leaves a child that can use it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dfengine import native

SCRIPT = """
import os, sys, threading, time
import torch
from dfengine.kernels import ingest

def buffers(size):
    images = torch.full((1, size, size, 3), 0.5)
    return images, torch.empty_like(images), torch.empty((2, *images.shape))

def run(images, x_0, x_t):
    ingest._run_cpu(images, x_0, x_t, 1.0, 0.0, [0.5, 0.5], [0.5, 0.5], 3, 0, 0)

torch.set_num_threads(2)
in_child, busy = buffers(48), buffers(26)
run(*in_child)
expected = in_child[2].tolist()
stop = threading.Event()

def loop():
    while not stop.is_set():
        run(*busy)

threads = [threading.Thread(target=loop) for _ in range(6)]
for thread in threads:
    thread.start()
for _ in range(200):
    in_child[2].zero_()
    child = os.fork()
    if child == 0:
        run(*in_child)
        os._exit(in_child[2].tolist() != expected)
    end = time.monotonic() + 10
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, 9)
            sys.stderr.write("the child hangs\\n")
            os._exit(1)
        time.sleep(0.001)
    if done[1]:
        sys.stderr.write(f"the child ended with status {done[1]}\\n")
        os._exit(1)
stop.set()
for thread in threads:
    thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(not native.available(), reason="dfengine._native is not built")
def test_a_fork_while_other_threads_use_the_pool_does_not_hang(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=tmp_path, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
