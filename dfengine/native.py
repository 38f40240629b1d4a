"""The compiled extension dfengine._native: whether it is there, why not, and what this processor offers it.

The extension is optional: installation builds it where a C++ compiler is found and else records the reason, which
`status` repeats. One that lies beside its sources and was built from others, as after an update without a reinstall,
or cannot be compared with them, is left out with a warning: its functions may take other arguments.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch  # noqa: F401  (before the extension, which looks for its OpenMP runtime: csrc/cpu/parallel.cpp)

from dfengine.files import os_reason
from dfengine.sources import digest

log = logging.getLogger("dfengine")

BUILD_NOTE = "_native_missing.txt"
"""Written beside this file by setup.py when the extension could not be built; its text is the reason."""


if hasattr(os, "register_at_fork"):
    # A forked child has none of the threads of torch's OpenMP runtime, and would wait for them.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _load():
    try:
        from dfengine import _native
    except ImportError as error:
        note = Path(__file__).with_name(BUILD_NOTE)
        if note.is_file():
            return None, note.read_text(encoding="utf-8").strip()
        return None, f"cannot be imported ({error})"
    try:
        if not _outdated(_native):
            return _native, ""
        reason = "was built from other sources or with other flags: rebuild it (pip install -e .)"
    except OSError as error:
        where = f"{os.path.normpath(error.filename)}: " if error.filename else ""
        reason = f"cannot be compared with its sources ({where}{os_reason(error)})"
    reason = f"the compiled extension {reason}"
    log.warning("%s; torch takes its place", reason)
    return None, reason


def _outdated(extension) -> bool:
    """Whether the sources that lie beside it, or the flags, are others; an installed package has it and their copy from
    one build. Raises OSError where they cannot be read."""
    here = Path(__file__).resolve().parent
    beside = here.parent / "csrc"
    if (here / "csrc").is_dir() or not (beside / "bindings.cpp").is_file():
        return False
    return getattr(extension, "sources", None) != digest(beside, hasattr(extension, "cuda_kernels"))


module, reason = _load()
"""The extension module or None, and the reason why it is None."""


def available() -> bool:
    """Whether the CPU kernels are compiled in."""
    return module is not None


def status() -> str:
    """One line: how the extension was built and what this processor runs of it, or why it is missing."""
    if module is None:
        return f"dfengine._native is not available: {reason}"
    usable = cpu_levels() | products()
    levels = ", ".join(f"{name} {'yes' if runs else 'no'}" for name, runs in usable.items())
    cuda = "with" if hasattr(module, "cuda_kernels") else "without"
    return f"dfengine._native built with {module.compiler}, {cuda} CUDA kernels; instruction sets: {levels}"


def cpu_levels() -> dict[str, bool]:
    """Instruction-set levels compiled in, least first, and whether this processor runs them; {} when missing."""
    if module is None:
        return {}
    levels = module.cpu_levels()
    return {name: levels[name] for name in ("base", "avx2", "avx512", "avx512_bf16") if name in levels}


def products() -> dict[str, bool]:
    """Instructions that multiply bfloat16 and bytes, slower first, and whether they are compiled in and run here; {}
    when the extension is missing."""
    if not hasattr(module, "product_supported"):
        return {}
    codes = {"avx512_bf16": 1, "amx_bf16": 2, "avx512_vnni": 3, "amx_int8": 4}  # csrc/cpu/product.h
    return {name: module.product_supported(code) for name, code in codes.items()}


class Bound:
    """A call of the extension with all of its arguments, as a function. It keeps the tensors that it runs on."""

    __slots__ = ("call", "kept")

    def __init__(self, call, kept=None):
        self.call, self.kept = call, kept

    def __call__(self) -> None:
        self.call.run(torch.get_num_threads())

    @classmethod
    def joined(cls, bound: list[Bound]) -> Bound:
        """One that runs these, one after the other."""
        return cls(module.Calls([each.call for each in bound]), bound)


def address(tensor) -> int:
    """A tensor as the extension takes it, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def source_folder() -> Path:
    """The C++ and CUDA sources: `csrc` of the repository, or its copy inside an installed package."""
    here = Path(__file__).resolve().parent
    for folder in (here / "csrc", here.parent / "csrc"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("csrc is missing from this installation of dfengine")
