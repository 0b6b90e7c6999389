# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled modules with CMake; pyproject.toml says the rest about the package."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# Kept between builds, so that an edit recompiles only what it touches. One for each Python and machine.
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-{sys.platform}-{platform.machine()}"
BUILD_TOOLS = "pip install -c constraints.txt setuptools cmake ninja pybind11 torch"


def check_prerequisites() -> None:
    """One sentence for what is missing, instead of CMake's page."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        sys.exit(
            "ffn-ops has a C++ part, but no compiler was found (install g++ or clang++, or name one in CXX)"
        )
    for package in ("cmake", "ninja", "pybind11", "torch"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            sys.exit(f"ffn-ops is built with {package}, which this Python does not have ({BUILD_TOOLS})")
        if package == "torch" and tuple(map(int, version.split(".")[:2])) < (2, 10):
            sys.exit(f"torch is {version}, but ffn-ops is built with torch 2.10 or later ({BUILD_TOOLS})")


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        check_prerequisites()
        import cmake
        import ninja

        run_cmake = Path(cmake.CMAKE_BIN_DIR, "cmake")
        configure = [run_cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))  # as other builders of wheels call it
        try:
            subprocess.run(configure, check=True)
            subprocess.run([run_cmake, "--build", BUILD], check=True)
        except subprocess.CalledProcessError:
            sys.exit(
                "ffn-ops could not be built: the first error above is the cause (a compiler must know C++17)"
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(BUILD / target.name), str(target))

    def run(self) -> None:
        super().run()  # copies the extensions into the source tree itself, when they are built in place
        # The emulated CANN, and the sources of its ATen operators, which are built where torch is.
        emulator = Path(ROOT if self.inplace else self.build_lib, "ffn_ops", "emulator")
        shutil.copytree(BUILD / "cann", emulator / "cann", dirs_exist_ok=True)
        for sources in ("aclnn", "emulator"):
            shutil.copytree(ROOT / "csrc" / sources, emulator / "csrc" / sources, dirs_exist_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        # The operator's library is not a Python module: torch loads it, and its name carries no Python ABI.
        if fullname.endswith("_op"):
            return str(Path(*fullname.split("."))) + ".so"
        return str(super().get_ext_filename(fullname))


setup(
    ext_modules=[Extension("ffn_ops._op", []), Extension("ffn_ops._native", [])],
    cmdclass={"build_ext": CMakeBuild},
)
