"""Run by test_distributed.py under torchrun: FOLDER DATA. Trains in two processes, whole and in two parts."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from dfengine.errors import DfengineError  # noqa: E402
from dfengine.files import locked  # noqa: E402
from dfengine.training import (  # noqa: E402
    Automatic,
    TrainConfig,
    TrainingInterrupted,
    plan,
    probe,
    run_folder_of,
    train,
)
from dfengine.training.trainer import Trainer  # noqa: E402
from tests.helpers import tiny_config  # noqa: E402

CONFIG = TrainConfig(
    steps=4, batch_size=4, validations=2, validation_samples=4, log_every=1, workers=0, threads=1, precision="float32"
)
ONE_STEP = CONFIG.replace(steps=1, denoiser_share=1.0, schedule="constant", ema_decay=0.0, clip=0.0, keep="last")


def main(folder: Path, data: Path) -> None:
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model = tiny_config()
    train(CONFIG, model, data, folder / "straight.safetensors")
    try:
        # Only the second process asks: both must stop after the same step.
        train(CONFIG, model, data, folder / "parts.safetensors", stop=lambda step: rank == 1 and step == 3)
    except TrainingInterrupted:
        train(CONFIG, model, data, folder / "parts.safetensors", resume=True)
    train(ONE_STEP.replace(batch_size=2), model, data, folder / "one.safetensors")
    # The larger model, worth the time of both, is too large for the memory of the second one alone.
    plan.CANDIDATES = tuple(plan.Candidate(candidate, 1) for candidate in (model, tiny_config(base=16)))
    probe.STEPS["cpu"] = 1
    step = Trainer.step

    def full(self, stage, progress):
        if rank == 1 and self.model_config.base == 16:
            raise torch.OutOfMemoryError("out of memory")
        step(self, stage, progress)

    Trainer.step = full
    config = CONFIG.replace(steps=None, minutes=1.0)
    try:
        train(config, Automatic(), data, folder / "picked.safetensors", stop=lambda step: True)
    except TrainingInterrupted:
        dist.barrier()
    taken = folder / "taken.safetensors"
    with locked(run_folder_of(taken)) if rank == 0 else nullcontext():  # as by another run
        dist.barrier()
        try:
            train(CONFIG, model, data, taken)
        except DfengineError as error:
            (folder / f"refused-{rank}.txt").write_text(str(error))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
