"""bench/sass.py, by which bench/kernels_check.py reads machine code, on a loop with a load before it."""

from __future__ import annotations

from bench import sass

CODE = """
IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] | 7 0
LDG.E.128 R8, [R2.64] | 5 0
@P0 BRA 0x50 | 7 {skipped}
IADD3 R2, R8, 0x1, RZ | 7 32
@!PT LDS RZ, [RZ] | 7 0
LDSM.16.M88.4 R4, [R3] | {loop} 0
@P1 BRA 0x80 | 7 0
LDGSTS.E.BYPASS.128 [R9], [R2.64] | 7 0
HMMA.16816.F32 R20, R4, R6, R20 | 7 {mask}
@P2 BRA 0x50 | 7 0
EXIT | 7 0
"""


def code(skipped: int = 0, loop: int = 5) -> list[sass.Instruction]:
    """skipped: the scoreboards that the branch around the load's first use waits for; loop: that of LDSM."""
    text = ""
    for number, line in enumerate(CODE.format(skipped=skipped, loop=loop, mask=1 << loop).strip().splitlines()):
        what, control = line.split(" | ")
        writes, waits = map(int, control.split())
        word = (writes << 5 | waits << 11) << 41
        text += f"        /*{16 * number:04x}*/  {what} ;  /* 0x{number:016x} */\n        /* 0x{word:016x} */\n"
    return sass.instructions(text)


def test_a_load_that_one_path_does_not_wait_for_is_under_way():
    assert sass.loads_under_way(code(), 0x50) == {5}
    assert sass.loads_under_way(code(skipped=32), 0x50) == set()
    assert sass.loads_under_way(code(), 0xA0) == set(), "the loop waits for the same scoreboard"
    assert sass.loads_under_way(code(loop=1), 0xA0) == {5}


def test_the_loop_of_an_opcode_and_what_a_turn_can_skip():
    loop = sass.loop_of(code(), "HMMA")
    assert [line.address for line in loop] == [0x50, 0x60, 0x70, 0x80, 0x90]
    assert [line.address for line in sass.shortest_turn(loop)] == [0x50, 0x60, 0x80, 0x90]
    assert sass.mix(loop) == {"LDSM": 1, "BRA": 2, "LDGSTS": 1, "HMMA": 1}
    assert sass.loop_of(code(), "HGMMA") == []
    assert len(code()) == 10, "less the instruction that does nothing"


def test_loads_that_are_under_way_together():
    load = code()[1]
    use = code()[3]
    assert sass.loads_together([load, load, use, load], "LDG.E.128") == 2
    assert sass.loads_together([load, code()[4], load, load], "LDG.E.128") == 3
    assert sass.loads_together([load, load], "LDG.E.64") == 0
