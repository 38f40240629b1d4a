"""Arguments of the public functions: the package's own errors, which are also those of Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dfengine
from dfengine.checkpoint import Checkpoint
from dfengine.detection import Detection
from dfengine.detector import Detector
from dfengine.evaluation.calibration import Calibration, calibrate
from tests.helpers import tiny_model

IMAGE = np.full((32, 32, 3), 7, np.uint8)


def a_checkpoint() -> Checkpoint:
    model = tiny_model()
    return Checkpoint(model.config, model.state_dict())


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return a_checkpoint()


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    return Detector(checkpoint, "cpu", "float32")


WRONG = {
    "load(None)": (lambda d: dfengine.load(None), TypeError, "a checkpoint is named by a path"),
    "load(5)": (lambda d: dfengine.load(5), TypeError, "of type int"),
    "Detector(path)": (lambda d: Detector("a.safetensors"), TypeError, "dfengine.load takes a path"),
    "detect(5)": (lambda d: d.detect(5), TypeError, "batch: is of type int"),
    "detect([None])": (lambda d: d.detect([None]), TypeError, r"batch\[0\]: is of type NoneType"),
    "stream of numbers": (lambda d: list(d.stream([IMAGE, 5])), TypeError, r"batch\[1\]: is of type int"),
    "batch_size 2.0": (lambda d: d.detect(IMAGE, batch_size=2.0), TypeError, "a positive whole number, not 2.0"),
    "batch_size True": (lambda d: d.detect(IMAGE, batch_size=True), TypeError, "batch_size must be"),
    "batch_size 0": (lambda d: d.detect(IMAGE, batch_size=0), ValueError, "a positive whole number, not 0"),
    "workers -1": (lambda d: list(d.stream(IMAGE, workers=-1)), ValueError, "workers must be a whole number from 0 up"),
    "calibration 0.5": (lambda d: setattr(d, "calibration", 0.5), TypeError, "a number is a threshold"),
    "threshold 'a'": (lambda d: setattr(d, "threshold", "a"), TypeError, "the threshold must be a number, not 'a'"),
    "threshold nan": (lambda d: setattr(d, "threshold", float("nan")), ValueError, "between 0 and 1, as scores do"),
    "by_hand(None)": (lambda d: Calibration.by_hand(None), TypeError, "the threshold must be a number, not None"),
    "rate '1%'": (lambda d: calibrate([0.1], "1%"), TypeError, "the false-alarm rate must be a number"),
    "scores 'abc'": (lambda d: calibrate("abc", 0.1), TypeError, "scores must be an array of numbers"),
    "load('')": (lambda d: dfengine.load(""), ValueError, "a checkpoint is named by a path, not by an empty text"),
    "device cpu:9": (lambda d: Detector(a_checkpoint(), "cpu:9"), ValueError, "device cpu:9: all processors are one"),
    "save('')": (lambda d: d.detect(IMAGE).save(""), ValueError, "a folder is named by a path, not by an empty text"),
    "save(zero byte)": (lambda d: d.detect(IMAGE).save("a\0b"), ValueError, r"not by 'a\\x00b'"),
    "detect('')": (lambda d: d.detect(""), dfengine.DfengineError, "^batch: an empty text is no path"),
    "detect(meta)": (lambda d: d.detect(torch.empty(3, 32, 32, device="meta")), dfengine.DfengineError,
                     "^batch: a tensor on the device meta, which has no pixels"),
    "save(None)": (lambda d: d.detect(IMAGE).save(None), TypeError, "a folder is named by a path"),
    "save_heatmaps(5)": (lambda d: d.detect(IMAGE).save_heatmaps(5), TypeError, "a folder is named by a path"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_argument_raises_one_line(what, detector):
    call, kind, reason = WRONG[what]
    with pytest.raises(kind, match=reason) as caught:
        call(detector)
    assert isinstance(caught.value, dfengine.DfengineError) and "\n" not in str(caught.value)
    assert detector.calibration is None


@pytest.mark.parametrize("seed", [1.5, True, "1"])
def test_a_seed_of_another_type(seed, checkpoint):
    with pytest.raises(TypeError, match=r"seed must be a whole number from 0 to 2\*\*64 - 1"):
        Detector(checkpoint, seed=seed)


def test_numbers_of_numpy_are_numbers(checkpoint, detector):
    plain = detector.detect([IMAGE] * 3, batch_size=2)
    again = detector.detect([IMAGE] * 3, batch_size=np.int64(2))
    assert isinstance(again, Detection) and (again.pred_score == plain.pred_score).all()
    parts = list(detector.stream([IMAGE] * 3, np.uint8(2), workers=np.int32(1), prefetch=np.int16(1)))
    assert [len(part) for part in parts] == [2, 1]
    other = Detector(checkpoint, "cpu", "float32", np.int64(3))
    assert type(other.seed) is int and other.detect(IMAGE)[0].seed == 3
    other.threshold = np.float32(0.25)
    assert other.calibration == Calibration.by_hand(0.25) and type(other.threshold) is float
    other.threshold = None
    assert other.calibration is None
    assert calibrate([0.1, 0.2, 0.3], np.float64(0.3)).false_alarm_rate == 0.3


def test_the_first_processor_is_the_processor(checkpoint):
    assert Detector(checkpoint, "cpu:0", "float32").device == torch.device("cpu")
