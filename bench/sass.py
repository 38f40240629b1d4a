"""Reading what `cuobjdump -sass` prints: instructions with their scoreboards, loops, and loads that are under way.

An instruction's control word (bits 41 to 61 of its second half, sm_70 and later) names the scoreboard that its result
releases, and those that it waits for. A load from global memory whose scoreboard is not waited for before a loop that
uses the same one keeps the loop waiting for memory.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/"
)
NO_SCOREBOARD = 7


class Instruction(NamedTuple):
    """address: in bytes from the kernel's start; predicate: "@P0", "@!UP1" or ""; writes: the scoreboard that its
    result releases, 7 for none; waits: a bit for each scoreboard that must be free before it."""

    address: int
    predicate: str
    opcode: str
    operands: str
    writes: int
    waits: int

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.split(".")[0] in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


def instructions(text: str) -> list[Instruction]:
    """Of one kernel, in order, less those that never do anything (@!PT)."""
    found = []
    for address, predicate, opcode, operands, word in LINE.findall(text):
        if predicate.strip() == "@!PT":
            continue
        control = int(word, 16) >> 41
        boards = control >> 5 & 7, control >> 11 & 63
        found.append(Instruction(int(address, 16), predicate.strip(), opcode, operands.strip(), *boards))
    return found


def mix(lines: list[Instruction]) -> dict[str, int]:
    """Instructions by opcode, without its suffixes."""
    return dict(Counter(line.opcode.split(".")[0] for line in lines))


def loops(lines: list[Instruction]) -> list[list[Instruction]]:
    """What lies between the target of each branch backwards and the branch."""
    ends = [line for line in lines if line.target is not None and line.target < line.address]
    return [[line for line in lines if end.target <= line.address <= end.address] for end in ends]


def loop_of(lines: list[Instruction], opcode: str) -> list[Instruction]:
    """The smallest loop with the opcode; empty where there is none."""
    inside = [loop for loop in loops(lines) if any(line.opcode.startswith(opcode) for line in loop)]
    return min(inside, key=len, default=[])


def shortest_turn(loop: list[Instruction]) -> list[Instruction]:
    """One turn of a loop that skips whatever a branch can skip."""
    taken, skip_to = [], 0
    for line in loop:
        if line.address < skip_to:
            continue
        taken.append(line)
        if line.target is not None and line.address < line.target <= loop[-1].address:
            skip_to = line.target
    return taken


def loads_together(lines: list[Instruction], opcode: str) -> int:
    """The most loads of a kind that straight code starts before it waits for one of them."""
    most, count, boards = 0, 0, 0
    for line in lines:
        if line.waits & boards or line.target is not None:
            count, boards = 0, 0
        if line.opcode.startswith(opcode):
            count, boards = count + 1, boards | 1 << line.writes
            most = max(most, count)
    return most


def loads_under_way(lines: list[Instruction], address: int) -> set[int]:
    """Scoreboards of loads from global memory (LDG) that may not have been waited for when control reaches `address`,
    over every path there is."""
    following = {line.address: after.address for line, after in zip(lines, lines[1:], strict=False)}
    known = {line.address: line for line in lines}
    starts = sorted(known)
    before: dict[int, frozenset[int]] = {starts[0]: frozenset()}
    work = [starts[0]]
    while work:
        line = known[work.pop()]
        state = {board for board in before[line.address] if not line.waits >> board & 1}
        if line.opcode.startswith("LDG.") and line.writes != NO_SCOREBOARD:
            state.add(line.writes)
        name = line.opcode.split(".")[0]
        ends = name in ("EXIT", "RET") or (name == "BRA" and "P" not in line.operands)
        targets = [] if ends and not line.predicate else [following.get(line.address)]
        if line.target is not None:  # the disassembler prints addresses of instructions that were left out, too
            targets.append(next((start for start in starts if start >= line.target), None))
        for target in targets:
            if target is None:
                continue
            joined = before.get(target, frozenset()) | state
            if target not in before or joined != before[target]:
                before[target] = frozenset(joined)
                work.append(target)
    return set(before.get(address, frozenset()))
