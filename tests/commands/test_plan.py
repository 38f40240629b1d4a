from __future__ import annotations

import functools
import json

import pytest
import torch

from dfengine.cli import main
from dfengine.commands import plan as plan_command
from dfengine.engine.lower import Lowering
from dfengine.engine.measure import measure
from dfengine.engine.timing import Ceilings
from tests.helpers import tiny_model

CEILINGS = Ceilings({torch.float32: 1e11, torch.bfloat16: 2e11}, {2**18: 5e10, 2**28: 1e10})


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(plan_command, "measure", functools.partial(measure, seconds=0.0, ceilings=CEILINGS))


def test_the_plan_names_every_op_with_its_time(tiny, capsys):
    assert main(["info", str(tiny), "--plan", "--batch", "2", "--precision", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    program = Lowering(tiny_model()).program(2)
    rows = lines[2 : 2 + len(program.ops)]
    assert [row.split()[1] for row in rows] == [op.name for op in program.ops]
    assert "batch 2, float32 on cpu" in lines[0]
    assert lines[1].split() == (
        "# op kernel shape MFLOP kB by us GFLOP/s GB/s % of roofline limit".split()
    )
    assert "4x32x32x8" in rows[1] and rows[1].split()[-1] in ("matmul", "bandwidth")
    assert f"{len(program.ops)} ops, {program.flops / 1e9:.2f} GFLOP" in "\n".join(lines)
    assert "images/s" in lines[-2] and "100.0 GFLOP/s (float32), 200.0 GFLOP/s (bfloat16)" in lines[-1]


def test_the_plan_as_json_adds_up(tiny, capsys):
    assert main(["info", str(tiny), "--plan", "--precision", "bfloat16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["precision"], facts["batch"], facts["preset"]) == ("bfloat16", 1, "diff-fastener")
    totals, ops = facts["totals"], facts["ops"]
    assert totals["ops"] == len(ops) and totals["flops"] == sum(op["flops"] for op in ops)
    assert totals["ops_us"] == pytest.approx(sum(op["us"] for op in ops))
    assert totals["percent_of_roofline"] == pytest.approx(100 * sum(op["bound_us"] for op in ops) / totals["us"])
    assert facts["ceilings"]["matmul_gflops_by_type"] == {"float32": 100, "bfloat16": 200}


def test_without_times(tiny, capsys, monkeypatch):
    monkeypatch.setattr(plan_command, "measure", lambda *_: pytest.fail("measured"))
    assert main(["info", str(tiny), "--plan", "--no-measure"]) == 0
    text = capsys.readouterr().out
    assert "up.1.0.conv1" in text and "GFLOP, " in text and "roofline" not in text
    assert main(["info", str(tiny), "--plan", "--no-measure", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "us" not in facts["ops"][0] and "ceilings" not in facts and facts["totals"]["arena_bytes"] > 0


def test_ceilings_that_cannot_be_true_give_no_percentages(tiny, capsys, monkeypatch):
    monkeypatch.setattr(plan_command, "measure", functools.partial(measure, seconds=0.0))
    low = Ceilings({torch.float32: 1.0}, {2**18: 1.0})
    monkeypatch.setattr(Ceilings, "measured", lambda *_: low)
    for options in ([], ["--json"]):
        assert main(["info", str(tiny), "--plan", "--precision", "float32", *options]) == 0
        printed = capsys.readouterr()
        said = "far above the ceilings of this device, measured 4 times, perhaps beside other work"
        assert said in printed.err and "images" in printed.out
        text = printed.out.replace(str(tiny), "")
        assert not any(word in text for word in ("roofline", "ceilings", "limit", "bound_us"))
    facts = json.loads(printed.out)
    assert facts["totals"]["us"] > 0 and all(op["us"] > 0 for op in facts["ops"])


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--plan"], "--plan needs a checkpoint"),
        (["CKPT", "--batch", "2"], "go with --plan"),
        (["CKPT", "--no-measure"], "go with --plan"),
        (["CKPT", "--plan", "--batch", "0"], "--batch"),
        (["CKPT", "--plan", "--precision", "float8"], "precision must be one of"),
    ],
)
def test_options_that_do_not_go_together(arguments, reason, save_model, capsys):
    path = save_model()
    assert main(["info", *(str(path) if a == "CKPT" else a for a in arguments)]) == 2
    assert reason in capsys.readouterr().err
