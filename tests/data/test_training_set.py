from __future__ import annotations

import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dfengine.data.augment import Augmentation, AugmentConfig
from dfengine.data.streams import Stream, stream
from dfengine.data.structural import STRUCTURAL_KINDS
from dfengine.data.synthesis import SynthesisConfig, Synthesizer
from dfengine.data.textures import TextureSource
from dfengine.data.training_set import TrainingSet, validation_set, worker_init
from tests.data.scenes import bars

IMAGES, _ = bars(7, 32)
TEXTURES = TextureSource.procedural(32)


def training_set(share="half", batch_size=4, seed=11, augment=None, config=None):
    source = Synthesizer(IMAGES, TEXTURES, config or SynthesisConfig())
    return TrainingSet(IMAGES, source, augment or AugmentConfig(), seed, batch_size, share)


def same(a, b):
    return (
        torch.equal(a["image"], b["image"])
        and torch.equal(a["mask"], b["mask"])
        and (a["label"], a["index"]) == (b["label"], b["index"])
    )


def test_sample_has_the_promised_form():
    sample = training_set()[5]
    assert sample["image"].shape == (32, 32, 3) and sample["image"].dtype == torch.uint8
    assert sample["mask"].shape == (32, 32) and sample["mask"].dtype == torch.uint8
    assert set(sample["mask"].unique().tolist()) <= {0, 1}
    assert sample["label"] in (0, 1) and 0 <= sample["index"] < 7


def test_label_agrees_with_mask():
    data = training_set()
    for position in range(24):
        sample = data[position]
        assert bool(sample["mask"].any()) == bool(sample["label"])


def test_order_of_access_does_not_matter():
    forward, backward = training_set(), training_set()
    first = [forward[n] for n in range(20)]
    last = [backward[n] for n in reversed(range(20))][::-1]
    assert all(same(a, b) for a, b in zip(first, last, strict=True))
    assert not same(first[0], training_set(seed=12)[0])


def test_worker_processes_give_the_same_bytes():
    loaders = [
        DataLoader(
            training_set(), batch_size=4, sampler=range(8, 32), num_workers=workers, worker_init_fn=worker_init,
            multiprocessing_context="fork" if workers else None,
        )
        for workers in (0, 2)
    ]  # fmt: skip
    count = 0
    for alone, shared in zip(*loaders, strict=True):
        assert all(torch.equal(alone[name], shared[name]) for name in ("image", "mask", "label", "index"))
        count += 1
    assert count == 6


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_half_of_every_batch_is_anomalous(batch_size):
    data = training_set(batch_size=batch_size)
    for batch in range(6):
        labels = [data[batch * batch_size + n]["label"] for n in range(batch_size)]
        assert sum(labels) == batch_size // 2


def test_odd_batches_round_at_random_and_places_vary():
    data = training_set(batch_size=3)
    counts, places = set(), set()
    for batch in range(16):
        labels = tuple(data[batch * 3 + n]["label"] for n in range(3))
        counts.add(sum(labels))
        places.add(labels)
    assert counts == {1, 2} and len(places) > 3


def test_coin_and_none():
    coin = [training_set("coin")[n]["label"] for n in range(60)]
    assert 15 <= sum(coin) <= 45
    per_batch = {sum(coin[n : n + 4]) for n in range(0, 60, 4)}
    assert len(per_batch) > 1
    none = TrainingSet(IMAGES, None, AugmentConfig.off(), 0, 4, "none")
    for position in range(14):
        sample = none[position]
        assert sample["label"] == 0 and not sample["mask"].any()
        np.testing.assert_array_equal(sample["image"].numpy(), IMAGES[sample["index"]])


