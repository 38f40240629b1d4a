from __future__ import annotations

import os

import pytest
from PIL import Image

from dfengine.data.images import list_images
from dfengine.errors import DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_list_images_is_natural_and_recursive(tmp_path):
    touch(tmp_path, "frame10.png", "frame2.PNG", "frame01.jpg", "day2/a.tif", "day10/a.webp", "notes.txt", "._a.png",
          ".hidden/a.png", "photo.heic")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    names = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
    assert names == ["day2/a.tif", "day10/a.webp", "frame01.jpg", "frame2.PNG", "frame10.png", "gone.png", "photo.heic"]
    flat = [path.name for path in list_images(tmp_path, recursive=False)]
    assert flat == ["frame01.jpg", "frame2.PNG", "frame10.png", "gone.png", "photo.heic"]


def test_what_dfengine_wrote_is_passed_over_in_a_tree_and_refused_by_name(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "heatmaps/b.png", "panels/c.png")  # somebody's own
    touch(tmp_path, *(f"results/{name}" for name in (".dfengine-output", "roc.png", "heatmaps/0.png")))
    touch(tmp_path, *(f"net.run/{name}" for name in (".dfengine-output", "loss.png", "panels/1.png")))
    (tmp_path / "link").symlink_to(tmp_path / "results" / "heatmaps")
    assert [path.name for path in list_images(tmp_path)] == ["a.png", "b.png", "c.png"]
    for name in ("results", "results/heatmaps", "net.run", "net.run/panels", "link"):
        with pytest.raises(DataError, match=f"{name}: holds what dfengine wrote .*, no images to read"):
            list_images(tmp_path / name)
    monkeypatch.chdir(tmp_path / "results" / "heatmaps")
    with pytest.raises(DataError, match=r"^\.: holds what dfengine wrote"):
        list_images(".")


def test_linked_folders_are_followed_once(tmp_path):
    touch(tmp_path, "data/a.png", "elsewhere/b.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert [path.name for path in list_images(tmp_path / "data")] == ["a.png", "b.png"]


def test_list_images_refuses_what_is_no_folder_of_images(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "empty/notes.txt")
    for path, reason in (("gone", "no such folder"), ("a.png", "is a file, not a folder"),
                         ("empty", "no image in this folder")):
        with pytest.raises(DataError, match=f"{path}: {reason}"):
            list_images(tmp_path / path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="empty: permission denied"):
        list_images(tmp_path / "empty")


def test_what_is_passed_over_is_counted_once_where_it_is_asked_for(tmp_path, caplog):
    touch(tmp_path, "a.png", "IMG_10.jpgg", "day2/IMG_2", ".b.png", "._a.png", ".DS_Store", "Thumbs.db", ".cache/c.tx")
    list_images(tmp_path)
    assert not caplog.records
    for _ in range(2):
        assert [path.name for path in list_images(tmp_path, others=True)] == ["a.png"]
    (record,) = caplog.records
    names = ".b.png, day2/IMG_2, IMG_10.jpgg"
    assert record.getMessage() == f"{tmp_path}: 3 files left out, no image by name: {names}"
    with pytest.raises(DataError, match=r"day2: no image in this folder \(.*\); it holds IMG_2$"):
        list_images(tmp_path / "day2")


def test_masks_of_a_data_set_are_left_out_and_named(tmp_path, caplog):
    for name in ("test/bad/0.png", "ground_truth/bad/0_mask.png", "visa/Data/Images/Normal/1.png",
                 "visa/Data/Masks/Anomaly/2.png", "dagm/Train/3.png", "dagm/Train/Label/3_label.png", "Label/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "dagm/Train/Label/Labels.txt").write_text("1\n")
    found = [path.name for path in list_images(tmp_path)]
    assert sorted(found) == ["0.png", "1.png", "3.png", "4.png"]
    (record,) = caplog.records
    assert record.getMessage().endswith("holds ground-truth masks, which are left out")
    for folder in ("ground_truth", "visa/Data/Masks", "dagm/Train/Label"):
        assert str(tmp_path / folder) in record.getMessage()
    assert [path.name for path in list_images(tmp_path / "ground_truth")] == ["0_mask.png"]  # asked for by name
    assert len(caplog.records) == 1


def test_a_folder_that_may_be_listed_but_not_entered_stops_nothing(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    (closed / "Masks").mkdir(parents=True)
    for path in (tmp_path / "a.png", closed / "b.png"):
        Image.new("L", (8, 8)).save(path)
    look = os.stat

    def refuse(path, *rest, **options):
        if os.fspath(path).startswith(str(closed) + os.sep):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return look(path, *rest, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert list_images(tmp_path) == [tmp_path / "a.png", closed / "b.png"]
