"""Training from a folder of normal images (DESIGN section 1, "Training")."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dfengine import signals
from dfengine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dfengine.data.images import list_images
from dfengine.data.synthesis import Synthesizer
from dfengine.data.textures import TextureSource
from dfengine.data.training_set import validation_set
from dfengine.engine.modules import ModuleRunner
from dfengine.engine.runner import make_runner
from dfengine.errors import DfengineError, UsageError
from dfengine.evaluation.calibration import calibrate
from dfengine.models import ModelConfig
from dfengine.precision import with_trial
from dfengine.training.config import TrainConfig, start_path
from dfengine.training.data import read_normals
from dfengine.training.distributed import World
from dfengine.training.log import RunLog
from dfengine.training.outputs import check_outputs, held, run_folder_of
from dfengine.training.plan import Automatic, settle
from dfengine.training.probe import agreed_precision
from dfengine.training.record import training_record
from dfengine.training.schedule import Budget, Clock, Pace, stage_of
from dfengine.training.state import (
    NOTHING_YET,
    STATE_FILE,
    RunState,
    TrainingInterrupted,
    check_identity,
    interrupted_by,
    kept_in,
    load_state,
    read_state,
)
from dfengine.training.trainer import Trainer, TrainingDiverged
from dfengine.training.validation import run, tolerance, validate, verdict
from dfengine.wording import counted

MAX_VALIDATION_NORMALS = 64
MAX_VALIDATING = 0.05  # share of a budget of minutes
INFERENCE_SEED = 0  # of validation and calibration: the seed that detection takes by default


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives. `record` is the training record inside the checkpoint `out`; `run_folder` holds state,
    log.csv, loss.png, panels/ and tensorboard/."""

    out: Path
    run_folder: Path
    record: dict[str, Any]


