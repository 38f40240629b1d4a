from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dfengine.data.folders import content_digest
from dfengine.training.data import native_side, read_normals, survey
from tests.odd_files import SIDE, content, pipe, png_header, rotated, saved, tiff


def record(normals) -> dict:
    data = {"fingerprint": normals.fingerprint, "held_out": normals.held_out_names, "trained": list(normals.trained)}
    return {"data": data}


def test_digests_of_the_images_trained_on_are_known(normals):
    read = read_normals(normals, 32, 0.25, seed=0)
    assert len(read.held_out) == 3 and len(read.train) == 9 and read.overlap == 0
    files = [normals / read.names[i] for i in read.train]
    assert read.trained == tuple(sorted(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files))
    assert not {content_digest(normals / name) for name in read.held_out_names} & set(read.trained)


def test_unreadable_images_are_named_relative_to_the_folder(normals, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(normals, folder / "train" / "good")
    (folder / "train" / "good" / "bad.png").write_text("no image")
    read = read_normals(folder, 32, 0.25, seed=0)
    assert [name for name, _ in read.skipped] == ["train/good/bad.png"]
    assert read.names[0] == "train/good/00.png"


def test_a_copy_of_a_training_image_among_the_held_out_is_counted(normals, tmp_path):
    names = read_normals(normals, 32, 0.25, seed=0)
    folder = tmp_path / "images"
    shutil.copytree(normals, folder)
    shutil.copy(folder / names.names[names.train[0]], folder / names.held_out_names[0])
    assert read_normals(folder, 32, 0.25, seed=0).overlap == 1


def test_the_images_held_out_before_stay_held_out(normals):
    before = read_normals(normals, 32, 0.25, seed=0)
    assert read_normals(normals, 32, 0.5, seed=5).held_out_names != before.held_out_names
    again = read_normals(normals, 32, 0.5, seed=5, before=record(before))
    assert again.held_out_names == before.held_out_names
    np.testing.assert_array_equal(again.train, before.train)
    assert again.overlap == 0 and again.trained == before.trained


def test_held_out_images_trained_on_before_are_counted(normals, tmp_path):
    before = read_normals(normals, 32, 0.25, seed=0)
    folder = tmp_path / "others"
    folder.mkdir()
    for number, file in enumerate(sorted(normals.iterdir())[:8]):
        shutil.copy(file, folder / f"again-{number}.png")
    read = read_normals(folder, 32, 0.5, seed=0, before=record(before))
    held_out = {content_digest(folder / name) for name in read.held_out_names}
    assert read.overlap == len(held_out & set(before.trained)) > 0
    assert set(before.trained) < set(read.trained)


@pytest.mark.parametrize("before", [{}, {"data": None}, {"data": {"name": "x"}}])
def test_a_record_that_says_nothing_changes_nothing(normals, before):
    assert read_normals(normals, 32, 0.25, 0, before).trained == read_normals(normals, 32, 0.25, 0).trained


def test_a_survey_looks_at_some_images_all_over_the_folder(tmp_path):
    """100 images of 20 + k pixels and of grey k: the median is that of 64 spread ones, and 8 are read."""
    for k in range(100):
        Image.new("L", (200, 20 + k), k).save(tmp_path / f"{k:02}.png")
    side, images = survey(tmp_path, 32)
    assert side == pytest.approx(69.5, abs=1)
    assert images.shape == (8, 32, 32, 3) and images.dtype == np.uint8
    assert [int(grey) // 12 for grey in images[:, 0, 0, 0]] == list(range(8))  # one of each eighth
    for k in range(0, 100, 2):
        (tmp_path / f"{k:02}.png").write_text("no image")
    images = survey(tmp_path, 32)[1]
    assert len(images) == 8 and images[:, 0, 0, 0].max() > 75
    for k in range(100):
        (tmp_path / f"{k:02}.png").write_text("no image")
    side, images = survey(tmp_path, 32)
    assert np.isnan(side) and images.shape == (0, 32, 32, 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make, side",
    [
        (saved("L", 3, "a.png"), SIDE),
        (rotated, SIDE),
        (tiff(np.zeros((SIDE, 2 * SIDE, 3), np.uint16), photometric="rgb"), SIDE),  # Pillow does not know it
        (content(png_header(12_000, 9_000)), 9_000),  # more pixels than Pillow likes
        (content(b"text"), None),
        (pipe, None),
    ],
    ids=["png", "rotated", "deep tiff", "large", "text", "pipe"],
)
def test_the_side_of_an_image_comes_from_its_header(tmp_path, make, side):
    assert native_side(Path(make(tmp_path))) == side
