"""bench/kernels.py: rows are kept and named, and a rival that fails costs no row."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from bench.kernels import Case

spec = importlib.util.spec_from_file_location("bench_kernels", Path(__file__).parents[2] / "bench" / "kernels.py")
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)


def added(x, y) -> None:
    torch.add(x, 1, out=y)


def failing(x, y) -> None:
    raise RuntimeError("not today\nsecond line")


def case_of(width: int, **rivals) -> Case:
    make = lambda: (torch.ones(2, width), torch.ones(2, width))  # noqa: E731
    return Case((2, width), torch.float32, 2**20, make, {"kernel": added, "torch": added, **rivals})


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the driver on given cases of the op `score`; (exit status, rows of its file)."""

    def running(cases: list[Case], *arguments: str) -> tuple[int, list[dict]]:
        monkeypatch.setattr("bench.kernels.score.cases", lambda device: iter(cases))
        out = tmp_path / "rows.json"
        fixed = ["kernels.py", "score", "--device", "cpu", "--seconds", "0", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", [*fixed, *arguments])
        status = driver.main()
        return status, json.loads(out.read_text())["rows"] if out.exists() else []

    return running


def test_a_rival_that_fails_is_named_in_its_row(run):
    status, (row,) = run([case_of(4, third=failing, fourth=added)])
    assert status == 0
    assert row["failed"] == {"third": "RuntimeError: not today"}
    assert set(row["rivals_us"]) == {"torch", "fourth"}


def test_an_op_that_fails_costs_its_own_case(run, capsys):
    status, rows = run([case_of(4, kernel=failing), case_of(8)])
    assert status == 1
    assert [row["shape"] for row in rows] == [[2, 8]]
    assert "score  2x4 float32: failed: RuntimeError: not today" in capsys.readouterr().err


@pytest.mark.parametrize("calls, p99", [(99, None), (100, 99.0), (150, 149.0), (1000, 990.0)])
def test_the_99th_percentile_is_given_of_a_hundred_calls(calls, p99, run, monkeypatch):
    times = [1e-6 * (turn + 1) for turn in reversed(range(calls))]
    monkeypatch.setattr(driver, "interleaved", lambda functions, *_: dict.fromkeys(functions, times))
    _, (row,) = run([case_of(4)])
    assert row["us_best"] == pytest.approx(1) and row.get("us_p99") == (p99 and pytest.approx(p99))


def test_resume_times_what_is_missing(run):
    _, (first,) = run([case_of(4)])
    _, rows = run([case_of(4, kernel=failing), case_of(8)], "--resume")
    assert [row["shape"] for row in rows] == [[2, 4], [2, 8]]
    assert rows[0]["us"] == first["us"]
    _, rows = run([case_of(8)])
    assert len(rows) == 1


def test_rivals_are_left_out_and_timed_once_they_are_not(run):
    cases = [case_of(4, **{"cuda wide": failing, "third": added})]
    (row,) = run(cases, "--resume", "--without", "cuda")[1]
    assert set(row["rivals_us"]) == {"torch", "third"} and row["without"] == ["cuda"] and "failed" not in row
    assert run(cases, "--resume", "--without", "cuda", "--without", "wgmma")[1][0]["us"] == row["us"]
    (row,) = run([case_of(4, **{"cuda wide": added})], "--resume")[1]
    assert set(row["rivals_us"]) == {"torch", "cuda wide"} and "without" not in row


def test_once_calls_everything_and_writes_nothing(run):
    calls = []
    case = case_of(4, third=lambda x, y: calls.append(x))
    assert run([case, case_of(8, third=failing)], "--once", "--match", "2x4") == (0, [])
    assert len(calls) == 1
