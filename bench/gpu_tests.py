"""A plugin of pytest for gpu_round.sh: which tests it runs, each until it has passed, and what that says of an op.

    python -m pytest -p bench.gpu_tests --noted FILE [--triton-only] [--new-only] tests
    python bench/gpu_tests.py FILE

Of tests/kernels that is all but what concerns the CPU alone, of the other tests what is marked gpu or goes through the
Triton kernels; these others first, conv2d next. FILE gets an object of JSON on each line: {"begun": true} from each
call, {"collected": [...]} with all of the tests, and {"test", "outcome", "seconds"} as each has run, with "why" of one
that failed. What has passed by FILE is left out. A process to which the GPU is lost after an error is replaced, for all
that followed would fail.

As a script it prints a line for each name: "green" where all of its tests have passed, or some and the others skipped,
"red" where one failed or did not run. A name is an op of bench/kernels, but for its CUDA kernels; an op with ":cuda" or
":wgmma", these; or "engine", all else. The exit status is 1 where one is red, or nothing is noted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "tests/kernels/"
ON_THE_CPU = {
    *("test_conv2d_cpu.py", "test_conv2d_int8.py", "test_conv2d_memory.py", "test_offline.py", "test_parallel.py"),
    *("test_philox.py", "test_quantization.py", "test_sass.py", "test_wgmma_on_host.py"),
}
LEVELS = {"cpu", "base", "avx2", "avx512", "avx512_bf16"}
"""In the parameters of a test in KERNELS: it runs a kernel of the CPU."""
TESTED_IN = {"max_pool": "resample", "upsample_bilinear": "resample"}
"""Where not in test_<op>.py and, if there is no op of this name, in test_<op>_<more>.py."""


def names() -> list[str]:
    """The ops of bench/kernels."""
    return sorted(path.stem for path in (ROOT / "bench" / "kernels").glob("[!_]*.py"))


def parameters(test: str) -> set[str]:
    return set(re.split(r"[-\[\]]", test.partition("[")[2]))


def belongs(test: str, marked: bool) -> bool:
    """Whether a GPU adds something to a test of this node ID; marked: gpu."""
    if not test.startswith(KERNELS):
        return marked or "triton_kernels" in test
    return Path(test.partition("::")[0]).name not in ON_THE_CPU and not LEVELS & parameters(test)


def named_by(test: str) -> list[str]:
    """The names under which the outcome of a test counts."""
    file = test.partition("::")[0]
    if not file.startswith(KERNELS):
        return ["engine"]
    stem = Path(file).stem.removeprefix("test_")
    ops = [op for op in names() if f"{stem}_".startswith(f"{TESTED_IN.get(op, op)}_")]
    ops = [op for op in ops if len(TESTED_IN.get(op, op)) == max(len(TESTED_IN.get(each, each)) for each in ops)]
    if stem.endswith("_wgmma"):
        kind = ":wgmma"
    else:
        kind = ":cuda" if stem.endswith("_cuda") or "cuda" in parameters(test) else ""
    return [op + kind for op in ops] or ["engine"]


def rank(test: str) -> int:
    return 0 if not test.startswith(KERNELS) else 1 if test.startswith(f"{KERNELS}test_conv2d") else 2


def noted(path: Path) -> dict[str, dict]:
    """Test -> its last line, {} for one that has not run; of all that were collected or, in a file that could not be
    imported, of the file."""
    collected, found = [], {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # cut short as the process was ended
            continue
        if "begun" in line:  # files that cannot be imported are noted before what is collected
            found = {test: row for test, row in found.items() if "::" in test}
        elif "collected" in line:
            collected = line["collected"]
        else:
            found[line["test"]] = line
    files = {test: row for test, row in found.items() if "::" not in test}
    return {test: found.get(test, {}) for test in collected} | files


def counts(path: Path) -> dict[str, Counter]:
    """Name -> how many of its tests "passed", "skipped", "failed", or were "not run"."""
    found: dict[str, Counter] = {}
    for test, row in noted(path).items():
        for name in named_by(test):
            found.setdefault(name, Counter())[row.get("outcome", "not run")] += 1
    return found


def verdict(count: Counter) -> str:
    if count["failed"] or count["not run"]:
        return "red"
    return "green" if count["passed"] else "skipped"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--noted", type=Path, required=True)
    parser.addoption("--triton-only", action="store_true")
    parser.addoption("--new-only", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Round(config), "gpu_round")


class Round:
    """In the process that starts others it notes what they report; in those it selects. One alone does both."""

    def __init__(self, config: pytest.Config) -> None:
        self.path, self.triton_only = config.getoption("noted"), config.getoption("triton_only")
        self.started = getattr(config, "workerinput", None)
        if self.started is None:
            rows = noted(self.path)
            done = ("passed", "failed") if config.getoption("new_only") else ("passed",)
            self.done = [test for test, row in rows.items() if row.get("outcome") in done]
            self._note({"begun": True})
        else:  # the same for one that replaces another
            self.done = self.started["done"]
        self.failed = False

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        node.workerinput["done"] = self.done

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Before it is imported: another file without any test of the round."""
        folder = str(collection_path.parent.as_posix()) + "/"
        if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
            return None
        if KERNELS in folder:
            return collection_path.name in ON_THE_CPU or None
        text = collection_path.read_text(encoding="utf-8")
        return not ("mark.gpu" in text or "triton_kernels" in text) or None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        every = [item for item in items if belongs(item.nodeid, item.get_closest_marker("gpu") is not None)]
        if (self.started or {"workerid": "gw0"})["workerid"] == "gw0":
            self._note({"collected": [item.nodeid for item in every]})
        done = set(self.done)
        kept = [item for item in every if item.nodeid not in done]
        if self.triton_only:
            kept = [item for item in kept if item.nodeid.startswith(KERNELS) and "triton" in parameters(item.nodeid)]
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = sorted(kept, key=lambda item: rank(item.nodeid))

    def pytest_runtest_logstart(self) -> None:
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        if self.started is not None or not (report.failed or report.skipped or report.when == "call"):
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
        self._note(row | ({"why": report.longreprtext[-4000:]} if report.failed else {}))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.started is None:
            self._note({"test": report.nodeid, "outcome": "failed", "seconds": 0, "why": report.longreprtext[-4000:]})

    def pytest_runtest_logfinish(self) -> None:
        torch = sys.modules.get("torch")
        if not self.failed or torch is None or not torch.cuda.is_available():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if self.started is None:
                pytest.exit(f"the GPU is lost to this process: {error}", returncode=3)
            os._exit(3)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # all are done
            session.exitstatus = pytest.ExitCode.OK

    def _note(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main(path: Path) -> int:
    found = counts(path)
    for name, count in sorted(found.items()):
        parts = ", ".join(f"{number} {outcome}" for outcome, number in count.items())
        print(f"{name}: {verdict(count)}: {parts}")
    for test, row in noted(path).items():
        if row.get("outcome") == "failed":
            print(f"failed: {test}: {(row['why'].strip().splitlines() or ['?'])[-1][:200]}")
    return int(not found or "red" in map(verdict, found.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
