"""Tactics: which implementation of an op, in which configuration, is quickest on a device for arguments of one shape.

What `dfengine.engine.tune` measured is remembered in a file for each device, and looked up when a program is bound. A
file holds for one environment: device, driver, versions of the libraries and this code; in another one it is left
unread, and the rules of `dfengine.kernels.Op.choose` hold. In order of rank:

    DFENGINE_TACTICS            a file by name, whatever its environment
    DFENGINE_CACHE/tactics/     what was measured here (by default in the user's cache folder)
    dfengine/engine/tactics/    shipped with the package, for a device of this name whatever its versions
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dfengine
from dfengine import native
from dfengine.devices import hardware_name
from dfengine.engine.program import Constant, Op, Value
from dfengine.errors import DfengineError, UsageError
from dfengine.files import atomic_write, check_folder, locked, os_reason
from dfengine.kernels import OPS, triton_import
from dfengine.kernels.conv_weight import ConvWeight

log = logging.getLogger("dfengine")

FORMAT = 1
FILE, CACHE = "DFENGINE_TACTICS", "DFENGINE_CACHE"
SHIPPED = Path(__file__).with_name("tactics")
IGNORED = ("seed", "draw", "step", "noise")
"""Arguments of no weight for the time that an op takes."""


@dataclass(frozen=True)
class Tactic:
    """backend: an implementation by name; options: its configuration, keyword arguments of its `run` and `bind`;
    microseconds: what it took."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    microseconds: float = 0.0

    def __str__(self) -> str:
        options = self.options.get("configuration", self.options)
        return " ".join([self.backend, *(f"{name}={value}" for name, value in options.items())])


def signature(op: Op) -> str:
    """What the time of an op depends on: its kernel, and shapes, strides, types and options of its arguments."""
    parts = [op.kernel]
    for name, argument in zip(op.arguments, op.at(0), strict=True):
        if name in IGNORED or isinstance(argument, (float, list, tuple)):
            continue
        if isinstance(argument, Value):
            described = _tensor(argument.shape, argument.buffer.dtype)
            wide = argument.buffer.shape[-1]
            described += f"/{wide}" if argument.channels is not None and argument.shape[-1] != wide else ""
        elif isinstance(argument, Constant) and isinstance(argument.content, ConvWeight):
            weight = argument.content
            described = _tensor(weight.packed.shape, weight.packed.dtype) + f" dilation {weight.dilation}"
        elif isinstance(argument, Constant):
            described = _tensor(argument.content.shape, argument.content.dtype)
        else:
            described = str(argument)
        parts.append(f"{name}={described}")
    return "; ".join(parts)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{'x'.join(map(str, shape))}]"


@functools.cache
def _code_digest() -> str:
    """Of the kernels' Python and CUDA files and of the extension: another build, other tactics."""
    digest = hashlib.sha256()
    files = sorted(Path(dfengine.kernels.__file__).parent.glob("*.py"))
    folder = native.source_folder()  # NVRTC compiles from it
    files += sorted((*folder.glob("cuda/*"), *folder.glob("common/*")))
    if native.module is not None:
        files.append(Path(native.module.__file__))
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def environment(device: torch.device) -> dict[str, str]:
    """What measured times hold for, by name."""
    found = {"dfengine": _code_digest(), "torch": torch.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "driver": _driver(),
            "triton": str(getattr(triton_import.triton, "__version__", None)),
        }
    else:
        levels = [name for name, usable in native.cpu_levels().items() if usable]
        found |= {
            "device": f"{hardware_name(device)}, {torch.get_num_threads()} threads",
            "capability": f"{platform.machine()} {levels[-1] if levels else 'without extension'}",
        }
    return found


def _driver() -> str:
    """The version of the kernel module; "unknown" where the system does not say it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found.group(0) if found else "unknown"


def _path_of(variable: str) -> Path | None:
    """The path that an environment variable holds, "~" at its begin being the home folder; None where it is unset.
    Raises `UsageError` for the home of nobody."""
    given = os.environ.get(variable)
    try:
        return Path(given).expanduser() if given else None
    except RuntimeError:
        raise UsageError(f"{variable}={given}: there is no home folder of this name; give the whole path") from None


def cache_folder() -> Path:
    """Where measured tactics are kept. Raises `UsageError` for a path in the home of nobody."""
    if named := _path_of(CACHE):
        return named / "tactics"
    if caches := _path_of("XDG_CACHE_HOME"):
        return caches / "dfengine" / "tactics"
    try:
        return Path.home() / ".cache" / "dfengine" / "tactics"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"dfengine-{os.getuid()}" / "tactics"


def check_cache() -> None:
    """Raises `DfengineError` where nothing can be kept in `cache_folder`, which is left as it is: a `UsageError` where
    DFENGINE_CACHE names what is no folder or can be none."""
    folder = cache_folder()
    try:
        check_folder(folder)
    except DfengineError as error:
        kind = type(error) if os.environ.get(CACHE) else DfengineError
        raise kind(f"{_cache_variable()}{str(error).removeprefix(f'{_path_of(CACHE)}: ')}") from None


@contextmanager
def _named_trouble() -> Iterator[None]:
    """For `with`: a DfengineError of the block says what could not be kept, and which variable names the place."""
    try:
        yield
    except DfengineError as error:
        raise DfengineError(f"{_cache_variable()}measured tactics: {error}") from None


def _cache_variable() -> str:
    """What the user set to name the folder, before it in a message; "" where nothing is set."""
    return f"{CACHE}={os.environ[CACHE]}: " if os.environ.get(CACHE) else ""


@functools.cache
def _say_unread(path: Path, reason: str) -> None:
    """Once: every program of a detector asks."""
    log.warning("%s%s: what was measured before is left unread: %s", _cache_variable(), path, reason)


@functools.cache
def say_lost(trouble: str) -> None:
    """Once, likewise."""
    log.warning("%s: measured tactics are not kept", trouble)


def warn_of_cache() -> bool:
    """Whether `cache_folder` can keep what is measured; says once why not."""
    try:
        check_cache()
    except DfengineError as error:
        say_lost(str(error))
        return False
    return True


def file_name(device: str) -> str:
    """The name of a device's file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


