"""A digest of the C++ and CUDA sources and their build file, by which an extension that was built from others is known.

CMake runs this file as a script; it imports nothing of the package.
"""

from __future__ import annotations

import hashlib
import os
import sys


def digest(folder: str | os.PathLike, cuda: bool) -> str:
    """Of the names and bytes of what an extension is compiled from, in `folder` (`csrc`), and of the CMakeLists.txt
    beside that, which has the flags: hexadecimal.

    cuda: with the CUDA kernels in it. Raises OSError where one of them is missing or cannot be read.
    """
    names = ["../CMakeLists.txt"]
    for part in ("", "bindings", "common", "cpu", *(["cuda"] if cuda else [])):
        for name in sorted(os.listdir(os.path.join(folder, part))):
            if name.endswith((".cpp", ".cu", ".h")) and not name.startswith("."):  # an editor's locks and copies
                names.append(f"{part}/{name}" if part else name)
    found = hashlib.sha256()
    for name in names:
        with open(os.path.join(folder, name), "rb", buffering=0) as file:
            content = file.read()
        found.update(f"{name} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


if __name__ == "__main__":  # FOLDER HEADER [cuda]
    with open(sys.argv[2], "w", encoding="utf-8") as header:
        header.write(f'#define DFE_SOURCES "{digest(sys.argv[1], "cuda" in sys.argv[3:])}"\n')
