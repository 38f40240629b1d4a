from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dfengine.errors import DfengineError, UsageError
from dfengine.files import atomic_path, atomic_write, check_json_writable, locked


def test_writes_bytes_and_text_and_makes_the_folder(tmp_path):
    path = tmp_path / "a" / "b" / "result.txt"
    atomic_write(path, "Gleis 7 übergeben\n")
    assert path.read_bytes() == "Gleis 7 übergeben\n".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["result.txt"]


def test_the_old_file_stays_until_the_block_ends(tmp_path):
    path = tmp_path / "weights.safetensors"
    atomic_write(path, b"old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".safetensors"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_new_files_get_ordinary_permissions_and_old_ones_keep_theirs(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    atomic_write(tmp_path / "new", b"1")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_link_is_followed(tmp_path):
    target = tmp_path / "disk" / "real.csv"
    atomic_write(target, b"old")
    (tmp_path / "link.csv").symlink_to(target)
    atomic_write(tmp_path / "link.csv", b"new")
    assert (tmp_path / "link.csv").is_symlink() and target.read_bytes() == b"new"


def test_the_longest_file_name(tmp_path):
    name = "x" * 251 + ".csv"
    atomic_write(tmp_path / name, b"1")
    assert os.listdir(tmp_path) == [name]
    with pytest.raises(DfengineError, match="the file name is too long"):
        atomic_write(tmp_path / ("x" + name), b"1")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failing_block_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("function", "code", "reason"), [
    ("os.fsync", errno.ENOSPC, "no space left on device"),
    ("os.fsync", errno.EDQUOT, "disk quota exceeded"),
    ("os.fsync", errno.EIO, "input/output error"),
    ("os.replace", errno.EROFS, "the file system is read-only"),
    ("tempfile.mkstemp", errno.EACCES, "permission denied"),
    ("tempfile.mkstemp", errno.EROFS, "the file system is read-only"),
    ("os.mkdir", errno.ENOSPC, "no space left on device"),
])
def test_failures_of_the_disk(function, code, reason, tmp_path, monkeypatch):
    path = tmp_path / "new" / "file" if function == "os.mkdir" else tmp_path / "file"
    if function != "os.mkdir":
        atomic_write(path, b"old")

    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(function, fail)
    with pytest.raises(DfengineError) as refusal:
        atomic_write(path, b"new")
    assert str(refusal.value).startswith(f"{path}: cannot be written: {reason}")
    monkeypatch.undo()
    if function == "os.mkdir":
        assert os.listdir(tmp_path) == []
    else:
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_write_to_a_full_device_names_the_file(tmp_path):
    with pytest.raises(DfengineError, match="report.html: cannot be written: no space left on device"):
        with atomic_path(tmp_path / "report.html"):
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("text", "reason"), [
    ("I/O error: No space left on device (os error 28)", "no space left on device"),
    ("I/O error: File too large (os error 27)", "the file is larger than"),
    ("I/O error: failed to\nfill whole buffer", "i/o error: failed to fill whole buffer"),
])
def test_what_safetensors_raises_is_an_error_of_the_disk(text, reason, tmp_path):
    with pytest.raises(DfengineError) as refusal, atomic_path(tmp_path / "a.safetensors"):
        raise SafetensorError(text)
    assert str(refusal.value).startswith(f"{tmp_path / 'a.safetensors'}: cannot be written: {reason}")
    assert "\n" not in str(refusal.value) and os.listdir(tmp_path) == []


def test_a_file_system_without_fsync_is_no_failure(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("os.fsync", fail)
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_one_block_at_a_time(tmp_path):
    path, inside, most = tmp_path / "file", [], []

    def work(name):
        for _ in range(200):
            with locked(path):
                inside.append(name)
                most.append(len(inside))
                inside.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 800 and set(most) == {1}
    assert os.listdir(tmp_path) == []


def test_the_second_comer_is_refused_where_it_does_not_wait(tmp_path):
    path, link = tmp_path / "folder" / ("x" * 255), tmp_path / "link"
    link.symlink_to(path)
    with locked(path):
        for name in (path, link):
            with pytest.raises(DfengineError, match="^in use$"), locked(name, "in use"):
                pass
    with locked(link, "in use"):
        pass
    assert os.listdir(path.parent) == []


HOLD = """
import sys
from dfengine.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_dies_lets_go(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DfengineError, match="in use"), locked(tmp_path / "file", "in use"):
            pass
        process.kill()
    with locked(tmp_path / "file", "in use"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_no_failure(tmp_path, monkeypatch):
    def fail(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with locked(tmp_path / "file"):
        atomic_write(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DfengineError, match="file/a: cannot be written: a part of its path is a file"):
        with locked(tmp_path / "file" / "a"):
            pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_regular_file_or_protected_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "kept").chmod(0o444)
    for name, reason in (("pipe", "is not a regular file"), ("kept", "is write-protected")):
        with pytest.raises(DfengineError, match=f"{name}: cannot be written: {reason}"):
            atomic_write(tmp_path / name, "other")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "kept").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "pipe"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_does_not_keep_a_lock(tmp_path):
    reading, writing = os.pipe()
    with locked(tmp_path / "file"):
        child = os.fork()
        if child == 0:
            os.read(reading, 1)  # lives until it is told
            os._exit(0)
    try:
        with locked(tmp_path / "file", busy="taken"):
            pass
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)


def test_json_takes_the_place_of_its_like_alone(tmp_path):
    target = tmp_path / "new.json"
    check_json_writable(target, "a", "b")
    assert not target.exists()
    target.write_text(' {"c": 2, "a": 1, "b": 0}')
    check_json_writable(target, "a", "b")
    others = (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", b'{"a": []}', b'["a", "b"]', b'{"a": 1, "b": ', b"\xff{")
    for number, content in enumerate(others):
        other = tmp_path / f"{number}.json"
        other.write_bytes(content)
        with pytest.raises(UsageError, match="is there already and does not show that this command wrote it;"):
            check_json_writable(other, "a", "b")
        assert other.read_bytes() == content
    for name in ("net", "net.csv", "net.JSON"):
        with pytest.raises(UsageError, match=f"{name}: must end in .json"):
            check_json_writable(tmp_path / name, "a")
