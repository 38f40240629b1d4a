from __future__ import annotations

from dfengine.cli import main
from dfengine.engine import execute


def test_a_right_program_passes(tiny, capsys):
    assert main(["verify", str(tiny), "--precision", "bfloat16", "--seed", "5"]) == 0
    text = capsys.readouterr().out
    assert "batch 2, bfloat16 on cpu" in text and "worst ops" in text and "worst blocks" in text
    assert text.splitlines()[-1].startswith("all ") and "ops agree with their references" in text


def test_a_wrong_op_is_named_and_the_status_is_1(tiny, capsys, monkeypatch):
    bound = execute.Executor._bound

    def spoilt(self, op, *choice):
        chosen, (call,) = bound(self, op, *choice)
        if op.name != "segment.db2.0":
            return chosen, [call]
        output = self.tensor(op.arguments["y"])
        return chosen, [lambda: (call(), output.mul_(1.01))]

    monkeypatch.setattr(execute.Executor, "_bound", spoilt)
    assert main(["verify", str(tiny), "--precision", "float32"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err
    assert "the first divergence is op segment.db2.0 (conv2d, cpu): y is " in printed.err
    assert "by themselves 1 of " in printed.err
    assert printed.out.splitlines()[2].startswith("segment.db2.0 ")  # the worst op
    assert "all " not in printed.out
