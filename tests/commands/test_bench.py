from __future__ import annotations

import json
import os

import pytest
import torch

from dfengine.checkpoint import Checkpoint, save_checkpoint
from dfengine.cli import main
from dfengine.commands import bench, plan
from dfengine.engine.measure import unmeasured
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.quantize import measured_ranges
from dfengine.engine.runner import ProgramRunner
from dfengine.precision import eight_bits
from tests.helpers import tiny_model


def test_every_batch_size_has_two_rows(tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    facts = dict(file="a", preset="a", image_size=64, hardware="a", threads=1, torch="2", rows=[])
    out.write_text(json.dumps(facts))  # of an earlier version: its like takes its place
    arguments = ["bench", str(tiny), "--batch", "1", "--batch", "3", "--seconds", "0", "--out", str(out)]
    assert main([*arguments, "--precision", "float32"]) == 0
    text = capsys.readouterr().out
    assert "images/s" in text and "PyTorch modules" in text
    rows = json.loads(out.read_text())["rows"]
    assert [(row["runs"], row["batch"]) for row in rows] == [
        ("detect", 1), ("PyTorch modules", 1), ("detect", 3), ("PyTorch modules", 3)
    ]  # fmt: skip
    assert all(row["images_per_second"] > 0 and row["ms"] > 0 and row["calls"] == 2 for row in rows)
    assert not any("ms_p99" in row for row in rows)
    assert [line.split()[-2:] for line in text.splitlines()[2:]] == 4 * [["-", "2"]]


def test_the_99th_percentile_is_given_of_a_hundred_calls(tiny, tmp_path, capsys, monkeypatch):
    times = [0.25] * 99 + [4.0]
    monkeypatch.setattr(bench, "interleaved", lambda functions, *_, **__: dict.fromkeys(functions, times))
    out = tmp_path / "bench.json"
    assert main(["bench", str(tiny), "--batch", "2", "--precision", "float32", "--out", str(out)]) == 0
    assert [line.split()[-4:] for line in capsys.readouterr().out.splitlines()[2:]] == 2 * [
        ["8.0", "250.00", "250.00", "100"]
    ]
    assert [row["ms_p99"] for row in json.loads(out.read_text())["rows"]] == [250.0, 250.0]


def test_a_slow_rival_gets_a_warm_up_and_two_calls(tiny, monkeypatch, capsys):
    run, calls = ModuleRunner.run, []
    monkeypatch.setattr(ModuleRunner, "run", lambda self, unit: calls.append(len(unit)) or run(self, unit))
    assert main(["bench", str(tiny), "--batch", "2", "--seconds", "0", "--precision", "float32"]) == 0
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("command", [["bench", "--seconds", "0"], ["info", "--plan"], ["tune", "--seconds", "0"]])
def test_other_work_is_said_before_anything_is_timed(command, tiny, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(plan, "measure", lambda executor: unmeasured(executor))
    warning = "dfengine: warning: load average 2.1 on 4 processors: beside other work times are longer"
    for load, warned in ((2.1, True), (2.0, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert main([command[0], str(tiny), *command[1:], "--precision", "float32", "--batch", "1"]) == 0
        printed = capsys.readouterr()
        assert printed.err.startswith(warning) == warned and printed.err.count("\n") == warned
        assert f"load average{' at the start' if command[0] == 'bench' else ''}: {load}" in printed.out
    assert main(["info", str(tiny), "--plan", "--no-measure"]) == 0 and not capsys.readouterr().err


def test_the_modules_beside_int8_are_called_what_they_are(tmp_path, capsys):
    if eight_bits(torch.device("cpu")) is None:
        pytest.skip("this machine multiplies no bytes")
    model = tiny_model(base=16)
    ranges = measured_ranges(ProgramRunner(tiny_model(base=16)).executor(1), torch.rand(1, 32, 32, 3))
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, Checkpoint(model.config, model.state_dict(), verified={"int8": {"ranges": ranges}}))
    assert main(["bench", str(path), "--batch", "1", "--seconds", "0", "--precision", "int8"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:-5] for row in rows] == [["detect", "int8"], ["PyTorch", "modules", "bfloat16"]]


def test_a_checkpoint_that_is_none_is_all_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0), raising=False)
    assert main(["bench", str(tmp_path / "nowhere")]) == 1
    printed = capsys.readouterr()
    assert not printed.out and printed.err == f"dfengine: {tmp_path / 'nowhere'}: no such file\n"


def test_wrong_usage_is_one_line(tiny, capsys):
    assert main(["bench", str(tiny), "--batch", "0"]) == 2
    assert main(["bench", str(tiny), "--precision", "float8"]) == 2
    assert main(["bench", "none.safetensors"]) == 1
    assert main(["bench", str(tiny), "--batch", "1000000000"]) == 1
    printed = capsys.readouterr().err
    assert "no memory for batches of 1000000000 images" in printed and "Traceback" not in printed
