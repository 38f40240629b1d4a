"""Train a grid of settings at equal cost and measure each without test labels.

    python bench/study.py GRID.toml [--out build/study] [--jobs 2] [--only NAME ...]

The grid names image sets (`bench/study_sets.py`), seeds, a budget in core-seconds and variants; a variant changes
fields of `ModelConfig`, `TrainConfig`, `SynthesisConfig` or `AugmentConfig` ("model", "train", "synthesis", "augment"
tables), or of the trained model's `ModelConfig` ("inference"), on top of those of `[base]` and of a set's own
`[base_of.SET]`. Its steps follow from the budget and from what its three kinds of step cost on this machine, measured
once before the runs and kept in costs.json: so a run's result does not depend on what else the machine does.
Interrupted runs go on; finished ones are kept by the hash of their settings and code. One row a run goes to
results.csv; `bench/study_report.py` makes tables of it.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import study_scores  # noqa: E402
import study_sets  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from dfengine.checkpoint import load_checkpoint  # noqa: E402
from dfengine.data.augment import AugmentConfig  # noqa: E402
from dfengine.data.synthesis import SynthesisConfig, Synthesizer  # noqa: E402
from dfengine.data.textures import TextureSource  # noqa: E402
from dfengine.engine.modules import ModuleRunner  # noqa: E402
from dfengine.evaluation.metrics import auroc, average_precision  # noqa: E402
from dfengine.models import preset  # noqa: E402
from dfengine.training import TrainConfig, run_folder_of, train  # noqa: E402
from dfengine.training.config import NO_INIT, start_path  # noqa: E402
from dfengine.training.distributed import World  # noqa: E402
from dfengine.training.precision import Precision  # noqa: E402
from dfengine.training.state import RunState  # noqa: E402
from dfengine.training.trainer import Trainer  # noqa: E402
from dfengine.training.validation import run as run_model  # noqa: E402

PRECISION = "bfloat16"
"""Of training and measuring: a CPU core has three times as much of it."""

CODE = "DFENGINE_STUDY_CODE"
TABLES = ("model", "train", "synthesis", "augment", "inference")


def settings(grid: dict) -> list[dict]:
    """Every run of a grid: {"set", "variant", "seed", "seconds", and the tables}."""
    runs = []
    for seed in grid["seeds"]:
        for variant, changes in grid["variants"].items():
            for name in changes.get("sets", grid["sets"]):
                seconds = changes.get("seconds", grid["seconds"])
                run = {"set": name, "variant": variant, "seed": seed, "seconds": seconds}
                layers = grid.get("base", {}), grid.get("base_of", {}).get(name, {}), changes
                for table in TABLES:
                    run[table] = {key: value for layer in layers for key, value in layer.get(table, {}).items()}
                runs.append(run)
    return runs


def key_of(run: dict) -> str:
    """Names a trained model: its settings, start weights and the code that made it. Inference settings share one."""
    named = {k: v for k, v in run.items() if k not in ("variant", "inference")}
    digest = hashlib.sha256((json.dumps(named, sort_keys=True) + code_digest()).encode())
    if (init := run["train"].get("init", NO_INIT)) != NO_INIT:
        digest.update(start_path(init).read_bytes())
    return digest.hexdigest()[:12]


def code_digest() -> str:
    """Of the code that makes a model; a study takes it once, at its start."""
    if CODE in os.environ:
        return os.environ[CODE]
    package = ROOT.parent / "dfengine"
    folders = (package / "data", package / "models", package / "training", package.parent / "kernels")
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    files += [package / "diffusion.py", *(ROOT / f"{name}.py" for name in ("study", "study_sets", "study_scores"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def configurations(run: dict):
    """(ModelConfig, TrainConfig without its budget) of a run."""
    model = dict(run["model"])
    model = preset(model.pop("preset", "diff-fastener-tiny"), **model)
    options = dict(precision=PRECISION, threads=1, workers=0, keep="last", validations=2, holdout=0.02)
    config = TrainConfig(steps=1, **{**options, **run["train"]}, seed=run["seed"])
    filled = config.resolve(model)
    return model, config.replace(
        synthesis=SynthesisConfig.from_dict(filled.synthesis.to_dict() | run["synthesis"]),
        augment=AugmentConfig.from_dict(filled.augment.to_dict() | run["augment"]),
    )


def step_costs(model, config, out: Path) -> list[float]:
    """Seconds of a step: denoiser alone, joint, segmentation alone; their samples' preparation included."""
    fields = ("image_size", "base", "multipliers", "seg_base", "skip_every", "blocks", "mode", "dilation", "activation")
    shape = {name: value for name, value in model.to_dict().items() if name in fields}
    name = json.dumps([shape, config.batch_size, config.precision, config.synthesis.recipe], sort_keys=True)
    path = out / "costs.json"
    costs = json.loads(path.read_text()) if path.exists() else {}
    if name not in costs:
        size = model.image_size
        images = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), np.uint8)
        synthesizer = Synthesizer(images, TextureSource.procedural(size), config.synthesis)
        resolved = config.replace(denoiser_every=2).resolve(model)
        with World("cpu") as world:
            state, precision = RunState({}, precision=config.precision), Precision(config.precision, world.device)
            trainer = Trainer(resolved, model, images, synthesizer, world, precision, state)
            costs[name] = []
            for stage, first in ((1, 0), (2, 0), (2, 1)):
                times = []
                for _ in range(6):
                    state.stage_steps[1] = first
                    start = time.process_time()
                    trainer.step(stage, 0.5)
                    times.append(time.process_time() - start)
                costs[name].append(float(np.median(times)))
        path.write_text(json.dumps(costs, indent=1) + "\n")
    return costs[name]


