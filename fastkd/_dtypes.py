"""The types that losses are computed in."""

import contextlib
from typing import Any

import torch


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 where one of them is, else float32; None counts for nothing."""
    wide = any(x is not None and x.dtype is torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would round embeddings before they are multiplied."""
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
