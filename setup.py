"""Drives CMake through ninja and gives the wheel its tag; everything else is in pyproject.toml.

FASTKD_BUILD=0    install without compiled kernels (plain PyTorch computes the losses)
FASTKD_TESTING=1  build the module that the tests use as well
"""

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
BUILD = os.environ.get("FASTKD_BUILD", "1") != "0"
TESTING = os.environ.get("FASTKD_TESTING", "0") == "1"


def find_torch():
    """The folder of the torch that the kernels will run with: only its headers and libraries are
    needed, so in an isolated build the one that is installed beside it serves."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    for place in places:
        folder = Path(place or ".") / "torch"
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
            if found and tuple(map(int, found.groups())) >= (2, 10):
                return folder
    sys.exit(
        "fastkd: no torch >= 2.10 is installed here, and the kernels are compiled against it. Run "
        "'pip install torch' first, or set FASTKD_BUILD=0 to install fastkd without compiled kernels."
    )


def find_compiler():
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        sys.exit(
            f"fastkd: no C++ compiler found ({', '.join(names)}). Install one (on Debian: apt-get install g++), "
            "or set FASTKD_BUILD=0 to install fastkd without compiled kernels."
        )


def find_tool(name):
    """cmake or ninja: from this environment, or from the path."""
    tool = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if not tool:
        sys.exit(
            f"fastkd: {name} not found. Run 'pip install {name}', or set FASTKD_BUILD=0 to install without kernels."
        )
    return tool


class CMakeBuild(build_ext):
    def run(self):
        if not BUILD:
            return
        torch = find_torch()
        find_compiler()
        package = ROOT / "fastkd" if self.inplace else Path(self.build_lib).resolve() / "fastkd"
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        options = [f"-DFASTKD_TORCH={torch}", f"-DFASTKD_OUTPUT={package / 'lib'}", f"-DFASTKD_TESTING={TESTING:d}"]
        if TESTING:
            import pybind11

            options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        subprocess.run(
            [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options], check=True
        )
        subprocess.run([cmake, "--build", folder], check=True)

    def get_outputs(self):
        return []

    def get_source_files(self):
        return []


class Wheel(bdist_wheel):
    def get_tag(self):
        """The libraries use no Python: one wheel for every Python on a platform."""
        return "py3", "none", super().get_tag()[2] if BUILD else "any"


setup(
    ext_modules=[Extension("fastkd.lib", sources=[])] if BUILD else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
