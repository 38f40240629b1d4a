from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from dfengine.engine import ranges
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.ranges import named_range
from dfengine.errors import DfengineError
from tests.helpers import tiny_model


@pytest.fixture(autouse=True)
def events(monkeypatch) -> list[str | None]:
    """The names of ranges as they open, None where one closes."""
    found: list[str | None] = []
    fake = SimpleNamespace(push_range=found.append, pop_range=lambda: found.append(None))
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    monkeypatch.delenv("DFENGINE_NVTX", raising=False)
    ranges._range_functions.cache_clear()
    yield found
    ranges._range_functions.cache_clear()


def executor() -> Executor:
    return Executor(Lowering(tiny_model()).program(1))


@pytest.mark.parametrize("asked", ["environment", "annotate"])
def test_each_op_runs_in_a_range_of_its_name(asked, events, monkeypatch):
    if asked == "environment":
        monkeypatch.setenv("DFENGINE_NVTX", "1")
    bound = executor()
    if asked == "annotate":
        bound.annotate()
    inputs = dict(images=torch.rand(1, 32, 32, 3), threshold=torch.tensor([0.5]))
    outputs = bound.run(**inputs)
    names = [f"{op.kernel} {op.name}" for op in bound.program.ops]
    assert events[::2] == names and set(events[1::2]) == {None}
    assert "conv2d up.1.0.conv1" in names
    monkeypatch.delenv("DFENGINE_NVTX", raising=False)
    plain = executor().run(**inputs)
    assert all(torch.equal(outputs[name], plain[name]) for name in plain)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_unasked_the_calls_are_the_kernels_own(value, events, monkeypatch):
    if value is not None:
        monkeypatch.setenv("DFENGINE_NVTX", value)
    monkeypatch.setattr("dfengine.engine.execute.named_range", lambda *_: pytest.fail("a call was wrapped"))
    bound = executor()
    bound.launch()
    assert not events


def test_a_range_closes_when_its_op_fails(events):
    def fails():
        raise ValueError("as asked")

    with pytest.raises(ValueError, match="as asked"):
        named_range("conv2d x", fails)()
    assert events == ["conv2d x", None]


def test_without_nvtx_those_of_torch_or_the_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DfengineError, match="need the package nvtx"):
        named_range("x", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranges._range_functions() == (torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop)
