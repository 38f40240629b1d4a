from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from PIL import Image

from dfengine.data.textures import FAMILIES, TextureSource, procedural_texture
from dfengine.errors import DataError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("banded/banded_1.png", "banded/banded_2.png", "woven/woven_1.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("size", [32, 100])
def test_families_vary(family, size):
    fields = [family(size, np.random.default_rng(seed)) for seed in range(5)]
    for field in fields:
        assert field.shape == (size, size)
        assert np.isfinite(field).all()
        assert field.std() > 0
    assert not np.array_equal(fields[0], fields[1])


def test_procedural_is_determined_by_the_generator():
    source = TextureSource.procedural(32)
    first = [source.sample(np.random.default_rng(seed)) for seed in range(40)]
    again = [procedural_texture(32, np.random.default_rng(seed)) for seed in range(40)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(texture.shape == (32, 32, 3) and texture.dtype == np.uint8 for texture in first)
    assert np.median([texture.std() for texture in first]) > 20


def test_folder_is_read_with_its_subfolders(folder):
    source = TextureSource.from_folder(folder, 16)
    samples = {source.sample(np.random.default_rng(seed)).tobytes() for seed in range(30)}
    assert len(samples) == 3
    assert source.sample(np.random.default_rng(1)).shape == (16, 16, 3)


def test_sample_does_not_depend_on_earlier_ones(folder):
    (folder / "woven" / "woven_0.png").write_bytes(b"no image")
    used, fresh = TextureSource.from_folder(folder, 16), TextureSource.from_folder(folder, 16)
    for seed in range(20):
        used.sample(np.random.default_rng(seed))
    for seed in range(5):
        np.testing.assert_array_equal(
            used.sample(np.random.default_rng(seed)), fresh.sample(np.random.default_rng(seed))
        )
    copy = pickle.loads(pickle.dumps(used))
    np.testing.assert_array_equal(copy.sample(np.random.default_rng(3)), used.sample(np.random.default_rng(3)))


def test_unreadable_textures_are_skipped_and_recorded_once(folder, caplog):
    bad = folder / "banded" / "banded_0.png"
    bad.write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        source = TextureSource.from_folder(folder, 16)
        for seed in range(20):
            source.sample(np.random.default_rng(seed))
    assert [name.endswith("banded_0.png") for name, _ in source.skipped] == [True]
    assert len([record for record in caplog.records if "banded_0.png" in record.getMessage()]) == 1


def test_folder_without_a_readable_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"text")
    with pytest.raises(DataError, match="a.png"):
        TextureSource.from_folder(tmp_path, 16)
    with pytest.raises(DataError):
        TextureSource.from_folder(tmp_path / "absent", 16)
