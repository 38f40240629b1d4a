"""The installed package: version, data, the optional extension and what is said where it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dfengine import native
from dfengine._version import __version__
from dfengine.sources import digest

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
    call = f"import sys; from {script.module} import {script.attr} as run; sys.exit(run())"
    done = subprocess.run([sys.executable, "-c", call, "--version"], text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dfengine {__version__}\n", "")


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


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the package with the extension and its sources beside it, as in an editable install."""
    if not native.available():
        pytest.skip(native.status())
    unwanted = shutil.ignore_patterns("__pycache__", "kernels", "assets")
    shutil.copytree(ROOT / "dfengine", tmp_path / "dfengine", ignore=unwanted)
    shutil.copytree(ROOT / "kernels", tmp_path / "dfengine" / "kernels", ignore=unwanted)
    shutil.copytree(native.source_folder(), tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    return tmp_path


def in_tree(tree, script):
    """What the script prints, and what it says beside that, with the package of this tree."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tree.parent, text=True, capture_output=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


SERVED = "from dfengine import kernels, native; print(native.status()); print(kernels.table('cpu')[0]['serves'])"


def test_an_extension_of_other_sources_than_those_beside_it_is_left_out_and_that_is_said(source_tree):
    said, warned = in_tree(source_tree, SERVED)
    assert "built with" in said and said.endswith("cpu\n") and not warned
    with (source_tree / "csrc" / "bindings" / "ingest.cpp").open("a") as file:
        file.write("// another argument\n")
    said, warned = in_tree(source_tree, SERVED)
    reason = "the compiled extension was built from other sources or with other flags: rebuild it (pip install -e .)"
    assert said == f"dfengine._native is not available: {reason}\nreference\n"
    assert warned == f"{reason}; torch takes its place\n"


def test_an_extension_whose_flags_cannot_be_read_is_left_out_and_that_is_said(source_tree):
    (source_tree / "CMakeLists.txt").unlink()
    said, warned = in_tree(source_tree, SERVED)
    missing = f"{source_tree / 'CMakeLists.txt'}: no such file"
    reason = f"the compiled extension cannot be compared with its sources ({missing})"
    assert said == f"dfengine._native is not available: {reason}\nreference\n"
    assert warned == f"{reason}; torch takes its place\n"


def test_an_installed_extension_is_not_compared_with_the_sources_that_came_with_it(source_tree):
    shutil.move(source_tree / "csrc", source_tree / "dfengine" / "csrc")
    (source_tree / "dfengine" / "csrc" / "bindings" / "ingest.cpp").unlink()
    said, warned = in_tree(source_tree, SERVED)
    assert "built with" in said and said.endswith("cpu\n") and not warned


def test_the_digest_is_of_every_source_that_is_compiled_and_of_the_flags(tmp_path):
    folder, flags = shutil.copytree(native.source_folder(), tmp_path / "csrc"), tmp_path / "CMakeLists.txt"
    shutil.copy(ROOT / "CMakeLists.txt", flags)
    plain, with_cuda = digest(folder, False), digest(folder, True)
    (folder / "cuda" / "score.cu").write_text("")
    assert digest(folder, False) == plain and digest(folder, True) != with_cuda
    flags.write_text(flags.read_text().replace("-O3", "-O2"))
    seen = {plain, digest(folder, False)}
    for name in ("bindings.cpp", "bindings/call.h", "common/philox.h", "cpu/score.cpp"):
        (folder / name).write_text("")
        seen.add(digest(folder, False))
    (folder / "cpu" / "score.cpp").rename(folder / "cpu" / "scores.cpp")
    assert len(seen | {digest(folder, False)}) == 7


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
