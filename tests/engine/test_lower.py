"""Programs against the modules that they were lowered from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine.engine.builder import Fusion
from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.modules import ModuleRunner, Output
from dfengine.engine.program import Buffer, Loop, Op, PerStep, Program, Value
from dfengine.kernels import OPS, CannotRunError, triton_import
from tests.helpers import tiny_model

CONFIGURATIONS = {
    "diff-fastener": {},
    "signed": dict(pixel_range="signed"),
    "plain middle": dict(dilation=1, channel_attention=False, spatial_attention=False),
    "dilation only": dict(channel_attention=False, spatial_attention=False),
    "channel gate only": dict(spatial_attention=False),
    "spatial gate only": dict(channel_attention=False),
    "diffusionad": dict(
        activation="silu", seg_activation="relu", skip_every=1, dilation=1, channel_attention=False,
        spatial_attention=False,
    ),
    "averaged": dict(mode="averaged", t_s=100, t_b=200),
    "two draws": dict(noise_draws=2),
    "averaged, two draws": dict(mode="averaged", t_s=100, t_b=200, noise_draws=2),
    "three levels": dict(multipliers=(1, 2, 3), attention_factors=(2, 4), blocks=1, heads=4),
    "no guidance": dict(guidance=0.0),
    "iterative": dict(mode="iterative", t_b=4),
    "iterative, signed, two draws": dict(mode="iterative", t_b=2, pixel_range="signed", noise_draws=2),
    "iterative from 0": dict(mode="iterative", t_b=0),
}  # fmt: skip
SPLIT = Fusion(prologue=False, two_sources=False, residual_resample=False, moments=False, tile_pixels=100)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((count, 32, 32, 3), dtype=np.float32))


def run(model, batch: torch.Tensor, dtype=torch.float64, fusion=None, backend="reference", seed=5) -> Output:
    program = Lowering(model, dtype, fusion=fusion).program(len(batch), seed)
    outputs = Executor(program, backend=backend).run(images=batch, threshold=torch.tensor([0.5]))
    assert torch.equal(outputs["pred_label"], outputs["pred_score"] > 0.5)
    return Output(outputs["anomaly_map"], outputs["reconstruction"].mean(dim=0), outputs["pred_score"])


def exact(model, batch: torch.Tensor, seed=5) -> Output:
    """By the modules, in float64 from the float32 noise on."""
    model = model.double()
    embed = model.reconstruction.time_embedding[0]
    embed.register_forward_hook(lambda _module, _inputs, output: output.double())
    runner = ModuleRunner(model, seed=seed)
    drawn = runner._draw
    runner._draw = lambda *key: drawn(*key).double()
    with torch.inference_mode():
        x = batch.double().permute(0, 3, 1, 2)
        x_0 = x * 2 - 1 if model.config.pixel_range == "signed" else x
        found = []
        for draw in range(model.config.noise_draws):
            for r in runner.reconstruct(x_0, draw):
                pair = torch.cat((x_0, r), dim=1)
                unit = ((r + 1) / 2 if model.config.pixel_range == "signed" else r).clamp(0, 1)
                found.append((model.segmentation(pair).sigmoid()[:, 0], unit.permute(0, 2, 3, 1)))
    maps, reconstruction = (torch.stack(part).mean(dim=0) for part in zip(*found, strict=True))
    score = maps.flatten(1).topk(max(1, round(50 * 32 * 32 / 65536))).values.mean(dim=1)
    return Output(maps, reconstruction, score)


def compiled_kernels() -> None:
    """Skips with the reason where a program would not run by the compiled kernels."""
    if not native.available():
        pytest.skip(native.status())
    executor = Executor(Lowering(tiny_model()).program(1))
    assert set(executor.backends.values()) == {"cpu"}


@pytest.mark.parametrize("fusion", [Fusion(), SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_program_is_its_module(name, fusion):
    batch = images(3)
    got = run(tiny_model(**CONFIGURATIONS[name]), batch, fusion=fusion)
    want = exact(tiny_model(**CONFIGURATIONS[name]), batch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["diff-fastener", "diffusionad", "averaged", "iterative"])
def test_in_float32_through_the_compiled_kernels(name):
    compiled_kernels()
    batch = images(3)
    got = run(tiny_model(**CONFIGURATIONS[name]), batch, torch.float32, backend=None)
    want = exact(tiny_model(**CONFIGURATIONS[name]), batch)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_through_the_triton_kernels():
    """In the interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small, batch = dict(multipliers=(1, 1), blocks=1, attention_factors=(2,)), images(1)
    try:
        triton_import.available(device)
    except CannotRunError as error:
        pytest.skip(str(error))
    lowering = Lowering(tiny_model(**small), device=device, backend="triton")
    executor = Executor(lowering.program(1, seed=5), device, backend="triton")
    assert set(executor.backends.values()) == {"triton", "library"}
    got = executor.run(images=batch, threshold=torch.tensor([0.5]))
    want = exact(tiny_model(**small), batch)
    torch.testing.assert_close(got["anomaly_map"].double().cpu(), want.anomaly_map, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["diff-fastener", "diffusionad", "averaged", "iterative"])
