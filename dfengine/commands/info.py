"""`dfengine info`: describe a checkpoint, or this installation."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from dfengine import __version__, kernels, native
from dfengine.checkpoint import load_checkpoint
from dfengine.commands.plan import aligned, run_plan
from dfengine.commands.scoring import say
from dfengine.console import OutputConsole
from dfengine.engine.modules import PRECISIONS
from dfengine.errors import UsageError
from dfengine.kernels.registry import ENVIRONMENT
from dfengine.models import PRESETS, cost
from dfengine.verified import verdict
from dfengine.wording import counted

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
    console = OutputConsole(highlight=False)
    if as_json:
        say(json.dumps(facts, indent=2))
    elif checkpoint is None:
        _print_installation(console, facts)
    else:
        _print_checkpoint(console, facts)


def installation() -> dict[str, Any]:
    """Versions, devices, the native module, the kernel table and the presets, as JSON values."""
    versions = {"python": platform.python_version(), "dfengine": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [f"cpu: {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"]
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
        "forced_backend": kernels.forced_backend(None),
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


def _print_checkpoint(console: Console, facts: dict[str, Any]) -> None:
    """What a user asks of a checkpoint, one subject a line; `--json` has every field."""
    config, calibration = facts["config"], facts["calibration"]
    say(facts["file"])
    size = f"{config['image_size']}x{config['image_size']} pixels"
    amounts = f"{facts['parameters'] / 1e6:.2f} million parameters, {facts['gflop_per_image']:g} GFLOP an image"
    lines = {"model": f"{config['preset']}, {size}, {amounts}, file of {facts['bytes'] / 1e6:.1f} MB"}
    lines["threshold"] = "not calibrated (run `dfengine calibrate`)"
    if calibration:
        made = [f"{name} {calibration[name]}" for name in ("seed", "precision") if calibration[name] is not None]
        lines["threshold"] = f"{calibration['threshold']:.6g}" + (f", set with {', '.join(made)}" if made else "")
        lines[""] = facts["calibration_note"]
    lines["precision"] = _passed(facts["verified"]) + (
        f"; {counted(facts['trial_images'], 'trial image')}, by which \"auto\" decides" if facts["trial_images"] else ""
    )
    lines |= _trained(facts["training"])
    lines["more"] = "every field: --json; every op that runs: --plan"
    indent = max(map(len, lines)) + 2
    for name, text in lines.items():
        wrapped = textwrap.wrap(text, max(20, console.width - indent), break_on_hyphens=False)
        say(f"{name:<{indent}}" + f"\n{'':<{indent}}".join(wrapped))


def _passed(verified: dict[str, dict[str, Any]]) -> str:
    """The records of `dfengine verify --record` in words; those of precisions that another release has are left out."""
    found = [f"{name} {verdict(record)}" for name, record in verified.items() if name in PRECISIONS]
    return ", ".join(found) or "no other than float32 was held to images (dfengine verify --data)"


def _trained(record: dict[str, Any]) -> dict[str, str]:
    """The training record in words, as far as it is of the usual form: it may come from another tool or release."""

    def part(name: str) -> dict[str, Any]:
        value = record.get(name)
        return value if isinstance(value, dict) else {}

    data, config, validation, versions = map(part, ("data", "config", "validation", "versions"))
    lines = {}
    if "images" in data:
        held_out = data.get("held_out")
        kept = f" ({len(held_out)} of them held out)" if isinstance(held_out, list) else ""
        lines["trained on"] = f"{counted(data['images'], 'image')} of {data.get('name', 'a folder')}{kept}"
    if "steps" in record:
        start = f", starting from {config['init']}" if config.get("init") else ""
        amount = [f"{counted(record['steps'], 'step')}{start}"]
        amount += [f"{record['seconds'] / 60:.1f} min"] if isinstance(record.get("seconds"), (int, float)) else []
        amount += [f"{name} {record[name]}" for name in ("seed", "precision") if name in record]
        lines["for"] = ", ".join([*amount, *([str(record["hardware"])] if "hardware" in record else [])])
    names = {"val_image_auroc": "image AUROC", "val_pixel_auroc": "pixel AUROC"}
    found = [f"{word} {validation[key]:.3f}" for key, word in names.items() if isinstance(validation.get(key), float)]
    if found:
        lines["validation"] = f"{', '.join(found)}, on held-out images with synthetic defects"
    if versions:
        lines["made with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    others = {key: value for key, value in record.items() if isinstance(value, (str, int, float)) and not lines}
    return lines | {key: str(value) for key, value in others.items()}


def _print_installation(console: Console, facts: dict[str, Any]) -> None:
    console.print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    for device in facts["devices"]:
        console.print(f"device {device}")
    console.print(escape(facts["native"]))
    for kind, rows in facts["kernels"].items():
        lines, reasons = [["kernels on " + kind, "serves", "also here", "not here"]], {}
        for row in rows:
            status = {backend: text for backend, text in row.items() if backend not in ("op", "serves")}
            serves = row["serves"] if row["serves"] in status else "none"
            also = [backend for backend, text in status.items() if text == "yes" and backend != serves]
            absent = [backend for backend, text in status.items() if text not in ("yes", "not written")]
            reasons |= {backend: status[backend] for backend in absent}
            lines.append([row["op"], serves, ", ".join(also), ", ".join(absent)])
        say("")
        say("\n".join(aligned(lines, left=range(4))))
        for backend, reason in reasons.items():
            console.print(escape(f"  {backend}: {reason}"))
    if forced := facts["forced_backend"]:
        rows = [row for rows in facts["kernels"].values() for row in rows]
        idle = all(row["serves"].startswith("none") for row in rows)
        why = "; ".join(sorted({row[forced] for row in rows} - {"yes", "not written"}))
        none = f", and serves none here: {why}" if idle else ""
        say(f"{ENVIRONMENT}={forced} forces this backend on every op{none}")
    say("")
    console.print("presets: " + ", ".join(facts["presets"]))
