from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from dfengine import native
from dfengine.engine import timing
from dfengine.engine.timing import Ceilings, copy_function, interleaved, matmul_rate
from dfengine.kernels import CannotRunError
from dfengine.kernels.conv2d_cpu import byte_products

KIB, MIB = 2**10, 2**20


def test_functions_take_turns_on_rotating_arguments():
    calls = []
    functions = {name: lambda value, name=name: calls.append((name, value)) for name in ("a", "b")}
    times = interleaved(functions, [(0,), (1,), (2,)], "cpu", 0.0)
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5}
    assert calls[:4] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]  # the warm-up
    assert calls[4:10] == [("a", 2), ("b", 2), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_the_least_number_of_calls_and_of_the_warm_up_may_be_others():
    calls = []
    times = interleaved({"a": lambda: calls.append(1)}, [()], "cpu", 0.0, least=2, warmup=1)
    assert len(times["a"]) == 2 and len(calls) == 3


def test_a_time_is_that_of_the_call():
    times = interleaved({"slow": lambda: time.sleep(0.01), "quick": lambda: None}, [()], "cpu", 0.0)
    assert min(times["slow"]) >= 0.01 > max(times["quick"])
    idle = interleaved({"slow": lambda: time.sleep(0.01)}, [()], "cpu", 0.0, "cpu")
    assert max(idle["slow"]) < 0.01  # of the processor


def test_copies_take_turns_on_their_buffers():
    copy = copy_function(64, 2, "cpu")
    pairs = next(cell.cell_contents for cell in copy.__closure__ if isinstance(cell.cell_contents, list))
    for value, (source, _) in enumerate(pairs, start=1):
        source.fill_(value)
    copy(), copy()
    assert [target.tolist() for _, target in pairs] == [[1] * 32, [2] * 32]


def test_bandwidth_lies_between_those_measured():
    ceilings = Ceilings({torch.float32: 1e11}, {4 * MIB: 8e9, 256 * KIB: 32e9})
    assert ceilings.bandwidth(1) == pytest.approx(32e9)
    assert ceilings.bandwidth(MIB) == pytest.approx(16e9)
    assert ceilings.bandwidth(2**40) == pytest.approx(8e9)


def test_the_bound_is_the_longer_of_arithmetic_and_traffic():
    ceilings = Ceilings({torch.float32: 1e11, torch.int8: 4e11}, {MIB: 1e10})
    assert ceilings.bound(2 * 10**9, 10**6, torch.float32) == pytest.approx(0.02)
    assert ceilings.bound(10**6, 10**8, torch.float32) == pytest.approx(0.01)
    assert ceilings.bound(2 * 10**9, 10**6, torch.int8) == pytest.approx(0.005)


def test_ceilings_are_measured_on_this_device(monkeypatch):
    monkeypatch.setattr(timing, "SHORT_MATMUL", 96)
    monkeypatch.setattr(timing, "COPIES", {"cpu": range(16, 19)})
    monkeypatch.setattr(timing, "INT8_LAYER", (16, 32))
    in_bytes = [torch.int8] if byte_products() else []
    found = Ceilings.measured(torch.device("cpu"), [torch.float32, *in_bytes], 0.0)
    assert list(found.copies) == [2**16, 2**17, 2**18]
    assert list(found.products) == [torch.float32, *in_bytes]
    assert all(1e7 < rate < 1e13 for rate in (*found.products.values(), *found.copies.values()))


def test_no_rate_of_int8_is_given_where_nothing_multiplies_it(monkeypatch):
    monkeypatch.setattr(native, "module", None)
    matmul_rate.cache_clear()
    with pytest.raises(CannotRunError, match="dfengine._native is not available"):
        matmul_rate(torch.int8, "cpu")


def test_a_ceiling_is_of_the_shortest_time_measured_anew(monkeypatch):
    monkeypatch.setattr(timing, "SHORT_MATMUL", 96)
    monkeypatch.setattr(timing, "COPIES", {"cpu": [16]})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for shortest in (0.25, 0.5):
        monkeypatch.setattr(timing, "interleaved", lambda f, *_, s=shortest: dict.fromkeys(f, [4.0, s, 4.0]))
        found = Ceilings.measured(torch.device("cpu"), [torch.float32])
        assert found == Ceilings({torch.float32: 2 * 2 * 96**3 / shortest}, {2**16: 2**16 / shortest})


class BusyCore:
    """A core, and its clock in seconds, that is taken away for `TURN` nanoseconds after each `TURN` of work."""

    TURN = 4_000_000

    def __init__(self):
        self._now = 0  # ns

    def clock(self) -> float:
        return self._now / 1e9

    def work(self, seconds: float) -> None:
        left = round(seconds * 1e9)
        while left:
            inside = self._now % (2 * self.TURN)
            if inside >= self.TURN:
                self._now += 2 * self.TURN - inside
            else:
                taken = min(left, self.TURN - inside)
                self._now, left = self._now + taken, left - taken


@pytest.mark.parametrize("threads", [1, 3])
def test_ceilings_beside_other_work_are_those_of_an_idle_device(threads, monkeypatch):
    core, rate, bandwidth, sizes = BusyCore(), threads * 1.4e11, threads * 1e10, []

    def product(a, b, out):
        core.work(2 * a.numel() * b.shape[-1] / rate)

    def copy_of(moved, count, device):
        sizes.append(moved * count)
        return lambda *_: core.work(moved / bandwidth)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "bmm", product)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(timing, "copy_function", copy_of)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=core.clock))
    monkeypatch.setitem(timing.CLOCKS, "elapsed", core.clock)
    found = Ceilings.measured(torch.device("cpu"), [torch.float32, torch.bfloat16])
    assert sizes == pytest.approx(list(found.copies), rel=1e-6)  # all that a size stands for is gone through
    assert list(found.products.values()) == pytest.approx([rate] * 2, rel=1e-3)
    assert list(found.copies.values()) == pytest.approx([bandwidth] * len(found.copies), rel=1e-3)
