"""What bench/kernels_check.py reads in the machine code of conv2d in CUDA C++."""

from __future__ import annotations

from bench import sass
from dfengine.kernels import conv2d_cuda


def cuda_launches() -> dict[str, tuple[int, int]]:
    """Threads and bytes of dynamic shared memory of a block for each kernel of csrc/cuda/conv2d.cu and
    conv2d_wgmma.cu: 3x3, dilation 1."""
    launches = {}
    for capability, tiles in (((8, 9), conv2d_cuda.TILES), ((9, 0), conv2d_cuda.WGMMA_TILES)):
        for place in conv2d_cuda.placements((256, 256), 1, capability, tiles=tiles):
            shared = place.tile.shared_bytes(place.halo_pixels(1))
            for kind in (*conv2d_cuda.NAMES.values(), "half_sums"):
                launches[f"conv2d_{kind}_{place.tile.name}"] = (place.tile.threads, shared)
    return launches


CUDA_LOOP = {"LDSM", "HMMA", "LDGSTS", "LDS", "BAR"}
"""What the innermost loop with products of every kernel of csrc/cuda/conv2d.cu is made of."""
MOST_OF_A_TURN = {
    "128x128": 88, "128x128w4": 106, "256x128": 118, "128x64": 56, "128x64x16": 36, "64x64": 58, "128x16": 34,
}  # fmt: skip
"""Instructions of one turn of that loop, of one tap, where no chunk begins; by tile."""
MOST_OF_A_TURN_IN_HALVES = 122
"""The same where products are summed in float16."""
MOST_OF_GELU = 150
"""Instructions for 8 values: 104 FFMA, 16 FMNMX, 12 to unpack and to pack, and what fetches and puts them back."""


WGMMA_LOOP = {"LDSM", "HGMMA", "WARPGROUP", "LDGSTS", "FENCE", "BAR"}
"""The same of csrc/cuda/conv2d_wgmma.cu."""
MOST_OF_A_WGMMA_TURN = {
    "wgmma_128x256": 57, "wgmma_256x128": 66, "wgmma_128x128": 66, "wgmma_128x64": 78, "wgmma_64x128": 55,
}  # fmt: skip


def read_sass(kernel: str, lines: list[sass.Instruction]) -> dict:
    """What bench/kernels_check.py adds to the row of a kernel of csrc/cuda/conv2d.cu or conv2d_wgmma.cu.

    loop: instructions by opcode of the loop of products (with wgmma, whose loop holds the activation of the input, of
    one turn of it); turn: instructions of a turn; gelu: of the loop that activates 8 values; wrong: what is not as it
    should be.
    """
    warpgroups = "_wgmma_" in kernel
    loop = sass.loop_of(lines, "HGMMA" if warpgroups else "HMMA")
    turn, counts = sass.shortest_turn(loop), sass.mix(loop)
    activation = (
        len(each)
        for each, mix in ((each, sass.mix(each)) for each in sass.loops(lines))
        if mix.get("FMNMX") == 16 and mix["FFMA"] >= 104 and not {"HMMA", "HGMMA", "LDG"} & set(mix)
    )
    gelu = min(activation, default=0)
    wrong = [f"the loop lacks {name}" for name in sorted((WGMMA_LOOP if warpgroups else CUDA_LOOP) - set(counts))]
    wrong += [f"the loop has {name}" for name in ("LDL", "STL") if name in counts]
    wrong += (wrong_of_wgmma if warpgroups else wrong_of_mma)(kernel, lines, loop, turn)
    together = sass.loads_together(lines, "LDG.E.128")
    wrong += [f"{together} of the four loads of a 2 x 2 mean are under way together"] if together < 4 else []
    wrong += [f"GELU takes {gelu} instructions"] if not 0 < gelu <= MOST_OF_GELU else []
    return {"loop": sass.mix(turn) if warpgroups else counts, "turn": len(turn), "gelu": gelu, "wrong": wrong}


def wrong_of_mma(kernel: str, lines, loop, turn) -> list[str]:
    """Nothing from global memory may be under way when the products begin: the scoreboards of such loads are those of
    the loop's own reads, which would wait for them."""
    kind, tile = kernel.removeprefix("conv2d_").rsplit("_", 1)
    most = MOST_OF_A_TURN_IN_HALVES if kind == "half_sums" else MOST_OF_A_TURN[tile]
    wrong = ["the loop has LDG"] if "LDG" in sass.mix(loop) else []
    wrong += [f"a load on scoreboard {board} is under way" for board in sass.loads_under_way(lines, loop[0].address)]
    return wrong + ([f"{len(turn)} instructions a turn"] if len(turn) > most else [])


def wrong_of_wgmma(kernel: str, lines, loop, turn) -> list[str]:
    """The products of one step must stay under way while the next is loaded, so that no wait in the loop is for all of
    them: a compiler that finds registers in its way waits after each. What the loop reads from global memory (runs that
    are not whole, and means) is of a chunk to come, not of every turn."""
    tile = next(tile for tile in conv2d_cuda.WGMMA_TILES if kernel.endswith(tile.name))
    waits = [line.operands for line in loop if line.opcode.startswith("WARPGROUP.DEPBAR")]
    steps, counts = tile.channels // 16, sass.mix(turn)
    products = steps * (tile.pixels // 16 // tile.warps[0])
    wrong = [f"a wait for {operands}" for operands in waits if operands.split()[-1] != "0x1"]
    wrong += [f"{len(waits)} waits for {steps} steps"] if len(waits) != steps else []
    wrong += [f"{counts.get(name, 0)} {name}" for name in ("HGMMA", "LDSM") if counts.get(name, 0) != products]
    shape = f"HGMMA.64x{tile.outputs}x16.F32"
    shapes = {line.opcode.removesuffix(".BF16") for line in loop if line.opcode.startswith("HGMMA")}
    wrong += [f"products {', '.join(sorted(shapes))}"] if shapes != {shape} else []
    wrong += ["a turn has LDG"] if "LDG" in counts else []
    most = MOST_OF_A_WGMMA_TURN[tile.name]
    return wrong + ([f"{len(turn)} instructions a turn"] if len(turn) > most else [])
