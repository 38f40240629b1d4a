from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from dfengine.data import folders
from dfengine.data.folders import Dataset, Sample, fingerprint, open_dataset, open_test_set
from dfengine.data.images import read_mask
from dfengine.errors import DataError
from dfengine.files import OUTPUT_MARKER


def grow(root: Path, *files: str) -> Path:
    """A tree of small images, one for each name; "a/0-4.png" stands for five."""
    for name in files:
        stem, suffix = os.path.splitext(name)
        first, dash, last = os.path.basename(stem).partition("-")
        names = [f"{i:03d}" for i in range(int(first), int(last) + 1)] if dash else [first]
        for each in names:
            path = root / os.path.dirname(name) / (each + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 1).save(path)
    return root


def names(samples: tuple[Sample, ...], root: Path) -> list[str]:
    return [sample.path.relative_to(root).as_posix() for sample in samples]


def labels(data: Dataset) -> list[tuple[str, int, str, str | None]]:
    return [(s.path.name, s.label, s.defect, s.mask and s.mask.relative_to(data.root).as_posix()) for s in data.test]


# MVTec and plain folders

def test_mvtec(tmp_path):
    grow(tmp_path, "train/good/0-2.png", "test/good/0-1.png", "test/bent/0-1.png", "test/cut/0-0.png",
         "ground_truth/bent/000_mask.png", "ground_truth/bent/001_mask.png", "ground_truth/cut/000_mask.png",
         "license/logo.png")
    data = open_dataset(tmp_path)
    assert (data.root, data.layout) == (tmp_path, "mvtec")
    assert names(data.train, tmp_path) == [f"train/good/00{i}.png" for i in range(3)]
    assert {(s.label, s.defect, s.mask) for s in data.train} == {(0, "good", None)}
    assert labels(data) == [
        ("000.png", 1, "bent", "ground_truth/bent/000_mask.png"),
        ("001.png", 1, "bent", "ground_truth/bent/001_mask.png"),
        ("000.png", 1, "cut", "ground_truth/cut/000_mask.png"),
        ("000.png", 0, "good", None), ("001.png", 0, "good", None)]
    assert data.has_masks and data.missing_masks == () and data.defects == ("good", "bent", "cut")
    assert read_mask(data.test[0].mask, (8, 8)).all()


def test_a_missing_mask_is_reported(tmp_path):
    grow(tmp_path, "train/good/0-0.png", "test/bent/0-1.png", "ground_truth/bent/001_mask.png")
    data = open_dataset(tmp_path)
    assert not data.has_masks
    assert names(data.missing_masks, tmp_path) == ["test/bent/000.png"]


def test_masks_in_subfolders_belong_to_the_image_of_the_same_subfolder(tmp_path):
    grow(tmp_path, "train/good/0-0.png", "test/bent/day1/000.png", "test/bent/day2/000.png",
         "ground_truth/bent/day2/000_mask.png")
    assert [sample.mask is not None for sample in open_dataset(tmp_path).test] == [False, True]


@pytest.mark.parametrize("good", ["good", "normal", "ok", "OK", "Good"])
def test_names_of_good(good, tmp_path):
    grow(tmp_path, f"train/{good}/0-1.png", f"test/{good}/0-1.png", "test/missing/0-0.png")
    data = open_dataset(tmp_path)
    assert data.layout == "folder" and len(data.train) == 2
    assert [(s.label, s.defect) for s in data.test if s.path.parent.name == good] == [(0, "good")] * 2
    assert not data.has_masks and data.missing_masks == ()


def test_training_images_directly_in_train_and_foreign_folders(tmp_path):
    grow(tmp_path, "train/0-1.png", "test/broken/0-0.png", "train_photos/missing/0-0.png", "extra/a.png")
    data = open_dataset(tmp_path)
    assert names(data.train, tmp_path) == ["train/000.png", "train/001.png"]
    assert names(data.test, tmp_path) == ["test/broken/000.png"]


def test_defects_beside_good_in_train_are_no_training_images(tmp_path):
    grow(tmp_path, "train/good/0-1.png", "train/broken/0-3.png")
    assert names(open_dataset(tmp_path).train, tmp_path) == ["train/good/000.png", "train/good/001.png"]


def test_images_alone_are_training_images(tmp_path):
    grow(tmp_path, "day1/0-2.png", "day2/0-1.png", "a.png")
    data = open_dataset(tmp_path)
    assert (data.layout, len(data.train), data.test, data.has_masks) == ("folder", 6, (), False)


def test_order_is_natural(tmp_path):
    grow(tmp_path, "train/good/2.png", "train/good/10.png", "train/good/1.png")
    assert [s.path.stem for s in open_dataset(tmp_path).train] == ["1", "2", "10"]


