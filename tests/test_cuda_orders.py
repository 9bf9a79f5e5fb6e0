"""The CUDA kernels without a GPU: what the backend cuda-cusim computes, in every order of threads."""

import ctypes

import cases
import elsewhere
import feature_cases
import feature_truth
import pytest
import relation_cases
import relation_checks
import rows_checks
import torch
from conftest import use
from cuda_tools import ORDERS, require_cuda_include
from relation_truth import TRUTH
from tolerances import error

from fastkd import functional
from fastkd.ops import triplet


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
                rows_checks.check(name, case, torch.float32, "batchmean", False)
                rows_checks.check(name, case, torch.bfloat16, "none", False)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("name", cases.KINDS)
def test_rows_of_several_blocks_without_packs(cusim, name, reduction):
    """Double, and classes that are not neighbours, are read one by one, by all blocks of a row."""
    for dtype, step in ((torch.float64, 1), (torch.float64, 2), (torch.float32, 2)):
        student, teacher = (torch.randn(2, 9001 * step, dtype=dtype)[:, ::step] for _ in range(2))
        with use("cuda-cusim"):
            found = rows_checks.run(cases.LOSSES[name], student, teacher, reduction=reduction)
        with use("torch"):
            right = rows_checks.run(cases.LOSSES[name], student.double(), teacher.double(), reduction=reduction)
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
            loss, grad = rows_checks.run(cases.LOSSES[name], student, teacher, mask=mask, reduction=reduction)
            assert loss.isfinite().all()
            assert grad.isfinite().all()
            assert not grad[1].any()


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_threads_changes_no_bit(cusim, order):
    student, teacher = torch.randn(3, 20003), torch.randn(3, 20003)
    with use("cuda-cusim"):
        cusim.cusim_order(0, 0)
        plain = rows_checks.run(cases.LOSSES["js_div"], student, teacher)
        cusim.cusim_order(*map(int, ORDERS[order]))
        again = rows_checks.run(cases.LOSSES["js_div"], student, teacher)
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
        plain = relation_checks.run(relation_cases.LOSSES[name], student, teacher)
        cusim.cusim_order(*map(int, ORDERS[order]))
        again = relation_checks.run(relation_cases.LOSSES[name], student, teacher)
    assert torch.equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])
    for out, ref in zip(plain, TRUTH[name](student, teacher), strict=True):
        assert error(out, ref) <= relation_checks.PROMISED.get(dtype, 5e-3)


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
            found.append(relation_checks.run(relation_cases.LOSSES["rkd_angle"], student, teacher, delta=0.3))
    for loss, grad in found[1:]:
        assert error(loss, found[0][0]) <= 1e-6
        assert error(grad, found[0][1]) <= 1e-6
