"""What "auto" chooses, on any machine: the half precision of this one is set by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine import precision as module
from dfengine.checkpoint import Checkpoint, Trial, load_checkpoint, save_checkpoint
from dfengine.commands.scoring import open_detector
from dfengine.detector import Detector
from dfengine.errors import UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.precision import TOLERANCE, chosen_runner, half_precision, trial_maps, with_trial
from tests.helpers import spoil_precision, tiny_config, tiny_model

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def checkpoint() -> Checkpoint:
    model = tiny_model()
    return Checkpoint(model.config, model.state_dict())


@pytest.fixture
def made(monkeypatch):
    """The precisions of the runners that are made, on a machine whose half precision is bfloat16."""
    made, make = [], module.make_runner

    def counted(model, device, precision, *more):
        made.append(precision)
        return make(model, device, precision, *more)

    monkeypatch.setattr(module, "make_runner", counted)
    monkeypatch.setattr(module, "half_precision", lambda device: "bfloat16")
    return made


def test_half_precision_runs_where_the_trial_passes(checkpoint, made, monkeypatch):
    assert Detector(checkpoint, "cpu").precision == "bfloat16"
    assert made == ["float32", "bfloat16"]
    made.clear()
    tried = with_trial(checkpoint, IMAGES, CPU)
    assert tried.trial.images.shape == (4, 32, 32, 3) and tried.trial.anomaly_map.dtype == torch.float16
    exact = trial_maps(module.make_runner(checkpoint.build(), CPU, "float32", 0), torch.from_numpy(IMAGES[:4]))
    torch.testing.assert_close(tried.trial.anomaly_map.float(), exact, rtol=0, atol=3e-4)
    made.clear()
    # The maps of float32 are known: it does not run again, but for noise of another seed.
    assert chosen_runner(tried, CPU, "auto", 0).precision == "bfloat16" and made == ["bfloat16"]
    made.clear()
    assert chosen_runner(tried, CPU, "auto", 7).precision == "bfloat16" and made == ["float32", "bfloat16"]


def test_a_spoilt_half_precision_is_not_chosen(checkpoint, made, monkeypatch):
    spoil_precision(monkeypatch, "bfloat16", lambda maps: maps[:, 3, 5].add_(2 * TOLERANCE["bfloat16"]))
    tried = with_trial(checkpoint, IMAGES, CPU)
    for candidate in (checkpoint, tried):
        runner = chosen_runner(candidate, CPU, "auto", 0)
        assert runner.precision == "float32"
    assert Detector(tried, "cpu", "bfloat16").precision == "bfloat16"  # asked for by name
    spoil_precision(monkeypatch, "bfloat16", lambda maps: maps[:, 3, 5].fill_(torch.nan))
    assert chosen_runner(tried, CPU, "auto", 0).precision == "float32"


def test_a_trial_of_other_weights_keeps_float32(checkpoint, made):
    wrong = with_trial(checkpoint, IMAGES, CPU).trial
    wrong = Trial(wrong.images, 1 - wrong.anomaly_map)
    assert chosen_runner(replace(checkpoint, trial=wrong), CPU, "auto", 0).precision == "float32"


@pytest.fixture
def eight(monkeypatch):
    """A machine that multiplies bytes, whose runners of int8 are those of float32."""
    make = module.make_runner

    def stand_in(model, device, precision, *more):
        runner = make(model, device, "float32" if precision == "int8" else precision, *more)
        runner.precision = precision
        return runner

    monkeypatch.setattr(module, "make_runner", stand_in)
    monkeypatch.setattr(module, "eight_bits", lambda device: "int8")


RECORD = {"device": "cpu", "ranges": {"middle.0.conv1": [-1.0, 2.0]}}


def test_eight_bits_are_tried_first_where_they_were_verified(checkpoint, eight, made):
    passed, refused, elsewhere, bare = (
        replace(checkpoint, verified={"int8": record})
        for record in (RECORD, RECORD | {"refused": ["a map differs"]}, RECORD | {"device": "cuda"}, {"device": "cpu"})
    )
    assert passed.ranges("int8") == {"middle.0.conv1": (-1.0, 2.0)} and checkpoint.ranges("int8") == {}
    assert module.candidates(passed, CPU) == ["int8", "bfloat16"]
    assert chosen_runner(passed, CPU, "auto", 0).precision == "int8" and made == ["float32", "int8"]
    for other in (checkpoint, refused, elsewhere, bare):
        assert module.candidates(other, CPU) == ["bfloat16"]
    assert module.candidates(
        replace(passed, verified={"int8": RECORD, "bfloat16": {"refused": [1], "device": "cpu"}}), CPU
    ) == ["int8"]


def test_where_eight_bits_fail_their_trial_half_precision_is_next(checkpoint, eight, made, monkeypatch):
    passed = replace(checkpoint, verified={"int8": RECORD})
    spoil_precision(monkeypatch, "int8", lambda maps: maps[:, 3, 5].add_(2 * TOLERANCE["int8"]))
    assert chosen_runner(passed, CPU, "auto", 0).precision == "bfloat16"


def test_where_no_kernel_takes_eight_bits_half_precision_is_next(checkpoint, eight, made, monkeypatch):
    make = module.make_runner

    def refuse(model, device, precision, *more):
        if precision == "int8":
            raise module.CannotRunError("weight: in int8, which is not multiplied here")
        return make(model, device, precision, *more)

    monkeypatch.setattr(module, "make_runner", refuse)
    passed = replace(checkpoint, verified={"int8": RECORD})
    assert chosen_runner(passed, CPU, "auto", 0).precision == "bfloat16"
    with pytest.raises(module.CannotRunError):
        chosen_runner(passed, CPU, "int8", 0)


def test_an_extension_without_the_op_chooses_as_ever(checkpoint, monkeypatch):
    """As MSVC builds it."""
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    for cached in (module.byte_products, module.default_product):
        cached.cache_clear()
    monkeypatch.setattr(native, "module", object())
    try:
        assert module.eight_bits(CPU) is None and module.candidates(checkpoint, CPU) == []
    finally:
        for cached in (module.byte_products, module.default_product):
            cached.cache_clear()


def test_eight_bits_without_ranges_are_refused_in_one_line(checkpoint, eight):
    with pytest.raises(UsageError, match="run dfengine verify CKPT --data DIR --precision int8 --record first"):
        chosen_runner(checkpoint, CPU, "int8", 0)
    refused = replace(checkpoint, verified={"int8": RECORD | {"refused": ["a map differs"]}})
    assert chosen_runner(refused, CPU, "int8", 0).precision == "int8"  # asked for by name


def test_who_has_eight_bits(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    expected = "int8" if native.available() and module.byte_products() else None
    assert module.eight_bits(CPU) == expected
    monkeypatch.setattr(module, "byte_products", lambda: ())
    assert module.eight_bits(CPU) is None
    if native.available():
        with pytest.raises(UsageError, match="int8 needs a processor with AVX512_VNNI or AMX-INT8"):
            module.check_precision("int8", CPU)
    with monkeypatch.context() as without:
        without.setattr(native, "module", None)
        without.setattr(native, "reason", "was built from other sources")
        with pytest.raises(UsageError, match="int8 needs the compiled kernels: was built from other sources"):
            module.check_precision("int8", CPU)
    with pytest.raises(UsageError, match="fp8 needs a GPU"):
        module.check_precision("fp8", CPU)
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    with pytest.raises(UsageError, match="DFENGINE_BACKEND=reference: multiplies no int8"):
        module.check_precision("int8", CPU)
    monkeypatch.delenv("DFENGINE_BACKEND")
    gpu = torch.device("cuda")
    monkeypatch.setattr(type(module.OPS["conv2d"]), "status", lambda op, device: {"triton": "no triton"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert module.eight_bits(gpu) is None
    monkeypatch.setattr(type(module.OPS["conv2d"]), "status", lambda op, device: {"triton": ""})
    monkeypatch.setenv("DFENGINE_BACKEND", "cuda")
    assert module.eight_bits(gpu) is None
    monkeypatch.delenv("DFENGINE_BACKEND")
    for capability, precision in (((8, 6), None), ((8, 9), "fp8"), ((9, 0), "fp8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, found=capability: found)
        assert module.eight_bits(gpu) == precision
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    for precision, message in (("int8", "int8 is one of CPUs"), ("fp8", "compute capability 8.9 or later")):
        with pytest.raises(UsageError, match=message):
            module.check_precision(precision, gpu)


def test_the_iterative_mode_stays_in_float32(made):
    model = tiny_model(mode="iterative", timesteps=20, tau=5, t_s=1, t_b=3)
    checkpoint = Checkpoint(model.config, model.state_dict())
    assert chosen_runner(checkpoint, CPU, "auto", 0).precision == "float32" and made == ["float32"]
    assert with_trial(checkpoint, IMAGES, CPU).trial is None


def test_maps_that_are_not_finite_make_no_trial(checkpoint):
    broken = {name: torch.full_like(v, 3e38) if v.dim() > 1 else v for name, v in checkpoint.state.items()}
    assert with_trial(Checkpoint(tiny_config(), broken), IMAGES, CPU).trial is None


def test_the_half_precision_of_a_processor(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: False)
    assert half_precision(CPU) is None
    monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(module.native, "available", lambda: True)
    for product, expected in (("tiles", "bfloat16"), ("pairs", "bfloat16"), ("float32", None)):
        monkeypatch.setattr(module, "default_product", lambda dtype, product=product: product)
        assert half_precision(CPU) == expected
    monkeypatch.setattr(module.native, "available", lambda: False)  # the modules run, through oneDNN
    assert half_precision(CPU) == "bfloat16"
    monkeypatch.setenv("DFENGINE_BACKEND", "reference")
    assert half_precision(CPU) is None
    assert half_precision(torch.device("cuda")) == "float16"


def test_a_threshold_of_float32_holds_where_auto_chose_another(checkpoint, made, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    calibration = replace(Calibration.by_hand(0.5), precision="float32", seed=0)
    save_checkpoint(path, with_trial(checkpoint.with_calibration(calibration), IMAGES, CPU))
    assert load_checkpoint(path).trial is not None
    assert open_detector(path, "cpu", "auto", 0).precision == "bfloat16"
    assert capsys.readouterr().err == ""
    assert open_detector(path, "cpu", "bfloat16", 0).precision == "bfloat16"
    assert "was set with precision float32, but precision bfloat16 is used" in capsys.readouterr().err
