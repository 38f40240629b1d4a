from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest

from dfengine.data.folders import content_digest
from dfengine.training.data import read_normals


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
