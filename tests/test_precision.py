"""What "auto" chooses, on any machine: the half precision of this one is set by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dfengine import precision as module
from dfengine.checkpoint import Checkpoint, Trial, load_checkpoint, save_checkpoint
from dfengine.commands.scoring import open_detector
from dfengine.detector import Detector
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
