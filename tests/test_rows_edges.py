"""The logit losses at their edges: impossible classes, NaN, masked rows, and numbers that are divided by."""

import cases
import pytest
import torch
from rows_checks import REDUCTIONS, logit_size, right, run
from tolerances import FLOOR, error
from truth import upstream_like

from fastkd import functional


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)], ids=str)
@pytest.mark.parametrize("name", cases.LOSSES)
def test_a_block_of_impossible_classes_on_one_side(backend, name, temperatures, side, reduction):
    """Never NaN: +inf where a class is impossible for one and the divergence asks for it of the other."""
    student, teacher = torch.randn(2, 2500) - 200, torch.randn(2, 2500) - 200
    (student if side == "student" else teacher)[:, :1024] = -torch.inf
    options = {"reduction": reduction, "temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    loss, grad = run(cases.LOSSES[name], student, teacher, **options)
    endless = {"student": ("kl_div", "soft_cross_entropy"), "teacher": ("reverse_kl_div",)}[side]
    assert bool(loss.isinf().all()) == (name in (*endless, "symmetric_kl_div", "adaptive_kl_div"))
    loss_ref, grad_ref = right(name, student, teacher, **options)
    tolerance = 2 * FLOOR[torch.float32] * logit_size(student)
    assert error(loss, loss_ref) < tolerance
    assert error(grad, grad_ref) < tolerance


@pytest.mark.parametrize("V", [7, 1025, 33000])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_a_student_without_a_possible_class(backend, name, V):
    """The loss is infinite, and no finite step changes that; the other rows are as they were."""
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    others = run(cases.LOSSES[name], student, teacher, reduction="none")
    student[1] = -torch.inf
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction="none")
    assert loss[1] == torch.inf
    assert not grad[1].any()
    assert torch.equal(loss[::2], others[0][::2])
    assert torch.equal(grad[::2], others[1][::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("V", [7, 33000])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_nothing_is_read_before_it_is_written(kernel, poisoned, name, V, dtype):
    """Nor left unwritten: a masked row has no statistics, and a gradient of 0."""
    student, teacher = torch.randn(2, 3, V).to(dtype)
    mask = torch.tensor([True, False, True])
    for reduction in ("none", "batchmean"):
        loss, grad = run(cases.LOSSES[name], student, teacher, mask=mask, reduction=reduction)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[1].any()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_normalizer_tensors_of_any_shape_and_dtype(backend, dtype, shape):
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    loss = functional.kl_div(student, teacher, normalizer=torch.full(shape, 7, dtype=dtype))
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert error(loss, functional.kl_div(student, teacher, normalizer=7)) < FLOOR[torch.float32]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_masks_and_weights_broadcast_to_the_rows(backend, shape, reduction):
    student, teacher = torch.randn(3, 5, 20), torch.randn(3, 5, 20)
    weight = torch.rand(shape)
    mask = weight < weight.max() if weight.numel() > 1 else torch.ones(shape, dtype=torch.bool)
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction, mask=mask, weight=weight)
    whole = {"mask": mask.expand(3, 5).contiguous(), "weight": weight.expand(3, 5).contiguous()}
    expected = run(functional.kl_div, student, teacher, reduction=reduction, **whole)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    for wrong in ((15,), (3, 5, 1), (5, 3), (2, 1)):
        with pytest.raises(ValueError, match=r"^mask: a shape that broadcasts to \[3, 5\] wanted, one per row; got"):
            functional.kl_div(student, teacher, mask=torch.ones(wrong, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"^weight: a shape that broadcasts to \[3, 5\] wanted, one per row; got"):
            functional.kl_div(student, teacher, weight=torch.ones(wrong))


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.zeros(1)], ids=["int", "float", "int64", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_normalizer_of_zero_is_for_batches_where_no_row_counts(backend, dtype, zero):
    """As a number or as a tensor: transformers hands a Trainer's loss either."""
    student, teacher = torch.randn(4, 20).to(dtype), torch.randn(4, 20)
    loss, grad = run(functional.kl_div, student, teacher, mask=torch.zeros(4, dtype=torch.bool), normalizer=zero)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(student))
    some = torch.tensor([True, False, True, True])
    assert functional.kl_div(student, teacher, mask=some, normalizer=zero) == torch.inf
    assert functional.kl_div(student[:0], teacher[:0], normalizer=zero) == 0
    with pytest.raises(ValueError, match=r"^normalizer: 0 is wanted only where no row counts"):
        functional.kl_div(student, teacher, normalizer=zero)


@pytest.mark.parametrize("name", ["skew_kl_div", "skew_reverse_kl_div", "total_variation"])
def test_classes_that_one_side_cannot_give_are_like_any_other(backend, name):
    student, teacher, _ = cases.Case("one-sided", "", (4, 50)).inputs(torch.float32)
    student[:, ::3], teacher[:, 1::3] = -torch.inf, -torch.inf
    loss, grad = run(getattr(functional, name), student, teacher)
    loss_ref, grad_ref = right(name, student, teacher)
    assert error(loss, loss_ref) <= 8 * FLOOR[torch.float32]
    assert error(grad, grad_ref) <= 16 * FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_student_without_a_possible_class_the_teacher_has(backend, reduction, dtype):
    """p = 0 where q > 0: +inf, as the mathematics says, and a finite gradient."""
    student, teacher = torch.randn(4, 20).to(dtype), torch.randn(4, 20).to(dtype)
    student[1, 3] = -torch.inf
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction)
    assert (loss if reduction == "batchmean" else loss[1]) == torch.inf
    assert grad.isfinite().all()
    expected = torch.softmax(student.double(), -1) - torch.softmax(teacher.double(), -1)
    expected = expected * (upstream_like(loss).double()[:, None] if reduction == "none" else 1 / 4)
    assert error(grad, expected) < 2 * FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_rows_without_any_possible_class(backend, name, side, reduction):
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    plain = run(cases.LOSSES[name], student, teacher, reduction=reduction)
    if side != "teacher":
        student[1] = -torch.inf
    if side != "student":
        teacher[1] = -torch.inf
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction=reduction)
    assert torch.equal(grad[1], torch.zeros(20))
    assert torch.equal(grad[::2], plain[1][::2])
    if reduction == "none":
        assert loss[1] == (torch.inf if side == "student" else 0.0)
        assert torch.equal(loss[::2], plain[0][::2])
    else:
        assert not loss.isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_nan_and_inf_propagate(backend, name, side, value):
    """A row that cannot be computed says so, and says it of itself alone."""
    student, teacher = torch.randn(3, 2000), torch.randn(3, 2000)
    plain = run(cases.LOSSES[name], student, teacher, reduction="none")
    (student if side == "student" else teacher)[1, 1500] = value
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction="none")
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    assert torch.equal(loss[::2], plain[0][::2])
    assert torch.equal(grad[::2], plain[1][::2])


def test_masked_rows_get_exactly_nothing(backend):
    student, teacher, options = cases.Case("masked rows", "", (9, 50), options={"mask": cases.some_rows}).inputs(
        torch.float32
    )
    for reduction in REDUCTIONS:
        loss, grad = run(functional.kl_div, student, teacher, reduction=reduction, **options)
        assert torch.equal(grad[~options["mask"]], torch.zeros_like(grad[~options["mask"]]))
        assert grad[options["mask"]].abs().sum(-1).min() > 0
        if reduction == "none":
            assert torch.equal(loss == 0, ~options["mask"])


def test_a_probability_that_vanishes_where_the_teacher_has_none(backend):
    """p = e^-200 is 0 in float32, but not nothing: reverse KL is +inf there all the same."""
    student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    student[0, 3], teacher[0, 3] = -200.0, -torch.inf
    loss, grad = run(functional.reverse_kl_div, student, teacher, reduction="none")
    assert loss[0] == torch.inf
    assert torch.equal(grad[0], torch.zeros(5))
    assert loss[1] == 0
