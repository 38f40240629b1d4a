"""Launching the CUDA C++ kernels of csrc/cuda by name: from dfengine._native, else compiled at run time through cupy.

The kernels are in the extension where it was built with nvcc for the device at hand. Elsewhere csrc/cuda/<op>.cu is
compiled by NVRTC (`cupy.RawModule`, which keeps the result on disk), the same source. Files of ARCHITECTURES are for
one architecture only, in both ways.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dfengine import native
from dfengine.kernels.registry import CannotRunError

Argument = torch.Tensor | np.generic | None
"""A pointer (None is the null pointer), or an np.int32, np.int64, np.uint32 or np.float32 value."""


ARCHITECTURES = {"conv2d_wgmma": "sm_90a"}
"""Of the files of csrc/cuda whose instructions no other architecture has, by op. cupy compiles for that of the device
without its features, `sm_90`."""


def available(device: str) -> None:
    """Raise CannotRunError with the reason where CUDA C++ kernels do not run on `device`: "cpu", or "cuda", which is
    the current one."""
    if device != "cuda":
        raise CannotRunError(f"the cuda backend does not run on {device}")
    if not torch.cuda.is_available():
        raise CannotRunError("no CUDA device")
    index = torch.cuda.current_device()
    if not _extension_serves(index) and importlib.util.find_spec("cupy") is None:
        raise CannotRunError(f"{_lacking(index)}, and cupy is not installed")


def launch(
    op: str,
    kernel: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[Argument],
    shared: int = 0,
) -> None:
    """Launch `kernel` of csrc/cuda/<op>.cu on the current stream of the device that holds the first tensor.

    grid, block: in blocks and threads; shared: bytes of dynamic shared memory. Raises CannotRunError where there is no
    code for the device and no cupy that could compile it, RuntimeError with CUDA's message.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        if _in_extension(kernel, device.index):
            native.module.cuda_launch(kernel, grid, block, shared, stream, packed(arguments))
            return
        cupy, function = _cupy(device.index), _function(op, kernel, device.index)
        key = op, kernel, device.index
        if shared > _allowed.get(key, MUCH_SHARED):  # the driver is asked only for more than before
            if key not in _allowed:
                function.preferred_shared_memory_carveout = 100
            if shared > 48 * 1024:
                function.max_dynamic_shared_size_bytes = shared
            _allowed[key] = shared
        values = tuple(_address(argument) if _is_pointer(argument) else argument for argument in arguments)
        with cupy.cuda.ExternalStream(stream):
            function(grid, block, values, shared_mem=shared)


def refusal(kernel: str, device: torch.device) -> str:
    """Why there is no way to launch a kernel on a CUDA device of its architecture; "" where it is compiled in, or cupy
    can compile it."""
    index = index_of(device)
    if _in_extension(kernel, index) or importlib.util.find_spec("cupy") is not None:
        return ""
    return f"{kernel}: {_lacking(index)}, and cupy is not installed"


def index_of(device: torch.device) -> int:
    """The number of a CUDA device; without one it is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def packed(arguments: Sequence[Argument]) -> bytes:
    """Eight bytes for each argument, its value in the first of them."""
    slots = []
    for argument in arguments:
        value = _address(argument) if _is_pointer(argument) else argument
        slots.append(value.tobytes().ljust(8, b"\0"))
    return b"".join(slots)


def _is_pointer(argument: Argument) -> bool:
    return argument is None or isinstance(argument, torch.Tensor)


def _address(argument: torch.Tensor | None) -> np.uint64:
    return np.uint64(0 if argument is None else argument.data_ptr())


def _compiled_in() -> bool:
    return native.module is not None and hasattr(native.module, "cuda_launch")


@functools.cache
def _extension_serves(device: int) -> bool:
    """Whether any of its kernels runs there; apart from those of ARCHITECTURES all have code for the same devices."""
    return _compiled_in() and any(_in_extension(kernel, device) for kernel in native.module.cuda_kernels())


def _lacking(device: int) -> str:
    """What the extension lacks to serve the device."""
    if native.module is None:
        return native.status()
    if not _compiled_in():
        return "dfengine._native was built without nvcc"
    major, minor = torch.cuda.get_device_capability(device)
    return f"dfengine._native has no code for compute capability {major}.{minor}"


@functools.cache
def _in_extension(kernel: str, device: int) -> bool:
    if not _compiled_in() or kernel not in native.module.cuda_kernels():
        return False
    with torch.cuda.device(device):  # which is asked about the one that is current
        return native.module.cuda_kernel_runs(kernel)


def compile_options() -> tuple[str, ...]:
    """The options with which csrc/cuda/<op>.cu compiles by NVRTC; cupy's cache sees a changed header by one of them."""
    folder = native.source_folder()
    headers = hashlib.sha256()
    for path in sorted((*folder.glob("cuda/*.h"), *folder.glob("common/*.h"))):
        headers.update(path.read_bytes())
    return (
        "-std=c++17",
        f"-I{folder / 'cuda'}",
        f"-I{folder / 'common'}",
        f"-DDFENGINE_HEADERS=0x{headers.hexdigest()[:8]}u",
    )


MUCH_SHARED = 16 * 1024
"""Bytes of dynamic shared memory (csrc/bindings/cuda.cpp has the same) beyond which a kernel is given all that a
multiprocessor has, at the cost of its first-level cache: for the other blocks that are meant to share it."""
_allowed: dict[tuple[str, str, int], int] = {}
"""By op, kernel and device: the most dynamic shared memory that was asked for, where that is much."""


@functools.cache
def _function(op: str, kernel: str, device: int):
    try:
        return _compiled(op, device).get_function(kernel)
    except Exception as error:
        if type(error).__name__ == "CompileException":  # cupy's, which is no RuntimeError
            raise RuntimeError(f"NVRTC refuses {op}.cu: {error}") from error
        raise


def _cupy(device: int):
    try:
        import cupy
    except Exception as error:  # missing, or installed and broken in whatever way
        raise CannotRunError(f"{_lacking(device)}, and cupy cannot be imported: {error}") from error
    return cupy


@functools.cache
def _compiled(op: str, device: int):
    cupy = _cupy(device)
    text = (native.source_folder() / "cuda" / f"{op}.cu").read_text(encoding="utf-8")
    if op in ARCHITECTURES:
        return cupy.RawModule(path=str(_cubin(op, text, (*compile_options(), f"-arch={ARCHITECTURES[op]}"))))
    return cupy.RawModule(code=text, options=compile_options())


def _cubin(op: str, text: str, options: tuple[str, ...]) -> Path:
    """The file that NVRTC made of a source, now or before, beside those that cupy keeps."""
    from cupy.cuda import nvrtc

    key = hashlib.sha256(repr((text, options, nvrtc.getVersion())).encode()).hexdigest()
    folder = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    path = folder / f"dfengine_{op}_{key[:32]}.cubin"
    if path.is_file():
        return path
    program = nvrtc.createProgram(text, f"{op}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        code = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"NVRTC refuses {op}.cu: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    folder.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")  # another process may write the same one
    whole.write_bytes(code)
    whole.replace(path)
    return path
