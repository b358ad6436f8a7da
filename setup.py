"""Builds the native libraries with CMake and Ninja, and puts them into the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
# The platform of a wheel for others, such as manylinux_2_28_x86_64: `make wheel` sets it.
PLATFORM = os.environ.get("HQOD_WHEEL_PLATFORM", "")


class CMakeBuild(build_ext):
    """One CMake run for all libraries; CMakeLists.txt says which."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split("."))

    def copy_extensions_to_source(self) -> None:
        """An editable build writes into the source tree already."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "hqod_ops"
        build = ROOT / "build" / ("editable" if self.inplace else "wheel")
        if not self.inplace:
            shutil.rmtree(build, ignore_errors=True)  # a wheel is never made from stale objects
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "HQOD_OUTPUT": str(package),
            "HQOD_SANITIZE": os.environ.get("HQOD_SANITIZE", "OFF"),
            "HQOD_WERROR": os.environ.get("HQOD_WERROR", "OFF"),
            "HQOD_PORTABLE": "ON" if PLATFORM else "OFF",
            "HQOD_HOST": "OFF" if PLATFORM else "ON",  # the one part that is of a Python version
            "HQOD_CUDA": os.environ.get("HQOD_CUDA", "AUTO"),  # 1: fail without nvcc; 0: leave out
            "Python_EXECUTABLE": sys.executable,
        }
        commands = [
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
            + [f"-D{name}={value}" for name, value in options.items()],
            ["cmake", "--build", str(build)],
        ]
        build.mkdir(parents=True, exist_ok=True)
        for command in commands:
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                raise CompileError(
                    "hqod_ops: cmake is not installed: pip install cmake ninja"
                ) from None
            except subprocess.CalledProcessError:
                raise CompileError(
                    "hqod_ops: the native build failed; the reason stands above. It needs a C++20 "
                    "compiler (g++ >= 11 or clang >= 14), cmake, ninja, pybind11 and torch >= 2.10."
                ) from None


class Wheel(bdist_wheel):
    """A wheel for others is for every Python 3: its libraries know torch's stable ABI alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", PLATFORM) if PLATFORM else super().get_tag()


setup(
    ext_modules=[Extension("hqod_ops.lib", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
