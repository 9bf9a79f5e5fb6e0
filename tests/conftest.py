import contextlib

import pytest
import torch

import fastkd
from fastkd import _library


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


KERNELS = cpu_levels()
BACKENDS = [*KERNELS, "torch"]


def pytest_sessionstart(session):
    if _library.cpu_missing:
        raise pytest.UsageError(f"the tests need the compiled library: {_library.cpu_missing}")


@contextlib.contextmanager
def use(name):
    name, _, level = name.partition("-")
    if level:
        torch.ops.fastkd.cpu_isa(level)
    try:
        with fastkd.backend(name):
            yield
    finally:
        if level:
            torch.ops.fastkd.cpu_isa("")


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