def test_in_half_precision_maps_err_little_more_than_under_autocast(name):
    """DESIGN section 3: at most twice the error of torch autocast plus 1e-3."""
    compiled_kernels()

    def model():
        made = tiny_model(**CONFIGURATIONS[name])
        for module in made.segmentation.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.data *= 3  # so that the signal outlives the layers
        return made

    batch = 0.7 + 0.3 * images(3)
    want = exact(model(), batch).anomaly_map
    assert want.std() > 0.02
    got = run(model(), batch, torch.bfloat16, backend=None).anomaly_map
    autocast = ModuleRunner(model(), precision="bfloat16", seed=5).run(batch).anomaly_map
    error, allowed = ((maps.double() - want).abs().max() for maps in (got, autocast))
    assert error <= 2 * allowed + 1e-3, (error, allowed)


def test_an_image_scores_the_same_in_any_batch_and_place():
    model, batch = tiny_model(), images(4)
    together = run(model, batch, torch.float32, backend=None)
    for order in ([2], [3, 1], [3, 2, 1, 0]):
        apart = run(model, batch[order], torch.float32, backend=None)
        for a, b in zip(apart, together, strict=True):
            torch.testing.assert_close(a, b[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [{}, dict(mode="iterative", t_b=2)], ids=["norm-guided", "iterative"])
def test_every_op_matters(mode):
    """Whatever op leaves ones instead of its result, the map or the reconstruction is another."""
    model, batch = tiny_model(**mode), images(2)
    program = Lowering(model, torch.float32).program(2)
    executor = Executor(program)
    inputs = dict(images=batch, threshold=torch.tensor([0.5]))
    names = [op.name for op in program.ops]
    right, calls = executor.run(**inputs), list(executor._calls)
    for index, op in enumerate(program.ops):  # of a loop in all its steps
        written = [value.of(executor._tensors[value.buffer]) for value in op.values(written=True)]

        def spoilt(written=written):
            for tensor in written:
                tensor.fill_(1)

        executor._calls = [*calls[:index], ("", [spoilt]), *calls[index + 1 :]]
        executor._follow(executor._grouped())
        wrong = executor.run(**inputs)
        assert any(not torch.equal(right[key], wrong[key]) for key in right), names[index]


def test_memory_is_near_the_lower_bound_and_is_asked_for_once():
    for batch, fusion in itertools.product((1, 4), (Fusion(), SPLIT)):
        executor = Executor(Lowering(tiny_model(), fusion=fusion).program(batch))
        assert executor.arena.nbytes <= 1.1 * executor.arena.lower_bound


def test_constants_are_shared_by_the_programs_of_a_model():
    lowering = Lowering(tiny_model())
    one = {id(a) for op in lowering.program(1).ops for a in op.arguments.values()}
    before = len(lowering.constants)
    other = [a for op in lowering.program(2).ops for a in op.arguments.values() if a in lowering.constants.values()]
    assert len(other) > 40 and all(id(a) in one for a in other)
    assert len(lowering.constants) == before


def test_weights_are_released_once_a_program_holds_them():
    batch = images(2)
    kept, released = Lowering(tiny_model()), Lowering(tiny_model())
    with pytest.raises(ValueError, match="no program"):
        released.release()
    released.program(1)
    released.release()
    assert all(p.device.type == "meta" for p in released.model.parameters())
    results = [Executor(of.program(2)).run(images=batch, threshold=torch.tensor([0.5])) for of in (kept, released)]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


WRONG = {
    "gray": torch.zeros(2, 32, 32, 1),
    "one pixel": torch.zeros(2, 1, 1, 3),
    "uint8": torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_other_inputs_are_refused(wrong):
    executor = Executor(Lowering(tiny_model()).program(2))
    with pytest.raises(ValueError, match=r"images: expected \(2, 32, 32, 3\) torch.float32"):
        executor.run(images=wrong, threshold=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="inputs: expected images, threshold"):
        executor.run(images=images(2))


def test_every_op_is_a_kernel_and_the_program_can_be_read():
    program = Lowering(tiny_model()).program(2)
    assert {op.kernel for op in program.ops} <= OPS.keys()
    text = str(program)
    assert text.startswith("program: batch 2, float32, ")
    assert len(text.splitlines()) == 1 + len(program.ops)
    assert "middle.0.conv1(4x16x16x16)" in text and "conv2d(" in text


def test_flops_are_those_of_the_modules():
    from dfengine.models import cost

    config = tiny_model().config
    program = Lowering(tiny_model()).program(1)
    convolutions = sum(op.flops for op in program.ops if op.name.startswith("segment."))
    assert convolutions == cost(config).segmentation_flops
    evaluation = sum(op.flops for op in program.ops if not op.name.startswith("segment."))
    linear = 2 * (2 * 8 * 32 + 2 * 32 * 32)  # the time embedding, folded away; with each block's and the gates' MLP
    assert 0.97 * 2 * cost(config).reconstruction_flops - linear <= evaluation <= 2 * cost(config).reconstruction_flops


def test_a_loop_is_one_copy_of_its_ops():
    def iterative(t_b: int):
        return Lowering(tiny_model(mode="iterative", t_b=t_b)).program(1)

    short, long = iterative(2), iterative(40)
    assert len(short.ops) == len(long.ops)
    assert short.loops[0].steps == 3 and long.loops[0].steps == 41
    assert "41 times: ops 1 to " in str(long)
    segmentation = sum(op.flops for op in long.ops if op.name.startswith("segment."))
    assert (long.flops - segmentation) * 3 == (short.flops - segmentation) * 41


def test_what_a_loop_finds_stays_as_long_as_it_runs():
    program = Lowering(tiny_model(mode="iterative", t_b=2)).program(1)
    (loop,) = program.loops
    lives = {buffer.name: span for buffer, span in program.lifetimes().items()}
    assert lives["x_t"][1] >= loop.last - 1 and lives["x_0"][1] >= loop.last
    assert lives["down.0"][1] < loop.last - 1


def test_an_input_outlives_a_loop_that_begins_with_the_program():
    roles = dict(x="input", t="workspace", y="output")
    x, t, y = (Value(Buffer(name, (64,), torch.float32, role)) for name, role in roles.items())
    ops = [Op("a", "copy", dict(x=x, y=t), ("y",)), Op("b", "copy", dict(x=t, y=y), ("y",))]
    lives = Program(ops, 1, torch.float32, (Loop(0, 2, 2),)).lifetimes()
    assert lives[x.buffer] == (0, 1) and lives[t.buffer] == (0, 1)


def test_steps_must_fit_their_loop():
    value = Value(Buffer("y", (1,), torch.float32))
    op = Op("one", "copy", dict(x=PerStep((1.0, 2.0)), y=value), ("y",))
    with pytest.raises(ValueError, match="one has arguments for 2 steps and runs 1 times"):
        Program([op], 1, torch.float32)
    Program([op], 1, torch.float32, (Loop(0, 1, 2),))
