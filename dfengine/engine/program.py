"""A program: a flat list of kernel calls over buffers (DESIGN section 2, "The engine").

An `Op` names a kernel of `dfengine.kernels.OPS` and gives its arguments by name, in the order of the kernel's `run`;
an argument is a `Value` (a buffer, or a slice of its channels), a `Constant` (a tensor or packed weight made when the
program was lowered) or plain data. Buffers have fixed shapes, so a program serves one batch size. A `Loop` repeats a
range of ops; what differs from step to step is a `PerStep` argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

ROLES = ("input", "output", "workspace")


@dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor that the executor places: contiguous, of `shape`, written anew in every run.

    role: "input" is filled by the caller before a run, "output" is read after it, "workspace" lives between ops.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str = "workspace"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"{self.name}: role {self.role!r} is none of {', '.join(ROLES)}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Value:
    """A buffer as an op sees it: `part` [begin, end) of the first axis and `channels` [begin, end) of the last, both
    whole by default, or all of it in another shape, `view`."""

    buffer: Buffer
    part: tuple[int, int] | None = None
    channels: tuple[int, int] | None = None
    view: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.buffer.shape)
        if self.part is not None:
            shape[0] = self.part[1] - self.part[0]
        if self.channels is not None:
            shape[-1] = self.channels[1] - self.channels[0]
        return tuple(shape) if self.view is None else self.view

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.buffer.dtype.itemsize

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This value in the buffer's tensor: a view of it."""
        if self.part is not None:
            tensor = tensor[self.part[0] : self.part[1]]
        if self.channels is not None:
            tensor = tensor[..., self.channels[0] : self.channels[1]]
        return tensor if self.view is None else tensor.view(self.view)

    def __str__(self) -> str:
        part = "" if self.part is None else f"[{self.part[0]}:{self.part[1]}]"
        channels = "" if self.channels is None else f"[..., {self.channels[0]}:{self.channels[1]}]"
        return self.buffer.name + part + channels


