"""Writing files that others use too: atomically, so that a reader sees the old file or the whole new one and a failure
leaves the old one as it was; and, for a change of what a file holds, one process at a time (`locked`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

from dfengine.errors import DfengineError, UsageError

_REASONS = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "is a folder, not a file",
    errno.ENOTEMPTY: "is a folder, not a file",
    errno.EEXIST: "a part of its path is a file, not a folder",  # from mkdir
    errno.ELOOP: "symbolic links that lead in a circle",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.EFBIG: "the file is larger than the file system or the process's limit allows",
    errno.EIO: "input/output error of the disk",
    errno.ESTALE: "the network drive is gone",
}


# ENOENT is what /proc answers, in which nobody can make a file: missing folders are made.
_WRONG_NAME = (
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT
)  # fmt: skip


def os_reason(error: OSError) -> str:
    """The few words a person can act on: "no space left on device", not "[Errno 28] ..."."""
    return _REASONS.get(error.errno) or (error.strerror or str(error) or type(error).__name__).lower()


def _refusal(path: Path, error: OSError) -> DfengineError:
    """ "PATH: cannot be written: REASON": a `UsageError` where another path has to be named, else a `DfengineError`."""
    kind = UsageError if error.errno in _WRONG_NAME else DfengineError
    reason = "no file can be made there" if error.errno == errno.ENOENT else os_reason(error)
    return kind(f"{path}: cannot be written: {reason}")


OUTPUT_MARKER = ".dfengine-output"
"""A file of this name marks a folder that dfengine wrote: its pictures are results, never input."""


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Gives the path of an empty temporary file beside `path` (same suffix); renamed to `path` when the block succeeds.

    Missing parent folders are created. The content is forced to disk before the rename, so that a power cut
    leaves the old or the new file. If the block raises, the temporary file is removed and `path` is untouched.
    A symbolic link is followed: its target is replaced, the link stays. What is no regular file, or has no permission
    to write for anybody, is refused.

    Raises DfengineError, "PATH: cannot be written: REASON", for any OSError of the block or of the rename,
    and for what safetensors raises in its place; `UsageError` where the path is the mistake (`_refusal`).
    """
    shown = Path(path)
    temporary = None
    try:
        target = Path(os.path.realpath(shown)) if shown.is_symlink() else shown
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if target.exists() and not target.is_file():
            raise UsageError(f"{shown}: cannot be written: is not a regular file")
        if target.exists() and not target.stat().st_mode & 0o222:  # a rename would not ask
            raise OSError(0, "is write-protected")
        target.parent.mkdir(parents=True, exist_ok=True)
        # A short stem: a target with the longest allowed name still gets a temporary one.
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=target.suffix[:32], dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(_mode(target))
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise _refusal(shown, error if isinstance(error, OSError) else _as_os_error(error)) from error
    except BaseException:
        _remove(temporary)
        raise


