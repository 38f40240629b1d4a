"""`verify` on programs that are right, and on programs with one fault each."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dfengine import native
from dfengine.engine import lower
from dfengine.engine.exact import ExactRunner
from dfengine.engine.measure import trial_images, trial_inputs
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.runner import ProgramRunner
from dfengine.engine.verify import Check, check_ops, first_divergence, verify
from dfengine.kernels import OPS
from tests.helpers import tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")


def runner(precision: str = "float32", **changes) -> ProgramRunner:
    return ProgramRunner(tiny_model(**changes), precision=precision, seed=3)


def position(of: ProgramRunner, name: str, batch: int = 2) -> int:
    return [op.name for op in of.executor(batch).program.ops].index(name)


def failed_ops(of: ProgramRunner) -> set[str]:
    executor = of.executor(2)
    with torch.inference_mode():
        found = list(check_ops(executor, of.twin(tiny_model(), 2), trial_inputs(executor)))
    assert [op.name for op, _ in found] == [op.name for op in executor.program.ops]
    assert all(checks for _, checks in found)
    return {op.name for op, checks in found if not all(check.agrees for check in checks)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(pixel_range="signed", noise_draws=2), dict(mode="averaged", t_s=100, t_b=200, noise_draws=2)],
    ids=["guided", "two draws", "averaged"],
)
def test_a_right_program_agrees_everywhere(precision, changes):
    right = runner(precision, **changes)
    checks = verify(right, tiny_model(**changes), 3)
    assert first_divergence(checks) is None
    ops = right.executor(3).program.ops
    assert {check.name for check in checks if check.kind == "op"} == {op.name for op in ops}
    blocks = [check.name for check in checks if check.kind == "block"]
    draws = changes.get("noise_draws", 1)
    tag = "draw1." if draws > 1 else ""
    of_segmentation = sum(name.startswith("segment.") for name in blocks)
    assert of_segmentation == 2 * 6 + 3 * 5 + 1 and (len(blocks) - of_segmentation) % draws == 0
    wanted = {"down.0", "down.1.0.conv2", "middle.0.gates", "middle.1.proj", "out"}
    assert {tag + name for name in wanted} | {"segment.db4.1", "segment.out"} <= set(blocks)
    # The errors are there, but not near what is allowed.
    assert 0 < max(check.share for check in checks) < 0.8
    (maps,) = [check for check in checks if check.kind == "map"]
    assert 0 < maps.error < maps.allowed


KINDS = (
    "ingest", "down.1.0.norm1", "down.1.0.conv1", "middle.1.attend", "middle.2.gates", "middle.2.gates.moments",
    "one_step", "segment.pool3", "segment.up2.upsample", "score",
)  # fmt: skip


@pytest.mark.parametrize("fault", ["percent", "nothing written", "not a number"])
def test_a_spoilt_op_is_the_only_one_named(fault):
    """One op of each kernel in turn: its largest value off by a percent, its last one not a number, or nothing done."""
    found = runner()
    executor = found.executor(2)
    assert {executor.program.ops[position(found, name)].kernel for name in KINDS} == {
        op.kernel for op in executor.program.ops
    }
    right = list(executor._calls)
    assert failed_ops(found) == set()
    for name in KINDS:
        index = position(found, name)
        op, (chosen, (call,)) = executor.program.ops[index], right[index]
        output = executor.tensor(op.arguments[op.writes[0]])

        def spoilt(call=call, output=output):
            if fault == "nothing written":
                return
            call()
            flat = output.view(-1)
            place = flat.abs().argmax() if fault == "percent" else -1
            flat[place] = flat[place] * 1.01 if fault == "percent" else torch.nan

        executor._calls = [*right[:index], (chosen, [spoilt]), *right[index + 1 :]]
        assert failed_ops(found) == {name}


def test_a_spoilt_weight_is_named_and_so_is_its_block():
    wrong = runner()
    op = wrong.executor(2).program.ops[position(wrong, "up.1.0.conv2")]
    (packed,) = op.arguments["weight"].content.prepacked.values()
    packed.weights[packed.weights.abs() == packed.weights.abs().max()] *= 1.05
    checks = verify(wrong, tiny_model(), 2)
    assert {check.name for check in checks if check.kind == "op" and not check.agrees} == {"up.1.0.conv2"}
    first = first_divergence(checks)
    assert (first.kind, first.name, first.kernel, first.backend) == ("op", "up.1.0.conv2", "conv2d", "cpu")
    assert "op up.1.0.conv2 (conv2d, cpu): y is " in str(first) and "of its reference in float64" in str(first)
    # The block that ends there and those after it differ from the modules, those before do not.
    blocks = [check for check in checks if check.kind == "block" and not check.agrees]
    assert blocks and min(blocks, key=lambda check: check.index).name == "up.1.0.conv2"


def test_a_wrong_kernel_is_named_at_its_first_op(monkeypatch):
    kernel = OPS["upsample_bilinear"]
    right = kernel.implementations["cpu"]

    def nearest(x, y):
        y.copy_(x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))

    monkeypatch.setitem(kernel.implementations, "cpu", dataclasses.replace(right, run=nearest))
    wrong = runner()
    assert failed_ops(wrong) == {f"segment.{up}.upsample" for up in ("up1", "up2", "up3", "up4")}
    assert first_divergence(verify(wrong, tiny_model(), 2)).name == "segment.up1.upsample"


def test_wrong_lowering_is_named_at_its_first_block(monkeypatch):
    """Every kernel does what the program says, but the program is not the model: no time embedding in one block."""
    whole = lower._Lowered.shift

    def without(self, weights):
        shift = whole(self, weights)
        return dataclasses.replace(shift, content=shift.content * (0 if weights == "up.0.0" else 1))

    monkeypatch.setattr(lower._Lowered, "shift", without)
    checks = verify(runner(), tiny_model(), 2)
    assert all(check.agrees for check in checks if check.kind == "op")
    first = first_divergence(checks)
    assert (first.kind, first.name) == ("block", "up.0.0.conv2") and "of the modules" in str(first)


def test_an_op_that_agrees_with_a_wrong_reference_is_seen_beside_the_modules(monkeypatch):
    known = OPS["attention"].implementations
    for name, right in list(known.items()):

        def larger(qkv, heads, y, right=right):
            right.run(qkv, heads, y)
            y.mul_(1.1)

        monkeypatch.setitem(known, name, dataclasses.replace(right, run=larger, bind=None))
    first = first_divergence(verify(runner(), tiny_model(), 2))
    assert first.kind == "block" and first.name.endswith(".1.proj")


def test_a_loop_is_checked_in_its_first_step_and_by_its_map():
    options = dict(mode="iterative", t_b=3)
    checks = verify(ProgramRunner(tiny_model(**options)), tiny_model(**options), 2)
    assert all(check.agrees for check in checks) and {check.kind for check in checks} == {"op", "map"}
    assert "reverse_step" in {check.kernel for check in checks}
    wrong = ProgramRunner(tiny_model(**options))
    wrong.executor(2).wrap(lambda op, call: (lambda: None) if op.name == "up.1.0.conv2" else call)
    assert first_divergence(verify(wrong, tiny_model(**options), 2)).name == "up.1.0.conv2"


def test_another_model_is_another_program():
    of = runner()
    with pytest.raises(ValueError, match="in the twin|no op called"):
        verify(of, tiny_model(blocks=1), 2)


def test_the_first_divergence_is_the_earliest_and_the_ops_own():
    def check(kind, index, error):
        return Check(kind, index, f"{kind}{index}", "conv2d", "cpu", "y", error, 1.0)

    fine = [check("op", 0, 0.5), check("block", 1, 1.0)]
    assert first_divergence(fine) is None
    late, early = check("op", 3, float("nan")), check("block", 2, 1.5)
    assert first_divergence([*fine, late, early]) is early
    assert first_divergence([early, check("op", 2, 2.0)]).kind == "op"
    assert late.share == torch.inf and early.share == 1.5 and fine[0].share == 0.5


def test_the_exact_runner_is_the_modules_in_float64():
    images = trial_images(2, 32, 3)
    exact = ExactRunner(tiny_model(noise_draws=2, pixel_range="signed"), seed=4).run(images)
    plain = ModuleRunner(tiny_model(noise_draws=2, pixel_range="signed"), seed=4).run(images)
    assert exact.anomaly_map.dtype == torch.float64
    error = (exact.anomaly_map - plain.anomaly_map).abs().max()
    assert 0 < error < 1e-5
