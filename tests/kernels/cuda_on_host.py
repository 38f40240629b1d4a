"""csrc/cuda/<op>.cu compiled for the host (cuda_on_host.h), in the place of the real launch."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest

from dfengine import native
from dfengine.kernels import cuda_launch

HERE = Path(__file__).resolve().parent


@cache
def library(op: str) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(mkdtemp(prefix="cuda_on_host-"))
    try:
        source, built = folder / f"{op}.cpp", folder / f"{op}.so"
        cu = native.source_folder() / "cuda" / f"{op}.cu"
        source.write_text(f'#include "{HERE / "cuda_on_host.h"}"\n#include "{cu}"\n')
        flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-shared", "-fPIC", "-w"]
        subprocess.run([compiler, *flags, "-o", built, source], check=True)
        return ctypes.CDLL(str(built))
    finally:
        shutil.rmtree(folder)


def launch(op, kernel, grid, block, arguments, shared=0, *, backwards=False) -> None:
    """As dfengine.kernels.cuda_launch.launch, on CPU tensors; `backwards` lets the threads run in opposite order."""
    slots = ctypes.create_string_buffer(cuda_launch.packed(arguments))
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(slots) + 8 * i for i in range(len(arguments))))
    sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
    status = library(op).host_launch(kernel.encode(), *sizes, ctypes.c_uint(shared), addresses, ctypes.c_int(backwards))
    assert status == 0, f"csrc/cuda/{op}.cu names no kernel {kernel}"


def install(monkeypatch: pytest.MonkeyPatch, backwards: bool) -> None:
    """Make every `_run_cuda` run on the host."""
    monkeypatch.setattr(cuda_launch, "launch", partial(launch, backwards=backwards))
