from __future__ import annotations

import json

import pytest
import torch

from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.profile import WARM_UP, Timeline, captured, timeline
from tests.helpers import tiny_model


def executor() -> Executor:
    return Executor(Lowering(tiny_model()).program(2))


def test_a_trace_has_an_event_for_each_op_and_run():
    bound = executor()
    trace = json.loads(timeline(bound, 3).chrome_trace(batch=2))
    assert trace["otherData"] == {"batch": 2} and trace["displayTimeUnit"] == "ms"
    whole = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    events, runs = ([e for e in whole if (e["cat"] == "run") == wanted] for wanted in (False, True))
    names = [op.name for op in bound.program.ops]
    assert [event["name"] for event in events] == names * 3 and len(runs) == 3
    assert all({"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} <= event.keys() for event in whole)
    for turn, run in enumerate(runs):
        inside = events[turn * len(names) : (turn + 1) * len(names)]
        assert run["ts"] <= inside[0]["ts"]
        assert sum(event["dur"] for event in inside) == pytest.approx(run["dur"])
    for before, after in zip(events, events[1:], strict=False):
        assert before["ts"] + before["dur"] <= after["ts"] + 1e-6
    arguments = events[1]["args"]
    op = bound.program.ops[1]
    assert arguments["shape"] == [4, 32, 32, 8] and arguments["kernel"] == op.kernel == "conv2d"
    assert (arguments["flops"], arguments["bytes"]) == (op.flops, op.moved)
    assert arguments["backend"] == bound.backends[op.name]


def test_the_slowest_ops_are_by_the_median_of_the_runs():
    bound = executor()
    count = len(bound.program.ops)
    steps = [[1.0] * count for _ in range(3)]
    steps[0][4] = 100.0  # once
    for run in steps:
        run[7] = 3.0
    stamps = [[sum(run[:i]) for i in range(count + 1)] for run in steps]
    slowest = Timeline(bound, stamps).slowest()
    assert slowest[0] == (bound.program.ops[7], 3.0) and {seconds for _, seconds in slowest[1:]} == {1.0}


def test_only_warm_runs_are_between_start_and_stop(monkeypatch):
    done = []
    bound = executor()
    launch = bound.launch
    bound.launch = lambda: (done.append("run"), launch())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: done.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: done.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: done.append("stop"))
    captured(bound, 2)
    assert done == ["run"] * WARM_UP + ["wait", "start", "run", "run", "wait", "stop"]
