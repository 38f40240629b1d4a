"""bench/gpu_round.sh in a small copy of the tree, where a stand-in for Python notes what is started, but for the tests;
and bench/gpu_tests.py, by which these are chosen and noted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import gpu_tests

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU coreutils")

PYTHON = """#!/usr/bin/env bash
echo "$*" | head -n 1 >>"$CALLS"
arguments=" $* "
after() { [[ $arguments == *" $1 "* ]] && sed "s/.* $1 \\([^ ]*\\) .*/\\1/" <<<"$arguments"; }
case "$*" in
    -) cat >/dev/null; printf '%s\\n' "Stub GPU torch 0 CUDA 0" 90-real "/python 3.12" ;;
    "-c import xdist") exit 1 ;;
    "-c import pybind11"*) ;;
    *gpu_tests* | -c*) exec "$REAL" "$@" ;;
    setup.py*) mkdir -p "$(after --build-lib)/dfengine"
        echo "$DFENGINE_CUDA_ARCHITECTURES" >"$(after --build-lib)/dfengine/_native.so" ;;
    *"dfengine info"*) echo '{"ops": [{"us": 2, "kernel": "conv2d", "name": "first"}]}' ;;
    *"dfengine train"*) of="$(after --out)"; touch "$of"; mkdir "${of%.*}.run"; touch "${of%.*}.run/log.csv" ;;
    *"dfengine evaluate"*) mkdir -p "$(after --out)"; touch "$(after --out)/metrics.json" ;;
    *"dfengine calibrate"*) touch "$(after --out)" ;;
    *redrawn.py*) echo weights >"${@: -1}" ;;
    *--json*) [ -z "${FAIL:-}" ] || exit 1
        echo '{"rows": []}' >"$(after --json)"; [ -z "${SLOW:-}" ] || exec sleep 100 ;;
esac
"""  # fmt: skip
CONV2D = """
import os, pytest
@pytest.mark.parametrize("name", ["triton-0", "cuda", "cpu-avx2"])
def test_contract(name):
    assert name != "cpu-avx2", "concerns the CPU alone"
    assert name != os.environ.get("RED")
"""
SCORE = """
import os
def test_contract():
    assert os.environ.get("RED") != "score"
"""
DETECTOR = """
import os, pytest
@pytest.mark.gpu
def test_on_a_gpu():
    assert os.environ.get("RED") != "engine"
def test_elsewhere():
    assert False
