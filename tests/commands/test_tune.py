from __future__ import annotations

import errno
import json
import tempfile

import pytest
from PIL import Image

from dfengine import native
from dfengine.cli import main
from dfengine.engine import tactics, tune
from dfengine.errors import DfengineError

pytestmark = pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "SECONDS", {"tuned": 0.0, "exhaustive": 0.0})


def test_what_is_measured_is_remembered_and_taken(tiny, tmp_path, capsys):
    out = tmp_path / "here.json"
    out.write_text('{"format": 1, "environment": {}, "tactics": {}}')  # its like takes its place
    exact = ["--precision", "float32"]
    assert main(["tune", str(tiny), *exact, "--batch", "1", "--batch", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert " ops measured, " in text and "here.json" in text
    rows = json.loads(out.read_text())["tactics"]
    assert len(rows) > 10 and any("x=float32[6x" in key for key in rows)  # both scales of three images
    (kept,) = (tmp_path / "cache" / "tactics").glob("*.json")
    assert json.loads(kept.read_text())["tactics"] == rows
    assert main(["tune", str(tiny), *exact, "--batch", "1"]) == 0
    assert "nothing was left to measure" in capsys.readouterr().out
    assert main(["verify", str(tiny), *exact]) == 0


def test_the_file_that_tactics_come_from_may_be_the_one_they_go_to(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "here.json"
    arguments = ["tune", str(tiny), "--precision", "float32", "--batch", "1", "--out", str(out)]
    assert main(arguments) == 0
    before = json.loads(out.read_text())["tactics"]
    monkeypatch.setenv("DFENGINE_TACTICS", str(out))
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path / "another"))
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing was left to measure" in capsys.readouterr().out
    assert json.loads(out.read_text())["tactics"] == before


def test_a_cache_that_cannot_be_written_loses_nothing(tiny, tmp_path, capsys, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path / "file"))
    assert main(["tune", str(tiny), "--batch", "1", "--batch", "2", "--out", str(tmp_path / "here.json")]) == 0
    assert len(json.loads((tmp_path / "here.json").read_text())["tactics"]) > 10
    (record,) = caplog.records
    reason = "cannot be written: is a file, not a folder"
    assert f"{reason}: measured tactics are not kept" in record.getMessage()
    capsys.readouterr()
    assert main(["tune", str(tiny), "--batch", "1"]) == 2  # before anything is measured
    printed = capsys.readouterr()
    assert printed.err.startswith(f"dfengine: DFENGINE_CACHE={tmp_path / 'file'}: {reason}; name a file")
    assert printed.err.count("\n") == 1 and not printed.out