def steps_of(run: dict, out: Path) -> int:
    model, config = configurations(run)
    config = config.resolve(model)
    alone, joint, segmentation = step_costs(model, config, out)
    every, share = config.denoiser_every, config.denoiser_share
    second = joint / every + segmentation * (1 - 1 / every)
    return round(run["seconds"] / (share * alone + (1 - share) * second))


def execute(run: dict, out: Path) -> dict:
    """Trains and measures one run; returns its row."""
    torch.set_num_threads(1)
    model, config = configurations(run)
    steps = steps_of(run, out)
    folder = out / "runs" / key_of(run)
    data = study_sets.build(run["set"], model.image_size, run["seed"], out)
    normals = folder / "normals"
    shutil.rmtree(normals, ignore_errors=True)
    normals.mkdir(parents=True)
    for path in data.train:
        (normals / path.name).symlink_to(path.resolve())
    checkpoint = folder / "model.safetensors"
    config = dataclasses.replace(config, steps=steps, validation_samples=24)
    start = time.process_time()
    if not checkpoint.exists():
        resume = (run_folder_of(checkpoint) / "state.safetensors").exists()
        train(config, model, normals, checkpoint, resume=resume, console=Console(file=open(folder / "log.txt", "a")))
    row = {"set": run["set"], "variant": run["variant"], "seed": run["seed"], "key": key_of(run), "steps": steps,
           "images": steps * config.batch_size, "seconds": round(time.process_time() - start)}  # fmt: skip
    loaded = load_checkpoint(checkpoint)
    loaded = dataclasses.replace(loaded, config=loaded.config.replace(**run["inference"]))
    return row | measure(loaded, data)


