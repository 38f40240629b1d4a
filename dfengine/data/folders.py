"""Data-set folders: MVTec AD, VisA, DAGM 2007 and plain folders, as lists of samples.

Only names are looked at here; whether an image is readable shows when it is read. Training samples are always normal.

    mvtec   train/good/*, test/<defect>/*, ground_truth/<defect>/<stem>_mask.png (MVTec AD, and VisA converted to it)
    visa    Data/Images/{Normal,Anomaly}/*, Data/Masks/Anomaly/<stem>.png, image_anno.csv; the split of
            ../split_csv/1cls.csv where it is there, else every tenth normal image is a test image
    dagm    Train/*.PNG, Test/*.PNG, Label/<stem>_label.PNG and Labels.txt in each (a single class folder)
    folder  the same without ground_truth, train/* instead of train/good/*, or without test; or only images, which are
            all taken as normal training images
"""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dfengine.data.images import FORMATS, list_images
from dfengine.errors import DataError
from dfengine.files import OUTPUT_MARKER, os_reason

GOOD_NAMES = frozenset(("good", "normal", "ok"))
LAYOUTS = ("mvtec", "visa", "dagm", "folder")
PARTS = ("train", "test", "ground_truth", "Data", "Train", "Test")
"""The folders of a data set."""


@dataclass(frozen=True)
class Sample:
    """One image. `label` is 0 (good) or 1 (anomalous); `defect` its kind, "good" for label 0.

    `mask` is the file that marks the anomalous pixels; None where there is none, and for good images, which have none.
    """

    path: Path
    label: int
    defect: str
    mask: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """`train` holds good samples only; `test` may be empty. Both are in natural order of their paths."""

    root: Path
    layout: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]

    @property
    def has_masks(self) -> bool:
        """Whether pixel metrics can be computed: there are anomalous test images and each has a mask."""
        anomalous = [sample for sample in self.test if sample.label]
        return bool(anomalous) and all(sample.mask for sample in anomalous)

    @property
    def missing_masks(self) -> tuple[Sample, ...]:
        """Anomalous test samples without a mask where others have one: worth a report."""
        anomalous = [sample for sample in self.test if sample.label]
        return tuple(s for s in anomalous if s.mask is None) if any(s.mask for s in anomalous) else ()

    @property
    def defects(self) -> tuple[str, ...]:
        """The kinds in `test`, "good" first."""
        kinds = {sample.defect for sample in self.test}
        return tuple(sorted(kinds, key=lambda kind: (kind != "good", kind)))


