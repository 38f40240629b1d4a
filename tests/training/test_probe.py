from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.models import cost
from dfengine.training import TrainConfig, probe
from dfengine.training.distributed import World
from dfengine.training.probe import _mixed_rate, _together, images_per_flop, images_per_second
from dfengine.training.trainer import Trainer
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def measured(config: TrainConfig) -> float:
    with World("cpu") as world:
        return images_per_second(config.resolve(tiny_config()), tiny_config(), IMAGES, "float32", world)


@pytest.mark.parametrize(
    "fields, kinds",
    [({}, {(1, 0), (2, 0), (2, 1)}), ({"recipe": "paper"}, {(2, 0)}), ({"denoiser_share": 1.0}, {(1, 0)})],
)
def test_the_steps_of_a_run_are_timed_and_no_others(monkeypatch, fields, kinds):
    taken, honest = [], Trainer.step

    def step(self, stage, progress):
        taken.append((stage, self.state.stage_steps[1]))
        honest(self, stage, progress)

    monkeypatch.setattr(Trainer, "step", step)
    assert 0 < measured(TrainConfig(minutes=1, batch_size=4, workers=1, **fields)) < 1e5
    assert sorted(taken) == sorted([*kinds] * probe.STEPS["cpu"])


def test_a_memory_that_is_too_small_is_a_rate_of_zero(monkeypatch):
    def full(self, stage, progress):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "step", full)
    assert measured(TrainConfig(minutes=1)) == 0


@pytest.mark.parametrize("slowest, expected", [(10.0, 20.0), (0.0, 0.0)])
def test_the_slowest_process_counts_and_none_waits_in_a_step(monkeypatch, slowest, expected):
    """A `World` of two without a process group: whatever is asked of the other process in a step raises an error."""
    monkeypatch.setattr(probe, "_mixed_rate", lambda config, cost_of: cost_of(2, True) and 100.0)
    world, config, asked = World("cpu"), TrainConfig(minutes=1, batch_size=2, workers=0), []
    world.size, world.rank = 2, 1
    monkeypatch.setattr(world, "minimum", lambda rate: asked.append(rate) or slowest)
    assert images_per_second(config.resolve(tiny_config()), tiny_config(), IMAGES, "float32", world) == expected
    assert asked == [100.0]


def test_kinds_of_step_are_mixed_as_a_run_mixes_them():
    costs = {(1, True): 2.0, (2, True): 5.0, (2, False): 1.0}
    config = TrainConfig(minutes=1, denoiser_share=0.25, denoiser_every=4)
    # A quarter of the time at 1/2, the rest at four images for 5 + 1 + 1 + 1.
    assert _mixed_rate(config, lambda *kind: costs[kind]) == pytest.approx(0.25 / 2 + 0.75 * 4 / 8)
    every = config.replace(denoiser_share=0.0, denoiser_every=1)
    assert _mixed_rate(every, lambda *kind: {(2, True): 5.0}[kind]) == pytest.approx(1 / 5)


def test_flops_of_a_denoiser_only_run():
    model = tiny_config()
    config = TrainConfig(minutes=1, denoiser_share=1.0).resolve(model)
    assert 1 / images_per_flop(config, model) == pytest.approx(3 * cost(model).reconstruction_flops)


@pytest.mark.parametrize(
    "cores, threads, workers, seconds",
    [
        (2, 2, 0, 1.4),  # in turn
        (2, 2, 1, 1.2),  # both cores are busy
        (2, 1, 1, 1.0),  # beside each other
        (16, 1, 8, 1.0),
        (1, 1, 1, 1.4),
    ],
)
def test_preparing_beside_computing(monkeypatch, cores, threads, workers, seconds):
    monkeypatch.setattr(probe.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(probe.torch, "get_num_threads", lambda: threads)
    assert _together(1.0, 0.4, workers, torch.device("cpu")) == pytest.approx(seconds)


def test_a_fast_device_waits_for_its_workers(monkeypatch):
    monkeypatch.setattr(probe.os, "cpu_count", lambda: 16)
    assert _together(0.01, 0.4, 8, torch.device("cuda")) == pytest.approx(0.05)