def train(
    config: TrainConfig,
    model_config: ModelConfig | Automatic,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    stop: Callable[[int], bool] | None = None,
) -> TrainResult:
    """Trains a detector on the normal images of the folder `data` and writes the checkpoint `out`.

    An `Automatic` model is chosen from the images and the budget (`training/plan.py`), which is said and recorded.
    Log, panels and state go to `run_folder_of(out)`; both are checked before the images are read.
    `resume` continues the state in the run folder, exactly as if it had never stopped (bit for bit on CPU with a budget
    in steps or epochs and the same number of threads); a finished run is left as it is. `stop(step)`, asked after each
    step, ends the run as Ctrl-C does when it returns True. Under torchrun, every process calls this with the same
    arguments; the main one logs and writes.

    Raises `DataError` for data that cannot be trained on, `UsageError` for options that do not fit each other or the
    saved state, `DfengineError` for an `out` that cannot be written, `TrainingDiverged` when a loss is not finite,
    `TrainingInterrupted` (exit code 130, or 143 for SIGTERM) after Ctrl-C, SIGTERM, `stop` or `leg_minutes`, when the
    state has been saved; before the first step, a signal finds nothing to save.
    """
    if config.workers is None:
        cpus = os.cpu_count() or 1
        config = config.replace(workers=min(8, cpus // 2))
    out, data = Path(out), Path(data)
    sources = [data, Path(config.textures)] if config.textures else [data]
    check_outputs(out, *sources, resume=resume)
    if config.textures:
        list_images(config.textures)  # better before the work than after it
    threads = torch.get_num_threads()
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        with World(config.device) as world, held(run_folder_of(out), world):
            check_outputs(out, *sources, resume=resume)  # what a run wrote that ended since
            if resume:
                read_state(run_folder_of(out) / STATE_FILE)  # better missed now than once the images are read
            try:
                run = _Run(config, model_config, data, out, world, resume, console)
            except KeyboardInterrupt as error:
                kept = kept_in(run_folder_of(out), 0) if resume else NOTHING_YET
                raise interrupted_by(error, f"training stopped while it was being prepared; {kept}") from None
            return run.go(stop)
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One process of a training run, from reading the images to writing the checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        wanted: ModelConfig | Automatic,
        data: Path,
        out: Path,
        world: World,
        resume: bool,
        console: Console | None,
    ):
        self.data, self.out, self.world = data, out, world
        self.folder = run_folder_of(out)
        self.state_path = self.folder / STATE_FILE
        self.best_path = self.folder / "best.safetensors"
        self.console = (console or Console(stderr=True)) if world.is_main else Console(quiet=True)
        self.resumed = resume
        if not resume:
            self._refuse_unfinished()
        self.plan = settle(wanted, config, data, self.state_path if resume else None, world, self._say)
        self.model_config = model_config = self.plan.model
        self.config = config = config.replace(init=self.plan.init).resolve(model_config)

        size = model_config.image_size
        before = load_checkpoint(start_path(config.init)).training if config.init else None
        self._say(f"reading the images of {data}")
        self.normals = read_normals(data, size, config.holdout, config.seed, before)
        if self.plan.reason:
            self._say(self.plan.reason)
        self._report_data()
        folder = config.textures
        textures = TextureSource.from_folder(folder, size) if folder else TextureSource.procedural(size)
        train_images = self.normals.images[self.normals.train]
        held_out = self.normals.images[self.normals.held_out]
        self.budget = Budget.of(config, len(train_images), world.size)
        self._say("estimating where the objects are, and making anomalies for the validation")
        synthesizer = Synthesizer(train_images, textures, config.synthesis)
        self.validation = validation_set(
            held_out[:MAX_VALIDATION_NORMALS], textures, config.synthesis, config.seed, config.validation_samples
        )

        state, tensors = self._resumed_state() if resume else (self._fresh_state(), None)
        precision = agreed_precision(state.precision, config, model_config, self.normals.images, world, self._say)
        state.precision, state.threads = precision.name, torch.get_num_threads()
        self.trainer = Trainer(config, model_config, train_images, synthesizer, world, precision, state)
        if tensors:
            self.trainer.restore(tensors)
        self.runner = ModuleRunner(self.trainer.average, world.device, precision.name, INFERENCE_SEED)
        if model_config.mode == "iterative":
            # The chain costs t_b + 1 evaluations an image: while training, its norm-guided twin stands in for it.
            self.runner.config = model_config.replace(mode="norm-guided")
        self._validated: dict[str, float] = {}
        self._validating = 0.0  # seconds
        self._signalled = 0  # the signal that asked to stop
        self._ended = False
        self.clock = Clock(state.elapsed)

    @property
    def state(self) -> RunState:
        return self.trainer.state

    def go(self, stop: Callable[[int], bool] | None) -> TrainResult:
        """Trains to the end of the budget and writes the checkpoint."""
        try:
            return self._go(stop)
        except KeyboardInterrupt as error:
            if self._ended:
                raise
            done, kept = counted(self.state.step, "step"), kept_in(self.folder, self.state.step)
            raise interrupted_by(error, f"training stopped at once, after {done}; {kept}") from None

    def _go(self, stop: Callable[[int], bool] | None) -> TrainResult:
        record = {}
        with ExitStack() as stack:
            stack.enter_context(signals.handling(self._ask))
            stack.callback(self.trainer.close)
            log = None
            if self.world.is_main:
                resume_step = self.state.step if self.resumed else None
                log = stack.enter_context(RunLog(self.folder, self.console, resume_step))
                if not self.state.finished:
                    self._begin(log)
            try:
                self._loop(log, stop)
            except TrainingDiverged as error:
                kept = f"the last good state is kept in {self.folder}" if self.state_path.exists() else "no state yet"
                raise TrainingDiverged(f"{error} ({kept})") from None
            if log:
                record = self._finish(log)
            self._ended = True
            self.world.barrier()
        return TrainResult(self.out, self.folder, record)

    def _loop(self, log: RunLog | None, stop: Callable[[int], bool] | None) -> None:
        config, state = self.config, self.state
        asked, saved_at = False, 0.0
        logged_step, pace = state.step, Pace(self.budget.steps)
        before = self.budget.progress(state.step, state.elapsed)
        while True:
            if config.leg_minutes is not None and self.clock.this_process >= 60 * config.leg_minutes:
                asked = True
            interrupted, state.elapsed = self.world.agree(asked or bool(self._signalled), self.clock.elapsed)
            progress = self.budget.progress(state.step, state.elapsed)
            due = int(progress * config.validations) > int(before * config.validations)
            if state.step > logged_step and (due or state.step % config.log_every == 0):
                row = self._row(before) | {"progress": progress} | self.trainer.means()
                logged_step, step_seconds = state.step, pace.at(state.step, state.elapsed)
                if log:
                    log.row(row, self.budget.seconds_left(state.step, state.elapsed, step_seconds))
            if log and due and (progress >= 1 or self._affordable()):
                self._validate(before, log)
            if log and (due or self.clock.this_process - saved_at >= 60 * config.save_minutes):
                saved_at = self.clock.this_process
                self._save(log)
            if progress >= 1:
                return
            if interrupted:
                if log and (state.step or asked):  # a leg ends in a state, however short it is
                    self.trainer.save(self.state_path)
                self.world.barrier()  # nobody may go on, and perhaps resume, before the state is there
                stopped = TrainingInterrupted(
                    f"training stopped at step {state.step} ({100 * progress:.1f}%); {kept_in(self.folder, state.step)}"
                )
                stopped.exit_code = 128 + (self._signalled or signal.SIGINT)
                raise stopped
            stage = stage_of(config, progress)
            pace.enter(stage, state.step, self.clock.elapsed)
            self.trainer.step(stage, progress)
            asked = stop is not None and stop(state.step)
            before = progress

    def _begin(self, log: RunLog) -> None:
        budget, state = self.budget, self.state
        seconds = None if budget.seconds is None else budget.seconds_left(state.step, state.elapsed, 0.0)
        steps = None if budget.steps is None else budget.steps - state.step
        log.begin(budget.progress(state.step, state.elapsed), seconds, steps)

    def _affordable(self) -> bool:
        """Whether another validation leaves a budget of minutes to training. A budget of steps validates when due."""
        return self.budget.seconds is None or self._validating <= MAX_VALIDATING * self.clock.elapsed

    def _row(self, progress: float) -> dict[str, float]:
        """The counters of a log row; `progress` is where its last step began."""
        state, groups = self.state, self.trainer.optimizer.param_groups
        return {
            "step": state.step,
            "stage": stage_of(self.config, progress),
            "progress": progress,
            "seconds": state.elapsed,
            "images": state.images_seen,
            "rate": groups[0]["lr"],
            "segmentation_rate": groups[1]["lr"],
        }

    def _validate(self, progress: float, log: RunLog) -> None:
        """Logs metrics and panel, and keeps the weights as the best where they are."""
        start = self.clock.elapsed
        self.trainer.refresh_average()
        row = self._row(progress)
        values, panel = validate(self.runner, self.validation, row["stage"], self.config.seed)
        self._validated = {"step": self.state.step, **values}
        row = {key: row[key] for key in ("step", "stage", "progress", "seconds")} | values
        log.validation(row, panel)
        self._validating += self.clock.elapsed - start
        score, best = values.get("val_score"), self.state.best.get("best_score", 0.0)
        if score is None or self.config.keep == "last":
            return
        if score < best - tolerance(best, int((self.validation.labels == 0).sum())):
            return
        try:
            weights = self.trainer.average.state_dict()
            save_checkpoint(self.best_path, Checkpoint(self.model_config, weights, self._record(self._validated)))
        except DfengineError as error:
            log.warn(str(error))
        else:
            self.state.best = self._validated | {"best_score": max(best, score)}

    def _save(self, log: RunLog) -> None:
        """Saves the state; a failing disk is reported, and the state before stays."""
        try:
            self.trainer.save(self.state_path)
        except TrainingDiverged:
            raise
        except DfengineError as error:
            log.warn(str(error))

    def _finish(self, log: RunLog) -> dict[str, Any]:
        """Writes the checkpoint: best or last weights, training record, and a first calibration. Returns the record.

        That of a run which was finished before stays: it may have been calibrated since.
        """
        if self.state.finished and self.out.exists():
            log.say(f"the run is finished already; {self.out} is left as it is")
            return load_checkpoint(self.out).training
        if self._validated.get("step") != self.state.step:
            self._validate(1.0, log)
        weights, metrics = self.trainer.average.state_dict(), self._validated
        if self.state.best and self.state.best["step"] != self.state.step and self.config.keep == "best":
            weights, metrics = load_checkpoint(self.best_path).state, self.state.best
        checkpoint = Checkpoint(self.model_config, weights, self._record(metrics))
        detector = make_runner(checkpoint.build(), self.world.device, "float32", INFERENCE_SEED)
        held_out = self.normals.images[self.normals.held_out]
        scores = run(detector, held_out)[2]
        calibration = calibrate(scores, self.config.false_alarm_rate, INFERENCE_SEED, "float32")
        checkpoint = with_trial(checkpoint.with_calibration(calibration), held_out, self.world.device)
        save_checkpoint(self.out, checkpoint)
        self.state.finished = True
        self._save(log)
        for line in verdict(metrics, self.normals.overlap):
            log.say(line)
        log.say(calibration.message)
        log.say(f"checkpoint written to {self.out}; log, panels and state are in {self.folder}")
        log.say("next: look at the last panel; `dfengine calibrate` on more normal images; `dfengine detect`")
        return checkpoint.training

    def _record(self, metrics: dict[str, float]) -> dict[str, Any]:
        seconds = self.clock.elapsed
        return training_record(self.config, self.data, self.normals, self.state, self.world, seconds, metrics)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _report_data(self) -> None:
        normals = self.normals
        for name, reason in normals.skipped:
            self._say(f"dfengine: warning: skipped {name}: {reason}")
        self._say(f"{counted(len(normals.train), 'normal image')} to train on, {len(normals.held_out)} held out")
        if normals.overlap:
            self._say(
                f"the weights see {normals.overlap} of the held-out images, in this run or before it: validation and "
                "threshold are optimistic"
            )

    def _identity(self) -> dict[str, Any]:
        identity = {
            "model": self.model_config.to_dict(),
            "training": self.config.identity(),
            "data fingerprint": self.normals.fingerprint,
            "choice of held-out images": hashlib.sha256(str(self.normals.held_out.tolist()).encode()).hexdigest()[:16],
            "number of processes": self.world.size,
            "type of device": self.world.device.type,
        }
        return json.loads(json.dumps(identity))  # as it reads back from a file

    def _resumed_state(self) -> tuple[RunState, dict[str, torch.Tensor]]:
        state, tensors = load_state(self.state_path, self.world.device)
        check_identity(self.state_path, state.identity, self._identity())
        threads = torch.get_num_threads()
        if state.threads != threads:
            self._say(
                f"resuming with {counted(threads, 'thread')} instead of {state.threads}: results will agree to "
                "rounding, not bit for bit"
            )
        return state, tensors

    def _refuse_unfinished(self) -> None:
        """Raises `UsageError` where the run folder holds an unfinished run, which is not thrown away."""
        if self.state_path.exists() and not (old := read_state(self.state_path)).finished:
            raise UsageError(
                f"{self.folder}: holds an unfinished run at step {old.step}; go on with --resume, or remove that folder"
            )

    def _fresh_state(self) -> RunState:
        """A new state, in a run folder cleared of an earlier, finished run."""
        self.world.barrier()
        if self.world.is_main:
            for leftover in (self.state_path, self.best_path):
                leftover.unlink(missing_ok=True)
            for leftover in ("panels", "tensorboard"):
                shutil.rmtree(self.folder / leftover, ignore_errors=True)
        return RunState(self._identity(), precision=self.config.precision, plan=self.plan.record())

    def _ask(self, number: int, _frame: Any) -> None:
        """SIGINT and SIGTERM ask the loop to stop after the present step; a later SIGINT stops at once."""
        if not signals.counts():
            return
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled, self.trainer.stopping = number, True