@pytest.mark.parametrize("files, message", [
    ((), "no train/good, no Data/Images .VisA., no Train . Test .DAGM., no images"),
    (("screw/train/good/0-0.png", "nut/train/good/0-0.png"), r"several data sets \(nut, screw\)"),
    (("good/0-1.png", "broken/0-1.png"), "test/<defect>; give .*/good for its normal images$"),
    (("Train/good/0-1.png", "Test/broken/0-1.png"), "expected train/good and test/<defect>$"),
    (("train/missing/0-0.png", "test/good/0-0.png"), "train: no folder good, normal or ok, .*; only missing"),
    (("train/good/0-0.png", "train/a.png"), "a.png: lies beside good/"),
    (("train/good/0-0.png", "test/0-0.png"), "test: images without a label"),
    (("train/good/0-0.png", "test/0-0.png", "test/good/0-0.png"), "000.png: lies beside the folders of test/"),
])
def test_what_is_no_data_set_says_what_was_expected(files, message, tmp_path):
    grow(tmp_path, *files)
    with pytest.raises(DataError, match=message) as refusal:
        open_dataset(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path))


def test_wrong_roots_and_layouts(tmp_path):
    grow(tmp_path, "train/good/0-0.png")
    for path, message in ((tmp_path / "gone", "no such folder"),
                          (tmp_path / "train/good/000.png", "is a file, not a folder")):
        with pytest.raises(DataError, match=message):
            open_dataset(path)
    with pytest.raises(DataError, match="coco: no such data layout; there are auto, mvtec, visa, dagm, folder"):
        open_dataset(tmp_path, "coco")
    with pytest.raises(DataError, match="no image for layout visa"):
        open_dataset(tmp_path, "visa")


SET = "train/good/0-1.png test/good/0-1.png test/bent/0-1.png ground_truth/bent/0-1.png"
VISA = "Data/Images/Normal/0-19.JPG Data/Images/Anomaly/0-2.JPG Data/Masks/Anomaly/0-2.png"


@pytest.mark.parametrize("files, given", [
    *((SET, part) for part in ("test", "test/good", "test/bent", "train", "train/good", "ground_truth/bent")),
    *((VISA, part) for part in ("Data", "Data/Images", "Data/Images/Normal", "Data/Images/Anomaly")),
    ("Train/0-2.PNG Test/3-4.PNG Test/Label/003_label.PNG", "Test"),
])
def test_a_part_of_a_set_with_test_images_names_the_whole_which_is_taken(files, given, tmp_path, monkeypatch):
    root = grow(tmp_path / "set", *files.split())
    refusal = f": is a part of the data set {root.resolve()}; give that folder$"
    with pytest.raises(DataError, match=f"^{root / given}{refusal}"):
        open_test_set(root / given)
    monkeypatch.chdir(root / given)
    with pytest.raises(DataError, match=f"^.{refusal}"):
        open_test_set(".")
    assert open_test_set(root.resolve()).test


def test_folders_of_kinds_are_taken_once_they_are_moved_as_said(tmp_path):
    grow(tmp_path, "ok/0-1.png", "broken/0-0.png", "ground_truth/broken/0-0.png")
    said = f"no test images; of its folders broken, ok, move ok and those of defects into {tmp_path}/test$"
    with pytest.raises(DataError, match=said):
        open_test_set(tmp_path)
    (tmp_path / "test").mkdir()
    for kind in ("broken", "ok"):
        (tmp_path / kind).rename(tmp_path / "test" / kind)
    data = open_test_set(tmp_path)
    assert data.defects == ("good", "broken") and data.has_masks


@pytest.mark.parametrize("beside", ["0-0.png", "test/screens/0-0.png", "Images/0-0.png"])
@pytest.mark.parametrize("name", ["Data", "Train", "Test", "train", "test", "ground_truth"])
def test_a_folder_that_is_only_named_as_a_part_is_looked_at_alone(name, beside, tmp_path, monkeypatch, caplog):
    """What lies beside it is not: it may be a home, or the whole disk."""
    if name == "ground_truth" and beside.startswith("test"):
        pytest.skip("masks beside a folder test are a data set's")
    photos = grow(tmp_path, f"{name}/photos/0-0.png", beside) / name / "photos"
    (tmp_path / "letter.txt").write_text("")
    listed, honest = [], folders.list_images
    monkeypatch.setattr(folders, "list_images", lambda folder, *rest: listed.append(folder) or honest(folder, *rest))
    with pytest.raises(DataError, match=f"^{photos}: no test images; expected test/good"):
        open_test_set(photos)
    assert listed == [photos] and not caplog.records


