"""The `dfengine` command line: options, and errors turned into one line and an exit status.

Exit status: 0 everything was done, 3 some images were refused, 1 nothing could be done, 2 wrong usage (also of an
environment variable, and a device, precision or DFENGINE_BACKEND that this machine does not serve), 130 or 143 ended by
Ctrl-C or SIGTERM.
Each command lives in `dfengine.commands`; imports happen inside, so that `dfengine --help` is quick.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from dfengine import signals
from dfengine._version import __version__
from dfengine.errors import DfengineError, UsageError
from dfengine.files import os_reason
from dfengine.stderr import WarningLines, flush_output, print_error

app = typer.Typer(
    help="Visual anomaly detection for railway fasteners: train on normal photos, detect, read the report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"dfengine {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options before a command."""


CheckpointArgument = Annotated[Path, typer.Argument(metavar="CKPT", help="A dfengine checkpoint (.safetensors).")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
PrecisionOption = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, tf32, int8 or fp8.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the inference noise; recorded with the results.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per batch; does not change any score.")]
RunOption = Annotated[int, typer.Option(min=1, help="Images per run of the program.")]


class Synthesis(str, Enum):
    """Recipes of the synthetic anomalies."""

    mixed = "mixed"
    paper = "paper"
    structural = "structural"


class Recipe(str, Enum):
    """Training recipes."""

    default = "default"
    paper = "paper"


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="A folder of normal images, or a data set (MVTec, VisA, DAGM layout).")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write; logs go to a folder beside it.")],
    preset: Annotated[
        str | None, typer.Option(help="Model preset; by default chosen from the images and the time.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Model size in pixels: 32, 64, 128, 256 or 512; by default chosen likewise.")
    ] = None,
    pixel_range: Annotated[str | None, typer.Option(help="unit ([0, 1]) or signed ([-1, 1]).")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes (default: 30).")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in optimiser steps.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget in passes over the normal images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step and process.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches accumulated per optimiser step.")] = 1,
    recipe: Annotated[Recipe, typer.Option(help="default (small budgets) or paper (the papers' recipe).")] = "default",
    synthesis: Annotated[Synthesis | None, typer.Option(help="Which synthetic anomalies to train on.")] = None,
    textures: Annotated[Path | None, typer.Option(help="Folder of texture images; procedural ones without it.")] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to start from, fasteners (shipped weights; the default where they fit and no preset is "
            "named) or none."
        ),
    ] = None,
    decoy: Annotated[float | None, typer.Option(help="Share of normals processed like anomalies, without one.")] = None,
    foreground: Annotated[str | None, typer.Option(help="auto, none (whole image) or texture.")] = None,
    denoiser_share: Annotated[float | None, typer.Option(help="Share of the budget for the denoiser alone.")] = None,
    denoiser_every: Annotated[int | None, typer.Option(help="Train the denoiser on every k-th joint step.")] = None,
    inference_t_share: Annotated[
        float | None, typer.Option(help="Share of joint samples drawn at the noise scales used at inference.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of the denoiser.")] = None,
    segmentation_rate: Annotated[float | None, typer.Option(help="Peak rate of the segmentation network.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of the weights' average; 0 switches it off.")] = None,
    flip: Annotated[str | None, typer.Option(help="Flips that keep a normal image normal: none, h, v or hv.")] = None,
    rotation: Annotated[
        float | None, typer.Option(help="Largest rotation of normals in degrees; 180 where objects lie anyhow.")
    ] = None,
    augment: Annotated[bool, typer.Option(help="Light augmentation of the normals.")] = True,
    holdout: Annotated[float, typer.Option(help="Share of the normals held out for validation.")] = 0.1,
    keep: Annotated[str, typer.Option(help="Weights to keep: best (by validation) or last.")] = "best",
    seed: Annotated[int, typer.Option(help="Seed of everything random in training.")] = 0,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Processes that prepare samples.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.")] = None,
    leg_minutes: Annotated[float | None, typer.Option(help="Stop (resumably) after this long.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state of this --out.")] = False,
) -> None:
    """Train a detector from normal images alone."""
    options = dict(locals())
    _exit(_command("train", "run_train")(**options))


