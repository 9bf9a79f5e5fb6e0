"""Drives CMake through ninja and gives the wheel its tag; everything else is in pyproject.toml.

FASTKD_BUILD=0    install without compiled kernels (plain PyTorch computes the losses)
FASTKD_CUDA=auto  build the CUDA kernels where there is nvcc (0: never, 1: or fail)
FASTKD_TESTING=1  build what the tests use as well
FASTKD_WERROR=1   a warning of CUDA's compilers is an error
FASTKD_BASELINE=1 the kernels of the CPU for its oldest instruction set alone, which compiles faster
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  the GPUs to build for, in torch's syntax; default: 8.0;9.0;10.0;12.0+PTX
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
BASELINE = os.environ.get("FASTKD_BASELINE", "0") == "1"
CUDA = os.environ.get("FASTKD_CUDA") or "auto"
GPUS = "8.0;9.0;10.0;12.0+PTX"
NAMED_GPUS = {  # as in torch/utils/cpp_extension.py
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


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


def tell(message):
    print(f"fastkd: {message}", file=sys.stderr)


def gpus_here():
    """What torch takes "native" for: the GPUs of this machine, and PTX of the newest."""
    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout if smi else ""
    gpus = sorted(set(re.findall(r"^\d+\.\d$", found, re.MULTILINE)), key=float)
    if not gpus:
        tell(f"TORCH_CUDA_ARCH_LIST: native, but nvidia-smi shows no GPU here; {GPUS} is built")
    return ";".join(gpus) + "+PTX" if gpus else GPUS


def architectures(torch_list, known):
    """CMake's form of TORCH_CUDA_ARCH_LIST: 9.0 is 90-real, 9.0+PTX is 90. What cannot be built is left out.

    known: the numbers that nvcc compiles for, such as "90".
    """
    real, ptx = set(), set()
    for name in re.split(r"[;\s]+", torch_list):
        gpus = gpus_here() if name == "native" else NAMED_GPUS.get(name, name)
        for gpu in filter(None, gpus.split(";")):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", gpu)
            if not match:
                sys.exit(
                    "TORCH_CUDA_ARCH_LIST: numbers such as 9.0, 9.0a and 12.0+PTX, names such as Ampere, "
                    f"or native wanted, got {name!r}"
                )
            major, minor, variant, with_ptx = match.groups()
            number = major + minor
            if int(number) < 80:
                tell(f"TORCH_CUDA_ARCH_LIST: {gpu} is left out, the kernels are for 8.0 and newer")
                continue
            if number not in known:
                tell(f"TORCH_CUDA_ARCH_LIST: {gpu} is left out, this nvcc knows {', '.join(sorted(known, key=int))}")
                continue
            real.add(number + variant)
            if with_ptx and int(number) < 90:
                # From 9.0 on kernels are launched in clusters, which code compiled for 8.x ignores: results would be
                # wrong. GPUs of 8.x run the real code, so that the PTX of 9.0 serves all others.
                tell(f"TORCH_CUDA_ARCH_LIST: for {gpu} the PTX of 9.0 is built, which serves the same GPUs")
                ptx.add("90")
            elif with_ptx:
                ptx.add(number + variant)
    suffix = {(True, True): "", (True, False): "-real", (False, True): "-virtual"}
    wanted = sorted(real | ptx, key=lambda name: (int(name.rstrip("af")), name))
    return ";".join(name + suffix[name in real, name in ptx] for name in wanted)


def nvcc_version(nvcc):
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return tuple(map(int, found.groups())) if found else (0, 0)


def nvcc_knows(nvcc):
    """The numbers that it compiles for, such as "90"."""
    run = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return set(re.findall(r"^compute_(\d+)$", run.stdout, re.MULTILINE))


def without_cuda(reason):
    if CUDA == "1":
        sys.exit(f"fastkd: {reason}")
    tell(f"{reason}: the CUDA kernels are not built")
    return []


def cuda_build():
    """What CMake is told of the CUDA kernels; nothing where they are not built."""
    root = find_cuda("bin/nvcc") if CUDA != "0" else None
    if not root:
        if CUDA == "1":
            sys.exit("fastkd: FASTKD_CUDA=1, but no nvcc is in $CUDA_HOME, PATH, /usr/local/cuda or PyPI's packages")
        return []
    nvcc = root / "bin" / "nvcc"
    if nvcc_version(nvcc) < (12, 8):  # the first that knows 10.0 and 12.0
        return without_cuda(f"nvcc 12.8 or newer wanted, {nvcc} is older")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or GPUS
    found = architectures(wanted, nvcc_knows(nvcc))
    if not found:
        return without_cuda(f"TORCH_CUDA_ARCH_LIST: at least one of 8.0 and newer wanted, got {wanted!r}")
    return [f"-DFASTKD_NVCC={nvcc}", f"-DCUDAToolkit_ROOT={root}", f"-DCMAKE_CUDA_ARCHITECTURES={found}"]


def cuda_options():
    """What CMake is told about CUDA."""
    if CUDA not in ("auto", "0", "1"):
        sys.exit(f"FASTKD_CUDA: auto, 0 or 1 wanted, got {CUDA!r}")
    options = cuda_build() or ["-DFASTKD_NVCC="]
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
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFASTKD_BASELINE={BASELINE:d}"]
        options += cuda_options()
        if TESTING:
            import pybind11

            options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
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
