"""``python -m fastkd``: what was built, and what will be used."""

import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__, _backend, _library

CPUINFO = Path("/proc/cpuinfo")
BLAS = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate"}  # torch's names and the usual ones


def processor() -> str:
    """Its name; Linux tells none of an ARM processor."""
    found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def blas(config: str) -> str:
    """What multiplies matrices, from torch.__config__.show(), which has the version of MKL alone."""
    mkl = re.search(r"Math Kernel Library Version (.+?) for ", config)
    found = re.search(r"\bBLAS_INFO=(\w+)", config)
    name = found[1] if found else "mkl" if mkl else "unknown"
    version = mkl[1] if mkl and name == "mkl" else "(torch does not tell its version)"
    return f"{BLAS.get(name, name)} {version}"


def lines() -> Iterator[tuple[str, str]]:
    """What the command prints: names and values."""
    yield "fastkd", __version__
    yield "torch", torch.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "processor", processor()
    yield "torch's CPU capability", torch.backends.cpu.get_cpu_capability()
    yield "torch's BLAS", blas(torch.__config__.show())
    for name in _backend.NAMES:
        yield f"backend {name}", _backend.unavailable(name) or "ready"
    if not _library.cpu_missing:
        yield "instruction set", torch.ops.fastkd.cpu_isa("?")
    yield "threads", str(torch.get_num_threads())
    chosen = _backend._chosen
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        yield f"{device} tensors use", f"{chosen} (FASTKD_BACKEND)" if chosen else _backend.automatic(device)


def main() -> int:
    """Prints them; returns the exit code."""
    rows = list(lines())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
