"""What an output names by mistake: for every command the same line and status, before its work."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from dfengine.cli import main
from dfengine.engine.execute import Executor

CHECKPOINTS = {
    "train": "train {photos} --out {out} --steps 1",
    "calibrate": "calibrate {model} --threshold 0.5 --out {out}",
    "convert": "convert {photos} {out}",
}
JSON = {name: f"{name} {{model}} --batch 1 --out {{out}}" for name in ("tune", "bench", "profile")}
FILES = CHECKPOINTS | JSON | {"roofline": "roofline {model} --batch 1 --out {out}"}
SUFFIXES = dict.fromkeys(CHECKPOINTS, ".safetensors") | dict.fromkeys(JSON, ".json") | {"roofline": ".png"}
RESULTS = {
    "detect": "detect {model} {photos} --out {out} --precision float32",
    "evaluate": "evaluate {model} {set} --out {out} --precision float32",
}
FOLDERS = RESULTS | {"fasteners": "fasteners {out} --size 32", "demo": "demo --out {out}"}


@pytest.fixture
def refused(tiny, tmp_path, capsys, monkeypatch):
    """A function that runs a command with this output, sees that it is refused with a status and before anything runs,
    and gives what is said of the output."""
    photos = tmp_path / "set" / "test" / "good"
    photos.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(photos / "0.png")
    monkeypatch.setattr(Executor, "run", None)

    def run(command, out, status):
        words = dict(model=tiny, photos=photos, set=tmp_path / "set", out=out)
        assert main([word.format(**words) for word in command.split()]) == status
        printed = capsys.readouterr()
        (said,) = [line for line in printed.err.splitlines() if "warning" not in line]
        assert said.startswith(f"dfengine: {out}: ") and not printed.out
        return said.removeprefix(f"dfengine: {out}: ")

    return run


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be(name, refused, tmp_path):
    suffix = SUFFIXES[name]
    folder, file = tmp_path / f"folder{suffix}", tmp_path / "file"
    folder.mkdir()
    file.write_text("mine")
    assert refused(FILES[name], folder, 2) == "cannot be written: is a folder, not a file"
    below = refused(FILES[name], file / f"out{suffix}", 2)
    assert below == "cannot be written: a part of its path is a file, not a folder"
    assert not list(folder.iterdir()) and file.read_text() == "mine"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_something_else(name, refused, tmp_path):
    photo = tmp_path / f"photo{SUFFIXES[name]}"
    photo.write_bytes(b"mine")
    said = refused(FILES[name], photo, 2)
    assert said.startswith("is there already and ") and said.endswith("; choose another name")
    assert photo.read_bytes() == b"mine"


@pytest.mark.parametrize("name, theirs", [
    ("tune", '{"tactics": ["pass early"]}'),
    ("bench", '{"torch": "2.0", "rows": [{"batch": 1}]}'),
    ("profile", '{"schemaVersion": 1, "traceEvents": [{"name": "process_name", "args": {"name": "python"}}]}'),
])  # fmt: skip
def test_a_json_file_of_another_program(name, theirs, refused, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(theirs)
    said = "is there already and does not show that this command wrote it; choose another name"
    assert refused(JSON[name], out, 2) == said
    assert out.read_text() == theirs


@pytest.mark.parametrize("name", [*CHECKPOINTS, "roofline"])
def test_a_name_of_another_kind_of_file(name, refused, tmp_path):
    for other in ("new.txt", "new", SUFFIXES[name], f"new{SUFFIXES[name].upper()}"):
        assert refused(FILES[name], tmp_path / other, 2) == f"must end in {SUFFIXES[name]}"
        assert not (tmp_path / other).exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be(name, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused(FOLDERS[name], file, 2) == "cannot be written: is a file, not a folder"
    below = refused(FOLDERS[name], file / "out", 2)
    assert below == "cannot be written: a part of its path is a file, not a folder"
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("link", [False, True])
def test_a_file_in_the_place_of_the_heatmaps(name, link, refused, tmp_path):
    heatmaps = tmp_path / "out" / "heatmaps"
    heatmaps.parent.mkdir()
    heatmaps.symlink_to("nowhere") if link else heatmaps.write_text("mine")
    assert refused(RESULTS[name], heatmaps.parent, 2).startswith("holds heatmaps, not a folder")
    assert [path.name for path in heatmaps.parent.iterdir()] == ["heatmaps"]


def test_a_file_in_the_place_of_a_folder_of_the_demo(capsys, tmp_path):
    for name, reason in (("images", ": cannot be written: is a file"), ("results/heatmaps", ": holds heatmaps")):
        file = tmp_path / name.replace("/", "-") / name
        file.parent.mkdir(parents=True)
        file.write_text("mine")
        assert main(["demo", "--out", str(tmp_path / name.replace("/", "-"))]) == 2
        said = capsys.readouterr()
        assert reason in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("name", FILES | FOLDERS)
def test_a_place_where_nobody_can_make_a_file(name, refused, tmp_path, monkeypatch):
    """As /proc is, which has no folder to make one in."""
    make = Path.mkdir

    def mkdir(self, *arguments, **options):
        if tmp_path / "proc" in (self, *self.parents):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    out = tmp_path / "proc" / f"out{SUFFIXES.get(name, '')}"
    assert refused((FILES | FOLDERS)[name], out, 2) == "cannot be written: no file can be made there"


@pytest.mark.parametrize("name", FILES | FOLDERS)
def test_a_place_that_takes_no_file_is_no_wrong_usage(name, refused, tmp_path, monkeypatch):
    """As for want of permission."""

    def refuse(*_arguments, dir, **_options):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    out = tmp_path / f"out{SUFFIXES.get(name, '')}"
    assert refused((FILES | FOLDERS)[name], out, 1) == "cannot be written: permission denied"


def test_fasteners_are_not_mixed_with_others(tmp_path, capsys):
    counts = ["--train", "1", "--test-good", "0", "--per-defect", "0", "--size", "32"]
    arguments = ["fasteners", str(tmp_path / "f"), *counts]
    assert main(arguments) == 0 and main(arguments) == 2
    assert "holds a data set already" in capsys.readouterr().err
    photos = tmp_path / "photos"
    (photos / "site").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(photos / "site" / "000.png")
    assert main(["fasteners", str(photos), *counts]) == 2
    assert "photos: holds images; choose another folder for a data set" in capsys.readouterr().err
    assert [path.name for path in photos.iterdir()] == ["site"]
