"""Compile every Triton kernel (for sm_89 and sm_90) and .cu file (for sm_80 and sm_86 too, or for the one architecture
whose instructions it has), without a GPU; report registers and spills.

    python bench/kernels_check.py [--json OUT] [--quick] [--only OP ...] [--backend triton|cuda]

Prints a table; exits with 1 when a kernel spills or does not compile, or when bench/kernels/<op>.py finds fault with
its machine code (`read_sass`). Where that file gives `cuda_launches` (threads and dynamic shared memory of a block),
the thread blocks that share a multiprocessor are printed.

Triton compiles in every shipped configuration and type (`compilations` of bench/kernels/<op>.py, whose options may name
the arguments that are "divisible" by 16); CUDA files compile by nvcc and by NVRTC, where these are found.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import sass  # noqa: E402
from dfengine import native  # noqa: E402
from dfengine.kernels import cuda_launch  # noqa: E402

OPS = sorted(path.stem for path in (Path(__file__).parent / "kernels").glob("[!_]*.py"))
ARCHITECTURES = {"triton": (89, 90), "cuda": (80, 86, 89, 90)}
"""For the files of cuda_launch.ARCHITECTURES there is but the one that stands there."""
ONES = "sizes 1,"
FIELDS = ("registers", "shared", "stack", "local")


def resources(cubin: bytes, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Kernel name -> registers a thread, shared bytes, stack bytes, local (spill) bytes, read from a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [cuobjdump, "--dump-resource-usage", path]
        text = subprocess.run(command, text=True, check=True, capture_output=True).stdout
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        name: dict(zip(FIELDS, (int(registers), int(shared), int(stack), int(local)), strict=True))
        for name, registers, stack, shared, local in re.findall(pattern, text)
    }


def triton_tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def with_ones(module):
    """The compilations of an op, and the first of each kernel again with every number that it may be given as 1: that
    is a constant to the launcher's compiler, on which tensor methods fail."""
    seen = set()
    for label, kernel, signature, constants, options in module.compilations():
        yield label, kernel, signature, constants, options
        if kernel in seen:
            continue
        seen.add(kernel)
        kept = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        ones = {name: 1 for name, kind in signature.items() if kind == "i32" and name not in kept}
        divisible = [name for name in options.get("divisible", ()) if name not in ones]
        types = {name: "constexpr" if name in ones else kind for name, kind in signature.items()}
        yield f"{ONES} {label}", kernel, types, constants | ones, options | {"divisible": divisible}


def check_triton(op: str, architecture: int, quick: bool) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows, seen = [], set()
    for label, kernel, signature, constants, options in with_ones(importlib.import_module(f"bench.kernels.{op}")):
        if quick and (kernel, label.startswith(ONES)) in seen:
            continue
        seen.add((kernel, label.startswith(ONES)))
        known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in options.get("divisible", ())}
        options = {name: value for name, value in options.items() if name != "divisible"}
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=known)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        (used,) = resources(compiled.asm["cubin"], triton_tool("cuobjdump")).values()
        used["shared"] = compiled.metadata.shared
        rows.append({"op": op, "backend": "triton", "kernel": label, "architecture": architecture, **used})
    return rows


MULTIPROCESSOR = {80: (164, 2048, 32), 86: (100, 1536, 16), 89: (100, 1536, 24), 90: (228, 2048, 32)}
"""KiB of shared memory, threads and thread blocks that fit, by architecture; each has 65536 registers."""


