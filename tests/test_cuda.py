"""The CUDA kernels without a GPU: run on the host under sanitizers, and compiled for every architecture.

Their numbers are tested with everyone's, in test_rows.py and beside it, as the backend cuda-cusim.
"""

import ctypes
import os
import re
import subprocess

import cases
import elsewhere
import pytest
import test_rows
import torch
from conftest import use
from cuda_tools import BUILDS, ORDERS, ROOT, HostCompiler, find_tool, require_cuda_include, run_program

from fastkd import _library

DIVERGENCES = ["ForwardKL", "SoftCrossEntropy", "ReverseKL", "JensenShannon"]
HALF, BFLOAT16, FLOAT = "0", "1", "2"
# (dtype, N, V, clusters): each takes another way through the kernels
SHAPES = {
    "a warp a row, several rows a block": (FLOAT, 9, 10, 1),
    "rows that begin at every alignment": (BFLOAT16, 9, 131, 1),
    "a block a row": (HALF, 3, 4104, 1),
    "a cluster a row, of parts that differ": (FLOAT, 2, 20003, 1),
    "several kernels, several blocks a row": (BFLOAT16, 2, 20001, 0),
}


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    return HostCompiler(tmp_path_factory.mktemp("cuda"))


def program(compiler, build):
    """csrc/testing/rows_main.cpp with the kernels, all instrumented alike."""
    flags = ["-O1", *BUILDS[build]]
    parts = [
        compiler.build(f"{build}-{name}.o", *flags, f"-DFASTKD_DIVERGENCE={name}", "-c", "csrc/testing/cusim_rows.cpp")
        for name in DIVERGENCES
    ]
    return compiler.build(
        build, *flags, "csrc/testing/rows_main.cpp", "csrc/testing/cusim_reduce.cpp", *parts, compiler.cusim()
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_are_clean(compiler, build, shape, divergence):
    """No access out of bounds or misaligned, no undefined behaviour, no race; right in every order."""
    dtype, N, V, clusters = SHAPES[shape]
    if build == "thread":
        V = min(V, 6001)
    orders = ORDERS if build == "plain" else ("random",)
    for order in orders:
        arguments = [str(DIVERGENCES.index(divergence)), dtype, str(N), str(V), str(clusters), *ORDERS[order]]
        assert run_program([program(compiler, build), *arguments]) == "right\n", order


@pytest.fixture
def cusim():
    """The library that the backend cuda-cusim runs."""
    if not elsewhere.CUSIM.exists():
        require_cuda_include()
        pytest.fail("FASTKD_TESTING=1 did not build _cusim.so")
    library = ctypes.CDLL(str(elsewhere.CUSIM))
    yield library
    library.cusim_order(0, 0)
    for attribute in (75, 97):
        library.cusim_device(attribute, -1)


@pytest.mark.parametrize("older", [False, True], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", cases.LOSSES)
def test_numbers_in_every_order_of_threads(cusim, name, order, older):
    """cudaDevAttrComputeCapabilityMajor is 75, cudaDevAttrMaxSharedMemoryPerBlockOptin 97."""
    if older:
        cusim.cusim_device(75, 8)
        cusim.cusim_device(97, 48 << 10)
    cusim.cusim_order(*map(int, ORDERS[order]))
    with use("cuda-cusim"):
        for case in cases.FINITE:
            if case.name in (
                "odd",
                "block_and_one",
                "three_long_rows",
                "half_way",
                "impossible_classes",
                "nan_under_mask",
            ):
                test_rows.check(name, case, torch.float32, "batchmean", False)
                test_rows.check(name, case, torch.bfloat16, "none", False)


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_no_bit(cusim, order):
    student, teacher = torch.randn(3, 20003), torch.randn(3, 20003)
    with use("cuda-cusim"):
        cusim.cusim_order(0, 0)
        plain = test_rows.run(cases.LOSSES["js_div"], student, teacher)
        cusim.cusim_order(*map(int, ORDERS[order]))
        again = test_rows.run(cases.LOSSES["js_div"], student, teacher)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])


# ---- what the compiler made of them


@pytest.fixture(scope="session")
def library():
    path = _library.FOLDER / "libfastkd_cuda.so"
    if not path.exists():
        find_tool("nvcc")  # skips where there is none
        pytest.fail("there is nvcc, but setup built no libfastkd_cuda.so")
    return path


ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}
BUILT_FOR_ALL = "TORCH_CUDA_ARCH_LIST" not in os.environ


def usage(path):
    """(architecture, function, registers, stack) of every kernel in a library or an object."""
    dump = subprocess.run(
        [find_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    arch = function = None
    for line in dump.splitlines():
        if found := re.search(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.search(r"Function (\w+):", line):
            function = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+)", line):
            yield arch, function, int(found[1]), int(found[2])


def registers_of(function):
    """As many as leave room for the blocks of 256 threads that rows_kernel.cuh counts on: three a
    multiprocessor; two where the logarithms of js_div are in registers too, and for ReverseKL."""
    if "rows_kernelIf" in function and "AnyType" not in function:
        return 80 if "ForwardKL" in function or "SoftCrossEntropy" in function else 128
    return 255


def test_the_library_has_every_architecture_and_no_spills(library):
    found = list(usage(library))
    built = {arch for arch, *_ in found}
    assert built == ARCHITECTURES if BUILT_FOR_ALL else built
    kernels = {function for _, function, *_ in found}
    for arch in built:
        assert {function for a, function, *_ in found if a == arch} == kernels
    assert [x for x in found if x[3] != 0] == []
    assert [x for x in found if x[2] > registers_of(x[1])] == []


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_logits_move_in_16_bytes(library, arch):
    """In the kernel that keeps a row on chip: the copies into shared memory, and the gradient's stores."""
    if arch not in {a for a, *_ in usage(library)}:
        pytest.skip(
            f"the library was not built for {arch}: TORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST')}"
        )
    for storage in ("13__nv_bfloat16", "f"):
        mangled = f"_ZN6fastkd4cuda11rows_kernelIf{storage}{'S2_' if storage != 'f' else 'f'}NS_8baseline9ForwardKLIfEEEEvNS_10RowsParamsIT_EEi"
        sass = subprocess.run(
            [find_tool("cuobjdump"), "-sass", "-arch", arch, "-fun", mangled, library], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
        assert re.search(r"LDGSTS\.\S*128", sass), mangled
        assert re.search(r"STG\.\S*128", sass)
        assert re.search(r"LDS\.128", sass)
        assert "LDL" not in sass
        assert "STL" not in sass


@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_compiles_for_the_variants_of_an_architecture(arch, tmp_path):
    run = subprocess.run(
        [find_tool("nvcc"), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Icsrc", "-DFASTKD_DIVERGENCE=JensenShannon",
         f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-warn-spills,-Werror", "-c", "csrc/cuda/rows.cu", "-o", tmp_path / "rows.o"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert all(stack == 0 for *_, stack in usage(tmp_path / "rows.o"))
