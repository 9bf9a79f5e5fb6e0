"""What the compiler made of the CUDA kernels, for every architecture: registers, stack and instructions."""

import functools
import re
import subprocess

import pytest
from cuda_tools import ROOT, find_tool, missing, write_headers

from fastkd import _library


@pytest.fixture(scope="session")
def library():
    path = _library.FOLDER / "libfastkd_cuda.so"
    if not path.exists():
        find_tool("nvcc")  # skips where there is none
        pytest.fail("there is nvcc, but setup built no libfastkd_cuda.so")
    return path


ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}


def require_built(arch, built):
    """Skips where the library was built for others; fails where it must be for all."""
    if arch not in built:
        missing(f"code for {arch} in the library; build it with TORCH_CUDA_ARCH_LIST='8.0;9.0;10.0;12.0+PTX'")


@functools.cache
def usage(path):
    """(architecture, function, registers, stack) of every kernel in a library or an object."""
    return list(read_usage(path))


def read_usage(path):
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


def registers_of(function, arch):
    """As many as leave room for the blocks of 256 threads that are counted on. Of rows_kernel.cuh three a
    multiprocessor; two where the logarithms of js_div are in registers too, and for ReverseKL. Two of
    the pairs' sweeps, of the triples in float, of the columns of dist, and of features, three of their plain distances,
    but for smooth L1 on sm_80, and of rows of triplets and of dist. Five of the 128 threads of pkt in float."""
    if re.search(r"triplet_kernel|dist_(rows|gradient)_kernelIf", function):
        return 80
    if "pkt_kernelIf" in function:
        return 96
    if re.search(r"pairs_sweep_kernel|(angles|dist_columns)_kernelIf", function):
        return 128
    if re.search(r"features_kernelIf|attention_\w+_kernelI[fd]", function):
        return 80 if "FeatureE0E" in function and ("Squares" in function or arch != "sm_80") else 128
    if "rows_kernelIf" in function and "AnyType" not in function:
        return 80 if "ForwardKL" in function or "SoftCrossEntropy" in function else 128
    return 255


@pytest.mark.gates
def test_every_kernel_is_there_for_every_architecture_and_none_spills(library):
    found = usage(library)
    built = {arch for arch, *_ in found}
    assert built
    kernels = {function for _, function, *_ in found}
    for arch in built:
        assert {function for a, function, *_ in found if a == arch} == kernels
    assert [x for x in found if x[3] != 0] == []
    assert [x for x in found if x[2] > registers_of(x[1], x[0])] == []


COPIES, STORES, LOADS = r"LDGSTS\.\S*128", r"STG\.\S*128", r"LDS\.128"  # of 16 bytes
# What a kernel is fast by. Rows: the kernel that keeps them on chip.
INSTRUCTIONS = {
    r"rows_kernelIf13__nv_bfloat16S2_\w*ForwardKL": (COPIES, STORES, LOADS),
    r"rows_kernelIfff\w*ForwardKL": (COPIES, STORES, LOADS),
    r"standardize_[fb]wd_kernelIf\w*RowWalk": (r"LDG\.E\.\S*128", STORES),
    r"complement_fwd_kernelIf": (r"LDG\.E\.\S*128", r"ATOMS\.OR"),
    r"complement_bwd_kernelIf": (r"LDG\.E\.\S*128", STORES),
    r"pairs_sweep_kernelI6__half": (COPIES, r"LDSM\.16\.M88\.4", r"HMMA\.16816\.F32 "),
    r"pairs_gradient_kernelI13__nv_bfloat16": (COPIES, r"LDSM\.16\.M88\.4", r"LDSM\.16\.MT88\.4", r"HMMA\.16816\.F32\.BF16"),
    r"pairs_gradient_kernelIf": (COPIES, r"LDSM\.16\.M88\.4", r"HMMA\.1688\.F32\.TF32"),
    r"features_kernelIfLNS_7FeatureE0E": (r"LDG\.E\.\S*128", STORES),
    r"features_kernelIfLNS_7FeatureE1E": (r"LDG\.E\.\S*128", STORES),
    r"features_kernelIfLNS_7FeatureE2E": (r"LDG\.E\.\S*128", STORES),
    r"attention_powers_kernelIfLb1E": (r"LDG\.E\.\S*128",),
    r"attention_slopes_kernelIfLb1E": (r"LDG\.E\.\S*128", STORES),
    r"pkt_kernelI[fd]Lb1E": (r"LDG\.E\.\S*128", STORES),
    r"triplet_kernelIf": (r"ATOMS\.POPC\.INC",),
    r"angles_kernelIf": (LOADS, r"LDG\.E\.\S*128", r"FMNMX\S*NAN"),
}  # fmt: skip


def machine_code(path, arch):
    """{function: its code} of the kernels that INSTRUCTIONS names."""
    wanted = re.compile("|".join(INSTRUCTIONS))
    functions = [function for a, function, *_ in usage(path) if a == arch and wanted.search(function)]
    dump = subprocess.run(
        [find_tool("cuobjdump"), "-sass", "-arch", arch, "-fun", ",".join(functions), path], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    codes = dict(part.split("\n", 1) for part in re.split(r"Function : (?=\w+\n)", dump)[1:])
    assert set(codes) == set(functions)
    return codes


@pytest.mark.gates
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_the_instructions_that_are_counted_on(library, arch):
    require_built(arch, {a for a, *_ in usage(library)})
    codes = machine_code(library, arch)
    for kernel, instructions in INSTRUCTIONS.items():
        found = {function: sass for function, sass in codes.items() if re.search(kernel, function)}
        assert found, kernel
        for function, sass in found.items():
            for instruction in (*instructions, "EXIT"):
                assert re.search(instruction, sass), (function, instruction)
            assert "LDL" not in sass, function
            assert "STL" not in sass, function


@pytest.mark.gates
@pytest.mark.parametrize("arch", ["90a", "100a"])
def test_compiles_for_the_variants_of_an_architecture(arch, tmp_path):
    run = subprocess.run(
        [find_tool("nvcc"), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Icsrc", f"-I{write_headers(tmp_path)}", "-DFASTKD_DIVERGENCE=ForwardKL",
         f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-warn-spills,-Werror", "-c", "csrc/cuda/rows.cu", "-o", tmp_path / "rows.o"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert all(stack == 0 for *_, stack in usage(tmp_path / "rows.o"))
