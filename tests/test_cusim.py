"""cusim, which runs the CUDA kernels on the host: right kernels pass, planted faults are found."""

import re

import pytest
from cuda_tools import BUILDS, ORDERS, HostCompiler, execute, run_program

pytestmark = pytest.mark.sanitizers

KERNELS = "tests/cusim/kernels.cu"


def kernels(compiler, build):
    return compiler.build(build, *BUILDS[build], "-x", "c++", KERNELS, "-x", "none", compiler.cusim())


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    return HostCompiler(tmp_path_factory.mktemp("cusim"))


@pytest.fixture
def run(compiler):
    """Runs a case of tests/cusim/kernels.cu in one order; what it and the sanitizer print."""

    def run(case, build, order):
        return run_program([kernels(compiler, build), case, *ORDERS[order]])

    return run


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", ["clean", "clean-copy", "clean-neighbour", "clean-neighbour-16", "clean-cluster"])
def test_right_kernels_are_right(run, case, build):
    for order in ORDERS:
        assert run(case, build, order) == "right\n", order


@pytest.mark.parametrize(
    ("case", "build", "report"),
    [
        ("global-bounds", "address", r"heap-buffer-overflow"),
        ("shared-bounds", "address", r"heap-buffer-overflow .*kernels\.cu:\d+"),
        ("misaligned", "address", r"runtime error: .* misaligned address .* requires 16 byte alignment"),
        ("no-barrier", "thread", r"data race .*kernels\.cu:\d+"),
        ("no-warp-barrier", "thread", r"data race .*kernels\.cu:\d+"),
        ("plain-sum", "thread", r"data race .*kernels\.cu:\d+"),
        ("no-cluster-barrier", "thread", r"data race .*kernels\.cu:\d+"),
        ("no-first-cluster-barrier", "thread", r"data race"),
        ("divergent-barrier", "plain", r"error: .* is at __syncthreads, .*kernels\.cu:\d+; .*thread 32 .*has returned"),
        ("other-barrier", "plain", r"error: .*at different barriers: .*kernels\.cu:\d+; others are at .*kernels\.cu:\d+"),
        ("shuffle-mask", "plain", r"error: .* is at a shuffle, .*kernels\.cu:\d+, mask 0xffffffff; .*has returned"),
        ("leaves-cluster", "plain", r"error: .*block of this rank has left the cluster: block .*kernels\.cu:\d+"),
        ("cluster-barrier-skipped", "plain", r"error: .*the cluster's barrier, .*kernels\.cu:\d+; .*has returned"),
        ("foreign-address", "plain", r"error: .*not in this block's shared memory: .*kernels\.cu:\d+"),
    ],
)  # fmt: skip
def test_a_fault_is_reported_in_every_order(run, case, build, report):
    for order in ORDERS:
        found = run(case, build, order)
        assert re.search(report, found), f"{order}: {found}"


@pytest.mark.parametrize(
    "case", ["no-barrier", "no-warp-barrier", "no-copy-wait", "no-cluster-barrier", "no-first-cluster-barrier"]
)
def test_a_fault_is_a_wrong_number_in_some_order(run, case):
    assert "wrong\n" in {run(case, "plain", order) for order in ORDERS}


def test_blocks_that_may_race_are_asked_not_to_be_reported(run):
    assert run("plain-sum-ordered", "thread", "forward") == "right\n"


def test_another_blocks_memory_is_poisoned_until_it_begins(run):
    assert "use-after-poison" in run("no-first-cluster-barrier", "address", "reverse")


@pytest.mark.parametrize("build", BUILDS)
def test_a_failed_launch_leaves_nothing_behind(run, build):
    """Abandoned threads: no leak, no race with the host afterwards."""
    for case in ("divergent-barrier", "other-barrier", "foreign-address", "cluster-barrier-skipped"):
        found = run(case, build, "forward")
        assert found.startswith("error: cusim: "), found
        assert len(found.splitlines()) == 1, found


def test_launches_and_queries_return_what_cuda_returns(compiler):
    assert execute([kernels(compiler, "plain"), "launches"]).stdout.splitlines() == [
        "cluster of 4: 0",
        "grid of 8 in clusters of 3: 9",
        "cluster of 16: 1",
        "cluster on an older GPU: 801",
        "64 KiB of shared memory: 1",
        "the last error: 1",
        "the last error, again: 0",
        "allow 64 KiB: 0",
        "64 KiB, allowed: 0",
        "allow 228 KiB: 1",
        "device: 0",
        "multiprocessors: 0",
        "4 of device 0",
        "a failing kernel: 719",
        "the text is cusim's: 1",
        "the next one: 0",
        "an error: 0",
    ]


def test_static_shared_memory_does_not_compile(compiler, tmp_path):
    source = tmp_path / "static.cu"
    source.write_text("#include <cuda_runtime.h>\n__global__ void kernel() { __shared__ float x[2]; x[0] = 0; }\n")
    assert "cusim: take shared memory dynamically" in compiler("-fsyntax-only", "-x", "c++", source).stderr
