from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dfengine.checkpoint import (
    Checkpoint,
    Trial,
    load_checkpoint,
    save_checkpoint,
    shipped_checkpoint,
    update_checkpoint,
)
from dfengine.errors import CheckpointError, DfengineError, UsageError
from dfengine.evaluation.calibration import Calibration, calibrate
from tests.helpers import tiny_config, tiny_model


def a_checkpoint() -> Checkpoint:
    calibration = calibrate([0.1, 0.2, 0.3], 0.3)
    return Checkpoint(tiny_config(), tiny_model().state_dict(), {"steps": 12, "seed": 3}, calibration)


def metadata_of(path) -> dict:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])["__metadata__"]


def test_everything_comes_back(tmp_path):
    path, saved = tmp_path / "a.safetensors", a_checkpoint()
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert (loaded.config, loaded.training, loaded.calibration) == (saved.config, saved.training, saved.calibration)
    model, x = loaded.build(), torch.randn(1, 3, 32, 32)
    assert not any(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved.state[name]), name
    with torch.no_grad():
        t = torch.tensor([7])
        torch.testing.assert_close(model.reconstruction(x, t), tiny_model().reconstruction(x, t))


def a_trial(count: int = 3, size: int = 32) -> Trial:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    return Trial(images, torch.rand((count, size, size), generator=generator).half())


def test_a_trial_and_what_was_verified_come_back(tmp_path):
    plain, path = a_checkpoint(), tmp_path / "a.safetensors"
    saved = replace(plain, trial=a_trial(), verified={"bfloat16": {"date": "2026-01-01", "auroc": 0.9}})
    save_checkpoint(path, saved)
    loaded = load_checkpoint(path)
    assert loaded.verified == saved.verified and loaded.state.keys() == saved.state.keys()
    assert torch.equal(loaded.trial.images, saved.trial.images)
    assert torch.equal(loaded.trial.anomaly_map, saved.trial.anomaly_map)
    # Other weights, other maps.
    assert loaded.half().trial is None and loaded.half().verified == {}
    kept = replace(loaded.half(), trial=loaded.trial, verified=loaded.verified)
    assert kept.half() is kept
    assert loaded.with_calibration(None).trial is loaded.trial
    # A release that knows version 1 alone reads what it can read, and refuses the rest by the version.
    assert metadata_of(path)["version"] == "2"
    save_checkpoint(path, plain)
    assert metadata_of(path)["version"] == "1"
    rewrite(path, verified=None)  # as the first release wrote it
    assert load_checkpoint(path).trial is None and load_checkpoint(path).verified == {}


def test_a_trial_that_does_not_fit_is_neither_written_nor_read(tmp_path):
    path = tmp_path / "a.safetensors"
    good = a_trial()
    images, maps = good.images, good.anomaly_map
    save_checkpoint(path, replace(a_checkpoint(), trial=good))
    sound = path.read_bytes()
    for trial, reason in (
        (a_trial(5), "not 1 to 4 images"),
        (a_trial(0), "not 1 to 4 images"),
        (a_trial(size=64), r"expected torch.uint8 of shape \(3, 32, 32, 3\)"),
        (Trial(images, maps[:2]), r"expected torch.float16 of shape \(3, 32, 32\)"),
        (Trial(images.float(), maps), "expected torch.uint8"),
        (Trial(images, maps.float()), "expected torch.float16"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            save_checkpoint(path, replace(a_checkpoint(), trial=trial))
        assert path.read_bytes() == sound
        rewrite(path, lambda t, v=trial: t | {"trial.images": v.images, "trial.anomaly_map": v.anomaly_map})
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"{path}: trial.") and "\n" not in str(caught.value)
        path.write_bytes(sound)
    for tensors, reason in (
        (drop("trial.images"), "the trial images are anomaly_map"),
        (lambda t: t | {"trial.more": maps}, "anomaly_map, images, more"),
        (lambda t: t | {"trial.anomaly_map": maps / 0}, "not finite"),
    ):
        rewrite(path, tensors)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(path)
        path.write_bytes(sound)
    rewrite(path, version="1")
    with pytest.raises(CheckpointError, match="2 unexpected .*trial"):
        load_checkpoint(path)


def test_half_precision_halves_the_file_and_keeps_vectors_exact(tmp_path):
    saved = a_checkpoint()
    save_checkpoint(tmp_path / "full.safetensors", saved)
    save_checkpoint(tmp_path / "half.safetensors", saved.half())
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]
    half = load_checkpoint(tmp_path / "half.safetensors").build().state_dict()
    for name, value in saved.state.items():
        if value.dim() < 2:
            assert torch.equal(half[name], value), name
        else:
            torch.testing.assert_close(half[name], value, rtol=1e-3, atol=1e-4)


