"""Where a run writes: checked before anything is read, and held against other runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dfengine.checkpoint import SUFFIX, check_output
from dfengine.errors import DfengineError, UsageError
from dfengine.files import BUSY, OUTPUT_MARKER, check_suffix, locked, make_folder
from dfengine.training.distributed import World
from dfengine.training.state import STATE_FILE


def run_folder_of(out: Path) -> Path:
    """The folder of log, panels and state beside the checkpoint `out`: its name with ".run" for ".safetensors"."""
    return out.with_suffix(".run")


def check_outputs(out: Path, *sources: Path, resume: bool = False) -> None:
    """Refuses an `out` that training would fail to write hours later, or that would change what is read from `sources`.

    Missing folders above `out` are made; `out` itself is left as it is. Raises `UsageError` for a name that does not
    end in .safetensors, another file or a folder in its place, a run folder that no run wrote and that is not empty,
    or, unless the run is to `resume`, a checkpoint that is there already, and `DfengineError` where it cannot be
    written.
    """
    check_suffix(out, SUFFIX)
    for source in sources:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
            raise UsageError(f"{out}: lies inside {source}, where panels of the run would pass for images to train on")
    check_output(out, present=resume)
    folder = run_folder_of(out)
    if folder.exists():
        make_folder(folder)
        marker = folder / OUTPUT_MARKER
        run = marker.is_file() and not marker.stat().st_size  # that of results lists them
        if any(folder.iterdir()) and not run and not (folder / STATE_FILE).exists():
            raise UsageError(f"{folder}: holds files not written by dfengine; choose another --out")


@contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """For `with`: no other run writes into `folder`. The main process locks it; all are refused with its reason."""
    with ExitStack() as stack:
        refusal = ""
        if world.is_main:
            try:
                stack.enter_context(locked(folder, f"{folder}: {BUSY}"))
            except DfengineError as error:
                refusal = str(error)
        if refusal := world.from_main(refusal):
            raise DfengineError(refusal)
        yield
