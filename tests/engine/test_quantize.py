"""Precisions of eight bits in a program: which convolutions, their ranges, and what comes of them."""

from __future__ import annotations

import pytest
import torch

from dfengine import native
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.measure import rounding_of
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.quantize import LEAST_CHANNELS, measured_ranges, quantizations
from dfengine.engine.runner import ProgramRunner, make_runner
from dfengine.engine.verify import first_divergence, verify
from dfengine.kernels import CannotRunError, triton_import
from dfengine.kernels.conv2d_cpu import byte_products
from tests.helpers import tiny_model

CPU = torch.device("cpu")
served = pytest.mark.skipif(
    not (native.available() and byte_products()), reason="no compiled kernel here multiplies bytes"
)


def model(**changes):
    return tiny_model(base=16, **changes)


def images(count: int) -> torch.Tensor:
    return torch.rand((count, 32, 32, 3), generator=torch.Generator().manual_seed(3))


def ranges_of(**changes) -> dict[str, tuple[float, float]]:
    return measured_ranges(ProgramRunner(model(**changes)).executor(1), images(4))


@served
def test_ranges_are_those_of_what_the_modules_convolve():
    of, seen = model(), {}

    def note(name):
        def hook(_module, inputs):
            low, high = seen.get(name, (0.0, 1e-6))
            seen[name] = min(low, inputs[0].min().item()), max(high, inputs[0].max().item())

        return hook

    for path, module in of.reconstruction.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            part = path.replace("in_layers.2", "conv1").replace("out_layers.3", "conv2")
            module.register_forward_pre_hook(note(part))
    ModuleRunner(of).run(images(4))
    ranges = ranges_of()
    assert len(ranges) > 8 and not any(name.startswith("segment.") for name in ranges)
    assert {"middle.0.conv1", "middle.0.conv2"} <= set(ranges) and not {"down.0", "out"} & set(ranges)
    for name, found in ranges.items():
        assert found == pytest.approx(seen[name], rel=1e-3, abs=1e-4), name


@served
def test_large_products_are_in_bytes_and_the_result_is_near():
    ranges = ranges_of()
    runner = ProgramRunner(model(), precision="int8", ranges=ranges)
    weights = [op.arguments["weight"].content for op in runner.executor(1).program.ops if op.kernel == "conv2d"]
    in_bytes = [weight for weight in weights if weight.quantization]
    assert len(in_bytes) == len(ranges) and all(min(w.inputs, w.outputs) >= LEAST_CHANNELS for w in in_bytes)
    exact = ModuleRunner(model()).run(images(3))
    got, half = runner.run(images(3)), ProgramRunner(model(), precision="bfloat16").run(images(3))
    assert 0 < (got.reconstruction - half.reconstruction).abs().max() < 0.03
    assert (got.anomaly_map - exact.anomaly_map).abs().max() < 0.02
    alone = torch.cat([runner.run(image[None]).anomaly_map for image in images(3)])
    assert torch.equal(alone, got.anomaly_map)


@served
@pytest.mark.parametrize("changes", [{}, {"mode": "iterative", "t_b": 4}, {"noise_draws": 2}], ids=str)
def test_every_op_agrees_with_its_reference(changes):
    runner = ProgramRunner(model(**changes), precision="int8", ranges=ranges_of(**changes))
    assert first_divergence(verify(runner, model(**changes), 2)) is None


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fp8_through_the_triton_kernels():
    """In the interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        triton_import.available(device)
    except CannotRunError as error:
        pytest.skip(str(error))
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU multiplies no fp8")
    small = dict(multipliers=(1, 1), blocks=1, attention_factors=(2,))
    exact = Executor(Lowering(model(**small), device=device).program(1), device)
    ranges = measured_ranges(exact, images(1))
    of = Lowering(model(**small), torch.float16, device, "triton", quantizations=quantizations("fp8", ranges))
    executor = Executor(of.program(1), device, backend="triton")
    weights = [op.arguments["weight"].content for op in executor.program.ops if op.kernel == "conv2d"]
    assert sum(weight.quantization is not None for weight in weights) == len(ranges) > 3
    assert [rounding_of(op) for op in executor.program.ops].count("fp8") == len(ranges)
    inputs = dict(images=images(1).to(device), threshold=torch.ones(1, device=device))
    got, want = executor.run(**inputs), exact.run(**inputs)
    assert 1e-4 < (got["reconstruction"] - want["reconstruction"]).abs().max() < 0.06
    assert (got["anomaly_map"] - want["anomaly_map"]).abs().max() < 0.03


@served
def test_a_loop_is_measured_in_all_its_steps():
    long, short = (ranges_of(mode="iterative", t_b=t) for t in (6, 0))
    assert long.keys() == short.keys()
    assert any(long[name] != short[name] for name in long)


@served
def test_ranges_of_another_model_are_refused():
    ranges = ranges_of()
    others = {f"x{name}": pair for name, pair in ranges.items()}
    for wrong in (others, ranges | {"segment.block3.0": (0.0, 1.0)}, {next(iter(ranges)): (0.0, 1.0)}):
        with pytest.raises(CannotRunError, match="not of this model"):
            ProgramRunner(model(), precision="int8", ranges=wrong)


def test_without_ranges_there_is_no_program():
    with pytest.raises(ValueError, match="int8: without the ranges"):
        quantizations("int8", {})
    assert quantizations("bfloat16", {}) is None


def test_the_modules_do_not_stand_in(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    with pytest.raises(CannotRunError, match="int8 runs in the fused kernels alone"):
        make_runner(model(), CPU, "int8", 0, ranges={"middle.0.conv1": (-1.0, 1.0)})