@app.command()
def calibrate(
    checkpoint: CheckpointArgument,
    data: Annotated[
        Path | None, typer.Argument(help="Normal images; those that the model was trained on are left out.")
    ] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Wanted share of normals above the threshold (default: 0.01).")
    ] = None,
    alarms_per_km: Annotated[float | None, typer.Option(help="The same, as alarms per km of track.")] = None,
    fasteners_per_km: Annotated[
        float | None, typer.Option(help="Fasteners per km, for --alarms-per-km (default: 6667).")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Set the threshold by hand: 0 to 1.")] = None,
    top_k: Annotated[
        float | None,
        typer.Option(
            help="Let scores average so many of a map's 65,536 largest pixels: few for small defects. The threshold is "
            "set anew."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result here (default: into CKPT).")] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Store the weights in half precision: half the size; needs no images.")
    ] = False,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Set the alarm threshold from held-out normal images."""
    options = dict(locals())
    _exit(_command("calibrate", "run_calibrate")(**options))


@app.command()
def detect(
    checkpoint: CheckpointArgument,
    # Whether one can be read shows when it is read, as of a file in a folder.
    inputs: Annotated[list[Path], typer.Argument(readable=False, help="Images or folders of images.")],
    out: Annotated[Path, typer.Option(help="Folder for results.csv, results.jsonl, heatmaps/ and report.html.")],
    batch_size: BatchOption = 16,
    threshold: Annotated[float | None, typer.Option(help="Alarm threshold, 0 to 1, not the calibrated one.")] = None,
    heatmaps: Annotated[bool, typer.Option(help="Write a heatmap overlay per image.")] = True,
    original_size: Annotated[bool, typer.Option(help="Heatmaps at the images' own size.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Score images; write results, heatmaps and a report."""
    options = dict(locals())
    _exit(_command("detect", "run_detect")(**options))


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    data: Annotated[Path, typer.Argument(help="A data set with test images (MVTec, VisA or DAGM layout).")],
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, the plots and report.html.")],
    group_by: Annotated[
        str | None, typer.Option(help="Regular expression; its first group in a file name is the bootstrap unit.")
    ] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="Score mildly changed good images too: do false alarms rise?")
    ] = False,
    batch_size: BatchOption = 16,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Measure a detector on labelled test images."""
    options = dict(locals())
    _exit(_command("evaluate", "run_evaluate")(**options))


@app.command(short_help="Describe a checkpoint, its program, or this installation.")
def info(
    checkpoint: Annotated[Path | None, typer.Argument(metavar="[CKPT]", help="A checkpoint to describe.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print every op of the program that detects, with its measured time.")
    ] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per run, for --plan (default: 1).")] = None,
    device: Annotated[str | None, typer.Option(help="For --plan: auto, cpu, cuda, cuda:1, ...")] = None,
    precision: Annotated[str | None, typer.Option(help="For --plan: as of detect.")] = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="For --plan: without times.")] = False,
) -> None:
    """Describe a checkpoint, its program (--plan), or this installation: devices, kernels, presets."""
    _command("info", "run_info")(checkpoint, as_json, plan, batch, device, precision, no_measure)


@app.command(short_help="Hold the program to its model, or a precision to float32.")
def verify(
    checkpoint: CheckpointArgument,
    data: Annotated[
        Path | None,
        typer.Option(help="Compare --precision with float32 on these: normal images, or a data set with test images."),
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="With --data: note the verdict in CKPT.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per run, without --data (default: 2).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per batch, with --data (default: 16).")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Compare the program that detects with its model, op by op; with --data, a precision with float32 on images."""
    if data is not None:
        if batch is not None:
            raise UsageError("verify: --batch is of the comparison without --data; with it, --batch-size")
        compare = _command("verify_data", "run_verify_data")
        _exit(compare(checkpoint, data, precision, record, batch_size or 16, device, seed))
        return
    if record:
        raise UsageError("verify: --record needs --data, the images of the comparison")
    if batch_size is not None:
        raise UsageError("verify: --batch-size goes with --data; without it, --batch")
    _exit(_command("verify", "run_verify")(checkpoint, batch or 2, device, precision, seed))


@app.command(short_help="Find the quickest kernels for a detector on this device.")
def tune(
    checkpoint: CheckpointArgument,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images per run (default: 1, 16); repeatable.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Measure everything anew, every candidate to the end.")
    ] = False,
    seconds: Annotated[float | None, typer.Option(min=0, help="Begin no further op after so long.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write what was measured here (for DFENGINE_TACTICS).")] = None,
) -> None:
    """Measure which kernels are quickest for a detector on this device; later runs take them."""
    _command("tune", "run_tune")(checkpoint, batch or [1, 16], device, precision, exhaustive, seconds, out)


