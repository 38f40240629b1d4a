"""Programs and the placing of their buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.engine.arena import ALIGNMENT, plan
from dfengine.engine.program import Buffer, Op, Program, Value


def chain(sizes: list[int], spans: list[tuple[int, int]], length: int) -> Program:
    """A program of `length` ops over buffers of `sizes` bytes, each written at the first and read at the last op."""
    buffers = [Value(Buffer(f"b{i}", (size,), torch.uint8)) for i, size in enumerate(sizes)]
    ops = []
    for step in range(length):
        writes = {f"w{i}": buffers[i] for i, (first, _) in enumerate(spans) if first == step}
        reads = {f"r{i}": buffers[i] for i, (first, last) in enumerate(spans) if first < step == last}
        ops.append(Op(f"op{step}", "none", {**reads, **writes}, tuple(writes)))
    return Program(ops, 1, torch.float32)


def assert_sound(program: Program) -> None:
    arena, spans = plan(program), program.lifetimes()
    placed = [(arena.offsets[b], arena.offsets[b] + b.nbytes, *spans[b]) for b in program.buffers]
    for i, (begin, end, first, last) in enumerate(placed):
        assert begin % ALIGNMENT == 0 and end <= arena.nbytes
        for other_begin, other_end, other_first, other_last in placed[:i]:
            apart = end <= other_begin or other_end <= begin
            assert apart or last < other_first or other_last < first
    assert arena.lower_bound <= arena.nbytes


def test_buffers_that_live_together_do_not_share_memory():
    rng = np.random.default_rng(0)
    for _ in range(30):
        count, length = int(rng.integers(1, 25)), int(rng.integers(2, 30))
        spans = [tuple(sorted(rng.integers(0, length, 2).tolist())) for _ in range(count)]
        program = chain(rng.integers(1, 5000, count).tolist(), spans, length)
        assert_sound(program)


def test_memory_is_used_again():
    program = chain([1000] * 10, [(i, i + 1) for i in range(10)], 11)
    arena = plan(program)
    assert arena.nbytes == arena.lower_bound == 2 * 1024


def test_inputs_and_outputs_live_to_the_ends():
    roles = {"in": "input", "out": "output", "mid": "workspace"}
    given, result, middle = (Value(Buffer(name, (4,), torch.float32, role)) for name, role in roles.items())
    ops = [
        Op("a", "none", dict(y=result), ("y",)),
        Op("b", "none", dict(y=middle), ("y",)),
        Op("c", "none", dict(x=given, z=middle), ()),
    ]
    program = Program(ops, 1, torch.float32)
    assert program.lifetimes() == {result.buffer: (0, 2), middle.buffer: (1, 2), given.buffer: (0, 2)}
    assert_sound(program)


def test_a_program_must_write_before_it_reads():
    missing = Value(Buffer("missing", (1,), torch.float32))
    with pytest.raises(ValueError, match="b reads missing"):
        Program([Op("b", "none", dict(x=missing), ())], 1, torch.float32)
    with pytest.raises(ValueError, match="two ops are called b"):
        Program([Op("b", "none", dict(x=missing), ("x",))] * 2, 1, torch.float32)


def test_values_are_views_of_their_buffer():
    buffer = Buffer("b", (4, 2, 2, 6), torch.float32)
    tensor = torch.arange(96.0).view(buffer.shape)
    part = Value(buffer, part=(1, 3), channels=(2, 5))
    assert part.shape == (2, 2, 2, 3) and part.nbytes == 96 and str(part) == "b[1:3][..., 2:5]"
    assert torch.equal(part.of(tensor), tensor[1:3, ..., 2:5])
    viewed = Value(buffer, part=(0, 2), view=(1, 2, 2, 2, 6))
    assert viewed.of(tensor).shape == viewed.shape and viewed.of(tensor).data_ptr() == tensor.data_ptr()
