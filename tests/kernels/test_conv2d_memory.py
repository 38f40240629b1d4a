"""What the CUDA kernels of conv2d touch in global memory, on the host: nothing beside their tensors, 16 bytes at a time
only where these are aligned, and the right place where offsets pass 32 bits. Launches run in a forked process, in which
a wrong access is a signal."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dfengine.kernels import conv2d
from dfengine.kernels import conv2d_cuda as cuda
from dfengine.kernels.slices import pixel_stride
from tests.kernels import cuda_on_host, launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.conv2d_cases import NAN, Case, make, moment_pixels, through_torch
from tests.kernels.test_conv2d_cuda import EVERY_TILE, launcher_of

pytestmark = [
    pytest.mark.skipif(launchers.GPU, reason="about kernels that run on the host"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
]


def status_of(run: Callable[[], None]) -> int:
    """The exit status of `run` in a process of its own; where a signal ended it, minus its number."""
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def guarded(values: Tensor, behind: bool) -> Tensor:
    """A copy in memory that forked processes share, of the same strides and NaN between, beside a page that nobody may
    touch: behind its last value, or before its first."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    size, page = extent * values.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    edge = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + (pages * page if behind else 0)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0  # PROT_NONE
    start = pages * page - size if behind else page
    copy = torch.frombuffer(memory, dtype=values.dtype, count=extent, offset=start).fill_(NAN)
    return copy.as_strided(values.shape, values.stride()).copy_(values)


