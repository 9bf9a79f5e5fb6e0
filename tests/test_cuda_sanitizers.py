"""The CUDA kernels without a GPU, run on the host under sanitizers and in several orders of threads.

Their numbers are tested with everyone's, in test_rows.py, test_relations.py and beside them, as the
backend cuda-cusim.
"""

import itertools

import pytest
from cuda_tools import BUILDS, ORDERS, HostCompiler, run_program

from fastkd._divergences import ENTRIES

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
    """The orders of threads: tests/test_cuda_orders.py."""
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
    """The orders of threads: tests/test_cuda_orders.py."""
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
