from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dfengine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped_checkpoint
from dfengine.errors import ConfigError, DataError, UsageError
from dfengine.models import build_model, preset
from dfengine.training import Automatic, TrainConfig, TrainingInterrupted, loop, plan, probe, run_folder_of, train
from dfengine.training.distributed import World
from dfengine.training.plan import Candidate, choose, settle
from dfengine.training.probe import images_per_flop
from dfengine.training.schedule import Clock
from dfengine.training.state import read_state
from tests.helpers import tiny_config
from tests.training.test_train import CONFIG

# The choice is tested with one need for all; the module's own figures may follow from measurements.
CANDIDATES = tuple(Candidate(candidate.model, 60_000) for candidate in plan.CANDIDATES)
NEEDS = [candidate.images_needed for candidate in plan.CANDIDATES]
NEEDED = 60_000  # of each candidate in these tests
LADDER = tuple(Candidate(candidate.model, NEEDED) for candidate in CANDIDATES)
COST = {candidate.model: cost for candidate, cost in zip(CANDIDATES, (1.0, 2.5, 7.0, 30.0, 450.0), strict=True)}


@pytest.fixture(autouse=True)
def _needs(monkeypatch):
    monkeypatch.setattr(plan, "CANDIDATES", CANDIDATES)


def names(candidates) -> list[str]:
    return [f"{c.model.preset.removeprefix('diff-fastener')} {c.model.image_size}" for c in candidates]


def chosen(images: float, side: float, speed: dict | None = None, close: float = 2.0):
    """(the plan where the smallest candidate sees `images`, the candidates measured for it); `speed` makes some faster
    than their cost says."""
    asked = []

    def measured(model) -> float:
        asked.append(Candidate(model))
        return images / COST[model] * (speed or {}).get(model, 1.0)

    return choose(LADDER, side, measured, COST.get, close, "in 60 minutes on a lathe"), asked


def test_each_candidate_costs_more_than_the_one_before_and_needs_as_much():
    """Then the first that is too large ends the climb."""
    config = TrainConfig(minutes=1)
    costs = [1 / images_per_flop(config.resolve(c.model), c.model) for c in CANDIDATES]
    assert costs == sorted(costs)
    sizes = [c.model.image_size for c in CANDIDATES]
    assert NEEDS == sorted(NEEDS) and sizes == sorted(sizes)
    assert names(CANDIDATES) == ["-tiny 64", "-tiny 128", "-small 128", "-small 256", " 256"]
    assert CANDIDATES[1].model.multipliers == (1, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "images, side, expected",
    [
        (1_000, 1000, 0),
        (149_000, 1000, 0),
        (151_000, 1000, 1),
        (430_000, 1000, 2),
        (1_900_000, 1000, 3),
        (28_000_000, 1000, 4),
        (28_000_000, 256, 4),
        (28_000_000, 250, 4),
        (28_000_000, 200, 2),
        (28_000_000, 120, 2),
        (28_000_000, 100, 0),
        (28_000_000, 20, 0),
    ],
)
def test_the_largest_that_the_images_and_the_time_are_enough_for(images, side, expected):
    picked = chosen(images, side)[0]
    assert picked.model == CANDIDATES[expected].model
    assert picked.images == pytest.approx(images / COST[picked.model])
    assert picked.record() == {"picked": picked.reason, "expected_images": round(picked.images)}


def test_what_is_hopeless_is_not_measured():
    # 25,000 and 31,000 expected of the second, which needs 60,000: less and more than a factor of 2 away.
    assert names(chosen(62_500, 1000)[1]) == ["-tiny 64"]
    picked, asked = chosen(77_500, 1000)
    assert names(asked) == ["-tiny 64", "-tiny 128"] and picked.model == CANDIDATES[0].model
    faster = {CANDIDATES[1].model: 2.5}
    assert chosen(77_500, 1000, faster)[0].model == CANDIDATES[1].model
    assert chosen(62_500, 1000, {CANDIDATES[1].model: 2.5})[0].model == CANDIDATES[0].model
    assert chosen(62_500, 1000, {CANDIDATES[1].model: 2.5}, close=8.0)[0].model == CANDIDATES[1].model
    assert names(chosen(28_000_000, 100)[1]) == ["-tiny 64"]
    assert names(chosen(59_000, 1000)[1]) == ["-tiny 64"]


