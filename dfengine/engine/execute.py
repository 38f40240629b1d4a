"""Runs a program: its buffers in one arena, its kernels chosen once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from dfengine import native
from dfengine.devices import processors
from dfengine.engine.arena import ALIGNMENT, Arena, plan
from dfengine.engine.program import Buffer, Constant, Op, Program, Value
from dfengine.engine.ranges import named_range, ranges_wanted
from dfengine.engine.tactics import Tactics, usable
from dfengine.errors import DfengineError
from dfengine.kernels import OPS
from dfengine.kernels.conv_weight import ConvWeight
from dfengine.kernels.triton_import import compile_ahead


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Aligned memory for an arena, uint8. Raises DfengineError where there is not enough."""
    # On a CPU torch has no error of its own for it; on a GPU another RuntimeError is another fault.
    errors = torch.OutOfMemoryError if device.type == "cuda" else (RuntimeError, MemoryError)
    try:
        block = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device=device)
    except errors:
        raise DfengineError(f"{device}: no {nbytes:,} bytes for the activations; use a smaller batch_size") from None
    return block[-block.data_ptr() % ALIGNMENT :]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)


class Executor:
    """A program bound to memory on a device.

    `run` reads inputs and gives new tensors; nothing that it returned is changed by a later call. tactics: measured
    choices of implementations; where they know nothing of an op, or are None, `backend` forces one, as in
    `dfengine.kernels.Op.choose`, on every op that has a kernel for its hardware (`Op.substitute`). arena, block: the
    plan, and memory from `allocate` that several executors may share, since nothing in it outlives a run. Not for two
    threads at once.
    """

    def __init__(
        self,
        program: Program,
        device: str | torch.device = "cpu",
        backend: str | None = None,
        arena: Arena | None = None,
        block: torch.Tensor | None = None,
        tactics: Tactics | None = None,
    ):
        self.program = program
        self.device = torch.device(device)
        self.arena = arena or plan(program)
        self._block = allocate(self.arena.nbytes, self.device) if block is None else block
        self._tensors = {buffer: self._tensor(buffer) for buffer in program.buffers}
        self._calls = [self._bound(op, backend, tactics) for op in program.ops]
        self._follow(self._grouped())
        self.captured = False
        """Whether it runs as CUDA graphs, which hold the addresses of its buffers."""
        self._inputs = {b.name: t for b, t in self._tensors.items() if b.role == "input"}
        self._outputs = {b.name: t for b, t in self._tensors.items() if b.role == "output"}
        self.backends = {op.name: chosen for op, (chosen, _) in zip(program.ops, self._calls, strict=True)}
        """The implementation of each op, with the configuration that a tactic names, by its name."""
        if ranges_wanted():
            self.annotate()

    def _tensor(self, buffer: Buffer) -> torch.Tensor:
        start = self.arena.offsets[buffer]
        return self._block[start : start + buffer.nbytes].view(buffer.dtype).view(buffer.shape)

    def _bound(self, op: Op, backend: str | None, tactics: Tactics | None) -> tuple[str, list[Callable[[], None]]]:
        """The implementation in words, and its call, or one call for each step where arguments are `PerStep`."""
        kernel = OPS[op.kernel]
        steps = [self.arguments(op, step) for step in range(op.steps)]
        tactic = tactics.find(op) if tactics else None
        if tactic and usable(op, tactic, steps[0], self.device.type):
            chosen, options, shown = tactic.backend, tactic.options, str(tactic)
        else:
            chosen, options = kernel.choose(*steps[0], backend=kernel.substitute(backend)), {}
            shown = chosen
        return shown, [kernel.implementations[chosen].bound(*arguments, **options) for arguments in steps]

    def arguments(self, op: Op, step: int = 0) -> list[Any]:
        """What the op's implementations are called with, in a step of its loop."""
        return [self._argument(argument) for argument in op.at(step)]

    def call(self, op: Op) -> Callable[[], None]:
        """What runs the op, in the first step of its loop."""
        return self._calls[self.program.ops.index(op)][1][0]

    def capture(self, pool: tuple[int, int] | None = None) -> int:
        """Replace runs of ops by CUDA graphs of them; returns how many graphs. Ops with arguments for each step stay
        outside, between the graphs of their loop. The device allocator is asked during the capture for the last time.

        pool: from `torch.cuda.graph_pool_handle`, for graphs of which no two ever run at once: what an op allocates
        there is not read once the op is done, so that in any order they may use the same memory.
        """
        self.compile_ahead()
        with torch.inference_mode():
            warm = torch.cuda.Stream(self.device)
            warm.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(warm):
                self.launch()  # libraries make their plans before the capture
            torch.cuda.current_stream(self.device).wait_stream(warm)
            rounds: list[list[Callable[[], None]]] = []
            graphs = 0
            for section in self.program.sections():
                units: list[list[Callable[[], None]]] = []
                ops = list(zip(self.program.ops, self._calls, strict=True))[section.first : section.last]
                for fixed, group in itertools.groupby(ops, key=lambda pair: len(pair[1][1]) == 1):
                    calls = [calls for _, (_, calls) in group]
                    if fixed:
                        units.append([self._graph([call for (call,) in calls], pool)])
                        graphs += 1
                    else:
                        units += calls
                rounds += [[unit[step % len(unit)] for unit in units] for step in range(section.steps)]
        self._follow([(False, [replay for calls in rounds for replay in calls])])
        self.captured = True
        return graphs

    @torch.inference_mode()
    def compile_ahead(self) -> None:
        """Compiles the Triton kernels of the program that are not compiled yet, on all processors: one after the other,
        as they are launched, they would take minutes."""
        compile_ahead([calls[0] for chosen, calls in self._calls if chosen.partition(" ")[0] == "triton"], processors())

    def _graph(self, calls: list[Callable[[], None]], pool: tuple[int, int] | None) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads copy meanwhile, on streams of torch's pool: the capture has one that is not of it.
        with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(self.device), capture_error_mode="thread_local"):
            for call in calls:
                call()
        return graph.replay

    def _arranged(self) -> list[list[Callable[[], None]]]:
        """The calls of each section, for each of its steps."""
        return [
            [calls[step % len(calls)] for _, calls in self._calls[section.first : section.last]]
            for section in self.program.sections()
            for step in range(section.steps)
        ]

    def _grouped(self) -> list[tuple[bool, list[Callable[[], None]]]]:
        """All calls in order, those of the extension's kernels (True) apart from others: torch's operations would
        share the processors with the threads that stand by for these kernels."""
        native_ops = [chosen.partition(" ")[0] == "cpu" for chosen, _ in self._calls]
        groups = itertools.groupby(self.steps(), key=lambda step: native_ops[step[0]])
        return [(of_extension, [call for _, call in group]) for of_extension, group in groups]

    def _follow(self, rounds: list[tuple[bool, list[Callable[[], None]]]]) -> None:
        """From now on these calls run, as `_grouped` gives them."""
        self._rounds = rounds
        self._joined = [(of_extension, _joined(calls)) for of_extension, calls in rounds]
        """The same, with neighbours among the extension's calls made one."""

    def _argument(self, argument: Any) -> torch.Tensor | ConvWeight | Any:
        if isinstance(argument, Value):
            return self.tensor(argument)
        return argument.content if isinstance(argument, Constant) else argument

    def tensor(self, value: Value) -> torch.Tensor:
        """What the arena holds of `value`: a view, which other buffers overwrite when its life is over."""
        return value.of(self._tensors[value.buffer])

    def steps(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """The index of each op in its turn, those of a loop in every step, and the function that runs it on what its
        buffers hold."""
        rounds = iter(self._arranged())
        for section in self.program.sections():
            for _ in range(section.steps):
                yield from zip(range(section.first, section.last), next(rounds), strict=True)

    def wrap(self, around: Callable[[Op, Callable[[], None]], Callable[[], None]]) -> None:
        """From now on `around(op, call)` runs for the call of each op; without CUDA graphs."""
        self._calls = [
            (chosen, [around(op, call) for call in calls])
            for op, (chosen, calls) in zip(self.program.ops, self._calls, strict=True)
        ]
        self._follow(self._grouped())
        self.captured = False

    def annotate(self) -> None:
        """From now on each op runs in an NVTX range "kernel op". Raises DfengineError where there is no NVTX."""
        self.wrap(lambda op, call: named_range(f"{op.kernel} {op.name}", call))

    @torch.inference_mode()
    def run(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """The outputs by name, for all inputs of the program by name. Raises ValueError for other shapes or dtypes."""
        if inputs.keys() != self._inputs.keys():
            raise ValueError(f"inputs: expected {', '.join(self._inputs)}; got {', '.join(inputs)}")
        for name, tensor in inputs.items():
            place = self._inputs[name]
            if tensor.shape != place.shape or tensor.dtype != place.dtype:
                wanted, got = (f"{tuple(t.shape)} {t.dtype}" for t in (place, tensor))
                raise ValueError(f"{name}: expected {wanted}, got {got}")
            place.copy_(tensor)
        self.launch()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}

    def launch(self, turn: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Run every op on the inputs that are in place. turn: called with each call in its place, and makes it."""
        for of_extension, calls in self._rounds if turn else self._joined:
            run = partial(_run, calls, turn)
            if of_extension:
                native.module.with_helpers(torch.get_num_threads(), run)
            else:
                run()


def _joined(calls: list[Callable[[], None]]) -> list[Callable[[], None]]:
    joined: list[Callable[[], None]] = []
    for bound, group in itertools.groupby(calls, key=lambda call: isinstance(call, native.Bound)):
        neighbours = list(group)
        joined += [native.Bound.joined(neighbours)] if bound else neighbours
    return joined


def _run(calls: list[Callable[[], None]], turn: Callable[[Callable[[], None]], None] | None) -> None:
    for call in calls:
        if turn is None:
            call()
        else:
            turn(call)
