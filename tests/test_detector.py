"""The everyday API, on a tiny model whose weights are all redrawn so that every block matters."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dfengine
from dfengine.checkpoint import Checkpoint, save_checkpoint
from dfengine.detector import Detector, load
from dfengine.devices import resolve_device
from dfengine.engine.modules import ModuleRunner
from dfengine.errors import ArgumentTypeError, CheckpointError, DataError, ImageError, UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.models import build_model, preset

SIZE = 32
CONFIG = preset("diff-fastener-tiny", image_size=SIZE, base=8, seg_base=4, heads=2)


def redrawn(config, seed=0):
    """Weights of ordinary size everywhere, zero-initialised ones and BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    state = build_model(config).state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            else:
                tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else noise * 0.2 + 0.5)
    return Checkpoint(config, state)


@pytest.fixture(scope="module")
def checkpoint():
    return redrawn(CONFIG)


@pytest.fixture(scope="module")
def path(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "tiny.safetensors"
    save_checkpoint(path, checkpoint.with_calibration(Calibration.by_hand(0.5)))
    return path


@pytest.fixture(scope="module")
def detector(path):
    return load(path, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 40, 52, 3), dtype=np.uint8)


def write(folder, images):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"image{i}.png")
    return folder


def test_detect_is_the_module_runner(detector, checkpoint, images):
    from dfengine.data.images import resize_unit

    detection = detector.detect(images)
    unit = np.stack([resize_unit(image, SIZE) for image in images])
    expected = ModuleRunner(checkpoint.build(), "cpu", "float32", 0).run(unit)
    np.testing.assert_allclose(detection.anomaly_map, expected.anomaly_map.numpy(), atol=1e-6)
    np.testing.assert_allclose(detection.pred_score, expected.pred_score.numpy(), atol=1e-6)
    np.testing.assert_allclose(detection.reconstruction, expected.reconstruction.numpy(), atol=1e-6)
    np.testing.assert_array_equal(detection.image, np.rint(unit * 255).astype(np.uint8))
    assert detection.anomaly_map.dtype == detection.pred_score.dtype == detection.reconstruction.dtype == np.float32
    assert np.ptp(detection.anomaly_map) > 0.05  # the tiny model does not answer the same everywhere


def test_score_depends_on_neither_batch_nor_place(detector, images):
    whole = detector.detect(images, batch_size=7)
    assert np.ptp(whole.pred_score) > 1e-4
    for batch_size in (1, 2, 3, 16):
        other = detector.detect(images[::-1], batch_size=batch_size)[::-1]
        np.testing.assert_allclose(other.pred_score, whole.pred_score, atol=1e-5, rtol=0)
        np.testing.assert_allclose(other.anomaly_map, whole.anomaly_map, atol=1e-5, rtol=0)
    alone = detector.detect(images[3])
    np.testing.assert_allclose(alone.pred_score, whole.pred_score[3:4], atol=1e-5, rtol=0)


def test_every_kind_of_input_gives_the_same_score(detector, images, tmp_path):
    folder = write(tmp_path / "in", images[:2])
    files = [folder / "image0.png", str(folder / "image1.png")]
    expected = detector.detect(images[:2]).pred_score
    tensors = torch.from_numpy(images[:2]).permute(0, 3, 1, 2)
    for batch in (
        folder,
        files,
        iter(files),
        [Image.fromarray(image) for image in images[:2]],
        [images[0], Image.fromarray(images[1])],
        tensors,
        tensors.float() / 255,
        images[:2].astype(np.uint16) * 257,
        images[:2].astype(np.float64) / 255,
    ):
        np.testing.assert_allclose(detector.detect(batch).pred_score, expected, atol=1e-6)


def test_mixed_sizes_and_original_size(detector, images):
    small = np.ascontiguousarray(images[1, :20, :24])
    batch = [images[0], small, images[2][..., 0]]
    detection = detector.detect(batch, original_size=True)
    assert [m.shape for m in detection.anomaly_map] == [(40, 52), (20, 24), (40, 52)]
    assert [m.shape for m in detection.pred_mask] == [(40, 52), (20, 24), (40, 52)]
    assert detection.reconstruction.shape == (3, SIZE, SIZE, 3)
    at_model_size = detector.detect(batch)
    assert at_model_size.anomaly_map.shape == (3, SIZE, SIZE)
    np.testing.assert_array_equal(at_model_size.pred_score, detection.pred_score)
    for resized, model_map in zip(detection.anomaly_map, at_model_size.anomaly_map, strict=True):
        assert resized.dtype == np.float32
        assert abs(resized.mean() - model_map.mean()) < 0.02