def measure(checkpoint, data: study_sets.StudySet) -> dict[str, float]:
    """Image AUROC of each score for each group of anomalies, and pixel AP of the map."""
    maps, reconstructions, _ = run_model(ModuleRunner(checkpoint.build()), data.images)
    kinds = np.array(data.kinds)
    plain = kinds == "normal"
    named = study_scores.scores(data.images, maps, reconstructions, plain)
    synthetic = np.char.startswith(kinds, "normal")
    row = {}
    anomalies = sorted({k for k in kinds if not k.startswith("normal") and k != "real:normal"})
    for score, values in named.items():
        for group in ("own", "foreign", "small", "texture", "real"):
            chosen = [k for k in anomalies if k.startswith(group)]
            if not chosen:
                continue
            negative = kinds == "real:normal" if group == "real" else synthetic if group == "foreign" else plain
            each = {}
            for kind in chosen:
                both = negative | (kinds == kind)
                each[kind] = float(auroc(kinds[both] == kind, values[both].astype(np.float64)))
            row[f"{group}/{score}"] = float(np.mean(list(each.values())))
            if score in ("seg@50", "seg@800") and group in ("foreign", "small", "real"):
                row |= {f"{kind}/{score}": value for kind, value in each.items()}
        processed = synthetic & ~plain
        both = synthetic
        row[f"traces/{score}"] = float(auroc(processed[both], values[both].astype(np.float64)))
    large = ~np.char.startswith(kinds, "small")  # a few pixels of each image, beside thousands
    row["pixel_ap"] = average_precision(data.masks[large].ravel(), maps[large].ravel().astype(np.float64))
    error = np.abs(reconstructions - data.images / 255.0).mean(axis=(1, 2, 3))
    row["normal_error"] = float(error[plain].mean())
    return {k: round(v, 4) for k, v in row.items()}


def write_csv(out: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(out / "results.csv.part", "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(out / "results.csv.part", out / "results.csv")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/study"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="variants to run")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    grid, out = tomllib.loads(arguments.grid.read_text()), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    os.environ[CODE] = code_digest()
    torch.set_num_threads(1)
    everything = settings(grid)
    runs = [r for r in everything if not arguments.only or r["variant"] in arguments.only]
    result_of = lambda run: out / "runs" / key_of(run) / (run["variant"] + ".json")  # noqa: E731
    if arguments.one:
        run = next(r for r in runs if f"{r['variant']}-{key_of(r)}" == arguments.one)
        row = execute(run, out)
        result_of(run).write_text(json.dumps(row))
        return 0
    if any(run["set"] == "fasteners" for run in runs):
        study_sets.rendered(out)
    for run in runs:
        steps_of(run, out)  # all costs are measured before anything runs beside
    waiting, running, failed = [r for r in runs if not result_of(r).exists()], [], 0
    print(f"{len(runs)} runs, {len(waiting)} to do", flush=True)
    while waiting or running:
        busy = {key_of(entry[0]) for entry in running}
        ready = [run for run in waiting if key_of(run) not in busy]  # two variants may share a trained model
        while ready and len(running) < arguments.jobs:
            run = ready.pop(0)
            waiting.remove(run)
            ready = [other for other in ready if key_of(other) != key_of(run)]
            (out / "runs" / key_of(run)).mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, str(arguments.grid), "--out", str(out), "--one",
                       f"{run['variant']}-{key_of(run)}"]  # fmt: skip
            log = open(out / "runs" / key_of(run) / "output.txt", "a")
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            running.append((run, process, time.monotonic()))
        time.sleep(0.5)
        for entry in list(running):
            run, process, start = entry
            if process.poll() is None:
                continue
            running.remove(entry)
            name = f"{run['set']} {run['variant']} seed {run['seed']}"
            if process.returncode:
                failed += 1
                print(f"{name}: failed, see {out / 'runs' / key_of(run) / 'output.txt'}", flush=True)
                continue
            row = json.loads(result_of(run).read_text())
            shown = {k: v for k, v in row.items() if k.endswith(("/seg@50", "/seg@800")) and ":" not in k}
            print(f"{name}: {time.monotonic() - start:.0f} s, {row['steps']} steps, {shown}", flush=True)
            write_csv(out, [json.loads(result_of(r).read_text()) for r in everything if result_of(r).exists()])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
