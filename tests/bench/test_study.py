from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.scenes import bars

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

pytest.importorskip("tomllib")  # of Python 3.11 and later
import study  # noqa: E402
import study_report  # noqa: E402
import study_scores  # noqa: E402
import study_sets  # noqa: E402

GRID = {
    "sets": ["a", "b"],
    "seeds": [0, 1],
    "seconds": 60,
    "base": {"train": {"focal_gamma": 2.0}},
    "base_of": {"b": {"train": {"focal_gamma": 1.0, "clip": 0.5}}},
    "variants": {
        "base": {},
        "gamma": {"train": {"focal_gamma": 4.0}},
        "draws": {"inference": {"noise_draws": 2}},
        "long": {"seconds": 120, "sets": ["a"]},
    },
}


def run(variant: str, name: str = "a", seed: int = 0) -> dict:
    runs = [r for r in study.settings(GRID) if (r["variant"], r["set"], r["seed"]) == (variant, name, seed)]
    assert len(runs) == 1
    return runs[0]


def test_a_grid_is_every_variant_on_every_set_and_seed():
    assert len(study.settings(GRID)) == 2 * (3 * 2 + 1)
    assert run("base")["train"] == {"focal_gamma": 2.0} and run("gamma")["train"] == {"focal_gamma": 4.0}
    assert run("base", "b")["train"] == {"focal_gamma": 1.0, "clip": 0.5}
    assert run("gamma", "b")["train"] == {"focal_gamma": 4.0, "clip": 0.5}
    assert run("long")["seconds"] == 120


def test_a_trained_model_is_shared_where_only_the_inference_differs():
    assert study.key_of(run("base")) == study.key_of(run("draws"))
    others = [run("gamma"), run("long"), run("base", seed=1), run("base", "b")]
    assert len({study.key_of(r) for r in (run("base"), *others)}) == 5


def test_the_grids_of_the_project_are_configurations():
    import tomllib

    for path in Path(study.ROOT).glob("study*.toml"):
        runs = study.settings(tomllib.loads(path.read_text()))
        assert len({study.key_of(r) for r in runs}) > 10
        for one in runs:
            model, config = study.configurations(one)
            model.replace(**one["inference"])
            assert config.resolve(model).synthesis.decoy <= 1


@pytest.mark.parametrize("kind", ["missing", "ring", "part"])
def test_foreign_edits_change_the_object_and_nothing_far_from_it(kind):
    images, foregrounds = bars(6, 64)
    foreign = study_sets.Foreign(images, foregrounds)
    changed = 0
    for index in range(6):
        after, name, mask = foreign.erase(index, kind, np.random.default_rng(index))
        assert name == f"foreign:{kind}" and after.dtype == np.uint8 and after.shape == (64, 64, 3)
        changed += mask.any()
        assert not (mask & ~study_sets.grow(foregrounds[index], 4)).any()
        change = np.abs(after.astype(int) - images[index]).max(axis=-1)
        assert change[~study_sets.grow(foregrounds[index], 6)].max() <= 3  # Poisson cloning rounds
    assert changed >= 4


@pytest.mark.parametrize("height, width", [(2, 2), (1, 9), (9, 2), (9, 9)])
def test_cloning_fills_regions_of_every_size_and_nothing_else(height, width):
    target, source = np.full((2, 32, 32, 3), 90, np.uint8)
    source[::2] = 160
    region = np.zeros((32, 32), bool)
    region[10 : 10 + height, 12 : 12 + width] = True
    change = np.abs(study_sets._clone(source, target, region).astype(int) - 90)
    assert change[region].max() > 20 and change[~region].max() <= 3


@pytest.mark.parametrize("damage", ["scratch", "dent"])
def test_small_damage_is_small_and_at_the_object(damage):
    images, foregrounds = bars(6, 64)
    foreign = study_sets.Foreign(images, foregrounds)
    for index in range(6):
        after, name, mask = getattr(foreign, damage)(index, np.random.default_rng(index))
        assert name == f"small:{damage}" and after.dtype == np.uint8 and after.shape == (64, 64, 3)
        assert 0 < mask.mean() < 0.05
        assert not (mask & ~study_sets.grow(foregrounds[index], 8)).any()
        far = ~study_sets.grow(mask, 8)
        np.testing.assert_allclose(after[far], images[index][far].astype(int), atol=10)
        again = getattr(foreign, damage)(index, np.random.default_rng(index))[0]
        np.testing.assert_array_equal(after, again)


def test_foreign_decoys_leave_the_object():
    images, foregrounds = bars(6, 64)
    foreign = study_sets.Foreign(images, foregrounds)
    for index in range(6):
        after = foreign.decoy(index, np.random.default_rng(index))
        np.testing.assert_allclose(after[foregrounds[index]], images[index][foregrounds[index]].astype(int), atol=3)


def test_scores_rank_a_worse_reconstruction_and_a_hotter_map_higher():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    reconstructions = np.repeat(images[:1] / 255.0, 4, axis=0).astype(np.float32)
    reconstructions[1:] = images[1:] / 255.0
    reconstructions[3, 20:40, 20:40] = 0
    maps = np.full((4, 64, 64), 0.01, np.float32)
    maps[3, 20:40, 20:40] = 0.9
    found = study_scores.scores(images, maps, reconstructions, np.array([True, True, True, False]))
    assert set(found) >= {"seg@50", "pixel", "gradient", "ssim", "sum:pixel"}
    assert all(values.argmax() == 3 for values in found.values())
    np.testing.assert_allclose(found["seg@50"], [0.01, 0.01, 0.01, 0.9], rtol=1e-6)


def test_the_table_gives_the_mean_and_half_the_range_over_seeds(tmp_path):
    path = tmp_path / "results.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["set", "variant", "seed", "steps", "own/seg@800", "foreign/seg@800", "pixel_ap"])
        writer.writerows([["a", "base", 0, 10, 0.8, 0.9, 0.5], ["a", "base", 1, 10, 0.9, 0.9, 0.5]])
        writer.writerows([["a", "more", 1, 10, 0.92, 0.9, 0.45], ["a", "more", 0, 10, 0.81, 0.9, ""]])
        writer.writerows([["b", "more", 0, 10, 0.7, "", 0.3], ["a", "once", 2, 10, 0.7, "", 0.3]])
    rows = study_report.read([path])
    base = "| a | base | 2 | 10 | 0.850 ± 0.050 | 0.900 ± 0.000 | 0.500 ± 0.000 |"
    assert study_report.table(rows).splitlines()[2:4] == [
        base, "| a | more | 2 | 10 | 0.865 ± 0.055 | 0.900 ± 0.000 | 0.450 |",
    ]  # fmt: skip
    assert study_report.table(rows, against="base").splitlines()[2:] == [
        base,
        "| a | more | 2 | 10 | +0.015 ± 0.005 | +0.000 ± 0.000 | -0.050 |",
        "| b | more | 1 | 10 | 0.700 |  | 0.300 |",  # a set without the base
        "| a | once | 0 | 10 |  |  |  |",  # a seed that the base has not
    ]
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow(["a", "base", 1, 10, 0.8, 0.9, 0.5])
    with pytest.raises(SystemExit, match="a base: seed 1 is there twice"):
        study_report.read([path])
    study_report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
