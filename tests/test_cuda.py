"""The CUDA kernels without a GPU: run on the host under sanitizers, and compiled for every architecture.

Their numbers are tested with everyone's, in test_rows.py, test_relations.py and beside them, as the
backend cuda-cusim.
"""

import ctypes
import functools
import itertools
import re
import subprocess

import cases
import elsewhere
import feature_cases
import feature_truth
import pytest
import relation_cases
import test_relations
import test_rows
import torch
from conftest import use
from cuda_tools import (
    BUILDS,
    ORDERS,
    ROOT,
    HostCompiler,
    find_tool,
    missing,
    require_cuda_include,
    run_program,
    write_headers,
)
from relation_truth import TRUTH
from tolerances import error

from fastkd import _library, functional
from fastkd._divergences import ENTRIES
from fastkd.ops import triplet

# One of each kind, and the losses of targets that go with it: see rows_main.cpp. A hard loss takes the same ways whatever
# the divergence: with one that is centred, one that is not, one of two sums and one without a softmax.
DIVERGENCES = {
    "ForwardKL": (0, 1),
    "SoftCrossEntropy": (0,),
    "JensenShannon": (0, 1),
    "NegativeLogAcceptance": (0, 1),
    "AlphaBeta": (0,),
    "BernoulliKL": (0, 1),
    "NonTargetKL": (2, 3),
}
NUMBERS = {entry.functor: str(number) for number, entry in enumerate(ENTRIES)}
STORAGES = ["BFloat16", "Half", "Float", "Double"]  # of the pairs
HALF, BFLOAT16, FLOAT, DOUBLE = "0", "1", "2", "3"
# (dtype, N, V, rows side by side, clusters): each takes another way through the kernels
SHAPES = {
    "a warp a row, several rows a block": (FLOAT, 9, 10, 1, 1),
    "rows that begin at every alignment": (BFLOAT16, 9, 131, 1, 1),
    "a block a row": (HALF, 3, 4104, 1, 1),
    "a cluster a row, of parts that differ": (FLOAT, 2, 20003, 1, 1),
    "several kernels, several blocks a row": (BFLOAT16, 2, 20001, 1, 0),
    "maps, several warps a block": (HALF, 86, 21, 43, 1),
    "maps, more classes than are kept": (FLOAT, 26, 301, 13, 0),
}
# (schedule, dtype, N, D, whether some rows are alike, rows of a block of triples, multiprocessors, how many
# rows the device is told are there or -1, whether they have weights)
RELATIONS = {
    "pairs, one tile": ("pairs", HALF, 20, 9, 1, 0, 4, -1, 0),
    "pairs, a sum in two parts": ("pairs", FLOAT, 70, 40, 1, 0, 4, -1, 0),
    "pairs, several tiles a block": ("pairs", BFLOAT16, 135, 9, 1, 0, 1, -1, 0),
    "pairs, more features than a block has, and than are copied ahead": ("pairs", BFLOAT16, 10, 530, 0, 0, 4, -1, 0),
    "pairs, in double": ("pairs", DOUBLE, 70, 17, 1, 0, 1, -1, 0),
    "pairs, tiles of no rows": ("pairs", FLOAT, 200, 9, 1, 0, 4, 70, 1),
    "pairs, weights": ("pairs", HALF, 70, 9, 1, 0, 4, -1, 1),
    "pairs, fewer rows, in double": ("pairs", DOUBLE, 135, 17, 1, 0, 1, 64, 1),
    "pairs, one row": ("pairs", BFLOAT16, 70, 9, 0, 0, 4, 1, 1),
    "pairs, no row": ("pairs", FLOAT, 70, 9, 0, 0, 4, 0, 0),
    "angles, one block of rows": ("angles", FLOAT, 70, 5, 0, 1024, 4, -1, 0),
    "angles, a large spread of distances": ("angles", BFLOAT16, 40, 33, 1, 1024, 4, -1, 0),
    "angles, two blocks of rows": ("angles", FLOAT, 70, 5, 1, 64, 2, -1, 0),
    "angles, fewer rows": ("angles", FLOAT, 140, 5, 1, 1024, 4, 35, 0),
    "angles, a block of no rows": ("angles", FLOAT, 140, 5, 0, 64, 2, 60, 0),
    "angles, no row": ("angles", FLOAT, 70, 5, 0, 64, 2, 0, 0),
    "angles, in double": ("angles", DOUBLE, 70, 5, 1, 64, 2, -1, 0),
}


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    return HostCompiler(tmp_path_factory.mktemp("cuda"))