@app.command(short_help="Time detection here, beside the same model in PyTorch.")
def bench(
    checkpoint: CheckpointArgument,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images per run (default: 1, 16); repeatable.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each batch size; two calls of each are made in any case.")
    ] = 5,
    out: Annotated[Path | None, typer.Option(help="Also write JSON here.")] = None,
) -> None:
    """Time detection on this machine, beside the same model as PyTorch modules."""
    _command("bench", "run_bench")(checkpoint, batch or [1, 16], device, precision, seconds, out)


@app.command(short_help="Run the program for a profiler.")
def profile(
    checkpoint: CheckpointArgument,
    batch: RunOption = 1,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    iterations: Annotated[int, typer.Option(min=1, help="Runs of the program that are profiled.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="On a CPU: the Chrome trace to write (default: profile.json).")
    ] = None,
) -> None:
    """Run the program for a profiler: a Chrome trace on a CPU; on a GPU with NVTX ranges, for nsys and ncu."""
    options = dict(locals())
    _command("profile", "run_profile")(**options)


@app.command(short_help="Draw the program's ops against this device's ceilings.")
def roofline(
    checkpoint: CheckpointArgument,
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
    batch: RunOption = 1,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
) -> None:
    """Draw every op of the program against the ceilings that this device reaches."""
    options = dict(locals())
    _command("roofline", "run_roofline")(**options)


@app.command(short_help="Import public DiffusionAD weights, executing nothing.")
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.pt", help="A public DiffusionAD checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The dfengine checkpoint to write.")],
    preset: Annotated[str, typer.Option(help="Method preset of the weights.")] = "diffusionad",
    image_size: Annotated[int | None, typer.Option(help="Where the file does not say it.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where the file does not say it.")] = None,
) -> None:
    """Import public DiffusionAD weights without executing anything in the file."""
    typer.echo(_command("convert", "convert", "dfengine")(source, out, preset, image_size, heads))


@app.command()
def fasteners(
    out: Annotated[Path, typer.Argument(help="Folder to write (MVTec layout).")],
    train: Annotated[int, typer.Option(min=0, help="Normal training images.")] = 176,
    test_good: Annotated[int, typer.Option(min=0, help="Normal test images.")] = 100,
    per_defect: Annotated[int, typer.Option(min=0, help="Test images of each defect type.")] = 40,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Image size in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    variety: Annotated[
        float, typer.Option(min=0, max=1, help="How much normal scenes differ: 1 is any line of any railway.")
    ] = 0.4,
) -> None:
    """Render procedural railway fasteners with exact defect masks."""
    _command("fasteners", "run_fasteners")(out, train, test_good, per_defect, size, seed, variety)


@app.command(short_help="Render fasteners, detect, evaluate, write the report.")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the images, results and report.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fresh test images.")] = 20_261,
    device: DeviceOption = "auto",
) -> None:
    """Render fresh fasteners, detect with the shipped checkpoint, evaluate, write the report."""
    _exit(_command("demo", "run_demo")(out, seed, device))


def _command(module: str, function: str, package: str = "dfengine.commands") -> Callable[..., Any]:
    """What runs a command, imported now. Raises `UsageError` where DFENGINE_BACKEND names no backend."""
    with signals.ending():
        if os.environ.get("DFENGINE_BACKEND"):
            importlib.import_module("dfengine.kernels").forced_backend(None)
        return getattr(importlib.import_module(f"{package}.{module}"), function)


def _exit(status: int) -> None:
    if status:
        raise typer.Exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status, its output flushed; never shows a traceback for a user's
    mistake."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names of files that are not in the system's encoding
    if "" in (sys.argv[1:] if arguments is None else arguments):  # as a path it would be the current folder
        print_error("an argument is empty: perhaps a variable of the shell that is not set")
        return UsageError.exit_code
    log, lines = logging.getLogger("dfengine"), WarningLines()
    log.addHandler(lines)
    try:
        with signals.raising() as signalled:
            try:
                status = _run(arguments, signalled)
                flush_output()
                return status
            except KeyboardInterrupt:
                return signals.say_ended(signalled())
    finally:
        log.removeHandler(lines)


def _run(arguments: list[str] | None, signalled: Callable[[], int]) -> int:
    try:
        app(args=arguments, prog_name="dfengine")
    except SystemExit as end:
        if end.code == 130:  # typer makes it of KeyboardInterrupt
            return signals.say_ended(signalled())
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except DfengineError as error:
        print_error(str(error))
        return error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_error(f"{where}{os_reason(error)}")
        return 1
    except MemoryError:
        print_error("out of memory")
        return 1
    return 0
