"""dist_loss: values and gradients against its formula in extended precision."""

import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from dist_checks import DTYPES, check, logits, run, some_rows
from dist_truth import dist_truth
from tolerances import FLOOR, NEAR_CONVERGENCE, error

import fastkd
from fastkd.functional import dist_loss

SHAPES = {
    "digits": (32, 10),
    "two_classes": (5, 2),
    "one_class": (5, 1),
    "one_row": (1, 40),
    "odd": (37, 333),
    "one_block": (20, 512),
    "block_and_one": (3, 1025),
    "sequence": (2, 30, 65),
    "many_dims": (2, 1, 2, 1, 3, 1, 2, 9),
    "vector": (50,),
    "many_chunks": (700, 33),
    "long_rows": (3, 9001),
    "no_rows": (0, 7),
    "no_rows_in_the_middle": (3, 0, 7),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_formula(backend, shape, dtype, masked):
    student, teacher = logits(shape, dtype)
    options = {"mask": some_rows(shape)} if masked else {}
    check(student, teacher, upstream=512.0, **options)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0), (0.0, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2, 1e-30])
def test_options(backend, temperature, weights, eps):
    student, teacher = logits((50, 60))
    check(student, teacher, temperature=temperature, inter_weight=weights[0], intra_weight=weights[1], eps=eps)