def open_dataset(root: str | os.PathLike, layout: str = "auto") -> Dataset:
    """Reads the lists of a data-set folder. Raises DataError naming the folder and what was expected in it."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'is a file, not a folder' if root.exists() else 'no such folder'}")
    if layout == "auto":
        layout = _detect_layout(root)
    if layout not in LAYOUTS:
        raise DataError(f"{layout}: no such data layout; there are auto, {', '.join(LAYOUTS)}")
    try:
        train, test = {"mvtec": _mvtec, "visa": _visa, "dagm": _dagm, "folder": _folder}[layout](root)
    except OSError as error:
        raise DataError(f"{error.filename or root}: {os_reason(error)}") from error
    if not train and not test:
        raise DataError(f"{root}: no image for layout {layout} ({FORMATS})")
    return Dataset(root, layout, tuple(train), tuple(test))


def open_test_set(root: str | os.PathLike) -> Dataset:
    """`open_dataset` for who needs labelled test images. Raises DataError where there are none too, naming the folder
    to give instead or what was expected."""
    root = Path(root)
    refusal = None
    try:
        dataset = open_dataset(root)
        if dataset.test:
            return dataset
    except DataError as error:
        refusal = error
    if not root.is_dir() or (root / OUTPUT_MARKER).exists():
        raise refusal
    whole = _whole(root)
    if whole:
        raise DataError(f"{root}: is a part of the data set {whole}; give that folder")
    names = [sub.name for sub in _subfolders(root)]
    kinds = [name for name in names if name not in PARTS]
    good = [name for name in kinds if name.lower() in GOOD_NAMES]
    if good and len(kinds) > len(good) and not _looks_like_dataset(root):
        moved = f"of its folders {_listed(kinds)}, move {_listed(good)} and those of defects into {root / 'test'}"
        raise DataError(f"{root}: no test images; {moved}")
    if refusal:
        raise refusal
    held = f"; there is only {_listed(names)}" if names else ""
    raise DataError(
        f"{root}: no test images; expected test/good and test/<defect>, or Data/Images (VisA), or Test (DAGM){held}"
    )


def _whole(part: Path) -> Path | None:
    """The data set with test images to which the folder `part` belongs; None where there is none."""
    for inner in (part.resolve(), *part.resolve().parents):
        root = inner.parent
        try:
            # In no other folder of this name, which may be anybody's, are files looked for.
            if _is_part(inner.name, root) and open_dataset(root).test:
                return root
        except (DataError, OSError):
            continue
    return None


def _is_part(name: str, root: Path) -> bool:
    """Whether the folder `name` of `root` is one of a data set with test images, by its name and what is beside it."""
    if name == "Data":
        return _detect_layout(root) == "visa"
    if name in ("Train", "Test"):
        return _detect_layout(root) == "dagm"
    return name in PARTS and os.path.isdir(root / "test") and _is_test(root / "test")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def fingerprint(paths: Iterable[str | os.PathLike]) -> str:
    """sha256 (hex) over names and bytes of files: changes when any is added, renamed or altered, not with their order
    or with the folder they lie in together. Raises DataError when one cannot be read."""
    files = sorted(Path(path) for path in paths)
    common = Path(os.path.commonpath([file.absolute().parent for file in files])) if files else Path()
    digest = hashlib.sha256()
    for name, file in sorted((file.absolute().relative_to(common).as_posix(), file) for file in files):
        # The fixed length of the inner digest keeps names and contents from running into each other.
        digest.update(os.fsencode(name) + b"\0" + _content(file))
    return digest.hexdigest()


def content_digest(path: str | os.PathLike) -> str:
    """The first 16 hex digits of the sha256 of a file's bytes: tells, in any folder, an image that was trained on.
    Raises DataError when it cannot be read."""
    return _content(Path(path)).hex()[:16]


def _content(file: Path) -> bytes:
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe or a device may never end
            raise DataError(f"{file}: not a regular file")
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"{file}: {os_reason(error)}") from error


def _detect_layout(root: Path) -> str:
    if os.path.isdir(root / "Data" / "Images"):
        return "visa"
    names = {folder.name for folder in _subfolders(root)}
    # On file systems that ignore case DAGM's Train would also pass for train: look at the names themselves.
    if {"Train", "Test"} <= names and not _subfolders(root / "Train", besides=("label",)):
        return "dagm"
    if {"train", "test", "ground_truth"} <= names:
        return "mvtec"
    return "folder"


def _folder(root: Path) -> tuple[list[Sample], list[Sample]]:
    if os.path.isdir(root / "train") or os.path.isdir(root / "test"):
        return _mvtec(root)
    if (root / OUTPUT_MARKER).exists():
        list_images(root)  # raises, for that
    # Anything that hints at labels must not end up as normal training images.
    subfolders = _subfolders(root)
    data_sets = [sub.name for sub in subfolders if _looks_like_dataset(sub)]
    if data_sets:
        raise DataError(f"{root}: holds several data sets ({_listed(data_sets)}); give one of these folders")
    _refuse_defects(root.resolve(), root)
    labelled = [sub.name for sub in subfolders if sub.name.lower() in GOOD_NAMES | {"train", "test", "ground_truth"}]
    if labelled and len(subfolders) > 1:
        first, remedy = labelled[0], ""
        if first.lower() in GOOD_NAMES:
            remedy = f"; give {root / first} for its normal images"
        raise DataError(f"{root}: holds folder {first} among others; expected train/good and test/<defect>{remedy}")
    images = _images(root, recursive=True, others=True)
    if not images:
        raise DataError(f"{root}: no train/good, no Data/Images (VisA), no Train + Test (DAGM), no images ({FORMATS})")
    return [Sample(path, 0, "good") for path in images], []


def _refuse_defects(folder: Path, shown: Path) -> None:
    """Raises `DataError` for a folder of a data set, or inside one, that holds test images, a defect or masks."""
    if folder.name == "test" and _is_test(folder):
        good = [sub for sub in _subfolders(folder) if sub.name.lower() in GOOD_NAMES]
        takes = "that folder" if os.path.isdir(folder.parent / "train") else good[0] if good else None
        remedy = f"; give {takes}" if takes else ""
        raise DataError(f"{shown}: holds the test images of {folder.parent}{remedy}")
    for inner in (folder, *folder.parents):
        outer = inner.parent
        if inner.name == "ground_truth" and any(os.path.isdir(outer / name) for name in ("train", "test")):
            raise DataError(f"{shown}: holds masks of the data set {outer}, no normal images")
        visa = outer.name == "Images" and os.path.isdir(outer / "Normal")
        if inner.name.lower() not in GOOD_NAMES and (visa or (outer.name == "test" and _is_test(outer))):
            raise DataError(f"{shown}: holds images of the defect {inner.name!r} of a data set, no normal ones")


def _is_test(folder: Path) -> bool:
    """Whether a folder "test" is that of a data set in the MVTec layout, by what is in it and beside it."""
    places = folder, folder.parent / "train"
    good = any(sub.name.lower() in GOOD_NAMES for place in places for sub in _subfolders(place))
    return good or os.path.isdir(folder.parent / "ground_truth")


def _looks_like_dataset(folder: Path) -> bool:
    return any(os.path.isdir(folder / name) for name in ("train", "Train", "test", "Test", "Data/Images"))


def _mvtec(root: Path) -> tuple[list[Sample], list[Sample]]:
    train = _train_images(root / "train")
    test = [Sample(path, 0, "good") for path in _images(root / "test")]
    if test and not _subfolders(root / "test"):
        raise DataError(f"{root / 'test'}: images without a label; put them in test/good and test/<defect>")
    if test:
        raise DataError(f"{test[0].path}: lies beside the folders of test/; put it in test/good or test/<defect>")
    for folder in _subfolders(root / "test"):
        good = folder.name.lower() in GOOD_NAMES
        masks = {} if good else _mask_files(root / "ground_truth" / folder.name)
        test += [Sample(path, 0, "good") if good else Sample(path, 1, folder.name, masks.get(_key(path, folder)))
                 for path in _images(folder, recursive=True, others=True)]
    return [Sample(path, 0, "good") for path in train], test


def _train_images(folder: Path) -> list[Path]:
    """train/good where it exists (several good names add up), else the images of train/ itself."""
    good = [sub for sub in _subfolders(folder) if sub.name.lower() in GOOD_NAMES]
    images = [path for sub in good for path in _images(sub, recursive=True, others=True)]
    loose = _images(folder, others=not good)
    if good and loose:
        raise DataError(f"{loose[0]}: lies beside {good[0].name}/; put all normal images in one of the two places")
    if not good and not loose and _subfolders(folder):
        names = [sub.name for sub in _subfolders(folder)]
        raise DataError(f"{folder}: no folder good, normal or ok, and no images; only {_listed(names)}")
    return images or loose


def _visa(root: Path) -> tuple[list[Sample], list[Sample]]:
    kinds = _visa_kinds(root)
    masks = _mask_files(root / "Data" / "Masks" / "Anomaly")
    normal = [Sample(path, 0, "good") for path in _images(root / "Data" / "Images" / "Normal")]
    anomalous = [Sample(path, 1, kinds.get(path.name, "anomaly"), masks.get(path.stem))
                 for path in _images(root / "Data" / "Images" / "Anomaly")]
    in_test = _visa_test_names(root)
    if in_test is None:
        in_test = {sample.path.name for sample in normal[9::10]}
    return ([s for s in normal if s.path.name not in in_test],
            [s for s in normal if s.path.name in in_test] + anomalous)


def _visa_kinds(root: Path) -> dict[str, str]:
    """Image name -> kind of anomaly, from image_anno.csv: several kinds in one image are separated by commas."""
    file = root / "image_anno.csv"
    return {Path(row["image"]).name: row["label"] for row in _csv_rows(file, ("image", "label"))
            if row["label"] and row["label"].lower() not in GOOD_NAMES} if file.is_file() else {}


def _visa_test_names(root: Path) -> set[str] | None:
    """Names of the normal test images, from the published split; None without one that speaks of this category."""
    for file in (root.parent / "split_csv" / "1cls.csv", root / "1cls.csv"):
        if file.is_file():
            rows = [row for row in _csv_rows(file, ("object", "split", "image"))
                    if row["object"] == root.resolve().name and "/Normal/" in row["image"]]
            if rows:
                return {Path(row["image"]).name for row in rows if row["split"] == "test"}
    return None


def _csv_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{file}: not a table of comma-separated values") from error
    if rows and any(row.get(column) is None for row in rows for column in columns):
        raise DataError(f"{file}: expected the columns {', '.join(columns)} in every row")
    return rows


def _dagm(root: Path) -> tuple[list[Sample], list[Sample]]:
    """Defective images of Train stay out of training and are not tested either: the published split is kept."""
    train = [s for s in _dagm_split(root / "Train") if not s.label]
    return train, _dagm_split(root / "Test")


def _dagm_split(folder: Path) -> list[Sample]:
    """An image is defective when Labels.txt says so, or, without that file, when it has a label image."""
    masks = _mask_files(folder / "Label")
    defective = _dagm_labels(folder / "Label" / "Labels.txt")
    samples = []
    for path in _images(folder):
        mask = masks.get(path.stem)
        label = int(defective[path.stem]) if path.stem in defective else int(mask is not None)
        samples.append(Sample(path, label, "defect" if label else "good", mask if label else None))
    return samples


def _dagm_labels(file: Path) -> dict[str, bool]:
    """Image stem -> defective. Lines are "<n> <0|1> <image> 0 <label image or 0>", after a first line holding a 1."""
    if not file.is_file():
        return {}
    rows = [line.split() for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {Path(row[2]).stem: row[1] == "1" for row in rows if len(row) >= 5}


def _mask_files(folder: Path) -> dict[str, Path]:
    """Masks by the `_key` of their image: NNN_mask.png, NNN_label.PNG and NNN.png all belong to NNN."""
    masks = {}
    for path in _images(folder, recursive=True):
        key = _key(path, folder)
        for ending in ("_mask", "_label", "_gt"):
            key = key.removesuffix(ending)
        masks[key] = path
    return masks


def _key(path: Path, folder: Path) -> str:
    """The name inside `folder` without suffix: "012", or "day2/012"."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _images(folder: Path, recursive: bool = False, others: bool = False) -> list[Path]:
    """`list_images` (others: as there), or nothing where the folder is missing or holds none."""
    if not folder.is_dir():
        return []
    try:
        return list_images(folder, recursive, others)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return []


def _subfolders(folder: Path, besides: Sequence[str] = ()) -> list[Path]:
    return [entry for entry in _entries(folder)
            if entry.is_dir() and not entry.name.startswith(".") and entry.name.lower() not in besides]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
