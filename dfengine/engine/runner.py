"""Runs detection through programs: one for each batch size, made when it is first needed."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from dfengine import native
from dfengine.engine.arena import Arena, plan
from dfengine.engine.arithmetic import float32_arithmetic
from dfengine.engine.execute import Executor, allocate
from dfengine.engine.lower import Lowering, NotLoweredError
from dfengine.engine.modules import PRECISIONS, ModuleRunner, Output
from dfengine.engine.program import Program
from dfengine.engine.quantize import Ranges, check_ranges, quantizations
from dfengine.engine.tactics import Tactics, say_lost
from dfengine.engine.tune import Choice, tune
from dfengine.errors import DfengineError, UsageError
from dfengine.kernels import CannotRunError, forced_backend
from dfengine.kernels.quantization import FORMATS
from dfengine.models import Model
from dfengine.wording import counted

log = logging.getLogger("dfengine")

MOST_PROGRAMS = 8
"""Programs kept for one detector, on a GPU each with its CUDA graph."""
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that have a program on a GPU; others are filled up to the next."""
TACTICS = ("default", "tuned", "exhaustive")
FAMILY = {"cpu": "cpu", "cuda": "triton"}
"""The backend that a program is lowered for, by device, where none is forced."""


class ProgramRunner:
    """As `ModuleRunner`, through fused kernels; what it runs is float32 or half precision from the pixels on.

    The model is the runner's own from then on: its weights move into the programs, which therefore never go stale.
    backend: forces the implementation of every op that has a kernel for its hardware (`Op.substitute`); by default on a
    CPU that of C++, on a GPU the first that serves. tactics: "default" takes what is known of the device, "tuned" and
    "exhaustive" measure what is not when a program is made (`dfengine.engine.tune`), for at most `tuning_seconds` each,
    and keep what was measured also where that is interrupted; a forced backend leaves them out. buckets: whether
    batches are filled up to one of `BUCKETS`, as by default on a GPU, where each program is captured as a CUDA graph.
    ranges: of a precision of eight bits, which needs them.
    Raises `NotLoweredError` for a configuration that has no program and `CannotRunError` where the backend does not
    serve one of its ops, and leaves the model as it was.
    """

    def __init__(
        self,
        model: Model,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        seed: int = 0,
        backend: str | None = None,
        tactics: str = "default",
        tuning_seconds: float | None = None,
        buckets: bool | None = None,
        ranges: Ranges | None = None,
    ):
        self.config = model.config
        self.device = torch.device(device)
        self.precision = precision
        self.seed = seed
        self.level, self.tuning_seconds = tactics, tuning_seconds
        self.tactics = None if backend else Tactics(self.device)
        self.choices: list[Choice] = []
        """What tuning found, over all programs."""
        self.unmeasured = 0
        """Ops for which it had no time."""
        self.backend = "cpu" if backend is None and self.device.type == "cpu" else backend
        self.buckets = self.device.type == "cuda" if buckets is None else buckets
        self._executors: OrderedDict[int, Executor] = OrderedDict()
        self._block: Tensor | None = None
        self._pool: tuple[int, int] | None = None  # of what the kernels allocate within the graphs
        self._threshold = torch.full((1,), torch.inf, dtype=torch.float32, device=self.device)
        # Tactics may want a weight in another form for each batch size.
        one_form = self.tactics is None or (tactics == "default" and len(self.tactics) == 0)
        with self._plain():
            family = self.backend or FAMILY[self.device.type]
            self._lowering = Lowering(
                model, PRECISIONS[precision], self.device, family, None, one_form, quantizations(precision, ranges)
            )
            program = self.executor(1).program
            if precision in FORMATS:
                check_ranges(program, ranges)
            self._lowering.release()

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """In the runner's arithmetic, on its device; a caller's autocast changes nothing."""
        with float32_arithmetic(self.device, self.precision), torch.autocast(self.device.type, enabled=False):
            yield

    def executor(self, batch: int) -> Executor:
        """The bound program for `batch` images; the least recently used is dropped beyond `MOST_PROGRAMS`.

        Programs share the memory of their activations, that of the largest. One that needs more moves the others, but
        for those that are captured: their addresses are in a graph, and their memory stays with them.
        """
        if batch not in self._executors:
            self._check_memory(batch)
            program = self._lowering.program(batch, self.seed)
            arena = plan(program)
            if self.device.type == "cuda" and (self._grows(arena) or len(self._executors) == MOST_PROGRAMS):
                torch.cuda.synchronize(self.device)  # another stream may still run on what is freed
            if len(self._executors) == MOST_PROGRAMS:
                self._executors.popitem(last=False)
            if self._grows(arena):
                self._grow(arena.nbytes)
            self._executors[batch] = self._made(program, arena)
        self._executors.move_to_end(batch)
        return self._executors[batch]

    def _grows(self, arena: Arena) -> bool:
        return self._block is None or self._block.nbytes < arena.nbytes

    def _grow(self, nbytes: int) -> None:
        """Makes the shared memory so large; programs that are not captured move there."""
        moved = {batch: made for batch, made in self._executors.items() if not made.captured}
        for batch in moved:
            del self._executors[batch]
        plans = [(batch, made.program, made.arena) for batch, made in moved.items()]
        moved.clear()
        self._block = None  # freed before the larger one is asked for
        self._block = allocate(nbytes, self.device)
        for batch, program, arena in plans:
            self._executors[batch] = self._bound(program, arena)

    def _bound(self, program: Program, arena: Arena) -> Executor:
        return Executor(program, self.device, self.backend, arena, self._block, self.tactics)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Makes, and on a GPU captures, the programs that batches of these sizes run, the largest first: the others
        share its memory. Raises UsageError for more than are kept."""
        wanted = {part for size in sizes for part in self.parts(size)}
        if len(wanted) > MOST_PROGRAMS:
            raise UsageError(f"batch sizes of {len(wanted)} programs: {MOST_PROGRAMS} are kept")
        with self._plain():
            for size in sorted(wanted, reverse=True):
                self.executor(size)

    def parts(self, count: int) -> list[int]:
        """The batch sizes of the programs that run `count` images, one after the other."""
        size = self.program_batch(count)
        return [self.program_batch(min(size, count - start)) for start in range(0, count, size)]

    def _check_memory(self, batch: int) -> None:
        """Raises DfengineError for a batch whose images alone are more than the device has memory."""
        least = 4 * batch * self.config.image_size**2 * self.config.channels * 4  # images, x_0, x_t of both scales
        if self.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.device).total_memory
        else:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if least > memory:
            wanted = f"{counted(batch, 'image')} at once"
            raise DfengineError(f"{self.device}: no memory for {wanted}; use a smaller batch_size")

    def _made(self, program: Program, arena: Arena) -> Executor:
        """The executor of a program: tuned where that was asked for, and captured on a GPU."""
        executor = self._bound(program, arena)
        if self.tactics is not None and self.level != "default":
            try:
                choices, left = tune(executor, self.tactics, self.level, self.tuning_seconds)
            except BaseException:
                done = counted(self.tactics.unsaved, "op")
                if self._saved():
                    then = "; the next run goes on" if self.level == "tuned" else ""  # an exhaustive one begins anew
                    log.warning("ended early: %s measured, kept in %s%s", done, self.tactics.path, then)
                raise
            self.choices += choices
            self.unmeasured += left
            if choices:
                self._saved()
                executor = self._bound(program, arena)
        if self.device.type == "cuda":
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graphs = executor.capture(self._pool)
            log.info("captured batch %d: %d ops in %d CUDA graphs", program.batch, len(program.ops), graphs)
        return executor

    def _saved(self) -> bool:
        """Whether there was something measured to keep and it is kept; says why where it cannot be."""
        try:
            return self.tactics.unsaved > 0 and self.tactics.save()
        except DfengineError as error:
            say_lost(str(error))
            return False

    def program_batch(self, count: int) -> int:
        """The batch size whose program runs `count` images, or as many of them as it takes."""
        if not self.buckets:
            return count
        return next((size for size in BUCKETS if size >= count), BUCKETS[-1])

    def twin(self, model: Model, batch: int) -> Program:
        """The program for `batch` images lowered anew, from another copy of the model: its packed weights are whole,
        where those of a bound program may be left only in the form of one backend."""
        of = self._lowering
        with self._plain():
            again = Lowering(model, of.dtype, of.device, of.backend, of.fusion, quantizations=of.quantizations)
            return again.program(batch, self.seed)

    def run(self, unit: np.ndarray | Tensor) -> Output:
        """Scores a batch of float32 (B, S, S, C) images in [0, 1] at model size."""
        images = torch.as_tensor(unit, dtype=torch.float32, device=self.device)
        parts = [self._run_part(part) for part in images.split(self.program_batch(len(images)))]
        return parts[0] if len(parts) == 1 else Output(*(torch.cat(of) for of in zip(*parts, strict=True)))

    def _run_part(self, images: Tensor) -> Output:
        count, size = len(images), self.program_batch(len(images))
        if count < size:
            images = torch.cat((images, images.new_zeros((size - count, *images.shape[1:]))))
        with self._plain():
            outputs = self.executor(size).run(images=images, threshold=self._threshold)
        whole = outputs["anomaly_map"], outputs["reconstruction"].mean(dim=0), outputs["pred_score"]
        return Output(*(tensor[:count] for tensor in whole))


def make_runner(
    model: Model,
    device: torch.device,
    precision: str,
    seed: int,
    tactics: str = "default",
    tuning_seconds: float | None = None,
    ranges: Ranges | None = None,
) -> ModuleRunner | ProgramRunner:
    """The runner that serves a detector: programs on a CPU with the compiled kernels, else the modules.

    On a GPU programs run once tactics were measured there, or where others than "default" are asked for, which measures
    them; before that the modules. A backend forced by DFENGINE_BACKEND, which is read here once, runs its programs or
    raises with the reason (CannotRunError, NotLoweredError); "reference" stands for the modules, of which the reference
    kernels are a slower copy. A precision of eight bits, which needs `ranges`, runs a program or raises.
    """
    forced = forced_backend(None)
    if forced not in (None, "reference"):
        return ProgramRunner(model, device, precision, seed, forced, ranges=ranges)
    tuned, eight_bits = tactics != "default", precision in FORMATS
    serves = native.available() if device.type == "cpu" else tuned or eight_bits or len(Tactics(device)) > 0
    if forced is None and serves:
        try:
            return ProgramRunner(model, device, precision, seed, None, tactics, tuning_seconds, ranges=ranges)
        except (NotLoweredError, CannotRunError):
            if tuned or eight_bits:
                raise
    if eight_bits:
        raise CannotRunError(f"{precision} runs in the fused kernels alone: {native.status()}")
    return ModuleRunner(model, device, precision, seed)