@pytest.mark.parametrize("shape", [(37, 333), (2, 30, 65), (50,), (700, 33), (3, 0, 7), (2, 40, 3, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standardized_logits(backend, shape, masked, dtype):
    """Rows of few classes too, of which some are impossible or equal; and what lies far from 0."""
    student, teacher = logits(shape, dtype)
    dim = 1 if len(shape) == 4 else -1
    if student.numel() and len(shape) > 1:
        student, teacher = student + 64, teacher - 128
        for x, row in ((student, 0), (teacher, 1)):
            x.movedim(dim, -1)[..., row : row + 1, ::3] = -torch.inf
        student.movedim(dim, -1)[..., 2, :] = 0.25
    options = {"mask": some_rows((shape[0], *shape[2:], 1) if dim == 1 else shape)} if masked else {}
    # deviations, and what the gradient is less by them, have roundings of their own
    check(student, teacher, upstream=512.0, tolerance=4, standardize=True, temperature=2.0, dim=dim, **options)


def test_standardized_logits_in_slabs_of_any_size(kernel):
    from fastkd.ops import standardize

    student, teacher = logits((6, 5, 33))
    whole = run(student, teacher, standardize=True)
    for most in (1, 4, 7):
        with unittest.mock.patch.dict(standardize.SLAB, {"cpu": most * 33}):
            for found, wanted in zip(run(student, teacher, standardize=True), whole, strict=True):
                # on a GPU the order of a row's sums depends on where in memory it begins
                assert error(found, wanted) <= (FLOOR[torch.float32] if kernel.startswith("cuda") else 0)


@pytest.mark.parametrize("near", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keeps_its_digits_near_convergence(backend, dtype, near):
    """Down to a loss below 5e-7; less eps, of which 1 - ab / (|a| |b| + eps) has nearly nothing but."""
    student, teacher = logits((200, 100), dtype, near=near)
    loss, grad = run(student, teacher, eps=1e-30)
    loss_ref, grad_ref = dist_truth(student, teacher, eps=1e-30)
    digits = 1.0 if dtype is torch.float32 else 1e-6
    assert error(loss, loss_ref) <= digits * NEAR_CONVERGENCE * (1e-3 / near if near < 1e-3 else 1)
    rounding = digits * 2e-7 / near if dtype is torch.float32 else 1e-15 / near
    assert error(grad, grad_ref) <= 20 * rounding


def test_equal_sides_have_no_loss_and_no_gradient(backend):
    student, _ = logits((30, 50))
    loss, grad = run(student, student.clone(), eps=1e-30)
    assert loss <= 1e-12
    assert grad.abs().max() <= 1e-10


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(backend, dtype, teacher_dtype):
    check(*logits((20, 300), dtype, teacher_dtype), upstream=512.0)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "slice": lambda x: F.pad(x, (3, 2))[:, 3:-2],
    "every_other_row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every_other_class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["student", "teacher", "both"])
def test_any_layout(backend, layout, of):
    student, teacher = logits((70, 90))
    student = LAYOUTS[layout](student) if of != "teacher" else student
    teacher = LAYOUTS[layout](teacher) if of != "student" else teacher
    check(student, teacher)


@pytest.mark.parametrize("shape", [(2, 7, 11, 19), (1, 5, 60, 40), (2, 1100, 3, 3), (3, 40, 2, 2), (4, 6, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_maps(backend, shape, masked, dtype):
    student, teacher = logits(shape, dtype)
    options = {"mask": some_rows((shape[0], *shape[2:], 1))} if masked else {}
    check(student, teacher, dim=1, **options)


def test_maps_that_lie_otherwise(backend):
    student, teacher = logits((2, 7, 11, 19))
    check(student, teacher.to(memory_format=torch.channels_last), dim=1)
    check(student.to(memory_format=torch.channels_last), teacher.to(memory_format=torch.channels_last), dim=1)


@pytest.mark.parametrize("maps", [False, True])
def test_masked_rows_may_hold_anything(backend, maps):
    student, teacher = logits((2, 40, 6))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 3] = mask[1, 7] = mask[0, 0] = False
    loss_ref, grad_ref = run(student, teacher, mask=mask)
    for i, j in ((0, 3), (1, 7), (0, 0)):
        student[i, j], teacher[i, j] = torch.nan, torch.inf
    if maps:
        student, teacher = (x.movedim(-1, 1).contiguous() for x in (student, teacher))
        loss, grad = run(student, teacher, mask=mask, dim=1)
        grad = grad.movedim(1, -1)
    else:
        loss, grad = run(student, teacher, mask=mask)
        assert torch.equal(loss, loss_ref)
        assert torch.equal(grad, grad_ref)
    torch.testing.assert_close(loss, loss_ref)
    torch.testing.assert_close(grad, grad_ref)
    assert (grad[~mask] == 0).all()


def test_a_mask_broadcasts(backend):
    student, teacher = logits((4, 5, 6))
    mask = torch.tensor([True, False, True, True, False])
    loss, grad = run(student, teacher, mask=mask)
    loss_ref, grad_ref = run(student[:, mask], teacher[:, mask])
    torch.testing.assert_close(loss, loss_ref)
    torch.testing.assert_close(grad[:, mask], grad_ref)
    assert (grad[:, ~mask] == 0).all()


def test_without_a_row_that_counts_there_is_no_loss(backend, poisoned):
    student, teacher = logits((6, 30))
    student[2] = torch.nan
    loss, grad = run(student, teacher, mask=torch.zeros(6, dtype=torch.bool))
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("V", [3, 7, 100, 1000, 9000])
def test_a_constant_row_has_correlation_0(backend, side, V):
    sides = list(logits((4, V)))
    sides[side][1:3] = torch.tensor([[0.1], [1e3]])
    check(*sides, eps=1e-30, tolerance=4)
    loss, grad = run(*(x[1:3] for x in sides), intra_weight=0.0, eps=1e-30)
    assert loss == 1
    assert (grad == 0).all()


@pytest.mark.parametrize("side", [0, 1])
def test_a_constant_column_has_correlation_0(backend, side):
    sides = list(logits((300, 30)))
    sides[side][:] = sides[side][:1]
    loss, grad = run(*sides, inter_weight=0.0, eps=1e-30)
    assert loss == 1
    assert (grad == 0).all()
    sides = list(logits((300, 30)))
    sides[side][:, 4] = -torch.inf
    check(*sides, eps=1e-30, tolerance=4)
    _, grad = run(*sides)
    assert side or (grad[:, 4] == 0).all()


def test_what_differs_by_rounding_errors_alone_is_constant(backend):
    """The rows hold the same probabilities in another order, which are summed in another."""
    order = torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(99)]) for _ in range(200)])
    teacher = torch.randn(100)[order]
    student = torch.randn(200, 100)
    check(student, teacher, eps=1e-30, constant=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_rows_without_any_possible_class(backend, side):
    sides = list(logits((40, 30)))
    sides[side][[0, 7]] = -torch.inf
    check(*sides)
    if side == 0:
        assert (run(*sides)[1][[0, 7]] == 0).all()


def test_impossible_classes(backend):
    student, teacher = logits((40, 30))
    student[torch.rand(40, 30) < 0.3] = -torch.inf
    teacher[torch.rand(40, 30) < 0.3] = -torch.inf
    check(student, teacher)


def test_large_and_shifted_logits(backend):
    student, teacher = logits((40, 300))
    check(student * 100, teacher * 100, tolerance=8)
    check((student * 8).round() / 8 + 1024, (teacher * 8).round() / 8 - 2048, tolerance=4)
    near = (teacher * 64).round() / 64
    loss, grad = run(near + 1024, near, eps=1e-30)  # the same probabilities
    assert loss <= 1e-9
    assert grad.abs().max() <= 1e-7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_hidden(backend, bad, side):
    sides = list(logits((40, 30)))
    sides[side][3, 4] = bad
    loss, grad = run(*sides)
    assert loss.isnan()
    assert grad[3].isnan().all()


def test_the_module(backend):
    student, teacher = logits((4, 6, 5))
    module = fastkd.DISTLoss(inter_weight=2.0, intra_weight=0.5, temperature=3.0, eps=1e-6, dim=1)
    mask = some_rows((4, 5, 1))
    options = {"inter_weight": 2.0, "intra_weight": 0.5, "eps": 1e-6, "dim": 1}
    torch.testing.assert_close(module(student, teacher, mask=mask), dist_loss(student, teacher, temperature=3.0, mask=mask, **options))  # fmt: skip
    torch.testing.assert_close(module(student, teacher, temperature=1.5), dist_loss(student, teacher, temperature=1.5, **options))  # fmt: skip
