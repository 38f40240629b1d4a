from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfengine.models import preset
from dfengine.training import TrainConfig
from dfengine.training.schedule import Budget, Pace, learning_rates, stage_of
from tests.helpers import tiny_config


def test_budgets():
    assert Budget.of(TrainConfig(steps=40), 100, 2) == Budget(None, 40)
    assert Budget.of(TrainConfig(minutes=2), 100, 2) == Budget(120.0, None)
    assert Budget.of(TrainConfig(epochs=3, batch_size=8, accumulate=2), 100, 2).steps == 3 * math.ceil(100 / 32)
    assert Budget(None, 40).progress(10, 1e9) == 0.25
    assert Budget(120.0, None).progress(10, 60.0) == 0.5
    assert Budget(120.0, None).progress(10, 500.0) == 1.0
    assert Budget(120.0, None).seconds_left(5, 100.0, 1.0) == 20.0
    assert Budget(None, 40).seconds_left(30, 100.0, 0.5) == 5.0


def test_one_slow_interval_changes_the_pace_a_little_and_slower_steps_wholly():
    pace, now = Pace(60), [0, 0.0]
    pace.enter(1, 0, 0.0)

    def after(steps: int, seconds: float) -> float:
        now[:] = now[0] + steps, now[1] + seconds
        return pace.at(*now)

    assert after(2, 20.0) == 10.0
    even = [after(2, 20.0) for _ in range(5)]
    assert even == pytest.approx([10.0] * 5)
    assert 10 < after(2, 40.0) < 12.5  # with a validation, say
    assert 9 < after(2, 2.0) < 10.5
    later = [after(2, 60.0) for _ in range(20)]
    assert later == sorted(later) and later[-1] == pytest.approx(30, rel=0.1)
    unlimited = Pace(None)
    unlimited.enter(2, 3, 4.0)
    assert unlimited.at(8, 14.0) == 2.0


def test_the_time_left_is_right_from_the_first_steps_of_a_slower_stage_on():
    budget, pace, elapsed = Budget(None, 1000), Pace(1000), 0.0
    for step in range(1000):  # 104 at 1 s, the others at 2.5 s; a row every 10
        stage = 1 if step < 104 else 2
        pace.enter(stage, step, elapsed)
        elapsed += 1.0 if stage == 1 else 2.5
        if (step + 1) % 10 == 0:
            left = budget.seconds_left(step + 1, elapsed, pace.at(step + 1, elapsed))
            assert left == pytest.approx((999 - step) * (1.0 if stage == 1 else 2.5))


def test_stage_boundary_and_peaks():
    config = TrainConfig(steps=100, denoiser_share=0.4, learning_rate=1e-3, segmentation_rate=2e-3)
    config = config.resolve(tiny_config())
    assert [stage_of(config, p) for p in (0, 0.39, 0.4, 0.99)] == [1, 1, 2, 2]
    rates = [learning_rates(config, step / 10_000, step) for step in range(10_000)]
    first, joint = rates[:4000], rates[4000:]
    assert max(r[0] for r in first) == pytest.approx(1e-3, rel=0.01)
    assert max(r[0] for r in joint) == pytest.approx(0.5e-3, rel=0.01)
    assert max(r[1] for r in joint) == pytest.approx(2e-3, rel=0.01)
    assert first[-1][0] == pytest.approx(1e-5, rel=0.05)
    assert joint[-1][0] == pytest.approx(0.5e-5, rel=0.05)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_rates_are_always_positive_and_below_their_peaks(progress, share, warmup):
    config = TrainConfig(steps=10, denoiser_share=share, warmup=warmup).resolve(tiny_config())
    rate, segmentation_rate = learning_rates(config, progress, 3)
    assert 0 < rate <= config.learning_rate
    assert 0 < segmentation_rate <= config.segmentation_rate


def test_paper_recipe_rates():
    model = preset("diffusionad")
    config = TrainConfig(steps=100, recipe="paper").resolve(model)
    assert stage_of(config, 0.0) == 2
    assert learning_rates(config, 0.7, 10) == (1e-4, pytest.approx(0.0, abs=1e-12))
    assert learning_rates(config, 0.7, 20) == (1e-4, pytest.approx(1e-5))
    config = TrainConfig(steps=100, recipe="paper").resolve(preset("diff-fastener"))
    assert learning_rates(config, 0.7, 10) == (1e-4, 1e-4)
