"""Where a run writes: checked before anything is read, and held against other runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dfengine.checkpoint import check_new, check_target
from dfengine.errors import DfengineError, UsageError
from dfengine.files import check_writable, locked
from dfengine.training.distributed import World

SUFFIX = ".safetensors"
RUN_SUFFIX = ".run"


def run_folder_of(out: Path) -> Path:
    """The folder of log, panels and state beside the checkpoint `out`: its name without ".safetensors", plus ".run"."""
    return out.with_name(out.name.removesuffix(SUFFIX) + RUN_SUFFIX)


def check_outputs(out: Path, *sources: Path, resume: bool = False) -> None:
    """Refuses an `out` that training would fail to write hours later, or that would change what is read from `sources`.

    Missing folders above `out` are made; `out` itself is left as it is. Raises `UsageError` for a name that cannot be,
    or, unless the run is to `resume`, a checkpoint that is there already or has the same run folder, and
    `DfengineError` for another file or a folder in its place, or one that cannot be written.
    """
    (check_target if resume else check_new)(out)
    twin = out.with_name(out.name.removesuffix(SUFFIX) if out.suffix == SUFFIX else out.name + SUFFIX)
    if twin.is_file() and not resume:
        raise UsageError(f"{out}: would share the run folder {run_folder_of(out)} with {twin}; choose another --out")
    if out.name.lower().endswith(RUN_SUFFIX):
        raise UsageError(f"{out}: is the name of a run folder; name the checkpoint {out.with_suffix(SUFFIX).name}")
    for source in sources:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
            raise UsageError(f"{out}: lies inside {source}, where panels of the run would pass for images to train on")
    check_writable(out)
    folder = run_folder_of(out)
    if folder.exists():
        check_writable(folder / "state.safetensors")


@contextmanager
def held(folder: Path, world: World) -> Iterator[None]:
    """For `with`: no other run writes into `folder`. The main process locks it; all are refused with its reason."""
    with ExitStack() as stack:
        refusal = ""
        if world.is_main:
            busy = f"{folder}: another run is writing into it; wait for its end, or choose another --out"
            try:
                stack.enter_context(locked(folder, busy))
            except DfengineError as error:
                refusal = str(error)
        if refusal := world.from_main(refusal):
            raise DfengineError(refusal)
        yield
