"""Which runner serves a detector, and the programs that it keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine.checkpoint import load_checkpoint, shipped_checkpoint
from dfengine.engine import runner as runner_module
from dfengine.engine.arithmetic import float32_arithmetic
from dfengine.engine.lower import NotLoweredError
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.runner import ProgramRunner, make_runner
from dfengine.errors import DfengineError, UsageError
from dfengine.kernels import CannotRunError
from dfengine.models import build_model, preset
from tests.helpers import redraw, tiny_model

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)


def images(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).random((count, size, size, 3), dtype=np.float32)


@compiled
def test_programs_serve_a_cpu():
    assert isinstance(make_runner(tiny_model(), CPU, "float32", 0), ProgramRunner)


def _not_lowered(*_args, **_options):
    raise NotLoweredError("up.0.0: a block that nobody lowered")


def test_modules_serve_what_has_no_program(monkeypatch):
    monkeypatch.setattr(runner_module, "Lowering", _not_lowered)
    assert isinstance(make_runner(tiny_model(), CPU, "float32", 0), ModuleRunner)


SIZES = [
    ("diff-fastener", 64, 9),
    ("diffusionad", 64, 5),
    ("diffusionad-v1", 64, 1),
    ("diff-fastener", 128, 3),
    ("diffusionad", 256, 2),
    ("diff-fastener", 256, 1),
    ("diff-fastener", 512, 1),
]


@compiled
@pytest.mark.parametrize("name, size, batch", SIZES)
def test_presets_at_every_size_are_their_modules(name, size, batch):
    """With the levels of the preset at that size, narrow."""

    def model():
        return redraw(build_model(preset(name, image_size=size, base=8, seg_base=4, heads=2))).eval()

    got, want = ProgramRunner(model()).run(images(batch, size)), ModuleRunner(model()).run(images(batch, size))
    assert len(want.pred_score) == batch
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@compiled
def test_the_reverse_chain_is_a_program():
    served = make_runner(tiny_model(mode="iterative", t_b=5), CPU, "float32", 3)
    assert isinstance(served, ProgramRunner)
    want = ModuleRunner(tiny_model(mode="iterative", t_b=5), seed=3).run(images(3))
    for a, b in zip(served.run(images(3)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_modules_serve_where_the_kernels_are_missing_or_not_wanted(monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    assert isinstance(make_runner(tiny_model(), CPU, "float32", 0), ModuleRunner)
    monkeypatch.delenv("DFENGINE_BACKEND")
    monkeypatch.setattr(native, "module", None)
    assert isinstance(make_runner(tiny_model(), CPU, "float32", 0), ModuleRunner)


@compiled
def test_a_program_that_needs_a_reference_is_refused_and_the_model_kept(monkeypatch):
    monkeypatch.delattr(native.module, "max_pool")
    model = tiny_model()
    with pytest.raises(CannotRunError, match="op max_pool on cpu"):
        ProgramRunner(model)
    served = make_runner(model, CPU, "float32", 0)
    assert isinstance(served, ModuleRunner)
    assert served.run(images(1)).anomaly_map.shape == (1, 32, 32)


@compiled
@pytest.mark.parametrize("batch, counted", [(1, "1 image"), (2, "2 images")])
def test_a_batch_beyond_memory_is_counted_in_words(batch, counted, monkeypatch):
    served = ProgramRunner(tiny_model())
    served._executors.clear()
    monkeypatch.setattr(runner_module.os, "sysconf", lambda name: 1)  # a page of a byte
    with pytest.raises(DfengineError, match=f"no memory for {counted} at once"):
        served.executor(batch)


@compiled
def test_programs_share_memory_and_the_least_used_goes(monkeypatch):
    monkeypatch.setattr(runner_module, "MOST_PROGRAMS", 2)
    served, modules = ProgramRunner(tiny_model(), seed=3), ModuleRunner(tiny_model(), seed=3)
    assert list(served._executors) == [1]
    batch = images(4)
    for count, kept in ((4, [1, 4]), (1, [4, 1]), (4, [1, 4]), (2, [4, 2]), (3, [2, 3])):
        got, want = served.run(batch[:count]), modules.run(batch[:count])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert list(served._executors) == kept
        assert len({executor._block.data_ptr() for executor in served._executors.values()}) == 1


@compiled
def test_warm_programs_are_kept_and_the_memory_stays(monkeypatch):
    served, exact = ProgramRunner(tiny_model(), buckets=True), ModuleRunner(tiny_model())
    served.warm_up((3, 1, 9, 70))
    assert list(served._executors) == [64, 16, 8, 4, 1]  # 70 are 64 and, filled up, 6
    warm, block = dict(served._executors), served._block.data_ptr()
    asked = []
    monkeypatch.setattr(runner_module, "allocate", lambda *arguments: asked.append(arguments))
    for count in (1, 3, 9, 70, 4, 16):
        for a, b in zip(served.run(images(count)), exact.run(images(count)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert warm.items() == served._executors.items() and served._block.data_ptr() == block and not asked
    with pytest.raises(UsageError, match="batch sizes of 9 programs: 8 are kept"):
        ProgramRunner(tiny_model()).warm_up(range(1, 10))


@compiled
def test_a_captured_program_keeps_its_memory_when_another_needs_more():
    """As on a GPU, whose graphs hold addresses."""
    served, exact = ProgramRunner(tiny_model()), ModuleRunner(tiny_model())
    captured, moved = served.executor(2), served.executor(1)
    captured.captured = True
    place = captured._block.data_ptr()
    served.run(images(4))
    assert served._executors[2] is captured and captured._block.data_ptr() == place != served._block.data_ptr()
    assert served._executors[1] is not moved and served._executors[1]._block is served._block
    for count in (2, 1, 4, 2):
        for a, b in zip(served.run(images(count)), exact.run(images(count)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@compiled
def test_batches_are_filled_up_to_buckets(monkeypatch):
    """As on a GPU, where each bucket is a CUDA graph."""
    monkeypatch.setattr(runner_module, "BUCKETS", (1, 2, 4))
    filled, exact = ProgramRunner(tiny_model(), buckets=True), ProgramRunner(tiny_model())
    batch = images(7)
    for count, programs in ((1, [1]), (3, [1, 4]), (4, [1, 4]), (6, [1, 4, 2]), (7, [1, 2, 4])):
        got, want = filled.run(batch[:count]), exact.run(batch[:count])
        for a, b in zip(got, want, strict=True):
            assert len(a) == count
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert list(filled._executors) == programs


@pytest.mark.gpu
def test_cuda_graphs_give_what_the_modules_give():
    device = torch.device("cuda")
    served = ProgramRunner(tiny_model(), device)
    modules = ModuleRunner(tiny_model(), device)
    served.warm_up((1, 2, 3, 5, 9))
    warm = dict(served._executors)
    for count in (1, 3, 9, 2, 5):  # also brings what results are copied to
        with float32_arithmetic(device, "float32"):  # torch rounds the inputs of convolutions to TF32 by itself
            want = modules.run(images(count))
        for a, b in zip(served.run(images(count)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for count in (1, 3, 9, 2, 5):
        served.run(images(count))
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
    assert warm.items() == served._executors.items()  # the graph of 1 is older than the memory of 16 and still runs


@pytest.mark.gpu
def test_the_reverse_chain_runs_in_graphs_of_its_body():
    device, options = torch.device("cuda"), dict(mode="iterative", t_b=5)
    served = ProgramRunner(tiny_model(**options), device, seed=2)
    with float32_arithmetic(device, "float32"):
        want = ModuleRunner(tiny_model(**options), device, seed=2).run(images(2))
    for a, b in zip(served.run(images(2)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_a_forced_backend_runs_or_says_why_not(monkeypatch):
    monkeypatch.setenv("DFENGINE_BACKEND", "cuda")
    with pytest.raises(CannotRunError, match="^DFENGINE_BACKEND=cuda: .*cuda backend does not run on cpu") as refused:
        make_runner(tiny_model(), CPU, "float32", 0)
    assert refused.value.exit_code == 2
    monkeypatch.setenv("DFENGINE_BACKEND", "cpu")
    with monkeypatch.context() as patch, pytest.raises(NotLoweredError, match=r"up\.0\.0"):
        patch.setattr(runner_module, "Lowering", _not_lowered)
        make_runner(tiny_model(), CPU, "float32", 0)
    if native.available():
        served = make_runner(tiny_model(), CPU, "float32", 0)
        monkeypatch.setenv("DFENGINE_BACKEND", "triton")  # it was read before
        assert isinstance(served, ProgramRunner) and len(served.run(images(3)).pred_score) == 3


@compiled
def test_the_callers_defaults_and_autocast_change_nothing():
    want, model = ProgramRunner(tiny_model()).run(images(2)), tiny_model()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            got = ProgramRunner(model).run(images(2))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@compiled
def test_results_are_not_changed_by_later_calls():
    served = ProgramRunner(tiny_model())
    first = served.run(images(2))
    copies = [value.clone() for value in first]
    served.run(1 - images(2))
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


@compiled
@pytest.mark.parametrize("precision, bound", [("float32", 1e-4), ("bfloat16", 0.06)])
def test_the_shipped_detector_gives_the_maps_of_its_modules(precision, bound):
    checkpoint = load_checkpoint(shipped_checkpoint())
    unit = images(2, 64)
    want = ModuleRunner(checkpoint.build()).run(unit)
    got = make_runner(checkpoint.build(), CPU, precision, 0).run(unit)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound)