class Tactics:
    """The tactics known for a device: `find` and `record` by op; `save` keeps what was recorded.

    Raises UsageError where the file that DFENGINE_TACTICS names cannot be used. A damaged file of the cache is left
    alone with a warning, and written anew by `save`. That the folder which DFENGINE_CACHE names can be none is said at
    once; one that is there may be read-only, for others to use.
    """

    def __init__(self, device: str | torch.device):
        self.environment = environment(torch.device(device))
        name = file_name(self.environment["device"])
        self.path = cache_folder() / name
        if os.environ.get(CACHE) and not os.path.isdir(self.path.parent):
            warn_of_cache()
        self.unsaved = 0
        """Records since the last `save`."""
        self._known: dict[str, Tactic] = {}
        shipped, named = SHIPPED / name, _path_of(FILE)
        if shipped.is_file():
            self._known |= _read(shipped)[1]
        self._measured = self._remembered()
        self._named = _named(named) if named else {}
        self._known |= self._measured | self._named

    def _remembered(self) -> dict[str, Tactic]:
        try:
            of, tactics = _read(self.path) if self.path.is_file() else ({}, {})
        except (OSError, ValueError) as error:
            _say_unread(self.path, os_reason(error) if isinstance(error, OSError) else str(error))
            return {}
        return tactics if of == self.environment else {}

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, op: Op) -> bool:
        """Whether it was measured: here, or for the file that DFENGINE_TACTICS names."""
        return signature(op) in self._measured or signature(op) in self._named

    def find(self, op: Op) -> Tactic | None:
        return self._known.get(signature(op))

    def record(self, op: Op, tactic: Tactic) -> None:
        self._known[signature(op)] = self._measured[signature(op)] = tactic
        self.unsaved += 1

    def save(self) -> bool:
        """Writes what was measured here to the cache, with what another process wrote meanwhile.

        Whether it is kept: with `warn_of_cache`'s warning where that cannot be. Raises `DfengineError` for a failing
        disk.
        """
        if not warn_of_cache():
            return False
        with _named_trouble(), locked(self.path):
            self.write(self.path, self._remembered() | self._measured)
        self.unsaved = 0
        return True

    def write(self, path: Path, tactics: dict[str, Tactic] | None = None) -> None:
        """Writes a file of the same form elsewhere, to ship it, or for DFENGINE_TACTICS: by default what was measured
        here, and what stands in the file that DFENGINE_TACTICS names."""
        measured = self._named | self._measured if tactics is None else tactics
        rows = {
            key: {"backend": t.backend, "options": t.options, "us": round(t.microseconds, 2)}
            for key, t in sorted(measured.items())
        }
        atomic_write(path, json.dumps({"format": FORMAT, "environment": self.environment, "tactics": rows}, indent=1))


def _named(path: Path) -> dict[str, Tactic]:
    try:
        return _read(path)[1]
    except OSError as error:
        raise UsageError(f"{FILE}={path}: {os_reason(error)}") from None
    except ValueError as error:
        raise UsageError(f"{FILE}={path}: {error}") from None


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tactic]]:
    """Environment and tactics of a file. Raises ValueError for one that is not of this form."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of tactics of format {FORMAT}")
    try:
        tactics = {
            str(key): Tactic(str(row["backend"]), dict(row["options"]), float(row["us"]))
            for key, row in content["tactics"].items()
        }
        return dict(content["environment"]), tactics
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError("damaged: an entry without its fields") from None


def usable(op: Op, tactic: Tactic, arguments: list, device: str) -> bool:
    """Whether a tactic runs these arguments here: a file may come from another build."""
    implementation = OPS[op.kernel].implementations.get(tactic.backend)
    if implementation is None:
        return False
    try:
        implementation.available(device)
        implementation.can_run(*arguments)
        return not tactic.options or tactic.options in list(implementation.configurations(*arguments))
    except DfengineError:
        return False
