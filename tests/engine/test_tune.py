"""Tactics found by measurement."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine.engine import tune as tune_module
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.runner import ProgramRunner
from dfengine.engine.tactics import Tactics, signature
from dfengine.engine.tune import tune
from dfengine.kernels import OPS, triton_import
from tests.helpers import tiny_model

compiled = pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
INPUTS = dict(images=torch.rand((1, 32, 32, 3), generator=torch.Generator().manual_seed(0)), threshold=torch.ones(1))


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setenv("DFENGINE_CACHE", str(tmp_path))
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    monkeypatch.setattr(tune_module, "SECONDS", {"tuned": 0.0, "exhaustive": 0.0})


def bound(dtype=torch.float32, **changes) -> Executor:
    return Executor(Lowering(tiny_model(**changes), dtype, disposable=False).program(1))


def replaced(monkeypatch, backend: str, wrap) -> None:
    """The implementation of conv2d runs through wrap(call)."""
    of = OPS["conv2d"].implementations[backend]
    changed = replace(of, bind=lambda *args, **options: wrap(of.bound(*args, **options), args))
    monkeypatch.setitem(OPS["conv2d"].implementations, backend, changed)


def slow(call, _args):
    def run():
        time.sleep(2e-2)
        call()

    return run


@compiled
def test_the_quickest_is_taken_and_results_stay(monkeypatch):
    replaced(monkeypatch, "cpu", slow)
    executor, known = bound(), Tactics("cpu")
    want = executor.run(**INPUTS)
    choices, left = tune(executor, known)
    choices = [choice for choice in choices if choice.op.kernel == "conv2d"]
    assert left == 0 and len(choices) > 20
    assert all(choice.tactic.backend == "library" and choice.tried == 2 for choice in choices)
    assert all(choice.default > 20000 > choice.tactic.microseconds for choice in choices)
    tuned = Executor(executor.program, tactics=known)
    assert tuned.backends["down.0"] == "library"
    torch.testing.assert_close(tuned.run(**INPUTS)["anomaly_map"], want["anomaly_map"], rtol=0, atol=1e-5)


@compiled
def test_a_gain_that_does_not_come_again_is_none(monkeypatch):
    """The default is slow while it is first compared with the candidates, and as quick as they are from then on."""
    seen = []

    def timed(functions, *_arguments):
        name, default = next(iter(functions.items()))
        first = default not in seen
        seen.append(default)
        return {other: [2e-3 if first and other == name else 1e-3] for other in functions}

    monkeypatch.setattr(tune_module, "interleaved", timed)
    choices, _ = tune(bound(), Tactics("cpu"), "exhaustive")
    compared = [choice for choice in choices if choice.tried > 1]
    again = sum(min(choice.tried - 1, tune_module.CONFIRMED) for choice in compared)
    assert len(compared) > 20 and len(seen) == len(choices) + again
    assert all(choice.tactic.microseconds == choice.default == pytest.approx(1e3) for choice in compared)


@compiled
def test_where_a_gain_does_not_come_again_the_next_is_tried(monkeypatch):
    """The default takes 3 ms and the others 1 and 2; that of 1 takes 3 where it is compared with the default alone."""
    rounds = []

    def timed(functions, *_arguments):
        default, *others = functions
        rounds.append(others)
        if len(others) == 1:
            alone_first = len(rounds) > 1 and len(rounds[-2]) > 1
            return {default: [3e-3], others[0]: [3e-3 if alone_first else 2e-3]}
        return {default: [3e-3]} | {name: [(1 + place) * 1e-3] for place, name in enumerate(others)}

    monkeypatch.setattr(tune_module, "interleaved", timed)
    choices = [choice for choice in tune(bound(), Tactics("cpu"), "exhaustive")[0] if choice.tried == 3]
    assert choices and all(choice.tactic.backend == "reference" for choice in choices)
    assert all((choice.tactic.microseconds, choice.default) == pytest.approx((2e3, 3e3)) for choice in choices)


@compiled
def test_what_is_wrong_is_never_taken(monkeypatch):
    """However quick: results a little off, outputs left unwritten, and refusals."""

    def off(call, args):
        def run():
            call()
            args[-3].mul_(1.01)

        return run

    def unwritten(call, args):
        return lambda: None

    def fails(call, args):
        raise RuntimeError("out of registers")

    def of_another_kind(call, args):
        raise LookupError("shared memory")  # Triton's errors derive from Exception alone

    for wrap, reason in (
        (off, "library: y "),
        (unwritten, "library: y nan"),
        (fails, "library: out of registers"),
        (of_another_kind, "library: shared memory"),
    ):
        with monkeypatch.context() as patch:
            replaced(patch, "cpu", slow)
            replaced(patch, "library", wrap)
            choices, _ = tune(bound(), Tactics("cpu"))
        choices = [choice for choice in choices if choice.op.kernel == "conv2d"]
        assert choices and all(choice.tactic.backend == "cpu" for choice in choices)
        assert all(choice.tried == 1 and choice.refused[0].startswith(reason) for choice in choices)


@compiled
def test_known_ops_are_not_measured_again_unless_exhaustive():
    executor, known = bound(), Tactics("cpu")
    first, _ = tune(executor, known)
    again, _ = tune(executor, known)
    assert first and not again
    every, _ = tune(executor, known, "exhaustive")
    assert {c.op.name for c in first} <= {c.op.name for c in every}
    assert max(c.tried for c in every) > max(c.tried for c in first)  # with the reference


@compiled
def test_no_op_is_begun_when_time_is_up():
    choices, left = tune(bound(), Tactics("cpu"), seconds=0)
    assert not choices and left > 20


@compiled
def test_an_op_for_whose_check_memory_is_short_is_left_unmeasured(monkeypatch, caplog):
    exact = tune_module.exact_outputs

    def short(op, before):
        if op.name == "down.0":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return exact(op, before)

    monkeypatch.setattr(tune_module, "exact_outputs", short)
    executor, known = bound(), Tactics("cpu")
    choices, left = tune(executor, known)
    assert left == 1 and "down.0" not in {choice.op.name for choice in choices} and len(choices) > 20
    assert "down.0 (conv2d): no memory to check its candidates" in caplog.text


@compiled
@pytest.mark.skipif(not triton_import.INTERPRETED, reason="needs Triton's interpreter")
def test_candidates_are_compiled_many_at_a_time_before_they_are_measured(monkeypatch):
    executor, known, compiled_calls, measured = bound(), Tactics("cpu"), [], []
    monkeypatch.setattr(tune_module, "PRIORITY", {"cpu": ("triton", "cpu")})
    monkeypatch.setattr(tune_module, "COMPILED_AHEAD", 20)
    monkeypatch.setattr(tune_module, "compile_ahead", lambda calls, threads: compiled_calls.append(len(calls)))

    def no_measuring(executor, op, arguments, ways, level):
        measured.append((len(compiled_calls), sum(way.backend == "triton" for way in ways), op))

    monkeypatch.setattr(tune_module, "_measured", no_measuring)
    tune(executor, known)
    of_op = {signature(op): count for _, count, op in measured}
    assert len(measured) > 40 and len(of_op) < len(measured)
    assert sum(of_op.values()) <= sum(compiled_calls) < sum(count for _, count, _ in measured)
    assert all(count >= 20 for count in compiled_calls[:-1]) and measured[0][0] == 1


@compiled
def test_ops_in_place_are_tuned_without_losing_what_they_read(monkeypatch):
    executor = bound(mode="iterative", t_b=2)
    want = executor.run(**INPUTS)
    monkeypatch.setattr(tune_module, "PRIORITY", {"cpu": ("cpu", "reference")})
    choices, _ = tune(executor, Tactics("cpu"), "exhaustive")
    (step,) = [choice for choice in choices if choice.op.kernel == "reverse_step"]
    assert step.tried == 2 and not step.refused
    assert torch.equal(executor.run(**INPUTS)["anomaly_map"], want["anomaly_map"])


@compiled
def test_a_runner_tunes_each_batch_size_once_and_remembers(tmp_path):
    batch = np.random.default_rng(0).random((3, 32, 32, 3), dtype=np.float32)
    first = ProgramRunner(tiny_model(), tactics="tuned")
    first.run(batch)
    assert first.choices and len(list((tmp_path / "tactics").glob("*.json"))) == 1
    second = ProgramRunner(tiny_model(), tactics="tuned")
    got = second.run(batch)
    assert not second.choices
    default = ProgramRunner(tiny_model())  # takes what is known
    want = ModuleRunner(tiny_model()).run(batch)
    for result in (got, default.run(batch)):
        torch.testing.assert_close(result.anomaly_map, want.anomaly_map, rtol=0, atol=1e-5)
