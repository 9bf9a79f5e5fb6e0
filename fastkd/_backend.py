"""Which implementation computes a loss: chosen per device, or by the user."""

import contextlib
import os
import warnings

import torch

from . import _library

NAMES = ("cuda", "triton", "cpu", "torch")
_chosen = None  # the user's choice; None: automatic
_warned = set()


def unavailable(name):
    """Why a backend cannot be used here: "" where it can."""
    if name == "cpu":
        return _library.cpu_missing
    if name in ("cuda", "triton"):
        return f"this build of fastkd has no {name} kernels"
    return ""


def check(name, origin):
    if name not in NAMES:
        raise ValueError(f"{origin}: one of {', '.join(NAMES)} wanted, got {name!r}")
    reason = unavailable(name)
    if reason:
        raise RuntimeError(f"{origin}: the backend {name!r} cannot be used: {reason}")
    return name


if os.environ.get("FASTKD_BACKEND"):
    _chosen = check(os.environ["FASTKD_BACKEND"], "FASTKD_BACKEND")


@contextlib.contextmanager
def backend(name):
    """Computes every loss inside the ``with`` block with one backend, in all threads.

    Args:
        name: ``"cpu"`` (C++) or ``"torch"`` (plain PyTorch, the reference).

    Raises:
        ValueError: ``name`` is no backend.
        RuntimeError: the backend cannot be used here, now or, for tensors on a device that it
            does not serve, when a loss is called.

    The environment variable ``FASTKD_BACKEND`` does the same for a whole process.
    """
    global _chosen
    check(name, "backend")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def automatic(device_type):
    """The backend that serves a kind of device when the user chose none."""
    return "cpu" if device_type in ("cpu", "meta") and not _library.cpu_missing else "torch"


def select(device):
    """The backend for tensors on a device."""
    if _chosen is None:
        name = automatic(device.type)
        if name == "torch" and device.type not in _warned and not torch.compiler.is_compiling():
            _warn(device.type)
        return name
    if _chosen == "cpu" and device.type not in ("cpu", "meta"):
        raise RuntimeError(f"backend: 'cpu' was chosen, but the tensors are on {device}")
    return _chosen


def _warn(device_type):
    """Once for each kind of device; of a missing library the import has told already."""
    _warned.add(device_type)
    if device_type not in ("cpu", "meta"):
        warnings.warn(
            f"fastkd has no kernels for {device_type!r} tensors; plain PyTorch computes the loss",
            RuntimeWarning,
            stacklevel=5,
        )
