from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest

from dfengine.checkpoint import Checkpoint, save_checkpoint
from dfengine.errors import DfengineError, UsageError
from dfengine.files import OUTPUT_MARKER
from dfengine.training import TrainingInterrupted, loop, train
from dfengine.training.outputs import check_outputs, held, run_folder_of
from dfengine.training.state import STATE_FILE
from tests.helpers import tiny_config, tiny_model
from tests.training.test_train import CONFIG


@pytest.mark.parametrize("out, folder", [("a/net.safetensors", "a/net.run"), ("v1.0.safetensors", "v1.0.run")])
def test_each_checkpoint_has_its_own_run_folder(out, folder):
    assert run_folder_of(Path(out)) == Path(folder)


def test_the_check_leaves_what_is_there(tmp_path):
    out = tmp_path / "net.safetensors"
    model = tiny_model()
    save_checkpoint(out, Checkpoint(model.config, model.state_dict()))
    before = out.read_bytes()
    (tmp_path / "net.run").mkdir()
    check_outputs(out, tmp_path / "images", resume=True)
    with pytest.raises(UsageError, match="is there already"):
        check_outputs(out, tmp_path / "images")
    photo = tmp_path / "photo.safetensors"
    photo.write_bytes(b"precious")
    for resume in (False, True):
        with pytest.raises(UsageError, match="photo.safetensors: is there already and is not a dfengine checkpoint"):
            check_outputs(photo, resume=resume)
    assert out.read_bytes() == before and photo.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["net.run", "net.safetensors", "photo.safetensors"]


@pytest.mark.parametrize(
    "out, reason",
    [
        ("folder.safetensors", r"folder\.safetensors: cannot be written: is a folder"),
        ("file/net.safetensors", r"file/net\.safetensors: cannot be written: a part of its path is a file"),
        ("taken.safetensors", r"taken\.run: cannot be written: is a file"),
        ("net.run", r"net\.run: must end in \.safetensors"),
        ("net", r"net: must end in \.safetensors"),
        ("net.SAFETENSORS", r"net\.SAFETENSORS: must end in \.safetensors"),  # its run folder would be net's
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_read(tmp_path, out, reason):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.run").write_text("")
    for resume in (False, True):
        with pytest.raises(UsageError, match=reason):
            train(CONFIG, tiny_config(), tmp_path / "no images", tmp_path / out, resume=resume)


def test_panels_cannot_come_among_the_images(tmp_path, normals, monkeypatch):
    with pytest.raises(UsageError, match="lies inside"):
        train(CONFIG, tiny_config(), normals, normals / "deeper" / "net.safetensors")
    assert not (normals / "deeper").exists()
    textures = tmp_path / "textures"
    with pytest.raises(UsageError, match="lies inside .*textures"):
        train(CONFIG.replace(textures=str(textures)), tiny_config(), normals, textures / "net.safetensors")
    monkeypatch.chdir(normals)
    with pytest.raises(UsageError, match="lies inside"):
        check_outputs(Path("net.safetensors"), normals)
    check_outputs(normals.with_name(normals.name + "-net.safetensors"), normals)


def test_a_folder_of_somebody_elses_is_refused_and_left(tmp_path, normals):
    out, folder = tmp_path / "net.safetensors", tmp_path / "net.run"
    for name in ("panels/mine.txt", "tensorboard/events.mine", "log.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = sorted(folder.rglob("*"))
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"net\.run: holds files not written by dfengine; choose another --out"):
            train(CONFIG, tiny_config(), normals, out, resume=resume)
    assert sorted(folder.rglob("*")) == before and (folder / "log.csv").read_text() == "mine"
    (folder / OUTPUT_MARKER).write_text("results.csv\n")  # of results
    with pytest.raises(UsageError, match=r"net\.run: holds files not written by dfengine"):
        check_outputs(out)
    (folder / OUTPUT_MARKER).unlink()
    for ours in (OUTPUT_MARKER, STATE_FILE):  # a full disk may have had no room for the marker
        (folder / ours).touch()
        check_outputs(out)
        (folder / ours).unlink()


def test_what_another_run_left_meanwhile_is_refused(tmp_path, normals, monkeypatch):
    """One that ended between the first look and the lock."""
    out, model, panel = tmp_path / "net.safetensors", tiny_model(), tmp_path / "net.run" / "panels" / "step-1.png"

    @contextmanager
    def after_another(folder, world):
        save_checkpoint(out, Checkpoint(model.config, model.state_dict()))
        panel.parent.mkdir(parents=True)
        for file in (panel, folder / OUTPUT_MARKER):
            file.touch()
        with held(folder, world):
            yield

    monkeypatch.setattr(loop, "held", after_another)
    with pytest.raises(UsageError, match=r"net\.safetensors: is there already"):
        train(CONFIG, tiny_config(), normals, out)
    assert panel.exists()


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, normals):
    out = tmp_path / "net.safetensors"
    refused = []

    def second(step):
        with pytest.raises(DfengineError, match=r"net\.run: another run is writing into it") as caught:
            train(CONFIG, tiny_config(), normals, out, resume=True)
        refused.append(caught.value)
        return True

    with pytest.raises(TrainingInterrupted):
        train(CONFIG, tiny_config(), normals, out, stop=second)
    assert len(refused) == 1
    train(CONFIG, tiny_config(), normals, out, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir() if "net" in p.name) == ["net.run", "net.safetensors"]
