"""Build of dfengine: kernels/ installs as dfengine.kernels, csrc/ as data of dfengine, and the optional extension.

dfengine._native is built by CMake. Where that fails (no compiler, no cmake, a compile error) the installation goes on
without it, warns, and leaves the reason in dfengine/_native_missing.txt for `dfengine info`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTE = "_native_missing.txt"


class BuildNative(build_ext):
    """Runs CMake for the one extension, dfengine._native."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        note = target.with_name(NOTE)
        note.unlink(missing_ok=True)
        try:
            build_native(target, Path(self.build_temp).resolve())
        except (OSError, ImportError, subprocess.CalledProcessError, RuntimeError) as error:
            reason = failure_reason(error)
            target.unlink(missing_ok=True)
            note.write_text(reason + "\n", encoding="utf-8")
            self.warn(f"dfengine._native is not built: {reason}; dfengine works without it, with torch in its place")

    def get_outputs(self) -> list[str]:
        """Only what was built: the extension may be absent."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the extension, or the note that it is missing, goes beside the package's sources."""
        for extension in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(extension.name)))
            package = Path(self.get_finalized_command("build_py").get_package_dir("dfengine"))
            for path, name in ((built, built.name), (built.with_name(NOTE), NOTE)):
                if path.exists():  # moved into place whole: another process may be importing it
                    os.replace(shutil.copy2(path, package / f"{name}.new"), package / name)
                else:
                    (package / name).unlink(missing_ok=True)


def build_native(target: Path, work: Path) -> None:
    """Configure and build in `work`, and put the module at `target`. Raises with the reason when any step fails."""
    if os.environ.get("DFENGINE_NATIVE") == "0":
        raise RuntimeError("switched off by DFENGINE_NATIVE=0")
    cmake = shutil.which("cmake")
    if cmake is None:
        raise RuntimeError("cmake was not found")
    import pybind11

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    configure = [
        cmake,
        f"-S{ROOT}",
        f"-B{work}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={work / 'out'}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELEASE={work / 'out'}",
    ]
    if shutil.which("ninja"):
        configure.append("-GNinja")
    build = [cmake, "--build", str(work), "--config", "Release", "--parallel"]
    try:
        run(configure)
        run(build)
    except subprocess.CalledProcessError as error:
        if os.environ.get("DFENGINE_CUDA_ARCHITECTURES") == "":
            raise
        # The CPU kernels matter more: an nvcc that does not suit the C++ compiler must not cost them.
        print(f"dfengine: building without the CUDA kernels: {failure_reason(error)}", file=sys.stderr)
        os.environ["DFENGINE_CUDA_ARCHITECTURES"] = ""
        shutil.rmtree(work)
        run(configure)
        run(build)
    built = [path for path in (work / "out").iterdir() if path.suffix in (".so", ".pyd", ".dylib")]
    if len(built) != 1:
        raise RuntimeError(f"the build left {len(built)} modules, not one")
    shutil.copy2(built[0], target)


def run(command: list[str]) -> None:
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    sys.stdout.write(result.stdout)
    if result.returncode:
        raise subprocess.CalledProcessError(result.returncode, command, output=result.stdout)


def failure_reason(error: Exception) -> str:
    """One line; for a failed command the first line of its output that names an error."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [line.strip() for line in error.output.splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"error|not found|no cmake_|could not", line, re.IGNORECASE)]
    if any("CMAKE_CXX_COMPILER" in line for line in lines) and not any(": error:" in line for line in lines):
        return "no working C++ compiler was found"
    return (named or lines or [f"{error.cmd[0]} exited with {error.returncode}"])[0]


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "dfengine" / "_version.py").read_text(encoding="utf-8")).group(1)


# Relative paths: setuptools refuses absolute ones.
packages = find_packages(include=["dfengine", "dfengine.*"])
packages += ["dfengine.kernels", *(f"dfengine.csrc{part}" for part in ("", ".bindings", ".common", ".cpu", ".cuda"))]

setup(
    version=version(),
    packages=packages,
    package_dir={"dfengine.kernels": "kernels", "dfengine.csrc": "csrc"},
    package_data={
        "dfengine": ["assets/*", "report/*.j2"],
        "dfengine.csrc": ["*.cpp", "*.h"],
        "dfengine.csrc.bindings": ["*.cpp", "*.h"],
        "dfengine.csrc.common": ["*.h"],
        "dfengine.csrc.cpu": ["*.cpp", "*.h"],
        "dfengine.csrc.cuda": ["*.cu", "*.h"],
    },
    include_package_data=False,
    ext_modules=[Extension("dfengine._native", sources=[])],
    cmdclass={"build_ext": BuildNative},
    zip_safe=False,
)
