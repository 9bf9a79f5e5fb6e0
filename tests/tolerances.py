"""How wrong a result may be, and why. Everything is measured as ||out - ref|| / ||ref|| in float64."""

import torch

# A kernel may be off by twice what plain PyTorch in the same dtype is off by ...
TIMES_EAGER = 2.0
# ... and by this where PyTorch happens to hit the nearest number: a few roundings of the type
# that is computed in (the loss), or one of the type that is stored (a gradient in half precision).
FLOOR = {torch.float64: 8 * 2.0**-53, torch.float32: 8 * 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The contract's promise near convergence, for float32 and a loss of 5e-7.
NEAR_CONVERGENCE = 2e-4


def error(out, ref):
    """||out - ref|| / ||ref||; where ref is 0, ||out||."""
    out, ref = out.double(), ref.double()
    endless = ref.isinf() & (out == ref)  # +inf where it should be
    out, ref = out.masked_fill(endless, 0.0), ref.masked_fill(endless, 0.0)
    norm = ref.norm()
    return ((out - ref).norm() / (norm if norm > 0 else 1.0)).item()
