"""Where a detector runs no program, each command that looks inside one says so in a line."""

from __future__ import annotations

import pytest

from dfengine import native
from dfengine.cli import main
from dfengine.engine import runner
from dfengine.engine.lower import NotLoweredError

COMMANDS = (["info", "--plan"], ["info", "--plan", "--no-measure"], ["verify"], ["profile"], ["roofline"])


@pytest.fixture(params=COMMANDS, ids=" ".join)
def command(request, tmp_path):
    """A function of a checkpoint's path that gives the arguments; and the file that must not be written."""
    out = tmp_path / ("out.json" if request.param[0] == "profile" else "out.png")
    options = ["--out", str(out)] if request.param[0] in ("profile", "roofline") else []
    return lambda path: [request.param[0], str(path), *request.param[1:], *options], out


def refused(command, path, capsys) -> str:
    arguments, out = command
    assert main(arguments(path)) == 1
    printed = capsys.readouterr()
    assert not out.exists() and not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith(f"dfengine: {path}: runs as torch modules, not as a program: ")
    return printed.err


def test_what_is_not_lowered(command, save_model, capsys, monkeypatch):
    if not native.available():
        pytest.skip(native.status())

    def not_lowered(*_args, **_options):
        raise NotLoweredError("up.0.0: a block that nobody lowered")

    monkeypatch.setattr(runner, "Lowering", not_lowered)
    assert "a block that nobody lowered" in refused(command, save_model(), capsys)


def test_a_forced_reference(command, save_model, capsys, monkeypatch):
    path = save_model()
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    assert "DFENGINE_BACKEND=reference" in refused(command, path, capsys)


def test_no_extension(command, save_model, capsys, monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "reason", "left out of this test")
    assert "left out of this test" in refused(command, save_model(), capsys)


def test_no_checkpoint(command, tmp_path, capsys):
    assert main(command[0](tmp_path / "none.safetensors")) == 1
    assert "none.safetensors" in capsys.readouterr().err
