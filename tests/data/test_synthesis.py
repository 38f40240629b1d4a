from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfengine.data import synthesis
from dfengine.data.structural import STRUCTURAL_KINDS
from dfengine.data.synthesis import (
    APPEARANCE_AUGMENTATIONS,
    KINDS,
    RIM,
    SynthesisConfig,
    Synthesizer,
    augment_appearance,
    blend,
    shuffle_cells,
)
from dfengine.data.textures import TextureSource
from dfengine.errors import ConfigError
from tests.data.scenes import bars

IMAGES, FOREGROUNDS = bars(6, 64)


def synthesizer(**changes):
    return Synthesizer(IMAGES, TextureSource.procedural(64), SynthesisConfig(**changes))


def draws(source, count, offset=0):
    return [source.sample(n % len(IMAGES), np.random.default_rng(offset + n)) for n in range(count)]


@given(seed=st.integers(0, 2**32), beta=st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_blend_is_the_equation(seed, beta):
    rng = np.random.default_rng(seed)
    normal, appearance = rng.integers(0, 256, (2, 9, 9, 3), np.uint8)
    mask = rng.random((9, 9)) < 0.5
    got = blend(normal, appearance, mask, beta)
    exact = np.where(
        mask[..., None], beta * normal.astype(np.float64) + (1 - beta) * appearance.astype(np.float64), normal
    )
    assert np.abs(got - exact).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(got[~mask], normal[~mask])


def test_paper_samples_are_the_blend_of_their_parts(monkeypatch):
    """A sample of the papers' recipe, recomputed from the appearance, mask and beta that were drawn."""
    seen = []

    def spy(normal, appearance, mask, beta):
        seen.append((normal, appearance, mask, beta))
        return blend(normal, appearance, mask, beta)

    monkeypatch.setattr(synthesis, "blend", spy)
    source = synthesizer(recipe="paper")
    betas = []
    for number, result in enumerate(draws(source, 40)):
        normal, appearance, mask, beta = seen[number]
        expected = normal.astype(np.float64)
        expected[mask] = beta * expected[mask] + (1 - beta) * appearance[mask]
        assert np.abs(result.image - expected).max() <= 0.5 + 1e-3
        np.testing.assert_array_equal(result.mask, mask)
        assert not (mask & ~source.foregrounds[number % len(IMAGES)]).any()
        betas.append(beta)
    assert 0.2 <= min(betas) < 0.3 and 0.7 < max(betas) <= 0.8


@pytest.mark.parametrize("recipe", ["mixed", "paper", "structural"])
def test_recipes_draw_their_kinds(recipe):
    kinds = [result.kind for result in draws(synthesizer(recipe=recipe), 60)]
    structural = sum(kind in STRUCTURAL_KINDS for kind in kinds)
    papers = sum(kind in ("texture", "self") for kind in kinds)
    assert set(kinds) <= set(KINDS)
    if recipe == "mixed":
        assert 18 <= structural <= 42 and 18 <= papers <= 42
    else:
        assert (structural, papers) == ((0, 60) if recipe == "paper" else (60, 0))


def test_paper_appearances_are_half_and_half():
    kinds = [result.kind for result in draws(synthesizer(recipe="paper"), 100)]
    assert 30 <= kinds.count("texture") <= 70


@pytest.mark.parametrize("recipe", ["paper", "structural"])
def test_same_generator_same_bytes(recipe):
    for first, again in zip(draws(synthesizer(recipe=recipe), 12), draws(synthesizer(recipe=recipe), 12), strict=True):
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.mask, again.mask)
        assert first.kind == again.kind


def test_nothing_changes_outside_the_mask():
    kernel = np.ones((2 * RIM + 1, 2 * RIM + 1), np.uint8)
    for number, result in enumerate(draws(synthesizer(), 60)):
        reach = result.mask
        if result.kind in STRUCTURAL_KINDS:
            reach = cv2.dilate(reach.astype(np.uint8), kernel).astype(bool)
        assert result.image.dtype == np.uint8 and result.mask.dtype == bool
        np.testing.assert_array_equal(result.image[~reach], IMAGES[number % len(IMAGES)][~reach])


def test_structural_masks_show_real_change():
    shares, areas = [], []
    for number, result in enumerate(draws(synthesizer(recipe="structural"), 60)):
        change = np.abs(result.image.astype(int) - IMAGES[number % len(IMAGES)]).max(axis=-1)
        shares.append((change[result.mask] > 5).mean())
        areas.append(result.mask.mean())
        assert result.mask.mean() >= 0.003
        rim = cv2.dilate(result.mask.astype(np.uint8), np.ones((3, 3))).astype(bool)
        assert (change > 40)[~rim].sum() <= 0.05 * result.mask.sum()
    assert np.median(shares) > 0.8
    assert np.median(areas) < 0.25