@pytest.mark.parametrize(
    "images, side, speed, reason",
    [
        (145_678, 1000, {}, "picked diff-fastener-tiny at 64 pixels: about 150,000 images in 60 minutes on a lathe; "
         "diff-fastener-tiny at 128 pixels would see only 58,000 of the 60,000 it needs"),
        (1_230, 1000, {}, "picked diff-fastener-tiny at 64 pixels: about 1,200 images in 60 minutes on a lathe; 60,000 "
         "would be better: give it more minutes"),
        (1e6, 101, {}, "picked diff-fastener-tiny at 64 pixels: about 1,000,000 images in 60 minutes on a lathe; the "
         "images, 101 pixels on their shorter side, are too small for diff-fastener-tiny at 128 pixels"),
        (9e6, 256, {CANDIDATES[3].model: 0}, "picked diff-fastener-small at 128 pixels: about 1,300,000 images in 60 "
         "minutes on a lathe; diff-fastener-small at 256 pixels does not fit into memory"),
        (45e6, 256, {}, "picked diff-fastener at 256 pixels: about 100,000 images in 60 minutes on a lathe"),
    ],
)  # fmt: skip
def test_the_reason_in_words(images, side, speed, reason):
    assert chosen(images, side, speed)[0].reason == reason


def test_fixed_fields_narrow_the_choice():
    assert names(Automatic(256).candidates()) == ["-tiny 256", "-small 256", " 256"]
    assert names(Automatic(128).candidates()) == ["-tiny 128", "-small 128"]
    assert names(Automatic(512).candidates()) == ["-tiny 512"]
    assert names(Automatic().candidates()) == names(CANDIDATES)
    ranges = {c.model.pixel_range for c in Automatic(pixel_range="signed").candidates()}
    assert ranges == {"signed"} and len(Automatic(pixel_range="signed").candidates()) == 5
    with pytest.raises(ConfigError, match="image size must be one of"):
        Automatic(100).candidates()


