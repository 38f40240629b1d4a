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
def compiled(text: str) -> ctypes.CDLL:
    """A C++ source as a library."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = Path(mkdtemp(prefix="cuda_on_host-"))
    try:
        source, built = folder / "source.cpp", folder / "source.so"
        source.write_text(text)
        flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-shared", "-fPIC", "-w"]
        # As on a GPU: a vector that is not aligned is an error (a trap, without a library), and 32-bit integers wrap.
        flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-fwrapv"]
        subprocess.run([compiler, *flags, *cuda_launch.compile_options()[1:], "-o", built, source], check=True)
        return ctypes.CDLL(str(built))
    finally:
        shutil.rmtree(folder)


@cache
def library(op: str, edit: tuple[str, str] | None = None) -> ctypes.CDLL:
    """csrc/cuda/<op>.cu; `edit`: a part of it that occurs once, and what stands in its place."""
    text = (native.source_folder() / "cuda" / f"{op}.cu").read_text()
    if edit is not None:
        assert text.count(edit[0]) == 1
        text = text.replace(*edit)
    return compiled(f'#include "{HERE / "cuda_on_host.h"}"\n{text}')


def launch(op, kernel, grid, block, arguments, shared=0, *, backwards=False, edit=None) -> None:
    """As dfengine.kernels.cuda_launch.launch, on CPU tensors.

    backwards: whether the threads run in the opposite order; edit: as for `library`.
    """
    launch_from(library(op, edit), kernel, grid, block, arguments, shared, backwards)


def launch_from(kernels: ctypes.CDLL, kernel, grid, block, arguments, shared=0, backwards=False) -> None:
    """The same with a library at hand."""
    slots = ctypes.create_string_buffer(cuda_launch.packed(arguments))
    addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(slots) + 8 * i for i in range(len(arguments))))
    sizes = [(ctypes.c_uint * 3)(*size) for size in (grid, block)]
    numbers = ctypes.c_uint(shared), addresses, ctypes.c_int(backwards)
    assert kernels.host_launch(kernel.encode(), *sizes, *numbers) == 0, f"there is no kernel {kernel}"


def install(monkeypatch: pytest.MonkeyPatch, backwards: bool, edit: tuple[str, str] | None = None) -> None:
    """Make every `_run_cuda` run on the host."""
    monkeypatch.setattr(cuda_launch, "launch", partial(launch, backwards=backwards, edit=edit))
