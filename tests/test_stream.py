"""`Detector.stream`: order, bounds, errors and endings, on the tiny model of `tests.helpers`."""

from __future__ import annotations

import gc
import io
import itertools
import threading
import time
from collections import deque

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from dfengine.checkpoint import Checkpoint
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.data.prefetch import Prefetch
from dfengine.detection import Detection
from dfengine.detector import Detector
from dfengine.errors import ArgumentTypeError, DataError, UsageError
from dfengine.evaluation.calibration import Calibration
from tests.helpers import tiny_model

SIZE = 32


def tiny_detector(seed: int = 0) -> Detector:
    model = tiny_model(seed)
    calibration = Calibration.by_hand(0.5)
    return Detector(Checkpoint(model.config, model.state_dict(), {}, calibration), "cpu", "float32")


@pytest.fixture(scope="module")
def detector():
    return tiny_detector()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (11, 40, 52, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    gc.collect()
    end = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def prefetch_threads() -> int:
    return sum(thread.name == "dfengine-prefetch" for thread in threading.enumerate())


def same(a: Detection, b: Detection) -> None:
    assert a.names == b.names and a.errors == b.errors
    for field in ("pred_score", "anomaly_map", "reconstruction", "image"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_stream_gives_in_order_what_detect_gives(detector, images, tmp_path, workers):
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    files = [tmp_path / f"{i}.png" for i in range(len(images))]
    opened = [Image.open(tmp_path / "0.png")] * 3 + [Image.open(tmp_path / "1.png")]
    whole = detector.detect(tmp_path, batch_size=4)
    assert [(error.index, error.name) for error in whole.errors] == [(3, str(files[3]))] and len(whole) == 10
    for source in (tmp_path, files, iter(files)):
        parts = list(detector.stream(source, batch_size=4, workers=workers, prefetch=1))
        assert [len(part) + len(part.errors) for part in parts] == [4, 4, 3]
        assert [len(part.errors) for part in parts] == [1, 0, 0]
        same(Detection.concatenate(parts), whole)
        assert [part.start for part in parts] == [0, 4, 8]
        assert [row["name"] for part in parts for row in part.rows()] == list(map(str, files))
    same(Detection.concatenate(list(detector.stream(opened, workers=workers))), detector.detect(opened))
    for take in (detector.detect, lambda source: list(detector.stream(source))):
        with pytest.raises(ArgumentTypeError, match="batch: is a Detection, .* give the images"):
            take(whole)
    mixed = [images[0], np.full((16, 16), np.nan), files[2], images[1]]
    for source in (mixed, iter(mixed)):
        (part,) = detector.stream(source, workers=workers)
        assert [(e.index, e.name) for e in part.errors] == [(1, "batch[1]")]
        np.testing.assert_array_equal(part.pred_score, detector.detect([images[0], files[2], images[1]]).pred_score)


def test_slow_images_keep_their_place():
    """The first image takes longest to prepare: the others wait for it."""

    def prepare(i):
        time.sleep(0.05 if i % 5 == 0 else 0)
        return i

    ready = Prefetch(range(23), prepare, 4, 10, alone=lambda i: False)
    taken = []
    while batch := ready.take(5):
        taken.append(batch)
    ready.close()
    assert taken == [list(range(i, min(i + 5, 23))) for i in range(0, 23, 5)]


def test_ctrl_c_does_not_wait_until_the_next_batch():
    def prepare(i):
        if i == 3:
            raise KeyboardInterrupt
        return i

    with pytest.raises(KeyboardInterrupt):
        Prefetch(range(23), prepare, 0, 5).take(5)


def test_an_iterator_may_use_its_memory_again(detector, images, monkeypatch):
    def frames():
        frame = np.empty_like(images[0])
        for image in images:
            frame[:] = image
            yield frame

    expected = detector.detect(images, batch_size=4).pred_score
    load = InputImage.load_tensor

    def slow_load(image, *arguments):
        time.sleep(0.01)
        return load(image, *arguments)

    monkeypatch.setattr(InputImage, "load_tensor", slow_load)
    for workers in (0, 3):
        got = np.concatenate([p.pred_score for p in detector.stream(frames(), batch_size=4, workers=workers)])
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("workers, prefetch", [(0, 1), (1, 1), (3, 2)])
def test_an_endless_source_is_drawn_from_no_further_than_asked(detector, images, workers, prefetch):
    drawn = []

    def endless():
        for i in itertools.count():
            drawn.append(i)
            yield images[i % len(images)]

    parts = detector.stream(endless(), batch_size=3, workers=workers, prefetch=prefetch)
    assert drawn == [] and prefetch_threads() == 0
    for batch in range(4):
        assert next(parts).names == tuple(f"batch[{3 * batch + i}]" for i in range(3))
        time.sleep(0.05)
        ahead = 3 * prefetch if workers else 0
        assert len(drawn) == 3 * (batch + 1) + ahead
    parts.close()
    assert prefetch_threads() == 0


def test_leaving_early_ends_the_threads_promptly(detector, images):
    for _ in detector.stream(itertools.cycle(images), batch_size=2, workers=3):
        assert prefetch_threads() == 3
        break
    gc.collect()
    assert prefetch_threads() == 0
    # A source that gives nothing more does not hold up its consumer; its thread ends when it gives something.
    more = threading.Event()

    def camera():
        yield images[0]
        more.wait(30)
        yield images[1]

    parts = detector.stream(camera(), batch_size=1, workers=2)
    next(parts)
    start = time.monotonic()
    parts.close()
    assert time.monotonic() - start < 3 and prefetch_threads() == 1
    more.set()


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_source_raises_comes_after_the_images_before_it(detector, images, workers):
    def failing():
        yield from images[:5]
        raise KeyError("the camera is gone")

    parts, scores = detector.stream(failing(), batch_size=3, workers=workers), []
    with pytest.raises(KeyError, match="the camera is gone"):
        for part in parts:
            scores += part.pred_score.tolist()
    assert prefetch_threads() == 0
    np.testing.assert_allclose(scores, detector.detect(images[:5]).pred_score, atol=1e-5, rtol=0)


class Camera:
    def __init__(self, frames):
        self.frames = frames

    def __iter__(self):
        return iter(self.frames)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_iterable_is_drawn_from_as_its_iterator_is(detector, images, workers):
    expected = detector.detect(images, batch_size=4).pred_score
    tensors = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    for source in (Camera(images), deque(images), dict(enumerate(images)).values(), DataLoader(tensors, batch_size=4)):
        got = [part.pred_score for part in detector.stream(source, batch_size=4, workers=workers)]
        np.testing.assert_allclose(np.concatenate(got), expected, atol=1e-6, rtol=0)
    endless = detector.stream(Camera(itertools.cycle(images)), batch_size=2, workers=workers)
    assert next(endless).names == ("batch[0]", "batch[1]")
    endless.close()
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        detector.stream(Camera(3), workers=workers)
    with io.BytesIO(b"one\ntwo\n") as file, pytest.raises(UsageError, match="^batch: is an open file .BytesIO.; give"):
        detector.stream(file, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_that_is_no_image_is_refused_in_its_place(detector, images, workers):
    """Of an iterator, which may have run for hours; in a list it is seen before anything is scored."""
    mixed = [images[0], None, images[1], 3, {"image": images[2]}]
    parts = list(detector.stream(iter(mixed), batch_size=3, workers=workers))
    assert [part.names for part in parts] == [("batch[0]", "batch[2]"), ()]
    refused = [(e.index, e.name, e.reason.partition(";")[0]) for part in parts for e in part.errors]
    kinds = {1: "NoneType", 3: "int", 4: "dict"}
    assert refused == [(i, f"batch[{i}]", f"is of type {kind}") for i, kind in kinds.items()]
    np.testing.assert_array_equal(parts[0].pred_score, detector.detect(images[:2]).pred_score)
    with pytest.raises(UsageError, match=r"batch\[1\]: is of type NoneType"):
        detector.stream(mixed, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["type", "shape", "pixels"])
def test_the_first_refused_item_of_an_iterable_is_warned_of(detector, images, workers, kind, caplog):
    """All of them are in `errors`, and of an endless source nothing else may be seen."""
    pairs = DataLoader(TensorDataset(torch.from_numpy(images[:5])), batch_size=1)
    source, reason = {
        "type": (pairs, "is of type list; expected a path, a PIL image, a NumPy array or a torch tensor"),
        "shape": (iter([i.transpose(2, 0, 1) for i in images[:5]]), "an array of shape (3, 40, 52) has 52 channels;"),
        "pixels": (iter([np.full((16, 16), 7.0)] * 5), "float pixels from 7 to 7; expected [0, 1]"),
    }[kind]
    mixed = itertools.chain([images[0]], source)
    for part in detector.stream(mixed, batch_size=2, workers=workers):
        assert part.errors
        (record,) = caplog.records  # from the first batch on
    assert record.levelname == "WARNING" and record.getMessage().startswith(f"batch[1]: {reason}")
    assert record.getMessage().endswith("; what is refused is in `errors`, this is said once")
    caplog.clear()
    list(detector.stream([images[0], np.full((16, 16), 7.0)], workers=workers))  # a list has an end
    assert not caplog.records


def test_items_keep_the_names_they_have(detector, images, tmp_path, monkeypatch):
    """Those of images that the caller holds, and of files whose names look like places."""
    held = [InputImage("mine", array=images[0]), *collect_inputs([np.stack(images[:2])])]
    monkeypatch.chdir(tmp_path)
    Image.fromarray(images[0]).save("batch[0].png")
    opened = [Image.open("batch[0].png"), Image.open(b"batch[0].png")]
    (part,) = detector.stream(iter([images[2], *held, *opened, images[3]]))
    names = "mine", "batch[0][0]", "batch[0][1]"
    assert part.names == ("batch[0]", *names, "batch[0].png", "batch[0].png", "batch[6]")
    assert tuple(image.name for image in held) == names


def test_wrong_arguments_are_refused_at_once(detector, images, tmp_path):
    for name, value in (("batch_size", 0), ("workers", -1), ("workers", 1.0), ("prefetch", 0), ("prefetch", True)):
        with pytest.raises(UsageError, match=name):
            detector.stream(images, **{name: value})
    with pytest.raises(UsageError, match="empty"):
        detector.stream([])
    with pytest.raises(DataError, match="no image"):
        detector.stream(tmp_path)
    assert list(detector.stream(iter([]))) == []


def test_files_are_read_when_their_turn_comes(detector, images, tmp_path):
    only_bad = list(detector.stream([tmp_path / "no.png", tmp_path / "nor.png"]))
    assert len(only_bad) == 1 and len(only_bad[0]) == 0 and [e.index for e in only_bad[0].errors] == [0, 1]
    assert only_bad[0].anomaly_map.shape == (0, SIZE, SIZE)
    later = detector.stream([tmp_path / "late0.png", tmp_path / "late1.png"], batch_size=1, workers=0)
    Image.fromarray(images[0]).save(tmp_path / "late0.png")
    assert len(next(later)) == 1
    Image.fromarray(images[1]).save(tmp_path / "late1.png")
    assert len(next(later)) == 1


def test_two_detectors_and_four_threads(images):
    detectors = tiny_detector(0), tiny_detector(1)
    expected = [detector.detect(images, batch_size=3).pred_score for detector in detectors]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    results = {}

    def work(i):
        parts = detectors[i % 2].stream(images, batch_size=3, workers=2)
        results[i] = np.concatenate([part.pred_score for part in parts])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(results[i], expected[i % 2])


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("calls", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_memory_stays_flat(detector, images, calls):
    pytest.importorskip("resource")  # Linux has /proc/self/statm
    drawn = np.random.default_rng(1).integers(1, 10, calls)
    for count in (*range(1, 10), *drawn[: calls // 4]):
        detector.detect(images[:count])
    before = resident()
    for count in drawn:
        detector.detect(images[:count])
    assert resident() - before < 8 * 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_streams_what_a_cpu_does(detector, images):
    model = tiny_model()
    gpu = Detector(Checkpoint(model.config, model.state_dict()), "cuda", "float32")
    expected = detector.detect(images, batch_size=2)
    on_device = [torch.from_numpy(image).permute(2, 0, 1).cuda() for image in images]
    for source in (images, on_device, [*images[:5], *on_device[5:]]):
        parts = list(gpu.stream(source, batch_size=2, workers=3))
        got = np.concatenate([part.anomaly_map for part in parts])
        np.testing.assert_allclose(got, expected.anomaly_map, atol=1e-4)
        pixels = np.concatenate([part.image for part in parts]).astype(int)
        assert np.abs(pixels - expected.image).max() <= 1
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        maps = np.concatenate([part.anomaly_map for part in gpu.stream(iter(on_device), batch_size=2)])
    np.testing.assert_allclose(maps, expected.anomaly_map, atol=1e-4)
