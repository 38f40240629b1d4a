"""The rule that picks an implementation, and the table of them."""

from __future__ import annotations

import types

import pytest
import torch

from dfengine import kernels, native
from dfengine.errors import UsageError
from dfengine.kernels import group_norm, ingest
from dfengine.kernels.registry import BACKENDS, PRIORITY, CannotRunError, Op, always


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)


def make_op(calls):
    def only_even(x):
        if x.numel() % 2:
            raise CannotRunError("odd size")

    def absent(device):
        raise CannotRunError("not on this machine")

    op = Op("double")
    op.register("triton", lambda x: calls.append("triton"), absent, always)
    op.register("cpu", lambda x: calls.append("cpu"), always, only_even)
    op.register("reference", lambda x: calls.append("reference"), always, always)
    return op


def test_priority_then_legality():
    calls = []
    op = make_op(calls)
    op(torch.zeros(4))
    op(torch.zeros(3))
    assert calls == ["cpu", "reference"]


def test_forced_backend_runs_or_says_why_not(monkeypatch):
    calls = []
    op = make_op(calls)
    op(torch.zeros(4), backend="reference")
    assert calls == ["reference"]
    with pytest.raises(CannotRunError, match="cpu: odd size"):
        op(torch.zeros(3), backend="cpu")
    with pytest.raises(CannotRunError, match="triton: not on this machine"):
        op(torch.zeros(4), backend="triton")
    with pytest.raises(CannotRunError, match="cuda: not written"):
        op(torch.zeros(4), backend="cuda")
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    assert op.choose(torch.zeros(4)) == "reference"
    assert op.choose(torch.zeros(4), backend="cpu") == "cpu", "the argument goes before the environment"


def test_a_program_that_forces_a_backend_leaves_to_torch_what_has_no_kernel_for_its_hardware(monkeypatch):
    op = make_op([])
    assert [op.substitute(name) for name in ("triton", "cuda", "cpu", "reference", None)] == [
        "triton", "cuda", "cpu", "reference", None,
    ]  # fmt: skip
    attention, wanted = kernels.OPS["attention"], dict(triton="library", cuda="library", cpu="cpu", library="library")
    assert {name: attention.substitute(name) for name in wanted} == wanted
    assert attention.substitute("reference") == "reference"
    assert {kernels.OPS["copy"].substitute(name) for name in BACKENDS} == {"reference"}
    monkeypatch.setenv("DFENGINE_BACKEND", "triton")
    assert kernels.OPS["attention"].substitute() == "library"


def test_unknown_backend_is_wrong_usage(monkeypatch):
    op = make_op([])
    with pytest.raises(UsageError, match="tritn"):
        op.choose(torch.zeros(4), backend="tritn")
    monkeypatch.setenv("DFENGINE_BACKEND", "gpu")
    with pytest.raises(UsageError, match="DFENGINE_BACKEND=gpu: no such backend"):
        op.choose(torch.zeros(4))
    with pytest.raises(ValueError, match="unknown backend"):
        op.register("opencl", None, None, None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_table_names_an_available_backend_for_every_op(device):
    rows = kernels.table(device)
    assert [row["op"] for row in rows] == list(kernels.OPS)
    for row in rows:
        assert row[row["serves"]] == "yes"
        assert row["serves"] in PRIORITY[device]
        first_available = next(name for name in PRIORITY[device] if row[name] == "yes")
        assert row["serves"] == first_available


def test_table_says_when_the_forced_backend_is_absent(monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "cpu")
    (row,) = [row for row in kernels.table("cuda") if row["op"] == "ingest"]
    assert row["serves"].startswith("none (") and "cuda" in row["serves"]


def test_an_extension_serves_only_what_it_has(monkeypatch):
    """As one from a compiler that some ops are beyond: those fall back, and a forced backend says why not."""
    monkeypatch.setattr(native, "module", types.SimpleNamespace(ingest=None))
    assert ingest.OP.status("cpu")["cpu"] == ""
    for op in (group_norm.OP, group_norm.BACKWARD):
        assert "built without group_norm" in op.status("cpu")["cpu"]
        assert op.default("cpu") == "reference"
    x, weight = torch.randn(2, 8, 4, 4, requires_grad=True), torch.ones(8)
    group_norm.group_norm(x, weight, torch.zeros(8), 2).sum().backward()
    assert x.grad is not None
    monkeypatch.setenv("DFENGINE_BACKEND", "cpu")
    with pytest.raises(CannotRunError, match="cpu: the compiled extension was built without group_norm"):
        group_norm.group_norm(x, weight, torch.zeros(8), 2)