def program(compiler, build):
    """csrc/testing/rows_main.cpp with the kernels, all instrumented alike."""
    return compiler.program(
        "rows",
        build,
        "reduce",
        "rows_statistics -DFASTKD_SINGLE",
        *(f"rows -DFASTKD_SINGLE -DFASTKD_DIVERGENCE={name}" for name in DIVERGENCES),
    )


def relations_program(compiler, build):
    return compiler.program(
        "relations", build, "reduce", "angles", *(f"pairs -DFASTKD_PAIRS_STORAGE={name}" for name in STORAGES)
    )


@pytest.mark.sanitizers
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_are_clean(compiler, build, shape, divergence):
    """No access out of bounds or misaligned, no undefined behaviour, no race; right in every order."""
    dtype, N, V, inner, clusters = SHAPES[shape]
    if build == "thread":
        V = min(V, 6001)
    orders = ORDERS if build == "plain" else ("random",)
    for order, targets in itertools.product(orders, DIVERGENCES[divergence]):
        arguments = [NUMBERS[divergence], dtype, N, V, inner, clusters, targets, *ORDERS[order]]
        assert run_program([program(compiler, build), *map(str, arguments)]) == "right\n", (order, targets)


@pytest.mark.sanitizers
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("build", ["address", "thread"])
def test_the_kernels_of_relations_are_clean(compiler, build, relation):
    """The orders of threads: below."""
    arguments = [*map(str, RELATIONS[relation]), *ORDERS["random"]]
    assert run_program([relations_program(compiler, build), *arguments]) == "right\n"


def features_program(compiler, build):
    return compiler.program("features", build, "reduce", "features", "attention")


# (of csrc/testing/dist_main.cpp: dtype, N, V, rows side by side, whether rows are masked)
DISTS = {
    "a block a row": (FLOAT, 9, 300, 1, 1),
    "a warp a row, several chunks": (BFLOAT16, 260, 33, 1, 0),
    "maps, a thread a row": (HALF, 86, 21, 43, 1),
    "in double": (DOUBLE, 20, 70, 1, 1),
}


