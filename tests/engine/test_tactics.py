"""Tactics: what they are known by, where they are kept, and which rank first."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch

from dfengine import native
from dfengine.engine import tactics as tactics_module
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.program import Op
from dfengine.engine.tactics import Tactic, Tactics, signature, usable
from dfengine.errors import UsageError
from tests.helpers import tiny_model


def program(batch: int = 1, dtype=torch.float32, **changes):
    return Lowering(tiny_model(**changes), dtype, disposable=False).program(batch)


def refuse_files(monkeypatch, code: int) -> None:
    """No file can be made in what seems to be the folder of the cache."""

    def refuse(dir):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tactics_module.tempfile, "TemporaryFile", refuse)


def op(name: str, **options) -> Op:
    return next(op for op in program(**options).ops if op.name == name)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv(tactics_module.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "tactics"


def test_a_signature_says_what_the_time_depends_on():
    conv = op("up.0.0.conv1")
    text = signature(conv)
    assert text.startswith("conv2d; x=float32[2x16x16x16]; ") and "prologue_act=gelu" in text and "dilation 1" in text
    assert signature(op("up.0.0.conv1")) == text
    assert signature(op("middle.0.conv1")) != signature(op("middle.0.conv1", dilation=1))
    assert signature(op("up.0.0.conv1", batch=2)) != text
    assert signature(op("up.0.0.conv1", dtype=torch.bfloat16)) != text
    ingest = [signature(next(o for o in Lowering(tiny_model()).program(1, seed).ops)) for seed in (0, 7)]
    assert ingest[0] == ingest[1] and "seed" not in ingest[0]


def test_what_was_recorded_is_found_again(cache):
    first, conv = Tactics("cpu"), op("down.0")
    assert len(first) == 0 and first.find(conv) is None and conv not in first
    first.record(conv, Tactic("library", {}, 12.5))
    first.save()
    assert first.path.parent == cache and first.path.is_file()
    again = Tactics("cpu")
    assert again.find(conv) == Tactic("library", {}, 12.5) and conv in again and len(again) == 1
    assert again.find(op("out")) is None


def test_two_processes_keep_what_each_measured():
    one, other = Tactics("cpu"), Tactics("cpu")
    one.record(op("down.0"), Tactic("library"))
    other.record(op("out"), Tactic("cpu"))
    one.save(), other.save()
    assert len(Tactics("cpu")) == 2


def test_in_another_environment_they_are_left_unread(monkeypatch):
    known = Tactics("cpu")
    known.record(op("down.0"), Tactic("library"))
    known.save()
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    assert len(Tactics("cpu")) == 0


DAMAGED = ["", "{", "[1]", "[" * 100_000, '{"format": 99}', '{"format": 1, "tactics": {"a": 3}}']


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_left_alone_and_written_anew(content, caplog):
    known = Tactics("cpu")
    known.path.parent.mkdir(parents=True)
    known.path.write_text(content)
    again = Tactics("cpu")
    (record,) = caplog.records
    variable = f"{tactics_module.CACHE}={known.path.parent.parent}: {known.path}: "
    assert record.getMessage().startswith(f"{variable}what was measured before is left unread: ")
    assert len(again) == 0 and known.path.read_text() == content
    again.record(op("down.0"), Tactic("library"))
    again.save()
    assert len(Tactics("cpu")) == 1 and len(caplog.records) == 1


def test_two_that_save_at_once_wait_for_each_other(monkeypatch):
    one, other = Tactics("cpu"), Tactics("cpu")
    one.record(op("down.0"), Tactic("library"))
    other.record(op("out"), Tactic("cpu"))
    write, waiting = Tactics.write, []

    def slow(self, path, tactics):
        if self is one:
            thread = threading.Thread(target=other.save)
            thread.start()
            thread.join(0.5)
            waiting.append(thread)
            assert thread.is_alive()
        write(self, path, tactics)

    monkeypatch.setattr(Tactics, "write", slow)
    one.save()
    waiting[0].join()
    assert len(Tactics("cpu")) == 2
    assert [file.name for file in one.path.parent.iterdir()] == [one.path.name]


@pytest.mark.parametrize("below", ["", "below"])
def test_a_cache_that_cannot_be_made_is_said_once_and_names_the_variable(below, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / below
    monkeypatch.setenv(tactics_module.CACHE, str(cache))
    known = Tactics("cpu")
    said = [record.getMessage() for record in caplog.records]
    where = f"{cache}: {tmp_path / 'file'}" if below else cache
    reason = "cannot be written: is a file, not a folder: measured tactics are not kept"
    assert said == [f"{tactics_module.CACHE}={where}: {reason}"]
    known.save()
    Tactics("cpu").save()
    assert len(caplog.records) == 1 and (tmp_path / "file").read_text() == ""


def test_a_cache_that_only_seems_writable_is_said_too(monkeypatch, caplog, cache):
    """As /proc is for root."""
    refuse_files(monkeypatch, errno.ENOENT)
    assert len(Tactics("cpu")) == 0 and not Tactics("cpu").save() and not cache.parent.exists()
    (record,) = caplog.records
    place = f"{tactics_module.CACHE}={cache.parent}: {cache.parents[1]}"
    reason = "cannot be written: no file can be made there: measured tactics are not kept"
    assert record.getMessage() == f"{place}: {reason}"


def test_a_cache_that_others_fill_may_be_read_only(monkeypatch, caplog):
    known = Tactics("cpu")
    known.record(op("down.0"), Tactic("library"))
    known.save()
    refuse_files(monkeypatch, errno.EACCES)  # as to others than root
    again = Tactics("cpu")
    assert len(again) == 1 and not caplog.records
    again.record(op("out"), Tactic("library"))
    again.save()
    assert len(Tactics("cpu")) == 1
    (record,) = caplog.records
    assert "cannot be written: permission denied" in record.getMessage()


def test_a_named_file_ranks_first_and_a_shipped_one_last(monkeypatch, tmp_path):
    conv, out, norm = op("down.0"), op("out"), op("down.1.0.norm1")
    author = Tactics("cpu")
    for each in (conv, out, norm):
        author.record(each, Tactic("cpu"))
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    author.environment = {**author.environment, "torch": "1.0"}  # ships for the device whatever the versions
    author.write(shipped / author.path.name)
    monkeypatch.setattr(tactics_module, "SHIPPED", shipped)
    measured = Tactics("cpu")
    assert measured.find(conv) == Tactic("cpu") and conv not in measured
    measured.record(conv, Tactic("library"))
    measured.record(out, Tactic("library"))
    measured.save()
    named = Tactics("cpu")
    named.environment = {}
    named.write(tmp_path / "named.json", {signature(conv): Tactic("reference")})
    monkeypatch.setenv(tactics_module.FILE, str(tmp_path / "named.json"))
    backends = [Tactics("cpu").find(each).backend for each in (conv, out, norm)]
    assert backends == ["reference", "library", "cpu"]
    assert norm not in Tactics("cpu")  # shipped: measured anew where that is asked for
    named.write(tmp_path / "named.json", {signature(norm): Tactic("reference")})
    assert norm in Tactics("cpu")


def test_a_named_file_that_cannot_be_used_is_wrong_usage(monkeypatch, tmp_path):
    monkeypatch.setenv(tactics_module.FILE, str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match="none.json: no such file"):
        Tactics("cpu")
    (tmp_path / "none.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UsageError, match="not a file of tactics of format 1"):
        Tactics("cpu")


def test_programs_take_the_known_tactic_where_it_is_usable():
    made = program()
    known = Tactics("cpu")
    conv, other, third = (next(o for o in made.ops if o.name == name) for name in ("down.0", "out", "middle.0.norm1"))
    known.record(conv, Tactic("library"))
    known.record(other, Tactic("cpu", {"product": "of another build"}))
    known.record(third, Tactic("opencl"))
    executor = Executor(made, tactics=known)
    plain = Executor(made)
    assert executor.backends["down.0"] == "library"
    for name in ("out", "middle.0.norm1"):
        assert executor.backends[name] == plain.backends[name]
    batch = torch.rand((1, 32, 32, 3))
    got, want = (e.run(images=batch, threshold=torch.tensor([0.5])) for e in (executor, plain))
    torch.testing.assert_close(got["anomaly_map"], want["anomaly_map"], rtol=0, atol=1e-5)


def test_the_library_is_not_forced_in_its_parts(monkeypatch):
    """DFENGINE_BACKEND is read when a detector is loaded, and not again while it runs."""
    made, known = program(), Tactics("cpu")
    for each in made.ops:
        if each.kernel == "conv2d":
            known.record(each, Tactic("library"))
    executor, inputs = Executor(made, tactics=known), dict(images=torch.rand((1, 32, 32, 3)), threshold=torch.ones(1))
    want = executor.run(**inputs)["anomaly_map"]
    monkeypatch.setenv("DFENGINE_BACKEND", "triton")
    assert torch.equal(executor.run(**inputs)["anomaly_map"], want)


def test_a_forced_library_is_torch_for_every_op():
    executor = Executor(program(), backend="library")
    assert set(executor.backends.values()) == {"library", "reference"}
    inputs = dict(images=torch.rand((1, 32, 32, 3)), threshold=torch.ones(1))
    got, want = (e.run(**inputs)["anomaly_map"] for e in (executor, Executor(program(), backend="reference")))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_without_a_home_there_is_a_cache(monkeypatch):
    for name in (tactics_module.CACHE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert tactics_module.cache_folder().name == "tactics"


def test_usable_asks_the_implementation():
    made = program()
    executor = Executor(made)
    attend = next(o for o in made.ops if o.kernel == "attention")
    assert usable(attend, Tactic("library"), executor.arguments(attend), "cpu")
    assert not usable(attend, Tactic("triton"), executor.arguments(attend), "cpu")
    conv = next(o for o in made.ops if o.name == "down.0")
    assert not usable(conv, Tactic("cuda"), executor.arguments(conv), "cpu")
    assert usable(conv, Tactic("cpu"), executor.arguments(conv), "cpu") == native.available()


@pytest.mark.parametrize("name, reason", [
    ("n" * 300, "the file name is too long"),
    ("dangling", "no file can be made there"),
    ("circle", "symbolic links that lead in a circle"),
])  # fmt: skip
def test_a_cache_that_can_be_no_folder_is_wrong_usage_and_no_trouble_to_look_up(name, reason, tmp_path, monkeypatch):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path / name))
    with pytest.raises(UsageError, match=f"cannot be written: {reason}$"):
        tactics_module.check_cache()
    assert len(Tactics("cpu")) == 0
    assert not (tmp_path / "gone").exists()
