from __future__ import annotations

import time

import pytest
import torch

from dfengine import native
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.measure import measure, place, rounding_of, trial_images, trial_inputs, unmeasured
from dfengine.engine.quantize import measured_ranges
from dfengine.engine.runner import ProgramRunner
from dfengine.engine.timing import Ceilings
from dfengine.kernels.conv2d_cpu import byte_products
from tests.helpers import tiny_model

CEILINGS = Ceilings({torch.float32: 1e11, torch.bfloat16: 2e11, torch.int8: 4e11}, {2**18: 1e10, 2**22: 1e10})


def bound(batch: int = 1, device: str = "cpu", **options) -> Executor:
    return Executor(Lowering(tiny_model(), device=device, **options).program(batch), device, options.get("backend"))


def test_every_op_gets_its_time_and_its_bound():
    executor = bound(2)
    plan = measure(executor, 0.0, CEILINGS)
    assert [row.op for row in plan.rows] == executor.program.ops and plan.rounds == 5
    for row in plan.rows:
        assert row.seconds > 0 and row.backend == executor.backends[row.op.name]
        arithmetic, traffic = row.op.flops / 1e11, row.op.moved / 1e10
        assert row.bound == pytest.approx(max(arithmetic, traffic))
        assert row.limit == ("matmul" if arithmetic > traffic else "bandwidth")
        assert row.percent == pytest.approx(100 * row.bound / row.seconds)
        facts = row.facts()
        assert facts["gbps"] == pytest.approx(facts["bytes"] / facts["us"] / 1e3)
    assert plan.percent == pytest.approx(100 * sum(row.bound for row in plan.rows) / plan.run_seconds)


@pytest.mark.skipif(not (native.available() and byte_products()), reason="no compiled kernel here multiplies bytes")
def test_what_is_multiplied_in_int8_is_held_to_the_rate_of_int8(monkeypatch):
    ranges = measured_ranges(ProgramRunner(tiny_model(base=16)).executor(1), torch.rand(1, 32, 32, 3))
    executor = ProgramRunner(tiny_model(base=16), precision="int8", ranges=ranges).executor(1)
    asked = []
    measured = lambda device, types: asked.extend(types) or CEILINGS  # noqa: E731
    monkeypatch.setattr(Ceilings, "measured", measured)
    monkeypatch.setattr("dfengine.engine.measure.MOST_PERCENT", float("inf"))  # these ceilings are of no machine
    rates = {}
    for row in measure(executor, 0.0).rows:
        constant = row.op.arguments.get("weight")
        in_bytes = row.op.kernel == "conv2d" and constant.content.quantization is not None
        arithmetic, traffic = row.op.flops / (4e11 if in_bytes else 2e11), row.op.moved / 1e10
        assert row.bound == pytest.approx(max(arithmetic, traffic))
        assert rounding_of(row.op) == ("int8" if in_bytes else None)
        rates.setdefault(in_bytes, []).append(row.op.name)
    assert asked == 2 * [torch.bfloat16, torch.int8] and len(rates[True]) == len(ranges) and rates[False]


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5])
def test_ceilings_are_measured_twice_and_again_while_ops_exceed_them(turn, monkeypatch):
    low = Ceilings({torch.float32: 1.0}, {2**18: 1.0, 2**28: 1.0})
    high = Ceilings({torch.float32: 1e13}, {2**18: 1e13, 2**28: 0.5})
    asked = []
    monkeypatch.setattr(Ceilings, "measured", lambda *_: asked.append(1) or (high if len(asked) == turn else low))
    plan = measure(bound(), 0.0)
    assert len(asked) == min(max(turn, 2), 4) and plan.rounds == 5 and all(row.seconds > 0 for row in plan.rows)
    if turn == 5:  # too late
        assert plan.ceilings is None and plan.percent is None and plan.run_seconds > 0
        assert all(row.percent is None and row.limit is None for row in plan.rows)
        assert "us" in plan.rows[0].facts() and "percent_of_roofline" not in plan.rows[0].facts()
    else:
        assert plan.ceilings == Ceilings(high.products, {2**18: 1e13, 2**28: 1.0})  # of each the highest