@pytest.mark.sanitizers
@pytest.mark.parametrize("shape", DISTS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_of_dist_are_clean(compiler, build, shape):
    program = compiler.program("dist", build, "dist")
    for order in ORDERS if build == "plain" else ("random",):
        assert run_program([program, *map(str, DISTS[shape]), *ORDERS[order]]) == "right\n", order


# (of csrc/testing/features_main.cpp, dtype, whether rows are masked)
FEATURES = {
    "plain, flat": (0, FLOAT, 0),
    "plain, of halves, flat": (0, HALF, 0),
    "plain, masked": (0, BFLOAT16, 1),
    "l2": (1, FLOAT, 1),
    "standardized": (2, BFLOAT16, 0),
    "standardized, masked": (2, FLOAT, 1),
    "cosine in double": (3, DOUBLE, 1),
    "smooth L1, flat": (5, BFLOAT16, 0),
    "smooth L1 of l2": (6, DOUBLE, 1),
    "smooth L1, standardized": (7, FLOAT, 1),
    "attention": (4, FLOAT, 0),
    "attention of halves": (4, BFLOAT16, 0),
}


@pytest.mark.sanitizers
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("build", ["address", "thread"])
def test_the_kernels_of_features_are_clean(compiler, build, feature):
    """The orders of threads: below."""
    arguments = [*map(str, FEATURES[feature]), *ORDERS["random"]]
    assert run_program([features_program(compiler, build), *arguments]) == "right\n"


def standardize_program(compiler, build):
    return compiler.program("standardize", build, "reduce", "standardize")


# (dtype, N, V, rows side by side)
STANDARDIZED = {
    "several rows a block": (FLOAT, 9, 10, 1),
    "rows that begin at every alignment": (BFLOAT16, 9, 131, 1),
    "a block a row": (HALF, 3, 4104, 1),
    "maps": (HALF, 86, 21, 43),
    "maps, runs of few rows": (FLOAT, 20, 30, 5),
    "maps, many classes": (BFLOAT16, 26, 301, 13),
}


@pytest.mark.sanitizers
@pytest.mark.parametrize("shape", STANDARDIZED)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_that_standardize_are_clean(compiler, build, shape):
    for order in ORDERS if build == "plain" else ("random",):
        arguments = [*map(str, STANDARDIZED[shape]), *ORDERS[order]]
        assert run_program([standardize_program(compiler, build), *arguments]) == "right\n", order


def complement_program(compiler, build):
    return compiler.program("complement", build, "reduce", "complement")


# (dtype, N, V, K); the last has more classes than there are bits
COMPLEMENTS = {
    "several rows a block": (FLOAT, 9, 10, 3),
    "rows that begin at every alignment": (BFLOAT16, 9, 131, 64),
    "a block a row": (HALF, 3, 4104, 64),
    "more classes than bits": (FLOAT, 2, 300001, 12),
}


@pytest.mark.sanitizers
@pytest.mark.parametrize("shape", COMPLEMENTS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_of_the_complement_are_clean(compiler, build, shape):
    for order in ORDERS if build == "plain" else ("random",):
        arguments = [*map(str, COMPLEMENTS[shape]), *ORDERS[order]]
        assert run_program([complement_program(compiler, build), *arguments]) == "right\n", order


def of_rows_program(compiler, build):
    return compiler.program("of_rows", build, "reduce", "head -DFASTKD_SINGLE", "parts -DFASTKD_SINGLE")


# (of csrc/testing/of_rows_main.cpp, dtype, N, V, rows side by side, clusters)
OF_ROWS = {
    "weights, a block a row": (0, FLOAT, 5, 300, 1, 1),
    "weights, more classes than are kept": (0, BFLOAT16, 2, 13001, 1, 0),
    "weights, maps": (0, HALF, 86, 21, 43, 1),
    "weights, maps, more classes than are kept": (0, FLOAT, 26, 301, 13, 0),
    "parts, a warp a row": (1, FLOAT, 9, 10, 1, 1),
    "parts, a block a row": (1, BFLOAT16, 3, 4104, 1, 1),
    "parts, maps": (1, HALF, 86, 21, 43, 1),
    "parts of coins": (2, FLOAT, 5, 131, 1, 1),
}


@pytest.mark.sanitizers
@pytest.mark.parametrize("shape", OF_ROWS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_of_weights_and_parts_are_clean(compiler, build, shape):
    for order in ORDERS if build == "plain" else ("random",):
        arguments = [*map(str, OF_ROWS[shape]), *ORDERS[order]]
        assert run_program([of_rows_program(compiler, build), *arguments]) == "right\n", order


def strips_program(compiler, build):
    return compiler.program("strips", build, "pkt", "triplet")


SINGLE, TWICE = "0", "1"  # float, double
# (op, dtype, N, classes, first row, rows, whether weights of triplets are wanted)
STRIPS = {
    "pkt, columns that lie together": ("pkt", SINGLE, 260, 1, 0, 40, 1),
    "pkt, rows that begin at every alignment": ("pkt", SINGLE, 201, 1, 10, 33, 1),
    "pkt, in double": ("pkt", TWICE, 132, 1, 0, 132, 1),
    "triplet, few positives": ("triplet", SINGLE, 40, 9, 0, 40, 1),
    "triplet, many positives of some rows": ("triplet", SINGLE, 300, 2, 7, 8, 1),
    "triplet, more positives than are sorted at a time": ("triplet", TWICE, 2300, 2, 5, 2, 1),
    "triplet, in double": ("triplet", TWICE, 40, 4, 3, 20, 1),
    "triplet, no negatives": ("triplet", SINGLE, 20, 1, 0, 20, 1),
    "triplet, the loss alone": ("triplet", SINGLE, 40, 4, 0, 40, 0),
}


@pytest.mark.sanitizers
@pytest.mark.parametrize("strip", STRIPS)
@pytest.mark.parametrize("build", BUILDS)
def test_the_kernels_of_strips_are_clean(compiler, build, strip):
    for order in ORDERS if build == "plain" else ("random",):
        arguments = [*map(str, STRIPS[strip]), *ORDERS[order]]
        assert run_program([strips_program(compiler, build), *arguments]) == "right\n", order


@pytest.fixture
def cusim():
    """The library that the backend cuda-cusim runs."""
    if not elsewhere.CUSIM.exists():
        require_cuda_include()
        pytest.fail("FASTKD_TESTING=1 did not build _cusim.so")
    library = ctypes.CDLL(str(elsewhere.CUSIM))
    yield library
    library.cusim_order(0, 0)
    angles_block(library).value = 0
    for attribute in (16, 75, 97):
        library.cusim_device(attribute, -1)


def angles_block(cusim):
    """How many rows the triples take together: so many that a host is slow with several blocks."""
    return ctypes.c_int.in_dll(cusim, "fastkd_cusim_angles_block")


@pytest.mark.parametrize("older", [False, True], ids=["clusters", "no clusters"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", cases.KINDS)
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


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", cases.KINDS)
def test_rows_of_several_blocks_without_packs(cusim, name, reduction):
    """Double, and classes that are not neighbours, are read one by one, by all blocks of a row."""
    for dtype, step in ((torch.float64, 1), (torch.float64, 2), (torch.float32, 2)):
        student, teacher = (torch.randn(2, 9001 * step, dtype=dtype)[:, ::step] for _ in range(2))
        with use("cuda-cusim"):
            found = test_rows.run(cases.LOSSES[name], student, teacher, reduction=reduction)
        with use("torch"):
            right = test_rows.run(cases.LOSSES[name], student.double(), teacher.double(), reduction=reduction)
        for x, y in zip(found, right, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-9 if dtype is torch.float64 else 1e-4, atol=1e-8)


@pytest.mark.parametrize("name", cases.LOSSES)
def test_a_masked_row_of_several_blocks(cusim, poisoned, name):
    """Without clusters, as above, a long row is several blocks', whose sums lie in memory: of a masked row none."""
    cusim.cusim_device(75, 8)
    cusim.cusim_device(97, 48 << 10)
    student, teacher = torch.randn(2, 3, 33000)
    mask = torch.tensor([True, False, True])
    with use("cuda-cusim"):
        for reduction in ("none", "batchmean"):
            loss, grad = test_rows.run(cases.LOSSES[name], student, teacher, mask=mask, reduction=reduction)
            assert loss.isfinite().all()
            assert grad.isfinite().all()
            assert not grad[1].any()


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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "pkt"])
def test_relations_in_every_order_of_threads(cusim, name, dtype, order):
    """Right, and the same bits. Several tiles a block of threads, several blocks of rows, a rest; some
    rows alike. cudaDevAttrMultiProcessorCount is 16."""
    student, teacher = relation_cases.Case("orders", "", 150, (9, 5), relation_cases.repeated).inputs(dtype)
    cusim.cusim_device(16, 1)
    angles_block(cusim).value = 64
    with use("cuda-cusim"):
        plain = test_relations.run(relation_cases.LOSSES[name], student, teacher)
        cusim.cusim_order(*map(int, ORDERS[order]))
        again = test_relations.run(relation_cases.LOSSES[name], student, teacher)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])
    for out, ref in zip(plain, TRUTH[name](student, teacher), strict=True):
        assert error(out, ref) <= test_relations.PROMISED.get(dtype, 5e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_triplets_in_every_order_of_threads(cusim, monkeypatch, dtype, order):
    """The same bits. Several strips; some rows alike, some nearly."""
    monkeypatch.setattr(triplet, "BLOCK", {"cpu": 1500, "cuda": 1500})
    student = torch.randn(60, 7, dtype=dtype)
    student[1::6], student[2::6] = student[::6], student[::6] + 0.01
    options = {"labels": torch.arange(60) % 5, "return_active": True}
    found = []
    with use("cuda-cusim"):
        for mode in ("forward", order):
            cusim.cusim_order(*map(int, ORDERS[mode]))
            leaf = student.clone().requires_grad_()
            loss, active = functional.relational_triplet(leaf, None, **options)
            found.append((loss, active, *torch.autograd.grad(loss, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", feature_cases.LOSSES)
def test_features_in_every_order_of_threads(cusim, name, order):
    """Right, and the same bits. cudaDevAttrMultiProcessorCount is 16."""
    shapes = [(37, 50), (3, 5003), (2, 40, 9, 9), (2, 16, 4, 8)]
    students, teachers = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    cusim.cusim_device(16, 1)
    found = []
    with use("cuda-cusim"):
        for mode in ("forward", order):
            cusim.cusim_order(*map(int, ORDERS[mode]))
            leaves = [x.clone().requires_grad_() for x in students]
            loss = feature_cases.LOSSES[name](leaves, teachers)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for student, teacher, grad in zip(students, teachers, found[0][1:], strict=True):
        assert error(grad, feature_truth.truth(name, student, teacher)[1]) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", [None, relation_cases.clusters], ids=["one spread", "clusters"])
def test_blocks_of_triples_change_no_number(cusim, make, dtype):
    """The spread is decided over all blocks."""
    case = relation_cases.Case("blocks", "", 140, (8, 8), make)
    student, teacher = case.inputs(dtype)
    found = []
    for block in (0, 64, 128):
        angles_block(cusim).value = block
        with use("cuda-cusim"):
            found.append(test_relations.run(relation_cases.LOSSES["rkd_angle"], student, teacher, delta=0.3))
    for loss, grad in found[1:]:
        assert error(loss, found[0][0]) <= 1e-6
        assert error(grad, found[0][1]) <= 1e-6


# ---- what the compiler made of them


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
