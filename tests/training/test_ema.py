from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dfengine.training.ema import Ema


def test_first_update_takes_most_of_the_source_and_later_ones_follow_the_decay():
    source, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(average.weight)
    nn.init.ones_(source.weight)
    ema = Ema(source, average, decay=0.9)
    ema.update()
    assert average.weight.item() == pytest.approx(1 - 2 / 11)
    ema.updates = 10**6
    before = average.weight.item()
    ema.update()
    assert average.weight.item() == pytest.approx(0.9 * before + 0.1)


def test_buffers_are_averaged_and_counters_left():
    source = nn.BatchNorm1d(2)
    average = copy.deepcopy(source)
    source.running_mean.fill_(1.0)
    source.num_batches_tracked.fill_(7)
    Ema(source, average, 0.999).update()
    assert torch.allclose(average.running_mean, torch.full((2,), 9 / 11))
    assert average.num_batches_tracked.item() == 0


def test_without_decay_nothing_moves():
    source, average = nn.Linear(2, 2), nn.Linear(2, 2)
    before = average.weight.clone()
    Ema(source, average, 0.0).update()
    assert torch.equal(average.weight, before)


def test_another_structure_is_refused():
    with pytest.raises(ValueError, match="structure"):
        Ema(nn.Linear(2, 2), nn.Linear(2, 3), 0.9)