"""


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """The copy: two ops, and a test of the engine."""
    root = tmp_path / "tree"
    files = {
        "pytest.ini": "[pytest]\nmarkers = gpu\n",
        "CMakeLists.txt": "",
        "setup.py": "",
        "csrc/a.cpp": "",
        "kernels/a.py": "",
        "dfengine/sources.py": "",
        "bench/kernels/__init__.py": "",
        "bench/kernels/conv2d.py": "",
        "bench/kernels/score.py": "",
        "tests/kernels/test_conv2d.py": CONV2D,
        "tests/kernels/test_conv2d_wgmma.py": "def test_tiles():\n    pass\n",
        "tests/kernels/test_score.py": SCORE,
        "tests/test_detector.py": DETECTOR,
        "tests/test_without_any.py": "raise RuntimeError('not even imported')",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("gpu_round.sh", "gpu_tests.py"):
        shutil.copy(ROOT / "bench" / name, root / "bench")
    for name, text in {"python": PYTHON, "cmake": "#!/bin/sh\n", "ncu": "#!/bin/sh\necho a,b\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in ("PRESET", "PRECISION", "DATA", "SIZE", "DFENGINE_DATA", "DFENGINE_TACTICS", "RED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    monkeypatch.setenv("REAL", sys.executable)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return root


def play(tree: Path, *arguments: str, **environment: str) -> tuple[int, str, list[str]]:
    """Runs the script with an empty $OUT: (exit status, its output, what it started)."""
    shutil.rmtree(tree.parent / "out", ignore_errors=True)
    calls = tree.parent / "calls"
    calls.unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", str(tree / "bench" / "gpu_round.sh"), *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []


def came_back(tree: Path) -> tuple[set[str], set[str]]:
    """What lies in $OUT, all of which fits the limits of the machine, and what in its archive."""
    files = [path for path in (tree.parent / "out").rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in files)
    with tarfile.open(tree.parent / "out" / "more.tar.gz") as archive:
        packed = {Path(member.name).name for member in archive if member.isfile()}
    return {path.name for path in files}, packed


@pytest.fixture(scope="module")
def passed(tmp_path_factory) -> Path:
    """What `--stage tests` leaves in build/, filled by the first that takes `green`."""
    return tmp_path_factory.mktemp("passed") / "build"


@pytest.fixture
def green(tree, passed) -> Path:
    """The copy once its tests have passed."""
    if passed.exists():
        shutil.copytree(passed, tree / "build", symlinks=True)
    else:
        status, output, _ = play(tree, "--stage", "tests")
        assert status == 0, output
        shutil.copytree(tree / "build", passed, symlinks=True)
    return tree


def calls_of(calls: list[str], text: str) -> list[str]:
    return [call for call in calls if text in call]


def test_the_second_command_goes_on_from_an_emptied_out(tree):
    status, output, calls = play(tree, "--stage", "first")
    assert status == 0, output
    assert len(calls_of(calls, "setup.py")) == 1
    (native,) = (tree / "build/gpu-round/layout/dfengine").glob("_native*.so")
    assert native.read_text() == "90-real\n"
    first, second = calls_of(calls, "-m pytest")
    assert "--triton-only" in first and "--triton-only" not in second
    rows = [json.loads(line) for line in (tree.parent / "out/tests.jsonl").read_text().splitlines()]
    ran = [row["test"] for row in rows if "test" in row]
    assert len(ran) == 5 and len(set(ran)) == 5, "each once, and none of the others"
    assert ran[0] == "tests/kernels/test_conv2d.py::test_contract[triton-0]", "beside the build"
    assert ran[1] == "tests/test_detector.py::test_on_a_gpu"
    timed = [call.split() for call in calls_of(calls, "bench/kernels.py")]
    assert [call[1] for call in timed] == ["conv2d", "score", "conv2d"] and "--match" in timed[0]
    assert not calls_of(calls, "--compile") and not calls_of(calls, "--without")

    status, output, calls = play(tree, "--stage", "second")
    assert status == 0, output
    assert not calls_of(calls, "setup.py") and not calls_of(calls, "-m pytest")
    quick, full = [calls_of(calls, "throughput.py --case detect")[n] for n in (0, 1)]
    assert "--rivals eager,autocast " in quick and "--rivals" not in full and "--add" in full
    assert calls.index(quick) < calls.index(calls_of(calls, "dfengine info")[0]) < calls.index(full)
    plain, packed = came_back(tree)
    assert {"round.log", "tests.jsonl", "kernels-conv2d.json", "throughput-detect.json", "plan.json"} <= plain
    assert {"ncu.csv", "ncu-conv2d-128-128-to-128.csv", "throughput-fp8.json", "native.log"} <= packed
    assert not plain & packed

    status, output, calls = play(tree, "--stage", "second")
    assert status == 0 and not calls_of(calls, "throughput.py") and not calls_of(calls, "dfengine"), output
    assert came_back(tree) == (plain, packed)
    assert len(calls_of(play(tree, "--stage", "throughput", "--again")[2], "throughput.py")) == 3


def test_a_red_op_leaves_the_others_timed_and_its_tests_run_again(tree):
    status, output, calls = play(tree, "--stage", "first", RED="score")
    assert status == 1 and "score is not timed: its tests have not passed" in output
    assert "failed: tests/kernels/test_score.py::test_contract" in output
    timed = calls_of(calls, "bench/kernels.py")
    assert {call.split()[1] for call in timed} == {"conv2d"}
    assert all("no claim, tests not green: score" in call for call in timed)
    status, output, calls = play(tree, "--stage", "throughput")
    assert status == 0 and "no claim, tests not green: score" in calls_of(calls, "throughput.py")[0]

    status, output, calls = play(tree, "--stage", "tests")
    assert status == 0 and "1 passed" in output and "score: green" in output
    assert not calls_of(calls, "setup.py") and not calls_of(calls, "--triton-only")
    assert play(tree, "--stage", "tests")[0] == 0, "where none is left"


def test_what_failed_beside_the_build_does_not_run_again_behind_it(tree):
    status, output, _ = play(tree, "--stage", "tests", RED="triton-0")
    rows = [json.loads(line) for line in (tree.parent / "out/tests.jsonl").read_text().splitlines()]
    ran = [row["test"] for row in rows if "test" in row]
    assert status == 1 and len(ran) == len(set(ran)) == 5 and "conv2d: red: 1 failed" in output


def test_red_cuda_kernels_are_left_out_of_their_op(tree):
    calls = play(tree, "--stage", "first", RED="cuda")[2]
    timed = calls_of(calls, "bench/kernels.py conv2d")
    assert len(timed) == 2 and all("--without cuda" in call for call in timed)


def test_nothing_of_a_red_engine_is_timed(tree):
    status, output, calls = play(tree, "--stage", "first", RED="engine")
    assert status == 1 and len(calls_of(calls, "bench/kernels.py")) == 3
    status, output, calls = play(tree, "--stage", "second")
    assert status == 1 and "no timing of the engine" in output
    assert not calls_of(calls, "throughput.py") and not calls_of(calls, "-m dfengine")
    assert "ncu-conv2d-128-to-128.csv" in came_back(tree)[1]


def test_the_gate_is_of_these_sources(green):
    assert calls_of(play(green, "--stage", "kernels")[2], "bench/kernels.py")
    (green / "kernels" / "a.py").write_text("changed = True\n")
    status, output, calls = play(green, "--stage", "kernels")
    assert status == 1 and "no timing on a red correctness gate" in output
    assert not calls_of(calls, "bench/kernels.py") and not calls_of(calls, "setup.py")
    (green / "csrc" / "a.cpp").write_text("// changed\n")
    assert calls_of(play(green, "--stage", "kernels")[2], "setup.py")


@pytest.mark.slow
def test_what_was_measured_when_time_ran_out_is_kept(green):
    status, output, calls = play(green, "--stage", "kernels", "--minutes", "0.4", SLOW="1")
    assert status == 1 and "failed with 124" in output and "no time left" in output
    assert came_back(green)[0] & {"kernels.json", "kernels-conv2d.json"}


def test_what_failed_is_done_again(green):
    status, output, calls = play(green, "--stage", "throughput", FAIL="1")
    assert status == 1 and len(calls_of(calls, "throughput.py")) == 3
    status, output, calls = play(green, "--stage", "throughput")
    assert status == 0 and len(calls_of(calls, "throughput.py")) == 3


def test_training_takes_carried_images(tree):
    status, output, calls = play(tree, "--stage", "train")
    assert status == 1 and "build/gpu-data/rail_eclip: no such folder of images" in output
    (tree / "build/gpu-data/rail_eclip").mkdir(parents=True)
    status, output, calls = play(tree, "--stage", "train", "--minutes", "5")
    assert status == 0, output
    (call,) = calls_of(calls, "dfengine train")
    assert "--preset diff-fastener-small --image-size 128 --minutes 2" in call
    assert {"train-half.safetensors", "train-metrics.json", "train-log.csv"} <= came_back(tree)[0]


@pytest.mark.parametrize("arguments", ["", "--stage", "--stage x", "--stage first --minutes 1m", "x"])
def test_wrong_usage(tree, arguments):
    status, output, calls = play(tree, *arguments.split())
    assert status == 2 and output.startswith("usage: bench/gpu_round.sh --stage STAGE") and not calls


def test_a_process_that_lost_its_gpu_is_replaced(tree):
    pytest.importorskip("xdist")
    (tree / "torch.py").write_text(
        "class cuda:\n lost = False\n is_available = staticmethod(lambda: True)\n @classmethod\n"
        " def synchronize(cls):\n  if cls.lost: raise RuntimeError('an illegal memory access')\n"
    )
    (tree / "tests/kernels/test_score.py").write_text(
        "import torch\ndef test_first():\n torch.cuda.lost = True\n assert False\n"
        "def test_second():\n assert not torch.cuda.lost\n"
    )
    noted = tree / "noted.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", "--noted", str(noted)]
    command += ["--import-mode=importlib", "-n", "1", "tests/kernels/test_score.py"]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    outcomes = {test.split("::")[1]: row["outcome"] for test, row in gpu_tests.noted(noted).items()}
    assert outcomes == {"test_first": "failed", "test_second": "passed"}, done.stdout + done.stderr
    assert gpu_tests.counts(noted)["score"] == {"failed": 1, "passed": 1}


def test_every_op_that_is_timed_has_tests():
    files = [f"tests/kernels/{path.name}" for path in (ROOT / "tests" / "kernels").glob("test_*.py")]
    chosen = [file for file in files if gpu_tests.belongs(f"{file}::test_x", False)]
    assert {name for file in chosen for name in gpu_tests.named_by(file)} >= set(gpu_tests.names())
    assert gpu_tests.ON_THE_CPU <= {Path(file).name for file in files}
    assert gpu_tests.named_by("tests/kernels/test_conv2d_fp8.py::test_x[cuda-1]") == ["conv2d:cuda"]
    assert gpu_tests.named_by("tests/kernels/test_conv2d_wgmma.py::test_x") == ["conv2d:wgmma"]
    assert gpu_tests.named_by("tests/kernels/test_group_norm_apply.py::test_x[triton-0]") == ["group_norm_apply"]
    assert gpu_tests.named_by("tests/test_stream.py::test_x") == ["engine"]


def test_a_line_that_was_cut_short_and_a_file_that_fails_to_import(tmp_path):
    noted = tmp_path / "noted.jsonl"
    of = {"collected": ["tests/kernels/test_score.py::test_x"]}
    passed = {"test": of["collected"][0], "outcome": "passed", "seconds": 0}
    broken = {"test": "tests/kernels/test_ingest.py", "outcome": "failed", "seconds": 0, "why": "ImportError"}
    lines = {"begun": True}, broken, of, passed
    noted.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"test": "tests/kern')
    found = gpu_tests.counts(noted)
    assert gpu_tests.verdict(found["score"]) == "green" and gpu_tests.verdict(found["ingest"]) == "red"


def test_a_file_that_fails_to_import_is_red_until_it_does_not(tree):
    """Whoever runs the tests, one process or several, and whatever passed before."""
    broken, (status, output, _) = tree / "tests/kernels/test_score_more.py", play(tree, "--stage", "tests")
    assert status == 0, output
    for text, wanted in (("raise RuntimeError('broken')", "red"), ("def test_x():\n    pass\n", "green")):
        broken.write_text(text)
        status, output, _ = play(tree, "--stage", "tests")
        assert f"score: {wanted}: " in output and status == (wanted == "red"), output


def test_what_was_measured_with_other_settings_is_measured(green):
    assert len(calls_of(play(green, "--stage", "throughput")[2], "throughput.py")) == 3
    assert not calls_of(play(green, "--stage", "throughput")[2], "throughput.py")
    second = calls_of(play(green, "--stage", "second")[2], "throughput.py")
    assert not second  # without torch.compile least of all: those rows would take the place of fuller ones
    _, _, calls = play(green, "--stage", "throughput", PRESET="diff-fastener-small", PRECISION="float16")
    calls = calls_of(calls, "throughput.py")
    assert len(calls) == 3 and all("--preset diff-fastener-small" in call for call in calls)
