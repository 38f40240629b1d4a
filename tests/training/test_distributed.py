from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfengine.training import train
from dfengine.training.distributed import World
from dfengine.training.log import read_log
from dfengine.training.state import load_state
from tests.helpers import tiny_config
from tests.training.two_processes import ONE_STEP

pytestmark = pytest.mark.timeout(300)  # two processes beside others, on few cores


@pytest.fixture(scope="module")
def folder(normals, tmp_path_factory) -> Path:
    """What two_processes.py leaves."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    errors = folder / "errors.txt"
    with errors.open("w") as stream:
        group = subprocess.Popen(
            [*command, str(folder), str(normals)], env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            status = group.wait(240)
        finally:
            if group.poll() is None:
                os.killpg(group.pid, signal.SIGKILL)
    assert status == 0, errors.read_text()[-3000:]
    return folder


def state_of(folder: Path, name: str):
    return load_state(folder / f"{name}.run" / "state.safetensors", torch.device("cpu"))


def test_two_processes_resume_to_the_same_bits(folder):
    whole, parts = state_of(folder, "straight"), state_of(folder, "parts")
    assert whole[0].step == parts[0].step == 4
    assert whole[0].images_seen == 4 * 4 * 2
    assert not [name for name in whole[1] if not torch.equal(whole[1][name], parts[1][name])]
    steps = [row["step"] for row in read_log(folder / "parts.run" / "log.csv") if "noise_loss" in row]
    assert steps == [1, 2, 3, 4]


def test_two_processes_are_one_with_twice_the_batch(folder, normals, tmp_path):
    train(ONE_STEP, tiny_config(), normals, tmp_path / "one.safetensors")
    two, one = state_of(folder, "one")[1], state_of(tmp_path, "one")[1]
    # Adam's first moment after one step is a tenth of the gradient.
    moments = [name for name in one if name.startswith("optimizer.exp_avg.")]
    assert moments and moments == [name for name in two if name.startswith("optimizer.exp_avg.")]
    for name in moments:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-7)
    assert max(one[name].abs().max() for name in moments) > 1e-3


def test_one_process_without_memory_for_a_model_decides_for_both(folder):
    state, _ = state_of(folder, "picked")
    assert state.identity["model"]["base"] == 8 and state.step == 1
    assert state.plan["expected_images"] > 1
    assert "2 processes" in state.plan["picked"] and "does not fit into memory" in state.plan["picked"]


def test_a_taken_run_folder_ends_both_with_the_same_line(folder):
    first, second = ((folder / f"refused-{rank}.txt").read_text() for rank in range(2))
    assert first == second and first.startswith(f"{folder / 'taken.run'}: another run is writing into it")
    assert not (folder / "taken.safetensors").exists()


def test_one_process_needs_no_group():
    with World("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.agree(True, 2.5) == (True, 2.5)
        assert world.minimum(2.5) == 2.5
        assert world.from_main("no") == "no"
