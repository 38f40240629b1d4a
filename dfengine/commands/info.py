"""`dfengine info`: describe a checkpoint, or this installation."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dfengine import __version__, kernels, native
from dfengine.checkpoint import load_checkpoint
from dfengine.commands.plan import run_plan
from dfengine.errors import UsageError
from dfengine.models import PRESETS, cost

_PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x", "nvtx")


def run_info(
    checkpoint: Path | None,
    as_json: bool,
    plan: bool = False,
    batch: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    no_measure: bool = False,
) -> None:
    """Prints the description, or with `plan` that of the program. Raises `CheckpointError` for a file that cannot be
    used, `UsageError` for options that do not go together."""
    if plan:
        if checkpoint is None:
            raise UsageError("--plan needs a checkpoint")
        return run_plan(checkpoint, batch or 1, device or "auto", precision or "auto", not no_measure, as_json)
    if no_measure or (batch, device, precision) != (None, None, None):
        raise UsageError("--batch, --device, --precision and --no-measure go with --plan")
    facts = installation() if checkpoint is None else describe(checkpoint)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        print(json.dumps(facts, indent=2))
    elif checkpoint is None:
        _print_installation(console, facts)
    else:
        _print_fields(console, facts)


def installation() -> dict[str, Any]:
    """Versions, devices, the native module, the kernel table and the presets, as JSON values."""
    versions = {"python": platform.python_version(), "dfengine": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "versions": versions,
        "devices": devices,
        "native": native.status(),
        "kernels": {kind: kernels.table(kind) for kind in kinds},
        "presets": list(PRESETS),
    }


def describe(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint is: configuration, cost, training record and calibration, as JSON values."""
    loaded = load_checkpoint(checkpoint)
    costs = cost(loaded.config)
    return {
        "file": str(checkpoint),
        "bytes": checkpoint.stat().st_size,
        "parameters": costs.reconstruction_parameters + costs.segmentation_parameters,
        "gflop_per_image": round(costs.image_flops / 1e9, 3),
        "config": loaded.config.to_dict(),
        "calibration": loaded.calibration.to_dict() if loaded.calibration else None,
        "calibration_note": loaded.calibration.message if loaded.calibration else "not calibrated",
        "trial_images": len(loaded.trial.images) if loaded.trial else 0,
        "verified": loaded.verified,
        "training": loaded.training,
    }


def _print_fields(console: Console, fields: dict[str, Any], indent: str = "") -> None:
    for key, value in fields.items():
        if isinstance(value, dict):
            console.print(f"{indent}{key}:", markup=False)
            _print_fields(console, value, indent + "  ")
            continue
        if isinstance(value, list) and len(value) > 12:
            value = f"{len(value)} entries (see --json)"
        console.print(f"{indent}{key}: {value}", markup=False)


def _print_installation(console: Console, facts: dict[str, Any]) -> None:
    console.print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    for device in facts["devices"]:
        console.print(f"device {device}")
    console.print(facts["native"])
    for kind, rows in facts["kernels"].items():
        table = Table(title=f"kernels on {kind}", title_justify="left")
        for column in rows[0]:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)
    console.print("presets: " + ", ".join(facts["presets"]))