def rewrite(path, tensors=lambda t: t, **metadata):
    """As by a release that writes no checksum."""
    full = metadata_of(path) | {"sha256": None} | metadata
    save_file(tensors(load_file(path)), path, {k: v for k, v in full.items() if v is not None})


def drop(key):
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


KEY = "reconstruction.out.2.bias"
DAMAGE = {
    "another version": (lambda p: rewrite(p, version="99"), "version '99' is not supported"),
    "foreign format": (lambda p: rewrite(p, format="other"), "not a dfengine checkpoint"),
    "no metadata": (lambda p: save_file(load_file(p), p), "not a dfengine checkpoint"),
    "broken config": (lambda p: rewrite(p, config="{"), "'config' is not valid JSON"),
    "hostile nesting": (lambda p: rewrite(p, config="[" * 100_000), "'config' is not valid JSON"),
    "missing field": (lambda p: rewrite(p, training=None), "'training' is missing"),
    "training is a list": (lambda p: rewrite(p, training="[]"), "'training' is not a table"),
    "unknown config field": (lambda p: rewrite(p, config='{"colour": 1}'), "configuration fields: colour"),
    "config out of range": (lambda p: rewrite(p, config='{"base": -4}'), "base must be between"),
    "another config": (
        lambda p: rewrite(p, config=json.dumps(tiny_config(base=16).to_dict())), r"has shape .* expected"),
    "verified is a list": (lambda p: rewrite(p, verified="[]"), "'verified' is not a table of records"),
    "a verified number": (lambda p: rewrite(p, verified='{"fp8": 1}'), "'verified' is not a table of records"),
    "ranges are a list": (lambda p: rewrite(p, verified='{"int8": {"ranges": []}}'), "ranges verified for int8"),
    "a range of one": (lambda p: rewrite(p, verified='{"int8": {"ranges": {"a": [1]}}}'), "ranges verified for int8"),
    "a range of words": (
        lambda p: rewrite(p, verified='{"int8": {"ranges": {"a": ["x", true]}}}'), "ranges verified for int8"),
    "a range without 0": (
        lambda p: rewrite(p, verified='{"int8": {"ranges": {"a": [1, 2]}}}'), "not pairs of numbers around 0"),
    "a range that is nothing": (
        lambda p: rewrite(p, verified='{"int8": {"ranges": {"a": [0, 1e-323]}}}'), "not pairs of numbers around 0"),
    "a range that is NaN": (
        lambda p: rewrite(p, verified='{"int8": {"ranges": {"a": [NaN, 2]}}}'), "not pairs of numbers around 0"),
    "a trial is missing": (lambda p: rewrite(p, version="2"), "the trial images are missing"),
    "bad calibration": (lambda p: rewrite(p, calibration='{"threshold": "high"}'), "calibration"),
    "missing tensor": (lambda p: rewrite(p, drop(KEY)), rf"1 missing \({KEY}\)"),
    "extra tensor": (lambda p: rewrite(p, lambda t: t | {"evil": t[KEY].clone()}), r"1 unexpected \(evil\)"),
    "wrong shape": (lambda p: rewrite(p, lambda t: t | {KEY: torch.zeros(7)}), rf"{KEY} has shape \(7,\)"),
    "wrong dtype": (lambda p: rewrite(p, lambda t: t | {KEY: t[KEY].int()}), "floating-point"),
    "not finite": (lambda p: rewrite(p, lambda t: t | {KEY: t[KEY] * float("nan")}), "not finite"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is damaged: cut short or overwritten"),
    "cut in the header": (lambda p: p.write_bytes(p.read_bytes()[:20]), "is damaged: cut short or overwritten"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("hello, I am a checkpoint"), "not a safetensors checkpoint"),
    "huge header": (lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "is damaged: cut short or overwritten"),
    "a pickle": (lambda p: torch.save({"a": torch.zeros(1)}, p), "dfengine convert"),
    "missing": (lambda p: p.unlink(), "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_foreign_file_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, a_checkpoint())
    damage, reason = DAMAGE[kind]
    damage(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_not_written(tmp_path):
    bad = Checkpoint(tiny_config(), drop(KEY)(tiny_model().state_dict()))
    with pytest.raises(CheckpointError, match="missing"):
        save_checkpoint(tmp_path / "a.safetensors", bad)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from dfengine.checkpoint import load_checkpoint, save_checkpoint
from dfengine.errors import DfengineError
path = sys.argv[1]
checkpoint = load_checkpoint(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint(path, checkpoint)
except DfengineError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_refused_and_the_old_one_stays(tmp_path):
    """A limit on the size of files stands for a full disk: safetensors meets both in the middle of writing."""
    pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, a_checkpoint())
    before = path.read_bytes()
    assert len(before) > 20_000
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: cannot be written: the file is larger than")
    assert done.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and path.read_bytes() == before


def test_a_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    calibrated = a_checkpoint().with_calibration(Calibration.by_hand(0.5))
    save_checkpoint(path, replace(calibrated, trial=a_trial()))
    sound = path.read_bytes()
    load_checkpoint(path)
    start = 8 + struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8:start])
    place = {name: start + header[name]["data_offsets"][0] for name in header if name != "__metadata__"}
    changed = {name: bytes([sound[at] ^ 1]) for name, at in place.items()}
    assert {"trial.images", "trial.anomaly_map", KEY} <= set(changed)
    for name in ("trial.images", "trial.anomaly_map", KEY, max(place, key=place.get)):
        path.write_bytes(sound[: place[name]] + changed[name] + sound[place[name] + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.safetensors: is damaged: its content") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    # In the header too, where it breaks what is read before the tensors: a number, a field, the JSON, a name.
    for known, other in ((b'threshold\\": 0.5', b'threshold\\": 0.4'), (b'\\"base\\"', b'\\"bass\\"'),
                         (b'\\"base\\":', b'\\"base\\";'), (KEY.encode(), KEY.encode().upper())):  # fmt: skip
        path.write_bytes(sound.replace(known, other, 1))
        assert path.read_bytes() != sound
        with pytest.raises(CheckpointError, match="is damaged: its content is not what was written"):
            load_checkpoint(path)
    at = sound.index(b'"dtype"')
    path.write_bytes(sound[:at] + bytes(64) + sound[at + 64 :])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is damaged: cut short or overwritten; copy it again"):
        load_checkpoint(path)
    # Of an older release, which wrote no checksum, the same file is read.
    path.write_bytes(sound)
    rewrite(path)
    assert "sha256" not in metadata_of(path) and load_checkpoint(path).calibration.threshold == 0.5


@pytest.mark.parametrize("name", ["fastener-tiny.safetensors", "rail-eclip-tiny.safetensors"])
def test_shipped_checkpoints_carry_a_checksum(name):
    path = shipped_checkpoint(name)
    load_checkpoint(path)
    assert len(metadata_of(path)["sha256"]) == 64


def test_values_whose_sum_overflows_are_finite(tmp_path):
    saved = a_checkpoint()
    state = saved.state | {KEY: torch.full_like(saved.state[KEY], 3e38)}
    save_checkpoint(tmp_path / "a.safetensors", replace(saved, state=state))
    assert torch.equal(load_checkpoint(tmp_path / "a.safetensors").state[KEY], state[KEY])


def test_an_update_keeps_what_another_process_wrote_meanwhile(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, a_checkpoint())
    seen = load_checkpoint(path)
    other, _ = update_checkpoint(path, seen, lambda present: replace(present, verified={"bfloat16": {"auroc": 1}}))
    assert other.verified == {}
    threshold = Calibration.by_hand(0.25)
    update_checkpoint(path, seen, lambda present: present.with_calibration(threshold))
    assert load_checkpoint(path).verified == {"bfloat16": {"auroc": 1}}
    assert load_checkpoint(path).calibration == threshold
    # Other weights: the change would not belong to them.
    save_checkpoint(path, replace(seen, state=tiny_model(1).state_dict()))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="was given other weights meanwhile"):
        update_checkpoint(path, seen, lambda present: present.with_calibration(None))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


UPDATE = """
import sys
from dataclasses import replace
from dfengine.checkpoint import load_checkpoint, update_checkpoint
path, name = sys.argv[1:]
seen = load_checkpoint(path)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(6):
    update_checkpoint(path, seen, lambda c: replace(c, verified=c.verified | {f"{name}{turn}": {}}))
"""


def test_updates_of_two_processes_are_all_kept(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, a_checkpoint())
    command = [sys.executable, "-c", UPDATE, str(path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert set(load_checkpoint(path).verified) == {f"{name}{turn}" for name in "ab" for turn in range(6)}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_only_a_checkpoint_is_overwritten(tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, a_checkpoint())
    save_checkpoint(path, a_checkpoint().with_calibration(None))
    assert load_checkpoint(path).calibration is None
    path.write_bytes(b"a photo")
    with pytest.raises(UsageError, match="is not a dfengine checkpoint; choose another name"):
        save_checkpoint(path, a_checkpoint())
    assert path.read_bytes() == b"a photo"


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(DfengineError, match="is a folder"):
        save_checkpoint(tmp_path / "a.safetensors", a_checkpoint())
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path / "a.safetensors")
