"""Compile every Triton kernel and .cu file for sm_89 and sm_90, without a GPU; report registers and spills.

    python bench/kernels_check.py [--json OUT] [--quick]

Prints a table; exits with 1 when a kernel spills or does not compile. Triton compiles in every shipped configuration
and type (`compilations` of bench/kernels/<op>.py, whose options may name the arguments that are "divisible" by 16, and
the "ones", integers that are 1, which a launch makes constants); CUDA files compile by nvcc and by NVRTC, where these
are found.
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

from dfengine import native  # noqa: E402
from dfengine.kernels import cuda_launch  # noqa: E402

OPS = sorted(path.stem for path in (Path(__file__).parent / "kernels").glob("[!_]*.py"))
ARCHITECTURES = (89, 90)
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


def check_triton(op: str, architecture: int, quick: bool) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rows, seen = [], set()
    for label, kernel, signature, constants, options in importlib.import_module(f"bench.kernels.{op}").compilations():
        ones, divisible = options.pop("ones", ()), options.pop("divisible", ())
        if quick and (kernel, ones) in seen:
            continue
        seen.add((kernel, ones))
        signature, constants = signature | dict.fromkeys(ones, "constexpr"), constants | dict.fromkeys(ones, 1)
        known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
        source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=known)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        (used,) = resources(compiled.asm["cubin"], triton_tool("cuobjdump")).values()
        used["shared"] = compiled.metadata.shared
        rows.append({"op": op, "backend": "triton", "kernel": label, "architecture": architecture, **used})
    return rows


def check_cuda(source: Path, architecture: int, nvcc: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        subprocess.run(
            [nvcc, f"-arch=sm_{architecture}", "-cubin", "-std=c++17", "-O3", "-o", cubin, source], check=True
        )
        used = resources(cubin.read_bytes(), triton_tool("cuobjdump"))
    head = {"op": source.stem, "backend": "cuda", "architecture": architecture}
    return [{**head, "kernel": name, **row} for name, row in used.items()]


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


def check_nvrtc(nvrtc: ctypes.CDLL, source: Path, architecture: int) -> str:
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
    parser.add_argument("--quick", action="store_true", help="only the first configuration of each Triton kernel")
    arguments = parser.parse_args()
    rows = []
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc was not found: registers and spills of the .cu files are not checked")
    nvrtc = find_nvrtc()
    if nvrtc is None:
        print("NVRTC was not found (pip install nvidia-cuda-nvrtc): the .cu files are not compiled with it")
    sources = sorted((native.source_folder() / "cuda").glob("*.cu"))
    refused = []
    for architecture in ARCHITECTURES:
        for op in OPS:
            rows += check_triton(op, architecture, arguments.quick)
        for source in sources if nvcc else []:
            rows += check_cuda(source, architecture, nvcc)
        for source in sources if nvrtc else []:
            message = check_nvrtc(nvrtc, source, architecture)
            refused += [f"NVRTC refuses {source.name} for sm_{architecture}: {message}"] if message else []
    print(f"{'op':14} {'backend':8} {'kernel':44} {'sm':>3} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}")
    for row in rows:
        print(
            f"{row['op']:14} {row['backend']:8} {row['kernel']:44} {row['architecture']:3} {row['registers']:9} "
            f"{row['shared']:7} {row['stack']:6} {row['local']:6}"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    spilled = [row for row in rows if row["local"] or row["stack"]]
    for row in spilled:
        print(f"spills: {row['op']} {row['kernel']} sm_{row['architecture']}", file=sys.stderr)
    for message in refused:
        print(message, file=sys.stderr)
    if nvrtc and not refused:
        print(f"NVRTC compiles {', '.join(source.name for source in sources)}")
    return 1 if spilled or refused else 0


if __name__ == "__main__":
    sys.exit(main())
