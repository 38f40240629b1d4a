"""The threads of the CPU kernels (csrc/cpu/team.h, parallel.cpp): who does what; a forked child can use them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dfengine import native
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.measure import trial_inputs
from tests.helpers import tiny_model

compiled = pytest.mark.skipif(not native.available(), reason="dfengine._native is not built")

SCRIPT = """
import os, sys, threading, time
import torch
from dfengine import native
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
for turn in range(200):
    in_child[2].zero_()
    child = os.fork()
    if child == 0:
        # With OpenMP's threads gone: alone, and with threads of its own.
        torch.set_num_threads(1 + turn % 3)
        run(*in_child)
        native.module.with_helpers(3, lambda: run(*in_child))
        other = threading.Thread(target=lambda: native.module.with_helpers(3, lambda: run(*buffers(48))))
        other.start()
        run(*in_child)
        other.join()
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
@compiled
def test_a_fork_while_other_threads_use_the_pool_does_not_hang(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], cwd=tmp_path, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def team_on_host(tmp_path_factory) -> Path:
    """tests/kernels/team_on_host.cpp as a program."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("team") / "team"
    source = Path(__file__).with_name("team_on_host.cpp")
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{native.source_folder()}"]
    subprocess.run([compiler, *flags, "-o", built, source], check=True)
    return built


@pytest.mark.parametrize("name", ["absent", "slow", "many", "late", "items"])
def test_a_team(team_on_host, name):
    """Waiting for a helper that will not come, or for what the leader could do itself, would never end."""
    done = subprocess.run([team_on_host, name], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def executor(dtype: torch.dtype = torch.float32) -> tuple[Executor, dict]:
    bound = Executor(Lowering(tiny_model(), dtype).program(2), backend="cpu")
    return bound, trial_inputs(bound)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit_of_a_detection(dtype):
    bound, inputs = executor(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7, 300, 2):
            torch.set_num_threads(count)
            results += [bound.run(**inputs) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


@compiled
def test_detections_on_several_threads_at_once():
    many, wrong = [executor() for _ in range(4)], []
    want = many[0][0].run(**many[0][1])

    def loop(bound, inputs):
        for _ in range(20):
            got = bound.run(**inputs)
            wrong.extend(name for name in want if not torch.equal(got[name], want[name]))

    threads = [threading.Thread(target=loop, args=pair) for pair in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@compiled
def test_helpers_stand_by_for_nested_calls_and_leave_after_an_error():
    bound, inputs = executor()
    want, seen = bound.run(**inputs), []

    def nested():
        native.module.with_helpers(2, lambda: seen.append(bound.run(**inputs)))
        seen.append(bound.run(**inputs))
        raise KeyError("inside")

    for threads in (1, 2, 5):
        with pytest.raises(KeyError, match="inside"):
            native.module.with_helpers(threads, nested)
    seen.append(bound.run(**inputs))
    assert len(seen) == 7 and all(torch.equal(got[name], want[name]) for got in seen for name in want)


EXIT = """
import threading, torch
from dfengine import native

torch.set_num_threads(4)
native.module.with_helpers(4, lambda: None)
standing = threading.Event()

def stand():
    standing.set()
    threading.Event().wait()

threading.Thread(target=lambda: native.module.with_helpers(4, stand), daemon=True).start()
standing.wait()
print("ended")
"""


BUSY = """
import sys, threading, torch
from dfengine import native
from dfengine.kernels import ingest

images, started = torch.full((1, 256, 256, 3), 0.5), threading.Event()
out = torch.empty_like(images), torch.empty((2, *images.shape))

def run():
    ingest._run_cpu(images, *out, 1.0, 0.0, [0.5, 0.5], [0.5, 0.5], 3, 0, 0)
    started.set()

def loop():
    while True:
        native.module.with_helpers(2, run) if sys.argv[1] == "helpers" else run()

torch.set_num_threads(2)
threading.Thread(target=loop, daemon=True).start()
started.wait()
print("ended")
"""


@compiled
@pytest.mark.parametrize("script", [[EXIT], [BUSY, "helpers"], [BUSY, "alone"]], ids=["waits", "helpers", "alone"])
def test_the_interpreter_ends_while_a_daemon_thread_is_within_the_extension(script, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", *script]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "ended\n", done.stderr