@dataclass(frozen=True, eq=False)
class Constant:
    """What lowering computed from the weights: a tensor, or an object that a kernel packed."""

    name: str
    content: Any
    nbytes: int = 0

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class PerStep:
    """An argument of an op in a loop: a constant or plain data for each step."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{_shown(self.values[0])}..{_shown(self.values[-1])}"


@dataclass(frozen=True)
class Loop:
    """Ops [first, last) of a program run `steps` times, in their order."""

    first: int
    last: int
    steps: int


@dataclass(frozen=True, eq=False)
class Op:
    """One kernel call. name: readable and unique in its program; writes: the names of the arguments that it writes.

    flops: of its matrix products, 2 for each multiply and add.
    """

    name: str
    kernel: str
    arguments: dict[str, Any]
    writes: tuple[str, ...]
    flops: int = 0

    def values(self, written: bool | None = None) -> Iterator[Value]:
        """The buffers it touches: all, only those it writes, or only those it reads."""
        for name, argument in self.arguments.items():
            if isinstance(argument, Value) and written in (None, name in self.writes):
                yield argument

    @property
    def moved(self) -> int:
        """Bytes that must be read and written at least."""
        constants = (a.nbytes for a in self.at(0) if isinstance(a, Constant))
        return sum(value.nbytes for value in self.values()) + sum(constants)

    @property
    def in_place(self) -> set[str]:
        """The arguments that it writes into a buffer that it reads."""
        read = {value.buffer for value in self.values(written=False)}
        return {n for n in self.writes if isinstance(self.arguments[n], Value) and self.arguments[n].buffer in read}

    @property
    def steps(self) -> int:
        """How many values its arguments go through: 1 where none is `PerStep`."""
        return max((len(a.values) for a in self.arguments.values() if isinstance(a, PerStep)), default=1)

    def at(self, step: int) -> list[Any]:
        """The arguments in order, as they are in this step of a loop."""
        return [a.values[step] if isinstance(a, PerStep) else a for a in self.arguments.values()]

    def __str__(self) -> str:
        reads = [
            f"{name}={_shown(argument)}"
            for name, argument in self.arguments.items()
            if name not in self.writes and argument is not None and argument != "none"
        ]
        results = [
            f"{self.arguments[name]}({'x'.join(map(str, self.arguments[name].shape))})"
            for name in self.writes
            if self.arguments[name] is not None
        ]
        return f"{', '.join(results)} = {self.kernel}({', '.join(reads)})"


def _shown(argument: Any) -> str:
    return f"{argument:.6g}" if isinstance(argument, float) else str(argument)


@dataclass(eq=False)
class Program:
    """Ops in the order in which they run, and the loops among them, which follow each other. `buffers` in the order of
    their first use."""

    ops: list[Op]
    batch: int
    dtype: torch.dtype
    loops: tuple[Loop, ...] = ()
    buffers: list[Buffer] = field(init=False)

    def __post_init__(self) -> None:
        found: dict[Buffer, None] = {}
        names: set[str] = set()
        for op in self.ops:
            if op.name in names:
                raise ValueError(f"two ops are called {op.name}")
            names.add(op.name)
            for value in op.values():
                found.setdefault(value.buffer)
        self.buffers = list(found)
        self._check_loops()
        self._check_order()

    def _check_loops(self) -> None:
        """An op with `PerStep` arguments is in a loop of as many steps."""
        repeats = self.repeats()
        for op, repeat in zip(self.ops, repeats, strict=True):
            if op.steps not in (1, repeat):
                raise ValueError(f"{op.name} has arguments for {op.steps} steps and runs {repeat} times")

    def sections(self) -> list[Loop]:
        """The program as loops one after the other, those of one step being what stands between its own."""
        found, at = [], 0
        for loop in self.loops:
            found += [Loop(at, loop.first, 1)] if at < loop.first else []
            found.append(loop)
            at = loop.last
        return found + ([Loop(at, len(self.ops), 1)] if at < len(self.ops) else [])

    def repeats(self) -> list[int]:
        """How often each op runs in one run of the program."""
        return [section.steps for section in self.sections() for _ in range(section.first, section.last)]

    def _check_order(self) -> None:
        """Every buffer that is read was written before, or is an input."""
        written = {buffer for buffer in self.buffers if buffer.role == "input"}
        for op in self.ops:
            for value in op.values(written=False):
                if value.buffer not in written:
                    raise ValueError(f"{op.name} reads {value.buffer.name}, which nothing wrote before")
            written.update(value.buffer for value in op.values(written=True))

    @property
    def flops(self) -> int:
        return sum(op.flops * repeat for op, repeat in zip(self.ops, self.repeats(), strict=True))

    @property
    def moved(self) -> int:
        return sum(op.moved * repeat for op, repeat in zip(self.ops, self.repeats(), strict=True))

    def lifetimes(self) -> dict[Buffer, tuple[int, int]]:
        """First and last op that touches each buffer; inputs live from the start, outputs to the end, and what a loop
        finds there as long as the loop runs."""
        spans: dict[Buffer, tuple[int, int]] = {}
        for index, op in enumerate(self.ops):
            for value in op.values():
                first, _ = spans.get(value.buffer, (index, index))
                spans[value.buffer] = first, index
        for buffer, (first, last) in spans.items():
            first = -1 if buffer.role == "input" else first  # before a loop that begins with the program
            for loop in self.loops:
                if first < loop.first <= last:
                    last = max(last, loop.last - 1)
            first = max(first, 0)
            spans[buffer] = first, len(self.ops) - 1 if buffer.role == "output" else last
        return spans

    def __str__(self) -> str:
        head = f"program: batch {self.batch}, {str(self.dtype).removeprefix('torch.')}, {len(self.ops)} ops, "
        head += f"{self.flops / 1e9:.2f} GFLOP, {self.moved / 1e6:.1f} MB moved"
        width = max((len(op.name) for op in self.ops), default=0)
        lines = [head]
        for section in self.sections():
            if section.steps > 1:
                lines.append(f"     {section.steps} times: ops {section.first} to {section.last - 1}")
            for i in range(section.first, section.last):
                lines.append(f"{i:4} {self.ops[i].name:{width}}  {self.ops[i]}")
        return "\n".join(lines)
