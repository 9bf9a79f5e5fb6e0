"""Loads the compiled library; says why where there is none."""

import warnings
from pathlib import Path

import torch

CPU_LIBRARY = Path(__file__).parent / "lib" / "libfastkd_cpu.so"


def _load(path):
    """Loads a library of ops. Returns "" or the reason why it cannot be used."""
    if not path.exists():
        return "fastkd was installed without its compiled kernels"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load in torch {torch.__version__}: {error}"
    return ""


cpu_missing = _load(CPU_LIBRARY)
if cpu_missing:
    warnings.warn(
        f"{cpu_missing}; losses are computed by plain PyTorch, which is right but slow. "
        "Reinstalling with a C++ compiler at hand (pip install --no-build-isolation . in its sources) builds them.",
        RuntimeWarning,
        stacklevel=3,
    )