def run_apart(launcher, arguments: tuple, y: Tensor, moments: Tensor | None = None, tile_pixels: int = 0) -> None:
    """Into y and moments, which forked processes share."""
    cuda_on_host.library(launcher.options["placement"].tile.op)  # compiled here, once
    conv2d._check(*arguments, y, moments, tile_pixels)
    assert status_of(lambda: launcher.run(conv2d.OP, *arguments, y, moments, tile_pixels)) == 0


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
def test_the_guard_is_there(behind):
    values = guarded(torch.arange(12.0), behind)
    inside, outside = (values.data_ptr() + at for at in ((47, 48) if behind else (0, -1)))
    assert status_of(lambda: ctypes.string_at(inside, 1)) == 0
    # Without pytest's report of a crash, which is wanted here.
    assert status_of(lambda: (faulthandler.disable(), ctypes.string_at(outside, 1))) == -signal.SIGSEGV


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("tile", EVERY_TILE, ids=lambda tile: tile.name)
def test_nothing_beside_the_tensors_is_touched(tile, behind, monkeypatch):
    """Fewer outputs than a block makes, so that parts of it have no weights; every loader, and every residual."""
    monkeypatch.setattr(cuda, "capability_of", lambda device: (9, 0))
    few = min(tile.outputs - 8, 40)
    for number, case in enumerate(
        (
            Case((2, 5, 8), (24, 40), few, 3, 1, True, "gelu", "none", "none", aligned=True),
            Case((1, 4, 10), (20, 7), few, 3, 1, True, "silu", "up", "down", bias="channel"),
            Case((1, 3, 5), (72,), few - 1, 3, 1, True, "none", "down", "none", aligned=True),
        )
    ):
        x, x2, weight, *small, prologue, resample, residual, residual_resample, act = make(case, torch.float16, number)
        place = next(p for p in cuda.shapes_of(tile, 1, (9, 0)) if p.moment_run(case.size[1:], tile.pixels))
        launcher = launcher_of(monkeypatch, place)
        cuda.prepacked(weight, case.sources, tile)
        for key, packed in weight.prepacked.items():
            weight.prepacked[key] = guarded(packed, behind)
        x, x2, residual, *small = (None if t is None else guarded(t, behind) for t in (x, x2, residual, *small))
        arguments = x, x2, weight, *small, prologue, resample, residual, residual_resample, act
        run = moment_pixels(launcher, arguments, 0)
        batch, height, width = case.size
        y = guarded(torch.full((*case.size, case.outputs), NAN, dtype=torch.float16), behind)
        moments = guarded(torch.full((batch, -(-height * width // run), 2, case.outputs), NAN), behind)
        run_apart(launcher, arguments, y, moments, run)
        exact, plain = (through_torch(arguments, dtype) for dtype in (torch.float64, torch.float16))
        assert_numeric_contract(y, exact, plain)
        assert moments.isfinite().all()


@pytest.mark.parametrize("shifted", ["x", "x2", "residual", "y", ""])
def test_each_tensor_is_asked_for_its_own_alignment(shifted, monkeypatch):
    """24 of 32 channels, from the fifth on in one of the tensors and from the ninth on in the others: by their strides
    pixels are aligned everywhere, by their addresses not in that one."""
    place = cuda.Placement(next(tile for tile in cuda.TILES if tile.name == "64x64"), 8)
    launcher, case = launcher_of(monkeypatch, place), Case((1, 8, 8), (24, 24), 24, residual="none")
    arguments = list(make(case, torch.float16))
    exact, plain = (through_torch(tuple(arguments), dtype) for dtype in (torch.float64, torch.float16))

    def placed(name: str, values: Tensor) -> Tensor:
        wide = guarded(torch.full((*values.shape[:3], 32), NAN, dtype=torch.float16), True)
        view = wide[..., 4:28] if name == shifted else wide[..., 8:]
        assert pixel_stride("", view) == 32 and (view.data_ptr() % 16 != 0) == (name == shifted)
        return view.copy_(values)

    for index, name in ((0, "x"), (1, "x2"), (8, "residual")):
        arguments[index] = placed(name, arguments[index])
    y = placed("y", torch.full((1, 8, 8, 24), NAN, dtype=torch.float16))
    run_apart(launcher, tuple(arguments), y)
    assert_numeric_contract(y, exact, plain)


def far_apart(values: Tensor, odd: bool, folder: Path) -> Tensor:
    """The values as a slice, the pixels of each sample more than 2^31 values long, and the second sample begins beyond
    that. They are in a sparse file, and so are 2^31 values before them, to which too short an offset would lead."""
    pixels = values.shape[1] * values.shape[2]
    pitch = 8 * (8 * 2**31 // 5 // pixels // 8) + odd
    path = folder / "values"
    memory = np.memmap(path, np.float16, "w+", shape=(2**31 + len(values) * pixels * pitch,))
    path.unlink()
    slots = torch.from_numpy(memory)[2**31 :].view(*values.shape[:3], pitch)
    return slots[..., : values.shape[3]].copy_(values)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 4, 4), (16, 8), 24, 3, 1, True, "gelu", "none", "none", aligned=True),
        Case((2, 4, 4), (16, 8), 24, 3, 1, True, "gelu", "down", "down", aligned=True),
        Case((2, 4, 4), (9, 6), 21, 3, 1, True, "silu", "up", "up"),
        Case((2, 4, 4), (9, 6), 21, 3, 1, False, "none", "down", "down"),
    ],
    ids=lambda case: f"{case.resample}-{'aligned' if case.aligned else 'odd'}",
)
def test_offsets_do_not_wrap_at_32_bits(case, monkeypatch, tmp_path):
    arguments = list(make(case, torch.float16))
    exact, plain = (through_torch(tuple(arguments), dtype) for dtype in (torch.float64, torch.float16))
    for index in (0, 1, 8):
        arguments[index] = far_apart(arguments[index], not case.aligned, tmp_path)
    y = far_apart(torch.full((*case.size, case.outputs), NAN, dtype=torch.float16), not case.aligned, tmp_path)
    place = cuda.Placement(next(tile for tile in cuda.TILES if tile.name == "64x64"), 8)
    run_apart(launcher_of(monkeypatch, place), tuple(arguments), y)
    assert_numeric_contract(y.contiguous(), exact, plain)
