"""Places the buffers of a program in one block of memory by their lifetimes."""

from __future__ import annotations

from dataclasses import dataclass

from dfengine.engine.program import Buffer, Program

ALIGNMENT = 256  # bytes; a multiple of every vector, cache line and memory transaction


@dataclass(frozen=True)
class Arena:
    """offsets: bytes from the start of the block; nbytes: its size; lower_bound: the largest sum of the sizes of
    buffers that live at the same time, below which no plan can go."""

    offsets: dict[Buffer, int]
    nbytes: int
    lower_bound: int


def plan(program: Program) -> Arena:
    """Place every buffer of `program`.

    Largest first, each at the lowest offset that is free during its whole life; of several orders (by size, by size
    times lifetime, by first use) the one that needs the least memory.
    """
    spans = program.lifetimes()
    sizes = {buffer: _aligned(buffer.nbytes) for buffer in spans}

    def length(buffer: Buffer) -> int:
        return spans[buffer][1] - spans[buffer][0] + 1

    orders = [
        sorted(spans, key=lambda b: -sizes[b]),
        sorted(spans, key=lambda b: -sizes[b] * length(b)),
        sorted(spans, key=lambda b: (-length(b), -sizes[b])),
        sorted(spans, key=lambda b: (spans[b][0], -sizes[b])),
    ]
    plans = [_placed(order, spans, sizes) for order in orders]
    offsets = min(plans, key=lambda offsets: _end(offsets, sizes))
    live = [sum(sizes[b] for b, (first, last) in spans.items() if first <= i <= last) for i in range(len(program.ops))]
    return Arena(offsets, _end(offsets, sizes), max(live, default=0))


def _placed(order: list[Buffer], spans: dict, sizes: dict) -> dict[Buffer, int]:
    offsets: dict[Buffer, int] = {}
    for buffer in order:
        first, last = spans[buffer]
        neighbours = sorted(
            (offset, offset + sizes[other])
            for other, offset in offsets.items()
            if spans[other][0] <= last and first <= spans[other][1]
        )
        at = 0
        for begin, end in neighbours:
            if at + sizes[buffer] <= begin:
                break
            at = max(at, end)
        offsets[buffer] = at
    return offsets


def _end(offsets: dict[Buffer, int], sizes: dict[Buffer, int]) -> int:
    return max((offset + sizes[buffer] for buffer, offset in offsets.items()), default=0)


def _aligned(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
