from __future__ import annotations

from pathlib import Path

import pytest

from dfengine.checkpoint import Checkpoint, save_checkpoint
from dfengine.errors import CheckpointError, DfengineError, UsageError
from dfengine.training import TrainingInterrupted, train
from dfengine.training.outputs import check_outputs, run_folder_of
from tests.helpers import tiny_config, tiny_model
from tests.training.test_train import CONFIG


@pytest.mark.parametrize(
    "out, folder",
    [("a/net.safetensors", "a/net.run"), ("v1.0", "v1.0.run"), ("v1.1", "v1.1.run"), ("net.pt", "net.pt.run")],
)
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
    (tmp_path / "photo.png").write_bytes(b"precious")
    for resume in (False, True):
        with pytest.raises(CheckpointError, match="photo.png: is there already and is not a dfengine checkpoint"):
            check_outputs(tmp_path / "photo.png", resume=resume)
    assert out.read_bytes() == before and (tmp_path / "photo.png").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["net.run", "net.safetensors", "photo.png"]


@pytest.mark.parametrize("out, reason", [("folder", "is a folder"), ("file/net", "is a file"), ("taken", "is a file")])
def test_what_cannot_be_written_is_refused_before_anything_is_read(tmp_path, out, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.run").write_text("")
    with pytest.raises(DfengineError, match=f"{out}.*cannot be written.*{reason}"):
        train(CONFIG, tiny_config(), tmp_path / "no images", tmp_path / out)


def test_the_name_of_a_run_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"net\.run: is the name of a run folder; name .* net\.safetensors"):
        check_outputs(tmp_path / "net.run")


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
    check_outputs(normals.with_name(normals.name + "-net"), normals)


@pytest.mark.parametrize("out, twin", [("net", "net.safetensors"), ("net.safetensors", "net")])
def test_two_checkpoints_do_not_share_a_run_folder(tmp_path, out, twin):
    model = tiny_model()
    save_checkpoint(tmp_path / twin, Checkpoint(model.config, model.state_dict()))
    with pytest.raises(UsageError, match=rf"{out}: would share the run folder .*net\.run with .*{twin}; choose"):
        check_outputs(tmp_path / out)
    check_outputs(tmp_path / "another", resume=False)


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, normals):
    out = tmp_path / "net.safetensors"
    refused = []

    def second(step):
        for name in ("net.safetensors", "net"):
            with pytest.raises(DfengineError, match=r"net\.run: another run is writing into it") as caught:
                train(CONFIG, tiny_config(), normals, tmp_path / name, resume=True)
            refused.append(caught.value)
        return True

    with pytest.raises(TrainingInterrupted):
        train(CONFIG, tiny_config(), normals, out, stop=second)
    assert len(refused) == 2
    train(CONFIG, tiny_config(), normals, out, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir() if "net" in p.name) == ["net.run", "net.safetensors"]