def test_a_cache_that_only_seems_writable_is_one_line_for_every_command(tiny, tmp_path, capsys, monkeypatch):
    """As /proc is for root: an error where only the cache keeps what is measured, else a warning, once."""
    folder = tmp_path / "odd"
    trouble = f"DFENGINE_CACHE={folder}: {tmp_path}: cannot be written: no file can be made there"
    monkeypatch.setenv("DFENGINE_CACHE", str(folder))

    def refuse(dir):
        if dir == tmp_path:
            raise OSError(errno.ENOENT, "no such file")
        return make(dir=dir)

    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    assert main(["tune", str(tiny), "--batch", "1"]) == 2
    assert capsys.readouterr() == ("", f"dfengine: {trouble}; name a file with --out to keep what is measured\n")
    tune = ["tune", str(tiny), "--batch", "1", "--batch", "2", "--out", str(tmp_path / "here.json")]
    detect = ["detect", str(tiny), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--threshold", "0.5"]
    for command in (tune, detect):
        tactics.say_lost.cache_clear()
        assert main(command) == 0
        assert capsys.readouterr().err == f"dfengine: warning: {trouble}: measured tactics are not kept\n"
    assert not folder.exists()


@pytest.mark.parametrize(
    "number, reason", [(errno.EACCES, "permission denied"), (errno.ENOSPC, "no space left on device")]
)
def test_a_named_cache_that_takes_no_file_is_no_wrong_usage(number, reason, tiny, tmp_path, capsys, monkeypatch):
    """As it is none where --out names the place."""

    def refuse(dir):
        raise OSError(number, "refused")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert main(["tune", str(tiny), "--batch", "1"]) == 1
    said = f"DFENGINE_CACHE={tmp_path / 'cache'}: {tmp_path}: cannot be written: {reason}; name a file with --out"
    assert capsys.readouterr() == ("", f"dfengine: {said} to keep what is measured\n")


def test_a_cache_that_nobody_named_is_no_wrong_usage(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("DFENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["tune", str(tiny), "--batch", "1"]) == 1
    reason = "cannot be written: is a file, not a folder"
    assert capsys.readouterr().err.startswith(f"dfengine: {tmp_path / 'file'}: {reason}; name a file")


@pytest.mark.parametrize("name, below", [("DFENGINE_CACHE", "tactics"), ("XDG_CACHE_HOME", "dfengine/tactics")])
def test_a_home_in_the_environment_is_expanded(name, below, tiny, tmp_path, capsys, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DFENGINE_CACHE")
    monkeypatch.setenv(name, "~/kept")
    command = ["tune", str(tiny), "--batch", "1", "--precision", "float32"]
    assert main(command) == 0 and not list(work.iterdir())
    (kept,) = (home / "kept" / below).glob("*.json")
    monkeypatch.setenv("DFENGINE_TACTICS", f"~/{kept.relative_to(home)}")
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.setenv("DFENGINE_TACTICS", "~/gone.json")
    assert main(command) == 2
    assert f"DFENGINE_TACTICS={home / 'gone.json'}: no such file" in capsys.readouterr().err
    monkeypatch.setenv("DFENGINE_TACTICS", "~nobody-of-this-name/a.json")
    assert main(command) == 2
    assert "DFENGINE_TACTICS=~nobody-of-this-name/a.json: there is no home folder" in capsys.readouterr().err


@pytest.mark.parametrize("end, status", [(KeyboardInterrupt, 130), (DfengineError("the device is lost"), 1)])
def test_what_was_measured_before_an_early_end_is_kept_and_not_measured_again(
    end, status, tiny, tmp_path, capsys, monkeypatch
):
    measured, turns = tune._measured, []

    def third_ends(*arguments):
        turns.append(arguments[1].name)
        if len(turns) == 3:
            raise end
        return measured(*arguments)

    command = ["tune", str(tiny), "--batch", "1", "--precision", "float32"]
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_measured", third_ends)
        assert main(command) == status
    (kept,) = (tmp_path / "cache" / "tactics").glob("*.json")
    printed = capsys.readouterr()
    assert printed.err.startswith(f"dfengine: warning: ended early: 2 ops measured, kept in {kept}; the next run goes")
    assert len(json.loads(kept.read_text())["tactics"]) == 2 and not printed.out
    went_on = []
    monkeypatch.setattr(tune, "_measured", lambda *arguments: went_on.append(arguments[1].name) or measured(*arguments))
    assert main(command) == 0
    assert went_on[0] == turns[2] and not set(turns[:2]) & set(went_on)


def test_no_time_is_said(tiny, capsys):
    assert main(["tune", str(tiny), "--batch", "1", "--seconds", "0"]) == 0
    assert "no time for " in capsys.readouterr().out


def test_a_batch_beyond_memory_is_refused_in_a_line(tiny, capsys):
    for command in (["tune"], ["info", "--plan", "--no-measure"], ["verify"], ["profile"]):
        assert main([*command, str(tiny), "--batch", "100000000"]) == 1
        refusal = "no memory for 100000000 images at once; use a smaller batch_size"
        assert capsys.readouterr().err == f"dfengine: cpu: {refusal}\n"


def test_a_forced_backend_is_wrong_usage(tiny, capsys, monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "cpu")
    assert main(["tune", str(tiny)]) == 2
    assert "DFENGINE_BACKEND=cpu: leaves tactics no choice" in capsys.readouterr().err


def test_a_named_file_that_is_none_is_wrong_usage(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DFENGINE_TACTICS", str(tmp_path / "none.json"))
    assert main(["detect", str(tiny), str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