def test_an_op_in_fp8_may_be_above_its_ceiling(monkeypatch):
    executor, names = bound(), ("up.1.0.conv1", "up.1.0.conv2")
    high, low = {2**18: 1e15}, {torch.float32: 1.0}  # so that what multiplies, and nothing else, is far above
    monkeypatch.setattr(Ceilings, "measured", lambda *_: Ceilings(low, high))
    assert measure(executor, 0.0).ceilings is None
    multiplying = [op for op in executor.program.ops if op.flops]
    assert {rounding_of(op) for op in multiplying} == {None} and set(names) < {op.name for op in multiplying}
    fp8 = {op.name for op in multiplying}
    monkeypatch.setattr("dfengine.engine.measure.rounding_of", lambda op: "fp8" if op.name in fp8 else None)
    plan = measure(executor, 0.0)
    assert plan.ceilings == Ceilings(low, high) and max(row.percent for row in plan.rows) > 1000
    fp8.remove(names[0])
    assert measure(executor, 0.0).ceilings is None


def test_a_slow_op_is_found():
    executor = bound()
    index = [op.name for op in executor.program.ops].index("up.1.0.conv2")
    executor.wrap(lambda op, call: (lambda: (time.sleep(0.02), call())) if op.name == "up.1.0.conv2" else call)
    plan = measure(executor, 0.0, CEILINGS)
    first, second = plan.slowest()[:2]
    assert first.index == index and first.seconds >= 0.02 > second.seconds
    assert plan.run_seconds >= 0.02


def test_ops_of_a_loop_count_all_its_steps():
    executor = Executor(Lowering(tiny_model(mode="iterative", t_b=4)).program(1))
    executor.wrap(lambda op, call: (lambda: (time.sleep(0.01), call())) if op.name == "up.1.0.conv2" else call)
    plan = measure(executor, 0.0, CEILINGS)
    first = plan.slowest()[0]
    assert first.op.name == "up.1.0.conv2" and first.repeat == 5 and first.seconds >= 0.05
    assert first.facts()["flops"] == 5 * first.op.flops
    assert first.bound == 5 * CEILINGS.bound(first.op.flops, first.op.moved, torch.float32)
    assert sum(row.flops for row in plan.rows) == executor.program.flops


def test_an_unmeasured_plan_has_no_times():
    executor = bound()
    plan = unmeasured(executor)
    assert [row.op for row in plan.rows] == executor.program.ops
    assert plan.rows[0].percent is None and "us" not in plan.rows[0].facts()
    assert plan.rows[1].facts()["shape"] == [2, 32, 32, 8]


def test_trial_inputs_are_those_of_the_program():
    executor = bound(3)
    inputs = trial_inputs(executor, seed=1)
    executor.run(**inputs)  # raises for others
    images = inputs["images"]
    assert 0 <= images.min() < 0.2 < 0.8 < images.max() <= 1
    assert not torch.equal(images, trial_inputs(executor, seed=2)["images"])
    # Smooth: neighbours are far nearer to each other than pixels at large.
    assert (images[:, 1:] - images[:, :-1]).abs().mean() < 0.5 * images.std()


def test_placed_inputs_give_what_run_gives():
    executor = bound(2)
    inputs = dict(images=trial_images(2, 32, 3), threshold=torch.tensor([0.5]))
    want = executor.run(**inputs)
    for _ in range(2):  # the first launch leaves other things in the inputs' place
        place(executor, inputs)
        executor.launch()
        for buffer in executor.program.buffers:
            if buffer.role == "output":
                assert torch.equal(executor._tensors[buffer], want[buffer.name])


@pytest.mark.gpu
def test_times_on_a_gpu():
    plan = measure(bound(2, "cuda", backend="triton"), 0.0)
    assert all(row.seconds > 0 for row in plan.rows) and plan.run_seconds > 0
