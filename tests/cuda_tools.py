"""What the tests of the CUDA sources need of NVIDIA's tools: where they are, or why a test is skipped."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from fastkd import _divergences, _schemas

ROOT = Path(__file__).parents[1]
CUSIM = Path("csrc/testing/cusim")
# Of the undefined: the address sanitizer finds what null and object-size do, which take a quarter of the compilation;
# optimizing what is left takes half of the rest, and runs no faster. With threads it does.
BUILDS = {
    "plain": ["-O1"],
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size"],
    "thread": ["-O1", "-fsanitize=thread"],
}
ORDERS = {"forward": ("0", "0"), "reverse": ("1", "0"), "random": ("2", "1"), "random again": ("2", "2")}


def cuda_include():
    """The folder of CUDA's host headers, or None."""
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *pip_roots()]
    for root in filter(None, roots):
        include = Path(root) / "include"
        if (include / "cuda_runtime_api.h").is_file() and (include / "cuda_bf16.h").is_file():
            return include
    return None


def pip_roots():
    """Where the packages nvidia-cuda-nvcc, -runtime, -crt and -cccl install to."""
    return [Path(sysconfig.get_path(name)) / "nvidia" / "cu13" for name in ("purelib", "platlib")]


def missing(what):
    """Skips the test; where the tools are promised to be there, as in CI, it fails."""
    if os.environ.get("FASTKD_REQUIRE_CUDA_TOOLS") == "1":
        pytest.fail(f"FASTKD_REQUIRE_CUDA_TOOLS=1, but there is no {what}")
    pytest.skip(f"no {what}")


def require_cuda_include():
    include = cuda_include()
    if include is None:
        missing("CUDA headers in $CUDA_HOME, /usr/local/cuda or site-packages/nvidia/cu13")
    return include


def find_tool(name):
    """nvcc or cuobjdump: NVIDIA's own, or of the packages that bring it; skips where there is none."""
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *pip_roots()]
    places = [str(Path(folder) / "bin") for folder in filter(None, folders)]
    triton = importlib.util.find_spec("triton")
    if triton:  # it carries cuobjdump
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    tool = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if tool is None:
        missing(f"{name} on the path, in $CUDA_HOME, /usr/local/cuda, site-packages/nvidia/cu13 or Triton's package")
    return tool


def write_headers(folder):
    """Those that the build writes; of the sources as they are now."""
    (folder / "calls.h").write_text(_schemas.header())
    (folder / "divergence_list.h").write_text(_divergences.list_header())
    (folder / "divergence_functors.h").write_text(_divergences.functors_header())
    return folder


class Compiler:
    """Compiles C++ into a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.command = os.environ.get("CXX", "g++").split()
        if shutil.which(self.command[0]) is None:
            missing(f"C++ compiler '{self.command[0]}'")
        # -g1: lines alone; variables' places take sanitizers longest
        self.flags = ["-std=c++20", "-g1", "-Icsrc", f"-I{write_headers(folder)}"]
        self.warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        self.built = {}

    def __call__(self, *arguments):
        command = [*self.command, *self.flags, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    def build(self, name, *arguments):
        """The file that is compiled under this name, once."""
        if name not in self.built:
            run = self(*self.warnings, *arguments, "-o", self.folder / name)
            self.built[name] = run.stderr if run.returncode else self.folder / name
        built = self.built[name]
        if isinstance(built, str):
            pytest.fail(built)
        return built


class HostCompiler(Compiler):
    """Compiles CUDA sources for the host."""

    def __init__(self, folder):
        super().__init__(folder)
        # nvcc lets a float* be read as a uint4*
        self.flags += ["-fno-strict-aliasing", f"-I{CUSIM / 'include'}", "-isystem", require_cuda_include()]

    def program(self, name, build, *kernels):
        """csrc/testing/NAME_main.cpp with csrc/testing/cusim_KERNEL.cpp, all instrumented alike; a
        kernel's options follow its name."""
        flags, parts = BUILDS[build], []
        for kernel in kernels:
            stem, *options = kernel.split()
            parts.append(self.build(f"{build}-{kernel}.o", *flags, *options, "-c", f"csrc/testing/cusim_{stem}.cpp"))
        return self.build(f"{build}-{name}", *flags, f"csrc/testing/{name}_main.cpp", *parts, self.cusim())

    def cusim(self):
        """The runtime, which is never instrumented."""
        return self.build("cusim.o", "-O2", "-fPIC", "-c", CUSIM / "cusim.cpp")


def execute(command, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def run_program(command):
    """What a program and the sanitizer in it print."""
    at_once = {"TSAN_OPTIONS": "atexit_sleep_ms=0"}  # there are no threads to wait for, only fibers
    result = execute(command, **at_once)
    if "unexpected memory mapping" in result.stderr:  # ThreadSanitizer and many bits of random addresses
        result = execute(["setarch", platform.machine(), "-R", *command], **at_once)
    return result.stdout + result.stderr