def occupancy(registers: int, threads: int, shared: int, architecture: int) -> int:
    """Thread blocks that share a multiprocessor. Registers come by 256 to a warp, and 1 KiB of shared memory to a block
    is the system's (CUDA C++ programming guide, compute capabilities)."""
    kibibytes, most_threads, most_blocks = MULTIPROCESSOR[architecture]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // (threads // 32)
    return min(by_registers, kibibytes * 1024 // (shared + 1024), most_threads // threads, most_blocks)


def disassembled(cubin: Path) -> dict[str, str]:
    """Kernel name -> SASS."""
    text = subprocess.run([triton_tool("cuobjdump"), "-sass", cubin], text=True, check=True, capture_output=True).stdout
    parts = re.split(r"Function : (\S+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def architectures_of(source: Path) -> tuple[int | str, ...]:
    only = cuda_launch.ARCHITECTURES.get(source.stem)
    return (only.removeprefix("sm_"),) if only else ARCHITECTURES["cuda"]


def check_cuda(source: Path, architecture: int | str, nvcc: str) -> list[dict]:
    name = f"bench.kernels.{source.stem.removesuffix('_wgmma')}"
    module = importlib.import_module(name) if importlib.util.find_spec(name) else None
    read = getattr(module, "read_sass", None)
    launches = module.cuda_launches() if hasattr(module, "cuda_launches") else {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        subprocess.run(
            [nvcc, f"-arch=sm_{architecture}", "-cubin", "-std=c++17", "-O3", "-o", cubin, source], check=True
        )
        used = resources(cubin.read_bytes(), triton_tool("cuobjdump"))
        text = disassembled(cubin) if read else {}
    rows = []
    for kernel, row in used.items():
        rows.append({"op": source.stem, "backend": "cuda", "architecture": architecture, "kernel": kernel, **row})
        if kernel in launches:
            threads, shared = launches[kernel]
            number = int(str(architecture).rstrip("a"))
            blocks = occupancy(row["registers"], threads, row["shared"] + shared, number)
            rows[-1] |= {"shared": shared, "threads": threads, "blocks": blocks}
        if read:
            rows[-1] |= read(kernel, sass.instructions(text[kernel]))
    return rows


def find_nvrtc() -> ctypes.CDLL | None:
    """NVRTC of the package nvidia-cuda-nvrtc, or of the system."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in package.submodule_search_locations] if package else []
    for name in [*(path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))), "libnvrtc.so"]:
        try:
            return ctypes.CDLL(str(name))
        except OSError:
            continue
    return None


def check_nvrtc(nvrtc: ctypes.CDLL, source: Path, architecture: int | str) -> str:
    """Compile a .cu file as kernels/cuda_launch.py has cupy do; the compiler's messages where that fails, else ""."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = source.read_text(encoding="utf-8").encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None)
    options = [*cuda_launch.compile_options(), f"-arch=sm_{architecture}"]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() or f"error {failed}" if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    quick = "only the first configuration of each Triton kernel, and NVRTC for one architecture"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", nargs="*", metavar="OP", help="ops and stems of csrc/cuda; all by default")
    parser.add_argument("--backend", choices=("triton", "cuda"), help="both by default")
    arguments = parser.parse_args()
    rows = []
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc was not found: registers and spills of the .cu files are not checked")
    nvrtc = find_nvrtc()
    if nvrtc is None:
        print("NVRTC was not found (pip install nvidia-cuda-nvrtc): the .cu files are not compiled with it")
    sources = sorted((native.source_folder() / "cuda").glob("*.cu")) if arguments.backend != "triton" else []
    sources = [source for source in sources if not arguments.only or source.stem in arguments.only]
    ops = [op for op in OPS if not arguments.only or op in arguments.only] if arguments.backend != "cuda" else []
    refused = []
    plain = {*ARCHITECTURES["triton"], *ARCHITECTURES["cuda"]}
    for architecture in [*sorted(plain), *{only for source in sources for only in architectures_of(source)} - plain]:
        for op in ops if architecture in ARCHITECTURES["triton"] else []:
            rows += check_triton(op, architecture, arguments.quick)
        mine = [source for source in sources if architecture in architectures_of(source)]
        for source in mine if nvcc else []:
            rows += check_cuda(source, architecture, nvcc)
        for source in mine if nvrtc else []:
            if arguments.quick and architecture != architectures_of(source)[0]:
                continue
            message = check_nvrtc(nvrtc, source, architecture)
            refused += [f"NVRTC refuses {source.name} for sm_{architecture}: {message}"] if message else []
    print(f"{'op':14} {'backend':8} {'kernel':44} {'sm':>3} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}")
    for row in rows:
        blocks = f"  {row['blocks']} blocks of {row['threads']} threads" if "blocks" in row else ""
        print(
            f"{row['op']:14} {row['backend']:8} {row['kernel']:44} {row['architecture']:>3} {row['registers']:9} "
            f"{row['shared']:7} {row['stack']:6} {row['local']:6}{blocks}"
        )
    for row in (row for row in rows if "loop" in row):
        counts = sorted(row["loop"].items(), key=lambda item: -item[1])
        mix = ", ".join(f"{count} {opcode}" for opcode, count in counts)
        print(f"loop of {row['kernel']} sm_{row['architecture']}: {row['turn']} a turn, of {mix}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilled = [row for row in rows if row["local"] or row["stack"]]
    for row in spilled:
        print(f"spills: {row['op']} {row['kernel']} sm_{row['architecture']}", file=sys.stderr)
    wrong = [row for row in rows if row.get("wrong")]
    for row in wrong:
        print(f"{row['kernel']} sm_{row['architecture']}: {', '.join(row['wrong'])}", file=sys.stderr)
    for message in refused:
        print(message, file=sys.stderr)
    if nvrtc and sources and not refused:
        print(f"NVRTC compiles {', '.join(source.name for source in sources)}")
    return 1 if spilled or wrong or refused else 0


if __name__ == "__main__":
    sys.exit(main())
