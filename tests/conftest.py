import contextlib
import importlib.util
import os

import pytest
import torch

GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
if TRITON and not GPU:  # before any kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_interpreter  # noqa: F401  mends it

import elsewhere  # noqa: E402

import fastkd  # noqa: E402
from fastkd import _library  # noqa: E402


def cpu_levels():
    """The instruction sets of this processor, of those that the library was built for."""
    if _library.cpu_missing:
        return []
    levels = []
    for name in ("baseline", "avx2", "avx512"):
        with contextlib.suppress(RuntimeError):
            torch.ops.fastkd.cpu_isa(name)
            levels.append(f"cpu-{name}")
    torch.ops.fastkd.cpu_isa("")
    return levels


def gpu_backends():
    """The GPU's kernels: on the GPU where there is one, else run on the host."""
    found = []
    if GPU and not _library.cuda_missing:
        found.append("cuda-gpu")
    elif not GPU and elsewhere.CUSIM.exists():
        found.append("cuda-cusim")
    if TRITON:
        found.append("triton-gpu" if GPU else "triton-interpreter")
    return found


KERNELS = [*cpu_levels(), *gpu_backends()]
BACKENDS = [*KERNELS, "torch"]


def pytest_sessionstart(session):
    if _library.cpu_missing:
        raise pytest.UsageError(f"the tests need the compiled library: {_library.cpu_missing}")


# What is built once for the tests that share it, and by which of their parameters it differs.
BUILT = {"compiled": "compiled", "compiler": "build", "built": None}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Where several processes run tests, one of them builds a thing and runs all tests that share it."""
    for item in items:
        for name in set(BUILT) & set(item.fixturenames):
            which = getattr(item, "callspec", None) and item.callspec.params.get(BUILT[name], "")
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name} {which or ''}"))


@contextlib.contextmanager
def use(name):
    """Computes with one backend: name, and which of its kernels or where."""
    name, _, which = name.partition("-")
    with contextlib.ExitStack() as stack:
        if name == "cpu" and which:
            torch.ops.fastkd.cpu_isa(which)
            stack.callback(torch.ops.fastkd.cpu_isa, "")
        if which in ("cusim", "gpu"):
            stack.enter_context(elsewhere.in_place_of(name, which))
        stack.enter_context(fastkd.backend(name))
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Every implementation that can run here, the CPU's once per instruction set."""
    with use(request.param):
        yield request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    """The same without plain PyTorch, for what only the kernels promise."""
    with use(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads; undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
