"""Whole runs of the smallest model on a handful of images."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dfengine import signals
from dfengine.checkpoint import load_checkpoint, save_checkpoint
from dfengine.data.folders import content_digest
from dfengine.data.images import load_uint8
from dfengine.engine.modules import ModuleRunner
from dfengine.errors import CheckpointError, DataError, DfengineError, UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.models import preset
from dfengine.training import TrainConfig, TrainingDiverged, TrainingInterrupted, run_folder_of, schedule, train
from dfengine.training import log as log_module
from dfengine.training import trainer as trainer_module
from dfengine.training.log import read_log
from dfengine.training.state import load_state, save_state
from dfengine.training.validation import tolerance
from tests.helpers import tiny_config

CONFIG = TrainConfig(
    steps=8,
    batch_size=2,
    accumulate=2,
    denoiser_share=0.25,
    denoiser_every=2,
    validations=2,
    validation_samples=4,
    log_every=2,
    workers=0,
    threads=1,
    precision="float32",
)


def state_of(out):
    return load_state(run_folder_of(out) / "state.safetensors", torch.device("cpu"))


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.fixture(scope="module")
def straight(normals, tmp_path_factory):
    """An uninterrupted run of 8 steps."""
    out = tmp_path_factory.mktemp("straight") / "net.safetensors"
    return train(CONFIG, tiny_config(), normals, out)


@pytest.fixture(autouse=True)
def no_plots(straight, monkeypatch):
    """One run with loss.png is enough: it would take half the time of each."""
    monkeypatch.setattr(log_module, "plot_losses", lambda path, rows: None)


def test_the_time_left_follows_the_smoothed_pace(normals, tmp_path, monkeypatch):
    left, asked, entered = [], [], []
    monkeypatch.setattr(log_module.RunLog, "row", lambda self, row, seconds: left.append((row["step"], seconds)))
    monkeypatch.setattr(schedule.Pace, "enter", lambda self, stage, step, seconds: entered.append((stage, step)))
    monkeypatch.setattr(schedule.Pace, "at", lambda self, step, seconds: asked.append(step) or 7.0)
    train(CONFIG, tiny_config(), normals, tmp_path / "net.safetensors")
    assert entered == [(1, 0), (1, 1), *((2, step) for step in range(2, 8))]
    assert asked == [2, 4, 6, 8] and left == [(2, 42.0), (4, 28.0), (6, 14.0), (8, 0.0)]


def test_a_run_leaves_a_calibrated_checkpoint_and_its_log(straight, normals):
    checkpoint = load_checkpoint(straight.out)
    record = checkpoint.training
    assert record == straight.record
    assert record["stage_steps"] == [2, 6]
    assert record["images_seen"] == 32
    assert record["data"]["images"] == 12
    assert len(record["data"]["held_out"]) == 2 and set(record["data"]["held_out"]) < set(os.listdir(normals))
    trained = set(os.listdir(normals)) - set(record["data"]["held_out"])
    assert record["data"]["trained"] == sorted(content_digest(normals / name) for name in trained)
    assert record["data"]["held_out_also_trained"] == 0
    assert record["config"] == CONFIG.resolve(tiny_config()).to_dict()
    assert {"val_noise_loss", "val_image_auroc", "val_pixel_ap", "val_score"} < record["validation"].keys()
    names = {p.relative_to(straight.run_folder).as_posix() for p in straight.run_folder.rglob("*.*")}
    expected = {"state.safetensors", "log.csv", "loss.png", "panels/step-0000004.png", "panels/step-0000008.png"}
    assert expected < names
    assert any(name.startswith("tensorboard/events") for name in names)
    rows = read_log(straight.run_folder / "log.csv")
    assert [row["step"] for row in rows if "noise_loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "val_noise_loss" in row] == [4, 8]

    runner = ModuleRunner(checkpoint.build())
    held_out = np.stack([load_uint8(normals / name, 32) for name in record["data"]["held_out"]]) / np.float32(255)
    assert checkpoint.calibration.threshold == pytest.approx(runner.run(held_out).pred_score.max().item(), abs=1e-6)
    assert checkpoint.calibration.n_normals == 2 and not checkpoint.calibration.estimated
    np.testing.assert_array_equal(checkpoint.trial.images, np.rint(255 * held_out).astype(np.uint8))


def test_averages_move_only_with_their_network(straight):
    assert state_of(straight.out)[0].average_updates == {"reconstruction": 2 + 3, "segmentation": 6}


@pytest.mark.parametrize("step, workers", [(2, 0), (5, 2)])
def test_a_resumed_run_ends_with_the_same_bits(straight, normals, tmp_path, step, workers):
    """Stopped between the stages and in the second, with any number of workers."""
    out, config = tmp_path / "net.safetensors", CONFIG.replace(workers=workers)
    with pytest.raises(TrainingInterrupted, match="--resume") as stopped:
        train(config, tiny_config(), normals, out, stop=lambda now: now == step)
    assert stopped.value.exit_code == 130
    assert not out.exists()
    with pytest.raises(UsageError, match=f"unfinished run at step {step}"):
        train(config, tiny_config(), normals, out)
    result = train(config, tiny_config(), normals, out, resume=True)
    assert_same(state_of(out)[1], state_of(straight.out)[1])
    assert_same(load_checkpoint(out).state, load_checkpoint(straight.out).state)
    assert load_checkpoint(out).calibration == load_checkpoint(straight.out).calibration
    steps = [row["step"] for row in read_log(result.run_folder / "log.csv") if "noise_loss" in row]
    assert steps == [2, 4, 6, 8]


def test_a_finished_run_is_left_as_it_is(straight, normals, tmp_path, lines):
    out = tmp_path / "copy" / straight.out.name
    shutil.copytree(straight.out.parent, out.parent)
    save_checkpoint(out, load_checkpoint(out).with_calibration(Calibration.by_hand(0.25)))
    before = out.read_bytes()
    config = CONFIG.replace(threads=2)
    assert train(config, tiny_config(), normals, out, resume=True, console=lines).record == straight.record
    assert out.read_bytes() == before
    assert "finished already" in lines.file.getvalue()
    assert "resuming with 2 threads instead of 1: results will agree to rounding" in lines.file.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(normals, tmp_path, number):
    out = tmp_path / "net.safetensors"
    before = signal.getsignal(number)

    def interrupt(step):
        if step == 2:
            # As a terminal or a scheduler does: to the whole family.
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)
        return False

    with pytest.raises(TrainingInterrupted, match="step 2") as stopped:
        train(CONFIG.replace(workers=1), tiny_config(), normals, out, stop=interrupt)
    assert stopped.value.exit_code == 128 + number
    assert not multiprocessing.active_children()
    assert state_of(out)[0].step == 2
    assert signal.getsignal(number) is before


def test_several_ctrl_c_at_once_are_one(normals, tmp_path):
    def impatient(step):
        for _ in range(3 if step == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return False

    with pytest.raises(TrainingInterrupted, match=r"stopped at step 2 .*--resume goes on") as stopped:
        train(CONFIG, tiny_config(), normals, tmp_path / "net.safetensors", stop=impatient)
    assert stopped.value.exit_code == 130 and state_of(tmp_path / "net.safetensors")[0].step == 2


def test_a_signal_that_is_ignored_stays_ignored(normals, tmp_path):
    """As in a script's background job."""

    def interrupt(step):
        os.kill(os.getpid(), signal.SIGINT)
        return False

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(CONFIG.replace(steps=4), tiny_config(), normals, tmp_path / "net.safetensors", stop=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert state_of(tmp_path / "net.safetensors")[0].step == 4


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_after_the_checkpoint_is_written_stops_no_training(normals, tmp_path, monkeypatch, times):
    """The first finds nothing to stop; the second ends what is left to do, and nothing is said to go on from."""
    out, honest = tmp_path / "net.safetensors", trainer_module.Trainer.close

    def interrupted(self):
        for _ in range(times * self.state.finished):
            os.kill(os.getpid(), signal.SIGINT)
        honest(self)

    monkeypatch.setattr(trainer_module.Trainer, "close", interrupted)
    monkeypatch.setattr(signals, "BURST", 0.0)
    with nullcontext() if times == 1 else pytest.raises(KeyboardInterrupt):
        train(CONFIG.replace(steps=4), tiny_config(), normals, out)
    assert load_checkpoint(out).training["steps"] == 4 and state_of(out)[0].finished


@pytest.mark.parametrize("saved", [False, True])
def test_a_second_ctrl_c_stops_at_once_and_says_what_was_saved(normals, tmp_path, monkeypatch, saved):
    out, honest = tmp_path / "net.safetensors", trainer_module.Trainer._next

    def impatient(self, stage, part):
        if self.state.step == 3:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return honest(self, stage, part)

    monkeypatch.setattr(trainer_module.Trainer, "_next", impatient)
    monkeypatch.setattr(signals, "BURST", 0.0)
    if not saved:
        monkeypatch.setattr(trainer_module.Trainer, "save", lambda self, path: None)
    reason = "the state at step 2 is saved in .*--resume goes on" if saved else "nothing was saved$"
    config = CONFIG.replace(validations=4)
    with pytest.raises(TrainingInterrupted, match=f"training stopped at once, after 3 steps; {reason}") as stopped:
        train(config, tiny_config(), normals, out)
    assert stopped.value.exit_code == 130 and run_folder_of(out).is_dir() and not out.exists()


def test_a_step_is_finished_without_the_workers_that_a_signal_has_ended(straight, normals, tmp_path, monkeypatch):
    out = tmp_path / "net.safetensors"
    honest = trainer_module.Trainer._next

    def interrupted(self, stage, part):
        if self.state.step == 3 and part == 1:
            workers = multiprocessing.active_children()
            for process in (*workers, multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)
            for process in workers:
                process.join(10)
            assert [process.exitcode for process in workers] == [0, 0]
        return honest(self, stage, part)

    monkeypatch.setattr(trainer_module.Trainer, "_next", interrupted)
    with pytest.raises(TrainingInterrupted, match="step 4"):
        train(CONFIG.replace(workers=2), tiny_config(), normals, out)
    monkeypatch.undo()
    train(CONFIG, tiny_config(), normals, out, resume=True)
    assert_same(state_of(out)[1], state_of(straight.out)[1])


def test_a_worker_that_dies_by_itself_is_an_error(normals, tmp_path, monkeypatch):
    honest = trainer_module.Trainer._next

    def killed(self, stage, part):
        if self.state.step == 1:
            for process in multiprocessing.active_children():
                process.terminate()
                process.join(10)
        return honest(self, stage, part)

    monkeypatch.setattr(trainer_module.Trainer, "_next", killed)
    with pytest.raises(RuntimeError, match="worker"):
        train(CONFIG.replace(workers=1), tiny_config(), normals, tmp_path / "net.safetensors")


def test_another_configuration_or_data_is_not_resumed(normals, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(normals, folder)
    out = tmp_path / "net.safetensors"
    with pytest.raises(TrainingInterrupted):
        train(CONFIG, tiny_config(), folder, out, stop=lambda step: True)
    with pytest.raises(UsageError, match="training seed was 0 and is now 1"):
        train(CONFIG.replace(seed=1), tiny_config(), folder, out, resume=True)
    with pytest.raises(UsageError, match="model t_b was 400 and is now 500"):
        train(CONFIG, tiny_config(t_b=500), folder, out, resume=True)
    path = run_folder_of(out) / "state.safetensors"
    state, tensors = load_state(path, torch.device("cpu"))
    state.identity["type of device"] = "cuda"
    save_state(path, state, tensors)
    with pytest.raises(UsageError, match="type of device was 'cuda' and is now 'cpu'"):
        train(CONFIG, tiny_config(), folder, out, resume=True)
    Image.new("RGB", (40, 40)).save(folder / "00.png")
    with pytest.raises(UsageError, match="the training images are not those of the run"):
        train(CONFIG, tiny_config(), folder, out, resume=True)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(normals, tmp_path, monkeypatch):
    out = tmp_path / "net.safetensors"
    config = CONFIG.replace(validations=4)
    honest = trainer_module.Trainer._next

    def poisoned(self, stage, part):
        batch = honest(self, stage, part)
        if self.state.step == 5:
            with torch.no_grad():
                self.model.reconstruction.out[-1].bias.fill_(float("nan"))
        return batch

    monkeypatch.setattr(trainer_module.Trainer, "_next", poisoned)
    with pytest.raises(TrainingDiverged, match="not finite at step 5.*last good state"):
        train(config, tiny_config(), normals, out)
    state, tensors = state_of(out)
    assert state.step == 4
    assert all(torch.isfinite(value).all() for value in tensors.values())


def test_a_full_disk_is_reported_and_training_goes_on(normals, tmp_path, monkeypatch, lines):
    def full(path, state, tensors):
        raise DfengineError(f"{path}: cannot be written: no space left on device")

    monkeypatch.setattr(trainer_module, "save_state", full)
    out = tmp_path / "net.safetensors"
    train(CONFIG, tiny_config(), normals, out, console=lines)
    assert "dfengine: warning: " in lines.file.getvalue() and "no space left on device" in lines.file.getvalue()
    assert load_checkpoint(out).training["steps"] == 8


def test_unreadable_images_are_named_and_too_few_refused(normals, tmp_path, lines):
    folder = tmp_path / "few"
    folder.mkdir()
    shutil.copy(normals / "00.png", folder)
    (folder / "bad.png").write_text("no image")
    with pytest.raises(DataError, match="at least 2 normal images, found 1 .1 unreadable"):
        train(CONFIG, tiny_config(), folder, tmp_path / "net.safetensors")
    shutil.copy(normals / "01.png", folder)
    config = CONFIG.replace(steps=2, validations=1)
    result = train(config, tiny_config(), folder, tmp_path / "net.safetensors", console=lines)
    assert "dfengine: warning: skipped bad.png" in lines.file.getvalue()
    assert "the weights see 2 of the held-out images" in lines.file.getvalue()
    assert result.record["data"]["skipped"] == ["bad.png"]
    assert result.record["data"]["held_out_also_trained"] == 2


def test_a_minute_budget_ends_in_time_through_both_stages(normals, tmp_path):
    config = CONFIG.replace(steps=None, minutes=0.03)
    record = train(config, tiny_config(), normals, tmp_path / "net.safetensors").record
    assert 1.8 <= record["seconds"] < 15
    assert min(record["stage_steps"]) >= 1


@pytest.mark.parametrize("name", ["diffusionad", "diffusionad-v1", "iterative"])
def test_every_method_trains_by_the_papers_recipe(normals, tmp_path, name):
    tiny, sizes = tiny_config(), ("image_size", "base", "multipliers", "heads", "seg_base", "attention_factors")
    short = dict(timesteps=50, beta_end=0.3, tau=5, t_s=2, t_b=7)
    model = preset(name, **{key: getattr(tiny, key) for key in sizes}, **short)
    config = CONFIG.replace(steps=2, recipe="paper", denoiser_share=None, denoiser_every=None, validations=1)
    result = train(config, model, normals, tmp_path / "net.safetensors")
    assert result.record["stage_steps"] == [0, 2]
    assert result.record["images_seen"] == 8
    assert load_checkpoint(result.out).config == model


def test_training_learns(normals, tmp_path):
    config = CONFIG.replace(
        steps=28, batch_size=6, accumulate=1, denoiser_share=0.5, validations=1, log_every=7, learning_rate=5e-3,
        segmentation_rate=5e-3,
    )  # fmt: skip
    result = train(config, tiny_config(), normals, tmp_path / "net.safetensors")
    rows = [row for row in read_log(result.run_folder / "log.csv") if "noise_loss" in row]
    assert rows[-1]["noise_loss"] < 0.8 * rows[0]["noise_loss"]
    joint = [row["mask_loss"] for row in rows if row["stage"] == 2]
    assert joint[-1] < 0.9 * joint[0]


def test_a_run_starts_from_the_weights_it_is_given(straight, normals, tmp_path):
    start = tmp_path / "start.safetensors"
    save_checkpoint(start, replace(load_checkpoint(straight.out), verified={"bfloat16": {"device": "cpu"}}))
    config = CONFIG.replace(steps=1, denoiser_share=1.0, init=str(start), learning_rate=1e-12, keep="last", seed=1)
    result = train(config, tiny_config(), normals, tmp_path / "net.safetensors")
    assert result.record["data"] == straight.record["data"]
    assert load_checkpoint(result.out).verified == {}  # that was of the weights before
    before, after = load_checkpoint(start).state, load_checkpoint(result.out).state
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="has shape"):
        train(config, tiny_config(base=16), normals, tmp_path / "other.safetensors")


def test_a_later_validation_may_be_worse_by_one_standard_error():
    assert tolerance(0.9, 12) == pytest.approx(0.0866, abs=1e-4)
    assert tolerance(0.9, 1200) == pytest.approx(0.00866, abs=1e-5)
    assert tolerance(1.0, 12) == tolerance(0.0, 12) == 0.005
