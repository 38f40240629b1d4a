"""The energy counter, through a library that stands in for NVML."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from bench import energy


class Nvml:
    """A GPU that takes 250 joules between two readings."""

    def __init__(self, knows: str = "GPU-abc", counts: bool = True):
        self.knows, self.counts, self.total = knows.encode(), counts, 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle) -> int:
        return 0 if uuid == self.knows else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules) -> int:
        self.total += 250_000
        millijoules._obj.value = self.total
        return 0 if self.counts else 3


@pytest.fixture
def nvml(monkeypatch):
    def install(**options):
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(**options))

    return install


def test_joules_by_uuid(nvml):
    nvml()
    joules = energy.counter("abc")
    assert (joules(), joules()) == (500.0, 750.0)
    assert energy.counter("another") is None
    nvml(counts=False)
    assert energy.counter("abc") is None


def test_none_without_the_library(monkeypatch):
    monkeypatch.setattr(energy, "LIBRARY", "libnone.so.1")
    assert energy.counter("abc") is None and energy.joules_per_call(lambda: None, "cpu") is None


def test_the_mean_of_calls(nvml, monkeypatch):
    nvml()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(energy, "SECONDS", 0.35)
    clock, calls = iter(range(100)), []
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock) / 10 - 1)
    assert energy.joules_per_call(lambda: calls.append(1)) == 250.0 / (len(calls) - 1)
