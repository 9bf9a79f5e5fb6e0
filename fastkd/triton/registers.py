"""How many registers a thread may have."""

import torch
import triton

from .._backend import interpreted

# Of 65536 they leave room for two programs of 256 threads. ptxas until 12.8 takes a few more, and
# leaves room for one.
REGISTERS = 128


def limited(dtype: torch.dtype) -> dict[str, int]:
    """Launch options for a kernel that computes in dtype; float64 needs more."""
    if dtype is torch.float64 or interpreted():
        return {}
    vendor = triton.runtime.driver.active.get_current_target().backend
    return {"maxnreg": REGISTERS} if vendor == "cuda" else {}