@pytest.fixture
def photos(tmp_path):
    """Three images of 300x260 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (260, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def settled(wanted, config, data, state=None, said=None):
    with World("cpu") as world:
        return settle(wanted, config, data, state, world, [].append if said is None else said.append)


def given_rates(monkeypatch, rates: dict, asked: list | None = None) -> None:
    """Images per second by candidate, in the place of a measurement."""

    def rate(config, model, images, precision, world):
        assert images.shape[1:] == (model.image_size, model.image_size, 3) and images.dtype == np.uint8
        assert config == config.resolve(model)
        if asked is not None:
            asked.append(Candidate(model))
        return rates[model]

    monkeypatch.setattr(plan, "images_per_second", rate)
    monkeypatch.setattr(plan, "images_per_flop", lambda config, model: 1 / COST.get(model, 1.0))


def test_minutes_images_and_machine_decide(photos, monkeypatch):
    monkeypatch.setattr(plan, "CANDIDATES", LADDER)
    config = TrainConfig(minutes=10, precision="float32")
    rates = dict(zip((c.model for c in CANDIDATES), (300.0, 150.0, 60.0, 20.0, 1.0), strict=True))
    given_rates(monkeypatch, rates)
    picked = settled(Automatic(), config, photos)
    assert picked.model == CANDIDATES[1].model and picked.images == 90_000
    assert "in 10 minutes on this CPU" in picked.reason
    assert settled(Automatic(), config.replace(minutes=60), photos).model == CANDIDATES[3].model
    # The size is the user's, even where it is more than the images have.
    rates[preset("diff-fastener-tiny", image_size=512)] = 1000.0
    assert settled(Automatic(512), config, photos).model == preset("diff-fastener-tiny", image_size=512)
    for path in photos.iterdir():
        Image.open(path).resize((150, 130)).save(path)
    assert settled(Automatic(), config.replace(minutes=60), photos).model == CANDIDATES[2].model


def test_a_real_measurement_climbs_as_far_as_the_time_goes(normals, monkeypatch, one_thread):
    monkeypatch.setitem(probe.STEPS, "cpu", 1)
    models = tiny_config(preset="one"), tiny_config(preset="two", base=16)
    monkeypatch.setattr(plan, "CANDIDATES", tuple(Candidate(model, 1000) for model in models))
    picked = settled(Automatic(), TrainConfig(minutes=1e-4, batch_size=2, precision="float32"), normals)
    assert picked.model == models[0]
    assert 0 < picked.images < 1000 and "1,000 would be better: give it more minutes" in picked.reason
    monkeypatch.setattr("dfengine.training.precision.cpu_has_bfloat16", lambda: True)
    said = []
    picked = settled(Automatic(), TrainConfig(minutes=1e4, batch_size=2), normals, said=said)
    assert said == ["timing training steps, to choose their precision", "timing training steps, to choose the model"]
    assert picked.model == models[1] and picked.images > 1000


@pytest.mark.parametrize("budget", ["steps", "epochs"])
def test_steps_and_epochs_take_the_smallest_and_measure_nothing(tmp_path, monkeypatch, budget):
    given_rates(monkeypatch, {})
    picked = settled(Automatic(), TrainConfig(**{budget: 3}), tmp_path / "not read")
    assert picked.model == CANDIDATES[0].model
    assert f"a budget of {budget}" in picked.reason and picked.record()["expected_images"] is None
    assert settled(Automatic(128), TrainConfig(**{budget: 3}), tmp_path).model == CANDIDATES[1].model


def test_a_named_model_is_taken_without_a_look(tmp_path):
    named = settled(tiny_config(), TrainConfig(minutes=1), tmp_path / "not read")
    assert named.model == tiny_config() and named.reason == "" and named.record() == {}


def test_nothing_is_measured_for_images_that_cannot_be_trained_on(tmp_path, monkeypatch):
    given_rates(monkeypatch, {})
    (tmp_path / "bad.png").write_text("no image")
    assert settled(Automatic(), TrainConfig(minutes=1), tmp_path).model == CANDIDATES[0].model
    with pytest.raises(DataError, match="no such folder"):
        settled(Automatic(), TrainConfig(minutes=1), tmp_path / "gone")


def test_weights_to_start_from_bring_their_model(tmp_path):
    model = tiny_config(t_b=500)
    start = tmp_path / "start.safetensors"
    save_checkpoint(start, Checkpoint(model, build_model(model).state_dict()))
    picked = settled(Automatic(), TrainConfig(minutes=1, init=str(start)), tmp_path)
    assert picked.model == model and picked.reason.endswith("the model of start.safetensors")
    assert str(tmp_path) not in str(picked.record())


@pytest.mark.parametrize(
    "fits, options, init",
    [(True, {}, "fasteners"), (False, {}, None), (True, {"recipe": "paper"}, None), (True, {"init": "none"}, None)],
)
def test_a_picked_model_starts_from_the_shipped_weights_where_they_fit(tmp_path, monkeypatch, fits, options, init):
    shipped = load_checkpoint(shipped_checkpoint()).config
    monkeypatch.setattr(plan, "CANDIDATES", (Candidate(shipped if fits else tiny_config()),))
    picked = settled(Automatic(), TrainConfig(steps=1, **options), tmp_path)
    assert picked.init == init
    assert ("starting from the fastener weights" in picked.reason) == (init is not None)


def test_the_shipped_weights_fit_the_smallest_candidate():
    assert load_checkpoint(shipped_checkpoint()).config == CANDIDATES[0].model


def test_a_named_model_starts_from_scratch_unless_told(tmp_path):
    shipped = load_checkpoint(shipped_checkpoint()).config
    assert settled(shipped, TrainConfig(steps=1), tmp_path).init is None
    assert settled(shipped, TrainConfig(steps=1, init="fasteners"), tmp_path).init == "fasteners"


def test_a_resumed_run_keeps_its_model_and_the_record_says_why(normals, tmp_path, monkeypatch, lines):
    models = tiny_config(preset="one"), tiny_config(preset="two", base=16)
    monkeypatch.setattr(plan, "CANDIDATES", tuple(Candidate(model, 10) for model in models))
    given_rates(monkeypatch, dict(zip(models, (1000.0, 100.0), strict=True)))
    out, config = tmp_path / "net.safetensors", CONFIG.replace(steps=None, minutes=10)
    with pytest.raises(TrainingInterrupted):
        train(config, Automatic(), normals, out, stop=lambda step: True, console=lines)
    assert "picked two at 32 pixels: about 60,000 images in 10 minutes on this CPU (1 thread)" in lines.file.getvalue()
    assert read_state(run_folder_of(out) / "state.safetensors").identity["model"] == models[1].to_dict()

    given_rates(monkeypatch, {})  # nothing may be measured any more
    with pytest.raises(UsageError, match="unfinished run at step 1"):
        train(config, Automatic(), normals, out)
    with pytest.raises(UsageError, match="model image_size was 32 and is now 64"):
        train(config, Automatic(image_size=64), normals, out, resume=True)
    with pytest.raises(UsageError, match="model base was 16 and is now 8"):
        train(config, models[0], normals, out, resume=True)
    # The budget is long for a slow machine to be interrupted in it, and over when the run is resumed.
    monkeypatch.setattr(loop, "Clock", lambda elapsed: Clock(60 * config.minutes))
    result = train(config, Automatic(), normals, out, resume=True)
    assert load_checkpoint(out).config == models[1]
    assert result.record["plan"]["expected_images"] == 60_000 and "picked two" in result.record["plan"]["picked"]
