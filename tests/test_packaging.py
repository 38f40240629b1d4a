"""The installed package: version, data, the optional extension and what is said where it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dfengine import native
from dfengine._version import __version__

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def build_script():
    """setup.py as a module, without running setup()."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    namespace = {"__file__": str(ROOT / "setup.py"), "__name__": "build_script"}
    exec(compile(text[: text.index("packages = find_packages")], "setup.py", "exec"), namespace)
    return namespace


def test_installed_version_is_the_source_version():
    assert importlib.metadata.version("dfengine") == __version__


def test_console_script_is_installed():
    scripts = importlib.metadata.entry_points(group="console_scripts")
    (script,) = (script for script in scripts if script.name == "dfengine")
    assert script.load()(["--version"]) == 0


def test_kernels_import_under_the_package():
    assert importlib.util.find_spec("dfengine.kernels.ingest") is not None


def test_sources_for_run_time_compilation_are_found():
    folder = native.source_folder()
    for name in ("cuda/ingest.cu", "common/philox.h", "common/convert.h", "cpu/ingest.cpp"):
        assert (folder / name).is_file()


def test_status_says_what_is_there():
    if native.available():
        assert "built with" in native.status()
        levels = native.cpu_levels()
        assert next(iter(levels)) == "base" and levels["base"]
    else:
        assert native.reason in native.status() and native.reason
        assert native.cpu_levels() == {}


def test_without_the_extension_the_reason_is_told_and_ingest_still_runs(tmp_path):
    """A process in which the import of the extension fails."""
    script = """
import sys
sys.modules["dfengine._native"] = None
import torch
from dfengine import kernels, native
from dfengine.kernels import ingest
assert not native.available() and "not available" in native.status(), native.status()
assert kernels.table("cpu")[0]["serves"] == "reference"
images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
assert ingest.ingest(images, gain=1.0, offset=0.0, a=[1.0], b=[0.5], seed=0)[1].isfinite().all()
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "output, reason",
    [
        ("-- Looking\nCMake Error: No CMAKE_CXX_COMPILER could be found.\n", "no working C++ compiler was found"),
        ("[1/2] x\na.cpp:3:1: error: expected ';'\nmore", "a.cpp:3:1: error: expected ';'"),
        ("", "cmake exited with 2"),
    ],
)
def test_a_failed_build_is_explained_in_one_line(build_script, output, reason):
    error = subprocess.CalledProcessError(2, ["cmake"], output=output)
    assert build_script["failure_reason"](error) == reason


def test_no_cmake_is_explained(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="cmake was not found"):
        build_script["build_native"](tmp_path / "x.so", tmp_path / "work")


def test_extension_can_be_switched_off(build_script, monkeypatch, tmp_path):
    monkeypatch.setenv("DFENGINE_NATIVE", "0")
    with pytest.raises(RuntimeError, match="DFENGINE_NATIVE"):
        build_script["build_native"](tmp_path / "x.so", tmp_path / "work")


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = text.split(".PHONY:")[1].split("\n")[0].split()
    assert {"demo", "test", "lint", "bench", "clean", "help"} <= set(targets)
    for target in set(targets) - {"help"}:
        assert f"make {target} " in text