def test_images_without_labels_are_no_test_set(tmp_path):
    expected = "no test images; expected test/good and test/<defect>, or Data/Images .VisA., or Test .DAGM."
    grow(tmp_path, "photos/A/0-0.png", "photos/B/0-0.png", "test/0.png")
    with pytest.raises(DataError, match=f"photos: {expected}; there is only A, B$"):
        open_test_set(tmp_path / "photos")
    with pytest.raises(DataError, match=f"A: {expected}$"):
        open_test_set(tmp_path / "photos" / "A")
    with pytest.raises(DataError, match="images without a label"):
        open_test_set(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_test_set(tmp_path / "gone")


@pytest.mark.parametrize("read", [open_dataset, open_test_set])
def test_a_folder_of_results_is_called_one(read, tmp_path):
    grow(tmp_path, "test/good/0-1.png", "test/good/results/heatmaps/0-1.png")
    results = tmp_path / "test" / "good" / "results"
    (results / OUTPUT_MARKER).touch()
    with pytest.raises(DataError, match=f"^{results}: holds what dfengine wrote"):
        read(results)


# VisA

def visa(root: Path) -> Path:
    return grow(root, "Data/Images/Normal/0-19.JPG", "Data/Images/Anomaly/0-2.JPG", "Data/Masks/Anomaly/0-1.png")


def test_visa_without_its_split(tmp_path):
    data = open_dataset(visa(tmp_path / "candle"))
    assert data.layout == "visa" and len(data.train) == 18
    assert [s.path.stem for s in data.test if not s.label] == ["009", "019"]
    assert [(s.path.stem, s.defect, s.mask and s.mask.name) for s in data.test if s.label] == [
        ("000", "anomaly", "000.png"), ("001", "anomaly", "001.png"), ("002", "anomaly", None)]
    assert not data.has_masks and len(data.missing_masks) == 1


def test_visa_with_its_split_and_kinds(tmp_path):
    root = visa(tmp_path / "candle")
    (root / "image_anno.csv").write_text(
        "image,label,mask\ncandle/Data/Images/Normal/000.JPG,normal,\n"
        "candle/Data/Images/Anomaly/000.JPG,\"chunk of wax missing,other\",candle/Data/Masks/Anomaly/000.png\n")
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text(
        "object,split,label,image,mask\ncandle,train,normal,candle/Data/Images/Normal/000.JPG,\n"
        "candle,test,normal,candle/Data/Images/Normal/007.JPG,\npcb1,test,normal,pcb1/Data/Images/Normal/001.JPG,\n"
        "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n")
    data = open_dataset(root)
    assert [s.path.stem for s in data.test if not s.label] == ["007"]
    assert [s.defect for s in data.test if s.label] == ["chunk of wax missing,other", "anomaly", "anomaly"]
    assert len(data.train) == 19


def test_visa_with_a_table_that_is_none(tmp_path):
    root = visa(tmp_path / "candle")
    (root / "image_anno.csv").write_text("a;b\n1;2\n")
    with pytest.raises(DataError, match="image_anno.csv: expected the columns image, label"):
        open_dataset(root)


def test_visa_converted_to_mvtec(tmp_path):
    grow(tmp_path, "train/good/0-3.JPG", "test/good/0-1.JPG", "test/bad/0-1.JPG", "ground_truth/bad/0-1.png")
    data = open_dataset(tmp_path)
    assert (data.layout, len(data.train), len(data.test), data.has_masks) == ("mvtec", 4, 4, True)


# DAGM

def test_dagm_by_label_images(tmp_path):
    grow(tmp_path, "Train/0-4.PNG", "Train/Label/001_label.PNG", "Test/5-8.PNG", "Test/Label/006_label.PNG")
    data = open_dataset(tmp_path)
    assert data.layout == "dagm"
    assert [s.path.stem for s in data.train] == ["000", "002", "003", "004"]
    assert [(s.path.stem, s.label, s.defect) for s in data.test] == [
        ("005", 0, "good"), ("006", 1, "defect"), ("007", 0, "good"), ("008", 0, "good")]
    assert data.has_masks and data.test[1].mask.name == "006_label.PNG"


def test_dagm_by_its_table(tmp_path):
    grow(tmp_path, "Train/0-2.PNG", "Test/3-4.PNG", "Test/Label/003_label.PNG", "Train/Label/001_label.PNG")
    (tmp_path / "Train/Label/Labels.txt").write_text("1\n0\t0\t000.PNG\t0\t0\n1\t1\t001.PNG\t0\t001_label.PNG\n")
    (tmp_path / "Test/Label/Labels.txt").write_text(
        "1\r\n3\t1\t003.PNG\t0\t003_label.PNG\r\n4\t1\t004.PNG\t0\t004_label.PNG\r\n")
    data = open_dataset(tmp_path)
    assert [s.path.stem for s in data.train] == ["000", "002"]
    assert [(s.label, s.mask is not None) for s in data.test] == [(1, True), (1, False)]
    assert [s.path.stem for s in data.missing_masks] == ["004"]


# Fingerprint

def test_fingerprint(tmp_path):
    (tmp_path / "a").mkdir()
    first, second = tmp_path / "a" / "1.png", tmp_path / "a" / "2.png"
    first.write_bytes(b"one")
    second.write_bytes(b"two")
    reference = fingerprint([first, second])
    assert len(reference) == 64 and int(reference, 16)
    assert fingerprint([str(second), first]) == reference
    (tmp_path / "a").rename(tmp_path / "moved")
    first, second = tmp_path / "moved" / "1.png", tmp_path / "moved" / "2.png"
    assert fingerprint([first, second]) == reference
    assert fingerprint([first]) != reference
    second.write_bytes(b"twO")
    assert fingerprint([first, second]) != reference
    second.write_bytes(b"two")
    second.rename(tmp_path / "moved" / "3.png")
    assert fingerprint([first, tmp_path / "moved" / "3.png"]) != reference
    with pytest.raises(DataError, match="2.png: no such file"):
        fingerprint([first, second])


def test_fingerprint_depends_on_the_order_of_contents(tmp_path):
    """Two files that swap their bytes are another data set."""
    paths = [tmp_path / "1.png", tmp_path / "2.png"]
    for path, content in zip(paths, (b"x", b"y"), strict=True):
        path.write_bytes(content)
    reference = fingerprint(paths)
    for path, content in zip(paths, (b"y", b"x"), strict=True):
        path.write_bytes(content)
    assert fingerprint(paths) != reference


# The real sets

@pytest.mark.skipif(not os.environ.get("DFENGINE_DATA"), reason="set DFENGINE_DATA to the evaluation data")
@pytest.mark.parametrize("name, layout, train, good, defects, masks", [
    ("rail_eclip", "folder", 109, 58, {"missing": 26}, False),
    ("mvtec_screw", "mvtec", 320, 41, {"scratch_neck": 25, "scratch_head": 24, "manipulated_front": 24,
                                       "thread_side": 23, "thread_top": 23}, True),
    ("dtd", "folder", 600, 0, {}, False),
])
def test_counts_of_the_real_data(name, layout, train, good, defects, masks):
    root = Path(os.environ["DFENGINE_DATA"]) / name
    if not root.is_dir():
        pytest.skip(f"no {name} in DFENGINE_DATA")
    data = open_dataset(root)
    assert (data.layout, len(data.train), data.has_masks) == (layout, train, masks)
    kinds = [sample.defect for sample in data.test]
    assert {kind: kinds.count(kind) for kind in data.defects} == ({"good": good} if good else {}) | defects
    if masks:
        assert all(read_mask(sample.mask, (256, 256)).any() for sample in data.test if sample.label)


@pytest.mark.parametrize(
    "files, given, reason",
    [
        ("test/good/0-0.png test/bent/0-0.png", "test/bent", "images of the defect 'bent'"),
        ("test/good/0-0.png test/bent/day/0-0.png", "test/bent/day", "images of the defect 'bent'"),
        ("train/good/0-0.png test/bent/0-0.png", "test/bent", "images of the defect 'bent'"),
        ("train/0-0.png test/bent/0-0.png ground_truth/bent/000_mask.png", "test/bent", "images of the defect 'bent'"),
        ("train/good/0-0.png test/bent/0-0.png", "test", "holds the test images of .*; give that folder"),
        ("test/ok/0-0.png test/bent/0-0.png", "test", "holds the test images of .*; give .*test/ok"),
        ("train/good/0-0.png ground_truth/bent/000_mask.png", "ground_truth/bent", "holds masks"),
        ("Data/Images/Normal/0-0.png Data/Images/Anomaly/0-0.png", "Data/Images/Anomaly", "the defect 'Anomaly'"),
    ],
)
def test_a_folder_of_defects_is_not_taken_for_normal_images(files, given, reason, tmp_path, monkeypatch):
    root = grow(tmp_path, *files.split())
    with pytest.raises(DataError, match=f"{given}: .*{reason}"):
        open_dataset(root / given)
    monkeypatch.chdir(root / given)
    with pytest.raises(DataError, match=reason):
        open_dataset(".")


def test_a_folder_that_only_lies_below_one_called_test_is_taken(tmp_path):
    for given in ("test/photos", "test/good", "Images/monday"):
        grow(tmp_path, f"{given}/0-1.png")
        assert len(open_dataset(tmp_path / given).train) == 2
