"""Compile every Triton kernel and .cu file for sm_89 and sm_90, without a GPU; report registers and spills.

    python bench/kernels_check.py [--json OUT] [--quick]

Prints a table; exits with 1 when a kernel spills. Triton compiles in every shipped configuration and type
(`compilations` of bench/kernels/<op>.py, whose options may name the arguments that are "divisible" by 16); CUDA files
only where nvcc is found.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
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
from dfengine.kernels import OPS  # noqa: E402

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

    rows = []
    compilations = importlib.import_module(f"bench.kernels.{op}").compilations()
    for label, kernel, signature, constants, options in itertools.islice(compilations, 1 if quick else None):
        known = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in options.get("divisible", ())}
        options = {name: value for name, value in options.items() if name != "divisible"}
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="only the first configuration of each Triton kernel")
    arguments = parser.parse_args()
    rows = []
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("nvcc was not found: the .cu files are not checked")
    for architecture in ARCHITECTURES:
        for op in OPS:
            rows += check_triton(op, architecture, arguments.quick)
        for source in sorted((native.source_folder() / "cuda").glob("*.cu")) if nvcc else []:
            rows += check_cuda(source, architecture, nvcc)
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
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
