import contextlib
import importlib.util
import os
import zlib
from unittest import mock

import pytest
import torch
from covering import LONG, ON_HOST, covering

GPU = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
if TRITON and not GPU:  # before any kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_interpreter  # noqa: F401  mends it

import elsewhere  # noqa: E402
from cases import KINDS  # noqa: E402

import fastkd  # noqa: E402
from fastkd import _library  # noqa: E402

# What they assert is told in full, as that of tests is.
pytest.register_assert_rewrite(
    "dist_checks", "linear_logits_checks", "probabilities_checks", "recipes_checks", "relation_checks", "rows_checks", "top_k_checks"
)  # fmt: skip


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
    if os.environ.get("FASTKD_ROUNDING"):
        x = torch.rand(64, 64)
        if torch.equal(torch.eye(64) @ x, x):
            raise pytest.UsageError("FASTKD_ROUNDING is set, and products are those of the BLAS: preload _rounding.so")


# Parts of the suite, each a target of the Makefile. What is marked with none of the others is in the first two: of each
# test's cases those that cover all pairs of its parameters, and those that cover all triples besides. Triton's
# interpreter, which takes twenty times as long as the kernels of the CPU, has those of pairs alone, and the ones that it
# is long at in the second.
PARTS = {
    "test": "every behaviour on every backend, by cases that cover all pairs of parameters",
    "sweep": "the cases that cover all triples besides",
    "gates": "what compilers make of the kernels of every architecture",
    "sanitizers": "the CUDA kernels as host code, instrumented and in several orders of threads",
    "products": "of the first part the CPU's losses that are made of matrix products",
    "all": "the first two, and every case that they leave out",
}


def pytest_addoption(parser):
    described = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    parser.addoption("--part", choices=PARTS, default="test", help=f"which part of the suite is run. {described}")


def pytest_configure(config):
    for name in ("gates", "sanitizers", "products"):
        config.addinivalue_line("markers", f"{name}: {PARTS[name]}")
    config.addinivalue_line("markers", "of_each_kind: beyond the covering cases, one divergence of each kind is swept")
    config.addinivalue_line("markers", "long: a test that takes a minute, and runs in the sweep")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    of_one_test, covered, swept = {}, set(), set()
    for item in items:
        of_one_test.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for cases in of_one_test.values():
        parameters = [getattr(case, "callspec", None) and case.callspec.params for case in cases]
        costs = [cost(case) for case in cases]
        chosen = covering(parameters, costs) if len(cases) > 1 else [0]
        covered.update(cases[i] for i in chosen)
        if config.option.part == "sweep" and len(chosen) < len(cases):
            kept = [*chosen, *(i for i, case in enumerate(cases) if case not in covered and not one_of_many(case))]
            begun = range(len(chosen))
            more = covering([parameters[i] for i in kept], [costs[i] for i in kept], 3, begun=begun)
            swept.update(cases[kept[i]] for i in more)
    wanted = {item: is_in(config.option.part, item, item in covered, item in swept) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not wanted[item]])
    items[:] = [item for item in items if wanted[item]]
    share_what_is_built(items)


def cost(item):
    """Of a case beside the others of its test."""
    backend = backend_of(item)
    return LONG if backend == "triton-interpreter" else ON_HOST if backend == "cuda-cusim" else 1


def one_of_many(item):
    """Whether it is of a divergence for which another one stands in the sweep."""
    return item.get_closest_marker("of_each_kind") is not None and item.callspec.params["name"] not in KINDS


def backend_of(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("backend", parameters.get("kernel", ""))


def is_in(part, item, covers, sweeps):
    """Whether a part of the suite has a test; covers: it is one of the cases that cover all pairs; sweeps: of those that
    cover all triples besides."""
    heavy = next((name for name in ("gates", "sanitizers") if item.get_closest_marker(name)), None)
    if heavy or part in ("gates", "sanitizers"):
        return heavy == part
    backend = backend_of(item)
    if part == "products":
        # of the CPU's kernels those of one instruction set: what they are handed by the BLAS is the same in all
        on_host = backend in ("", "torch", KERNELS[0])
        return covers and on_host and item.get_closest_marker("products") is not None
    if backend == "triton-interpreter" and part != "all":
        parameters = item.callspec.params
        long = parameters.get("name") in getattr(parameters.get("case"), "long", ())
        return covers and long == (part == "sweep")
    if part == "all":
        return True
    long = item.get_closest_marker("long") is not None
    return (sweeps or (covers and long)) if part == "sweep" else covers and not long


# What is built once for the tests that share it, and by which of their parameters it differs.
BUILT = {"compiled": "compiled", "compiler": "build", "built": None, "reader": None}


def share_what_is_built(items):
    """Where several processes run tests, one of them builds a thing and runs all tests that share it."""
    for item in items:
        for name in set(BUILT) & set(item.fixturenames):
            which = getattr(item, "callspec", None) and item.callspec.params.get(BUILT[name], "")
            program = item.originalname if item.get_closest_marker("sanitizers") else ""  # each has one of its own
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name} {which or ''} {program}"))


@contextlib.contextmanager
def use(name):
    """Computes with one backend: name, and which of its kernels or where."""
    name, _, which = name.partition("-")
    with contextlib.ExitStack() as stack:
        if name == "cpu" and which:
            torch.ops.fastkd.cpu_isa(which)
            stack.callback(torch.ops.fastkd.cpu_isa, "")
        if which == "interpreter":  # which takes a while for a program that has nothing to do, as most of eight have
            stack.enter_context(mock.patch("fastkd.triton.triplet.SPLITS", 2))
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


def gradcheck(backend, function, inputs):
    """Of every derivative; of those along random directions where kernels do not run as they are."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=backend in ("triton-interpreter", "cuda-cusim"))


def pytest_collectstart(collector):
    """A module's own tensors are drawn as it is imported."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(zlib.crc32(collector.nodeid.encode()))


@pytest.fixture(autouse=True)
def seed(request):
    """What fails once fails again: torch seeds itself anew in every process. Nor does it matter which tests ran before."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


@pytest.fixture(params=["cpu", "torch"])
def computed_by(request):
    """One backend with kernels, and plain PyTorch: for what is the same on the others, as what the user is told."""
    with fastkd.backend(request.param):
        yield request.param


@pytest.fixture
def fresh_dynamo():
    """What torch.compile has seen in other tests is forgotten."""
    torch._dynamo.reset()


@pytest.fixture
def poisoned():
    """New memory holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def threads():
    """Sets the number of threads; undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
