from __future__ import annotations

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from dfengine.errors import CheckpointError, DfengineError, UsageError
from dfengine.training import state as state_module
from dfengine.training.state import (
    RunState,
    check_identity,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)

CPU = torch.device("cpu")


def test_state_survives_a_file(tmp_path):
    path = tmp_path / "run" / "state.safetensors"
    state = RunState({"model": {"base": 8}}, "float32", 7, 1.5, [3, 4], 112, {"reconstruction": 7}, {}, {"step": 5})
    tensors = {"model.w": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "n": torch.tensor(3)}
    save_state(path, state, tensors)
    loaded, values = load_state(path, CPU)
    assert loaded == state
    assert values.keys() == tensors.keys()
    assert all(torch.equal(values[name], tensors[name]) for name in tensors)


def test_a_full_disk_leaves_the_previous_state(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(path, RunState({}, step=1), {"w": torch.zeros(3)})

    def full(tensors, file, metadata):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(DfengineError, match=r"state\.safetensors.*no space left on device"):
        save_state(path, RunState({}, step=2), {"w": torch.ones(3)})
    assert load_state(path, CPU)[0].step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(CheckpointError, match="no training state to resume"):
        load_state(path, CPU)
    save_file({"w": torch.zeros(3)}, str(path))
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path, CPU)
    save_state(path, RunState({}), {"w": torch.zeros(3)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged"):
        load_state(path, CPU)


def test_a_difference_of_the_runs_is_named(tmp_path):
    saved = {"training": {"seed": 0, "steps": 5}, "data fingerprint": "ab"}
    check_identity(tmp_path, saved, saved)
    with pytest.raises(UsageError, match="training seed was 0 and is now 1"):
        check_identity(tmp_path, saved, {"training": {"seed": 1, "steps": 5}, "data fingerprint": "ab"})
    with pytest.raises(UsageError, match="the training images are not those of the run; repeat the options"):
        check_identity(tmp_path, saved, {"training": {"seed": 0, "steps": 5}, "data fingerprint": "cd"})


def test_a_restored_optimizer_takes_the_same_step():
    def trained(steps):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2, fused=True)
        for k in range(steps):
            advance(net, optimizer, k)
        return net, optimizer

    def advance(net, optimizer, k):
        optimizer.zero_grad()
        net(torch.full((1, 3, 5, 5), 0.5 + k)).square().mean().backward()
        optimizer.step()

    whole, _ = trained(4)
    half, optimizer = trained(2)
    names = {id(p): name for name, p in half.named_parameters()}
    saved = {name: value.contiguous().clone() for name, value in optimizer_tensors(optimizer, names).items()}
    again = torch.optim.AdamW(half.parameters(), 1e-2, fused=True)
    restore_optimizer(again, dict(half.named_parameters()), saved)
    for k in (2, 3):
        advance(half, again, k)
    assert torch.equal(half.weight, whole.weight)
    assert torch.equal(half.bias, whole.bias)
