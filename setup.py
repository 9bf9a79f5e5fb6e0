"""Drives CMake through ninja and gives the wheel its tag; everything else is in pyproject.toml.

FASTKD_BUILD=0    install without compiled kernels (plain PyTorch computes the losses)
FASTKD_CUDA=auto  build the CUDA kernels where there is nvcc (0: never, 1: or fail)
FASTKD_TESTING=1  build what the tests use as well
FASTKD_WERROR=1   a warning of CUDA's compilers is an error
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  the GPUs to build for; default: 8.0;9.0;10.0;12.0+PTX
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
WERROR = os.environ.get("FASTKD_WERROR", "0") == "1"
CUDA = os.environ.get("FASTKD_CUDA") or "auto"


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


def cuda_roots():
    """Where CUDA may be: $CUDA_HOME, the nvcc on the path, the usual place, PyPI's packages."""
    yield os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc")
    yield nvcc and Path(nvcc).resolve().parents[1]
    yield "/usr/local/cuda"
    for place in (*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        yield Path(place or ".") / "nvidia" / "cu13"


def find_cuda(wanted):
    """The folder of CUDA that has a file, or None."""
    return next((Path(root) for root in cuda_roots() if root and (Path(root) / wanted).is_file()), None)


def architectures(torch_list):
    """CMake's form of TORCH_CUDA_ARCH_LIST: 9.0 is 90-real, 9.0+PTX is 90."""
    found = []
    for name in filter(None, re.split(r"[;\s]+", torch_list)):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", name)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: numbers such as 9.0 or 12.0+PTX wanted, got {name!r}")
        major, minor, variant, ptx = match.groups()
        if int(major) < 8:
            print(
                f"fastkd: TORCH_CUDA_ARCH_LIST: {name} is left out, the kernels are for 8.0 and newer", file=sys.stderr
            )
            continue
        if ptx and int(major) < 9:  # on a newer GPU it would be compiled without the clusters that are launched there
            sys.exit(f"TORCH_CUDA_ARCH_LIST: +PTX wanted from 9.0 on alone, got {name!r}")
        found.append(f"{major}{minor}{variant}" + ("" if ptx else "-real"))
    if not found:
        sys.exit(f"TORCH_CUDA_ARCH_LIST: at least one of 8.0 and newer wanted, got {torch_list!r}")
    return ";".join(found)


def nvcc_version(nvcc):
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return tuple(map(int, found.groups())) if found else (0, 0)


def cuda_options():
    """What CMake is told about CUDA."""
    if CUDA not in ("auto", "0", "1"):
        sys.exit(f"FASTKD_CUDA: auto, 0 or 1 wanted, got {CUDA!r}")
    options = []
    root = find_cuda("bin/nvcc") if CUDA != "0" else None
    if root and nvcc_version(root / "bin" / "nvcc") < (12, 8):  # the first that knows 10.0 and 12.0
        old = f"fastkd: nvcc 12.8 or newer wanted, {root / 'bin' / 'nvcc'} is older"
        if CUDA == "1":
            sys.exit(old)
        print(f"{old}: the CUDA kernels are not built", file=sys.stderr)
        root = None
    if root:
        options += [f"-DFASTKD_NVCC={root / 'bin' / 'nvcc'}", f"-DCUDAToolkit_ROOT={root}"]
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or "8.0;9.0;10.0;12.0+PTX"
        options += [f"-DCMAKE_CUDA_ARCHITECTURES={architectures(wanted)}"]
    elif CUDA == "1":
        sys.exit("fastkd: FASTKD_CUDA=1, but there is no nvcc in $CUDA_HOME, PATH, /usr/local/cuda or PyPI's packages.")
    else:
        options += ["-DFASTKD_NVCC="]
    headers = find_cuda("include/cuda_runtime_api.h") if TESTING else None
    return [
        *options,
        f"-DFASTKD_WERROR={WERROR:d}",
        f"-DFASTKD_CUDA_INCLUDE={headers / 'include' if headers else ''}",
    ]


class CMakeBuild(build_ext):
    def run(self):
        if not BUILD:
            return
        torch = find_torch()
        find_compiler()
        package = ROOT / "fastkd" if self.inplace else Path(self.build_lib).resolve() / "fastkd"
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        options = [f"-DFASTKD_TORCH={torch}", f"-DFASTKD_OUTPUT={package / 'lib'}", f"-DFASTKD_TESTING={TESTING:d}"]
        options += cuda_options()
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
