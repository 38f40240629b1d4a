from __future__ import annotations

import json
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

from dfengine.cli import main
from dfengine.commands.profile import profiler_lines


def test_a_cpu_gets_a_trace_and_the_longest_ops(tiny, tmp_path, capsys):
    out = tmp_path / "traces" / "trace.json"
    out.parent.mkdir()
    process = '{"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "dfengine"}}'
    out.write_text(f'{{"traceEvents": [{process}, {{"name": "thread_name"}}]}}')  # its like takes its place
    assert main(["profile", str(tiny), "--batch", "2", "--iterations", "2", "--out", str(out)]) == 0
    trace = json.loads(out.read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] != "run"]
    names = {event["name"] for event in events}
    assert len(events) == 2 * len(names) and "middle.0.gates" in names
    assert trace["otherData"]["batch"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 15 + 1 and all(line.split()[0] in names for line in lines[2:17])
    times = [float(line.split()[4]) for line in lines[2:17]]
    assert times == sorted(times, reverse=True)
    assert str(out) in lines[-1]


def test_no_runs_and_what_is_no_name_of_a_trace_are_wrong_usage(tiny, tmp_path, capsys):
    assert main(["profile", str(tiny), "--iterations", "0"]) == 2
    assert main(["profile", str(tiny), "--out", str(tmp_path / "trace.txt")]) == 2
    assert "trace.txt: must end in .json" in capsys.readouterr().err and not (tmp_path / "trace.txt").exists()


def test_the_command_lines_run_this_again(monkeypatch):
    program, config = SimpleNamespace(batch=4), SimpleNamespace(precision="float16")
    executor = SimpleNamespace(program=program, device=torch.device("cuda:1"))
    bound = SimpleNamespace(executor=executor, runner=config, path="my models/a.safetensors")
    monkeypatch.setenv("DFENGINE_BACKEND", "triton")
    nsys, ncu = (shlex.split(line) for line in profiler_lines(bound, 20))
    again = [sys.executable, "-m", "dfengine", "profile", "my models/a.safetensors", "--batch", "4"]
    again += ["--device", "cuda:1", "--precision", "float16", "--iterations"]
    assert nsys[:3] == ["DFENGINE_BACKEND=triton", "nsys", "profile"] and nsys[-len(again) - 1 :] == [*again, "20"]
    assert "--capture-range=cudaProfilerApi" in nsys and "--trace=cuda,nvtx" in nsys
    assert ncu[:3] == ["DFENGINE_BACKEND=triton", "ncu", "--nvtx"] and ncu[-len(again) - 1 :] == [*again, "1"]
    for option, value in (("--profile-from-start", "off"), ("--clock-control", "none")):
        assert ncu[ncu.index(option) + 1] == value
    monkeypatch.delenv("DFENGINE_BACKEND")
    assert profiler_lines(bound, 20)[0].startswith("nsys profile ")


@pytest.mark.gpu
def test_on_a_gpu(tiny, capsys, monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "triton")
    assert main(["profile", str(tiny), "--device", "cuda", "--iterations", "2"]) == 0
    assert "ncu --nvtx" in capsys.readouterr().out
