"""Which implementation computes a loss: chosen per device, or by the user."""

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator

import torch

from . import _library

NAMES = ("cuda", "triton", "cpu", "torch")
_namespaces = {"cuda": "fastkd", "cpu": "fastkd", "triton": "fastkd_triton"}  # of the backend's ops
_chosen = None  # the user's choice; None: automatic
_warned = set()
_defining = threading.Lock()


def unavailable(name):
    """Why a backend cannot be used here: "" where it can."""
    if name == "cpu":
        return _library.cpu_missing
    if name == "cuda":
        return _library.cuda_missing or _cuda_unserved()
    if name == "triton":
        return _triton_missing()
    return ""


@functools.cache
def _cuda_unserved():
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability 8.0 wanted, the GPU has {major}.{minor}"
    reason = torch.ops.fastkd.cuda_code()
    return reason and (
        f"the CUDA kernels do not run on this GPU, of compute capability {major}.{minor} ({reason}); "
        f"installing fastkd from its sources with TORCH_CUDA_ARCH_LIST={major}.{minor} builds them for it"
    )


@functools.cache
def _triton_missing():
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "" if torch.cuda.is_available() or interpreted() else "Triton needs a GPU, and torch sees none"


def interpreted():
    """Triton's interpreter runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def serves(name, device_type):
    """Whether a backend computes on a kind of device. Meta tensors have shapes alone: any will do."""
    if name == "torch" or device_type == "meta":
        return True
    if name == "triton" and device_type == "cpu":
        return interpreted()
    return device_type == ("cpu" if name == "cpu" else "cuda")


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
def backend(name: str) -> Iterator[None]:
    """Computes every loss inside the ``with`` block with one backend, in all threads.

    Args:
        name: ``"cuda"`` (C++/CUDA), ``"triton"``, ``"cpu"`` (C++) or ``"torch"`` (plain PyTorch,
            the reference).

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
    if torch.compiler.is_compiling():
        from . import _untraced

        return _untraced.automatic(device_type)
    return look_for_automatic(device_type)


def look_for_automatic(device_type):
    candidates = {"cuda": ("cuda", "triton"), "cpu": ("cpu",), "meta": ("cpu",)}.get(device_type, ())
    return next((name for name in candidates if not unavailable(name)), "torch")


def select(device):
    """The backend for tensors on a device."""
    if _chosen is None:
        name = automatic(device.type)
        if name == "torch" and device.type not in _warned and not torch.compiler.is_compiling():
            _warn(device.type)
        return name
    if not serves(_chosen, device.type):
        raise RuntimeError(f"backend: {_chosen!r} was chosen, but the tensors are on {device}")
    return _chosen


def namespace(name):
    """Where the ops of a backend are; they are defined when they are first asked for."""
    if torch.compiler.is_compiling():
        from . import _untraced

        return _untraced.namespace(name)
    return look_for_namespace(name)


def look_for_namespace(name):
    found = _namespaces[name]
    if name == "triton":
        with _defining:
            _define_triton()
    return found


@functools.cache
def _define_triton():
    from . import triton

    triton.register()


def _warn(device_type):
    """Once for each kind of device; of a missing library the import has told already."""
    _warned.add(device_type)
    if device_type not in ("cpu", "meta"):
        warnings.warn(
            f"fastkd has no kernels for {device_type!r} tensors; plain PyTorch computes the loss. "
            "python -m fastkd tells which kernels there are.",
            RuntimeWarning,
            stacklevel=5,
        )