def test_every_epoch_passes_through_all_images_in_its_own_order():
    data = TrainingSet(IMAGES, None, AugmentConfig.off(), 3, 4, "none")
    epochs = [[data[epoch * 7 + n]["index"] for n in range(7)] for epoch in range(5)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2


def outside_of(sample) -> np.ndarray:
    return cv2.dilate(sample["mask"].numpy(), np.ones((5, 5), np.uint8)) == 0


def test_camera_first_leaves_the_normal_image_outside_the_anomaly():
    """Outside its mask (and soft rim) an anomalous sample is exactly the augmented normal image."""
    data = training_set(augment=AugmentConfig(camera_last=False), config=SynthesisConfig(decoy=0.0))
    for position in range(16):
        sample = data[position]
        augmentation = Augmentation(32, stream(11, Stream.SAMPLE, position), data.augment)
        normal = augmentation.camera(augmentation.pose(IMAGES[sample["index"]]))
        outside = outside_of(sample)
        np.testing.assert_array_equal(sample["image"].numpy()[outside], normal[outside])


def test_camera_last_acts_on_the_anomaly_too():
    """Noise covers an anomaly as it covers the rest; the pose comes before the anomaly all the same."""
    off = AugmentConfig.off()
    clean, grainy = (
        training_set(augment=replace(off, shift=0.1, noise=noise), config=SynthesisConfig(decoy=0.0))
        for noise in (1e-6, 20.0)
    )
    inside, outside = [], []
    for position in range(24):
        sample = clean[position]
        if not sample["label"]:
            continue
        other = grainy[position]
        np.testing.assert_array_equal(other["mask"], sample["mask"])
        difference = other["image"].numpy().astype(float) - sample["image"].numpy()
        inside.append(difference[sample["mask"].numpy() > 0].std())
        outside.append(difference[outside_of(sample)].std())
    assert len(inside) >= 8
    np.testing.assert_allclose(np.mean(inside), np.mean(outside), rtol=0.35)
    assert np.mean(inside) > 2


def test_normals_of_a_gray_set_stay_gray():
    images = np.repeat(IMAGES[..., :1], 3, axis=-1)
    source = Synthesizer(images, TEXTURES, SynthesisConfig(recipe="structural", decoy=1.0))
    data = TrainingSet(images, source, AugmentConfig(), 11, 4)
    for position in range(24):
        image = data[position]["image"].numpy()
        assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


def test_decoys_are_normals_that_were_processed():
    plain = training_set(augment=AugmentConfig.off(), config=SynthesisConfig(decoy=0.0))
    decoys = training_set(augment=AugmentConfig.off(), config=SynthesisConfig(decoy=1.0))
    changed = 0
    for position in range(24):
        sample = decoys[position]
        if not sample["label"]:
            changed += not torch.equal(sample["image"], plain[position]["image"])
            assert not sample["mask"].any()
    assert changed >= 8


def test_bad_arguments():
    source = Synthesizer(IMAGES[:3], TEXTURES)
    for synthesizer, share, batch in itertools.product((None, source), ("half", "all"), (0, 4)):
        with pytest.raises(ValueError):
            TrainingSet(IMAGES, synthesizer, AugmentConfig(), 0, batch, share)


def test_validation_set_is_fixed_and_half_structural():
    first = validation_set(IMAGES, TEXTURES, SynthesisConfig(structural_share=0.0), seed=4, count=20)
    again = validation_set(IMAGES, TEXTURES, SynthesisConfig(structural_share=0.0), seed=4, count=20)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.masks, again.masks)
    np.testing.assert_array_equal(first.images[:7], IMAGES)
    assert first.labels.tolist() == [0] * 7 + [1] * 20 and len(first) == 27 == len(first.kinds)
    assert sum(kind in STRUCTURAL_KINDS for kind in first.kinds) == 10
    np.testing.assert_array_equal(first.masks.any(axis=(1, 2)), first.labels == 1)
    assert first.indices.tolist()[:7] == list(range(7)) and set(first.indices[7:]) == set(range(7))
    other = validation_set(IMAGES, TEXTURES, SynthesisConfig(), seed=5, count=20)
    assert not np.array_equal(first.images, other.images)


@pytest.mark.parametrize("recipe, kinds", [("paper", {"texture", "self"}), ("structural", set(STRUCTURAL_KINDS))])
def test_validation_set_keeps_to_its_recipe(recipe, kinds):
    chosen = validation_set(IMAGES, TEXTURES, SynthesisConfig(recipe=recipe), seed=0, count=12)
    assert set(chosen.kinds[7:]) <= kinds
    assert len(validation_set(IMAGES, TEXTURES, SynthesisConfig(), seed=0, count=0)) == 7