def atomic_write(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes bytes, or text as UTF-8, through `atomic_path`.

    Names that the file system could not decode reach Python with lone surrogates, which UTF-8 does not have: they are
    written as the escapes of Python and JSON.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def remove(path: str | os.PathLike) -> None:
    """Removes a file. Raises DfengineError, "PATH: cannot be removed: REASON"."""
    try:
        os.unlink(path)
    except OSError as error:
        raise DfengineError(f"{path}: cannot be removed: {os_reason(error)}") from None


_HELD: set[int] = set()
"""Descriptors of the locks of this process."""


def _leave_to_parent() -> None:
    """A forked child shares the parent's locks: without this they would last as long as the child."""
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


BUSY = "another run is writing into it; wait for its end, or choose another --out"
"""Said of a folder that is `locked`."""


@contextmanager
def locked(path: str | os.PathLike, busy: str | None = None) -> Iterator[None]:
    """For `with`: no other process or thread is in such a block for the same `path` at the same time.

    Whoever reads a file to write it changed holds this meanwhile. It is the lock of flock(2) on a hidden file beside
    `path`, gone when the block ends; the system lets go of it when the process ends in any way. The second comer waits,
    or, with `busy`, is refused: a DfengineError of that message. On a file system without locks there is none.

    Raises DfengineError, "PATH: cannot be written: REASON", where the hidden file cannot be made.
    """
    target = Path(os.path.realpath(path))
    # No longer than a file name may be; that two long names may share a lock does no harm.
    name = os.fsdecode(b"." + os.fsencode(target.name)[:240] + b".lock")
    beside = target.with_name(name)
    if fcntl is None:
        yield
        return
    descriptor = _lock(beside, Path(path), busy)
    _HELD.add(descriptor)
    try:
        yield
    finally:
        _HELD.discard(descriptor)
        _remove(beside)  # before it is let go: `_lock` tells a removed file by its inode
        os.close(descriptor)


class _Abandoned(Exception):
    pass


def check_writable(path: str | os.PathLike) -> None:
    """Raises DfengineError, as `atomic_path` would, where `path` cannot be written: better before the work than after.

    Missing folders above it are made; what is there stays.
    """
    try:
        with atomic_path(path):
            raise _Abandoned  # the temporary file could be made: it goes
    except _Abandoned:
        pass


def check_own_writable(path: str | os.PathLike, is_own: Callable[[bytes], bool]) -> None:
    """As `check_writable`; raises UsageError too where `path` is a file that is not empty and has not the content of
    what is to be written there: it stays."""
    check_writable(path)
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    try:
        own = is_own(Path(path).read_bytes())
    except OSError:
        own = False
    if not own:
        raise UsageError(f"{path}: is there already and does not show that this command wrote it; choose another name")


def check_json_writable(path: str | os.PathLike, *keys: str) -> None:
    """`check_own_writable` of a JSON object with all these keys; the name must end in .json."""
    check_suffix(path, ".json")

    def is_own(content: bytes) -> bool:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.keys() >= set(keys)

    check_own_writable(path, is_own)


def check_suffix(path: str | os.PathLike, suffix: str) -> None:
    """Raises UsageError where the name of an output does not end so, in just these letters: what lies beside it may be
    named after the rest, and a.png and a.PNG are two files."""
    if Path(path).suffix != suffix:
        raise UsageError(f"{path}: must end in {suffix}")


def make_folder(path: str | os.PathLike) -> None:
    """Makes a folder for output, where it is missing. Raises as `atomic_path` does where that fails, or no file can be
    made in it: better before the work than after it."""
    folder = Path(path)
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{path}: cannot be written: is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refusal(folder, error) from error


def check_folder(path: str | os.PathLike) -> None:
    """Raises as `make_folder` does, where it would for `path`; the folder is not made."""
    folder = Path(path)
    for there in (folder, *folder.parents):
        try:
            os.stat(there)
        except OSError as error:
            missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
            if not missing or os.path.islink(there):
                raise _refusal(there, error) from error
        else:
            return make_folder(there)


def _lock(file: Path, shown: Path, busy: str | None) -> int:
    """A descriptor of `file`, locked."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _refusal(shown, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy is not None else 0))
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise DfengineError(busy) from None
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                return descriptor
            os.close(descriptor)
            raise DfengineError(f"{shown}: cannot be locked: {os_reason(error)}") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one before removed it while this one waited


def _as_os_error(error: SafetensorError) -> OSError:
    """safetensors gives the number of a failed system call, 28 for a full disk, as text only."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(" ".join(str(error).split()))


def _mode(target: Path) -> int:
    """The permissions `target` has, or those an ordinary new file would get (mkstemp makes private files)."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _sync(path: Path) -> None:
    """fsync of a file or a folder; folders only where the system can open them (not on Windows)."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except OSError:
        if path.is_file():
            raise
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems know no fsync; a full disk or an i/o error must not pass for success.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(temporary: Path | None) -> None:
    if temporary is not None:
        try:
            temporary.unlink()
        except OSError:
            pass  # already gone, or the folder went: the first error is the one to report