def test_seed(path, images):
    first, again, other = (load(path, "cpu", "float32", seed).detect(images[:2]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.anomaly_map, again.anomaly_map)
    assert np.abs(first.anomaly_map - other.anomaly_map).max() > 1e-4
    assert (first.seed, other.seed) == (0, 1)
    for seed in (-1, 2**64, 1.5, None, True):
        with pytest.raises(UsageError, match="seed"):
            load(path, "cpu", seed=seed)


def test_bad_images_are_reported_and_the_rest_scored(detector, images, tmp_path):
    folder = write(tmp_path / "in", images[:4])
    (folder / "image1.png").write_bytes(b"not an image")
    (folder / "image2.png").write_bytes(b"")
    for detection in (detector.detect(folder, batch_size=2), detector.detect(folder)):
        assert [Path(name).name for name in detection.names] == ["image0.png", "image3.png"]
        assert len(detection.pred_score) == len(detection.anomaly_map) == len(detection.image) == 2
        assert [(e.index, Path(e.name).name) for e in detection.errors] == [(1, "image1.png"), (2, "image2.png")]
        assert "empty" in detection.errors[1].reason
        np.testing.assert_allclose(
            detection.pred_score, detector.detect(images[:4]).pred_score[[0, 3]], atol=1e-5, rtol=0
        )
    bad = [images[0], np.full((16, 16), np.nan), images[1]]
    assert [e.name for e in detector.detect(bad).errors] == ["batch[1]"]


def test_nothing_scored_raises(detector, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ImageError, match="a.png.*empty$"):
        detector.detect(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a.png.*\(and 1 more refused\)"):
        detector.detect(tmp_path)
    with pytest.raises(ImageError, match="no such file"):
        detector.detect(tmp_path / "missing.png")
    with pytest.raises(UsageError):
        detector.detect([])
    with pytest.raises(UsageError, match="empty"):
        detector.detect(iter([]))
    with pytest.raises(UsageError):
        detector.detect(3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        detector.detect(tmp_path / "empty")
    for batch_size in (0, -1, 2.0, True):
        with pytest.raises(UsageError, match="batch_size"):
            detector.detect(np.zeros((16, 16)), batch_size=batch_size)


def test_results_that_are_not_finite_are_refused(checkpoint, images):
    state = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
    state["reconstruction.out.2.weight"].fill_(torch.finfo(torch.float32).max)
    state["reconstruction.out.2.bias"].fill_(torch.finfo(torch.float32).max)
    state["segmentation.decoder_segment.fin_out.0.weight"].fill_(torch.finfo(torch.float32).max)
    detector = Detector(Checkpoint(CONFIG, state), "cpu", "float32")
    detections = list(detector.stream(images[:2]))
    if all(np.isfinite(d.anomaly_map).all() and len(d) == 2 for d in detections):
        pytest.fail("the weights were meant to overflow")
    assert {e.reason for d in detections for e in d.errors} == {"the model's result is not finite in float32"}


def test_no_later_call_changes_a_result(detector, images):
    first = detector.detect(images[:2])
    kept = [np.array(a) for a in (first.pred_score, first.anomaly_map, first.reconstruction, first.image)]
    threshold = first.threshold
    detector.detect(images[2:4])
    calibration, detector.calibration = detector.calibration, Calibration.by_hand(0.9)
    try:
        assert detector.detect(images[:2]).threshold == 0.9 == detector.threshold
    finally:
        detector.calibration = calibration
    now = (first.pred_score, first.anomaly_map, first.reconstruction, first.image)
    for before, after in zip(kept, now, strict=True):
        np.testing.assert_array_equal(before, after)
    assert first.threshold == threshold == 0.5


def test_the_input_is_not_changed(detector, images):
    batch = images[:2].astype(np.float32) / 255
    before = batch.copy()
    detector.detect(batch)
    np.testing.assert_array_equal(batch, before)


def test_threads_get_their_own_results(detector, images):
    expected = detector.detect(images).pred_score
    results = {}

    def work(i):
        results[i] = detector.detect(images[i]).pred_score[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose([results[i] for i in range(len(images))], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["diffusionad-v1-tiny", "iterative-tiny"])
def test_other_modes(name, images):
    changes = dict(timesteps=20, tau=5, t_s=1, t_b=3, noise_draws=2)
    config = preset(name, image_size=SIZE, base=8, seg_base=4, heads=2, **changes)
    detection = Detector(redrawn(config), device="cpu").detect(images[:2])
    assert detection.anomaly_map.shape == (2, SIZE, SIZE) and detection.threshold is None


def test_precision(path, detector, images):
    assert (detector.device.type, detector.precision) == ("cpu", "float32")
    half = load(path, "cpu", "bfloat16")
    expected, got = detector.detect(images[:2]), half.detect(images[:2])
    difference = np.abs(expected.anomaly_map - got.anomaly_map).max()
    assert 0 < difference < 0.006  # a fifth of the map's standard deviation
    assert got.anomaly_map.dtype == np.float32
    for precision, match in (("float16", "needs a GPU"), ("tf32", "needs a GPU"), ("int4", "must be one of")):
        with pytest.raises(UsageError, match=match):
            load(path, "cpu", precision)


def test_devices(monkeypatch):
    for device in ("gpu", "", "cuda:x", "meta", None, 3.5):
        with pytest.raises(UsageError, match="device must be"):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto").type == resolve_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="cuda: torch finds no CUDA GPU"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda" and resolve_device("cuda:1").index == 1
    with pytest.raises(UsageError, match="has 2 GPUs"):
        resolve_device("cuda:2")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["auto", "float32", "tf32", "bfloat16", "float16"])
def test_gpu_agrees_with_cpu(path, detector, images, precision):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    gpu = load(path, "cuda", precision)
    tolerance = {"float32": 1e-4, "bfloat16": 0.02}.get(gpu.precision, 0.01)
    expected, got = detector.detect(images), gpu.detect(torch.from_numpy(images).permute(0, 3, 1, 2).cuda())
    np.testing.assert_allclose(got.anomaly_map, expected.anomaly_map, atol=tolerance)
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)


def test_load_refuses_what_is_no_checkpoint(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("text.safetensors", "absent.safetensors", "."):
        with pytest.raises(CheckpointError):
            load(tmp_path / name)


def test_repr(detector):
    assert repr(detector) == "Detector(diff-fastener-tiny, 32x32, cpu, float32, threshold 0.5000)"


def test_import_does_not_load_torch():
    code = (
        "import sys, dfengine; assert dfengine.__version__; assert 'load' in dir(dfengine); "
        "assert not {'torch', 'numpy', 'cv2'} & set(sys.modules), 'slow import'"
    )
    root = Path(dfengine.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (dfengine.load, dfengine.Detector) == (load, Detector)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dfengine.nonsense  # noqa: B018


def test_a_detector_is_not_pickled(detector):
    with pytest.raises(TypeError, match="load it in each process"):
        pickle.dumps(detector)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_detects(detector, images):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = detector.detect(images).pred_score
        child = os.fork()
        if child == 0:
            os._exit(int(not np.array_equal(detector.detect(images).pred_score, expected)))
        end = time.monotonic() + 30
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.01)
        if done[0] == 0:
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done[0] == child and done[1] == 0
    finally:
        torch.set_num_threads(threads)


def test_a_warm_detector_makes_no_program_later(path, images):
    warm, cold = load(path, device="cpu", precision="float32"), load(path, device="cpu", precision="float32")
    warm.warmup((1, 4, 3))
    with warm.program_runner() as runner:
        made = None if runner is None else dict(runner._executors)
    for count in (1, 7, 4):  # 7 are 4 and 3
        got, want = warm.detect(images[:count], batch_size=4), cold.detect(images[:count], batch_size=4)
        np.testing.assert_allclose(got.pred_score, want.pred_score, rtol=0, atol=1e-6)
    if made is not None:
        assert sorted(made) == [1, 3, 4] and made.items() == runner._executors.items()
    for wrong in ((0,), (1, 2.0), (True,), None, 1.5, "x"):
        with pytest.raises((UsageError, ArgumentTypeError), match="a batch size must be a positive whole number"):
            warm.warmup(wrong)