@pytest.mark.parametrize("recipe", ["paper", "structural"])
def test_empty_draws_leave_the_sample_normal(recipe, monkeypatch):
    """A black image on which no edit shows, and shapes that are always empty: `max_draws` are tried, then normal."""
    black = np.zeros((2, 32, 32, 3), np.uint8)
    source = Synthesizer(black, TextureSource.procedural(32), SynthesisConfig(recipe=recipe, max_draws=7))
    drawn = []

    def no_shape(size, rng):
        drawn.append(size)
        return np.zeros((size, size), bool)

    def no_edit(scene, rng):
        drawn.append(scene.size)
        return scene.image, "erased"

    monkeypatch.setattr(synthesis, "perlin_mask", no_shape)
    monkeypatch.setattr(source._structural, "draw", no_edit)
    result = source.sample(0, np.random.default_rng(0))
    assert result.kind == "normal" and not result.mask.any() and len(drawn) == 7
    np.testing.assert_array_equal(result.image, black[0])


def test_default_allows_fifty_draws():
    assert SynthesisConfig().max_draws == 50


def test_texture_classes_use_foreign_textures_on_a_random_part():
    source = synthesizer(recipe="paper", foreground="texture")
    results = draws(source, 40)
    assert {result.kind for result in results} == {"texture"}
    covered = np.mean([result.mask for result in results], axis=0)
    assert (covered > 0).mean() > 0.35  # the part differs from sample to sample


def test_given_foreground_replaces_the_estimate():
    given = np.zeros((6, 64, 64), bool)
    given[:, :20, :20] = True
    source = Synthesizer(IMAGES, TextureSource.procedural(64), SynthesisConfig(recipe="paper"), given)
    for result in draws(source, 20):
        assert not result.mask[20:].any() and not result.mask[:, 20:].any()


@pytest.mark.parametrize("size", [64, 100])
def test_shuffle_moves_cells_and_keeps_pixels(size):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    shuffled = shuffle_cells(image, np.random.default_rng(1))
    assert shuffled.shape == image.shape and not np.array_equal(shuffled, image)
    if size % 8 == 0:
        cells = {image[y : y + 8, x : x + 8].tobytes() for y in range(0, size, 8) for x in range(0, size, 8)}
        moved = {shuffled[y : y + 8, x : x + 8].tobytes() for y in range(0, size, 8) for x in range(0, size, 8)}
        assert cells == moved


def test_ten_augmentations_of_which_three_are_drawn(monkeypatch):
    names = [augmentation.__name__ for augmentation in APPEARANCE_AUGMENTATIONS]
    assert len(set(names)) == 10
    calls = []
    counted = tuple(lambda picture, rng, n=n: calls.append(n) or picture for n in range(10))
    monkeypatch.setattr(synthesis, "APPEARANCE_AUGMENTATIONS", counted)
    for seed in range(60):
        calls.clear()
        augment_appearance(IMAGES[0], np.random.default_rng(seed))
        assert len(set(calls)) == len(calls) == 3


@pytest.mark.parametrize("augmentation", APPEARANCE_AUGMENTATIONS, ids=lambda f: f.__name__)
def test_each_augmentation_changes_a_picture_and_keeps_its_form(augmentation):
    from PIL import Image

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(40, 200, (32, 32, 3), np.uint8))
    changed = np.asarray(augmentation(picture, rng))
    assert changed.shape == (32, 32, 3) and changed.dtype == np.uint8
    assert not np.array_equal(changed, np.asarray(picture))


def test_config_round_trip_and_refusals():
    config = SynthesisConfig(recipe="structural", beta_range=(0.1, 0.9), decoy=0.3)
    assert SynthesisConfig.from_dict(config.to_dict()) == config
    for bad in (
        {"recipe": "papers"},
        {"foreground": "full"},
        {"beta_range": (0.8, 0.2)},
        {"area": (0.0, 0.2)},
        {"structural_share": 1.5},
        {"max_draws": 0},
        {"change_threshold": 0},
        {"texture": 1},
    ):
        with pytest.raises(ConfigError):
            SynthesisConfig.from_dict(bad)


def test_wrong_arrays_are_refused():
    textures = TextureSource.procedural(64)
    for images in (IMAGES[:0], IMAGES.astype(np.float32), IMAGES[:, :, :32], IMAGES[:, ::2, ::2]):
        with pytest.raises(ValueError):
            Synthesizer(images, textures)


def test_decoy_is_still_the_normal_image_mostly():
    source = synthesizer()
    for seed in range(20):
        image = source.decoy(IMAGES[0], source.foregrounds[0], np.random.default_rng(seed))
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - IMAGES[0]).mean() < 6
