"""What the benchmarks share: where they ran, and where their results go."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import dfengine.native
from dfengine._version import __version__
from dfengine.devices import hardware_name
from dfengine.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent


def command_output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, text=True, check=True, capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def commit() -> str | None:
    """The commit, with "-dirty" after it where the tree differs from it in more than results."""
    name = command_output("git", "rev-parse", "--short", "HEAD")
    changed = command_output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return f"{name}-dirty" if name and changed else name


def environment(device: str) -> dict:
    """Where and with what the numbers were measured."""
    result = {
        "device": hardware_name(device),
        "dfengine": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": dfengine.native.status(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }
    if device == "cuda":
        import triton

        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
        result |= {
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "driver, clocks, power": command_output("nvidia-smi", query, "--format=csv,noheader"),
        }
    return result


def peak_memory(device: str) -> int:
    """Bytes: of this process's resident memory on a CPU, of torch's allocations on a GPU, at their highest so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum is inherited from the parent.
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def results_path(head: dict, name: str, folder: Path = ROOT / "bench" / "results") -> Path:
    """<folder>/<device name>/<name>.json, for the `environment` of a run."""
    return folder / re.sub(r"[^A-Za-z0-9.]+", "-", head["device"]).strip("-").lower() / f"{name}.json"


def rows_of(path: Path, head: dict) -> list[dict]:
    """The rows of a file measured on the same machine in the same way, each with its commit; else none."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    same = all(before.get(key) == head.get(key) for key in ("device", "torch", "threads", "tactics", "clock"))
    return [{"commit": before.get("commit")} | row for row in before["rows"]] if same else []


def write(path: Path, result: dict, tell: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(result, indent=1) + "\n")
    if tell:
        print(f"wrote {path}")
