"""Heads whose classes are split over ranks: losses of whole heads, in values and gradients, on every backend."""

import math

import cases
import pytest
import split_ranks
import torch
from split_ranks import Group, on_ranks, upstream_of
from tolerances import FLOOR, error

from fastkd import LinearLogits, functional
from fastkd.ops import group_forms

N, H, V = 11, 6, 37
LOSSES = [name for name in cases.LOSSES if name != "adaptive_kl_div"]
BOUNDS = (0, 5, 20, 37)


@pytest.fixture(autouse=True)
def threads():
    with split_ranks.threads():
        yield


@pytest.fixture(autouse=True)
def several_slabs(monkeypatch):
    monkeypatch.setattr(group_forms, "ROWS", 1)
    rows_of_three_ranks = 3
    monkeypatch.setitem(group_forms.SLAB_BYTES, "cpu", rows_of_three_ranks * 4 * math.ceil(group_forms.CLASSES / 3))


def given(dtype=torch.float32, size=2.0):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return (size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "hidden": draw(N, H),
        "weight": draw(V, H) / 2,
        "bias": draw(V),
        "teacher": draw(N, 4),
        "teacher_head": draw(V, 4),
    }


def leaf(x):
    return x.detach().clone().requires_grad_()


def whole(loss_function, x, forms, **options):
    """Loss and gradients by whole logits in float64."""
    hidden, weight, bias = (leaf(x[name].double()) for name in ("hidden", "weight", "bias"))
    student = LinearLogits(hidden, weight, bias, **forms).logits()
    teacher = LinearLogits(x["teacher"].double(), x["teacher_head"].double()).logits()
    loss = loss_function(student, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias), upstream_of(loss))


def of_ranks(loss_function, x, forms, group=None, bounds=BOUNDS, teacher_is_head=True, **options):
    """The same by ranks that have some of the classes each."""
    group, results = group or Group(len(bounds) - 1), {}

    def of_rank(rank):
        own = slice(bounds[rank], bounds[rank + 1])
        hidden, weight, bias = leaf(x["hidden"]), leaf(x["weight"][own]), leaf(x["bias"][own])
        teacher = LinearLogits(x["teacher"], x["teacher_head"][own])
        teacher = teacher if teacher_is_head else teacher.logits()
        loss = loss_function(LinearLogits(hidden, weight, bias, **forms), teacher, group=group, **options)
        results[rank] = torch.autograd.grad(loss, (hidden, weight, bias), upstream_of(loss))
        return loss.detach()

    losses = on_ranks(group, of_rank)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    hidden, weight, bias = zip(*(results[rank] for rank in range(group.size)), strict=True)
    assert all(torch.equal(grad, hidden[0]) for grad in hidden)
    return losses[0], hidden[0], torch.cat(weight), torch.cat(bias)


def agree(found, wanted, dtype, times=20):
    loss, *grads = zip(found, wanted, strict=True)
    assert error(*loss) <= times * FLOOR[torch.float64 if dtype is torch.float64 else torch.float32]
    for ours, right in grads:
        assert ours.dtype == dtype
        assert error(ours, right) <= times * FLOOR[torch.float32 if dtype is torch.float32 else dtype] + (
            4 * FLOOR[dtype] if dtype.itemsize == 2 else 0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_matches_float64(backend, name, reduction, dtype):
    x = given(dtype, 1.0)
    options = {"reduction": reduction, "temperature": 2.0}
    agree(of_ranks(cases.LOSSES[name], x, {}, **options), whole(cases.LOSSES[name], x, {}, **options), dtype)


@pytest.mark.parametrize("forms", [{}, {"scale": 0.5}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("teacher_is_head", [True, False])
@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_scale_and_softcap(backend, name, teacher_is_head, forms):
    x = given()
    found = of_ranks(cases.LOSSES[name], x, forms, teacher_is_head=teacher_is_head)
    agree(found, whole(cases.LOSSES[name], x, forms), torch.float32)


@pytest.mark.parametrize("divergence", ["kl_div", "reverse_kl_div", "bernoulli_kl_div"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_targets_masks_and_weights(backend, reduction, smoothing, divergence):
    x = given()
    mask = torch.arange(N) % 4 != 1
    options = {
        "target": torch.arange(N) * 3, "mask": mask, "weight": torch.linspace(0.5, 1.5, N), "divergence": divergence,
        "label_smoothing": smoothing, "reduction": reduction, "temperature": torch.linspace(1, 2, N),
    }  # fmt: skip
    wanted = whole(functional.kd_loss, x, {}, **options)
    x["hidden"][1] = torch.nan  # of a row that does not count
    agree(of_ranks(functional.kd_loss, x, {}, **options), wanted, torch.float32)


def test_a_student_of_logits(backend):
    """Beside a teacher with a head: in place, too."""
    x = given()
    teachers = [LinearLogits(x["teacher"], x["teacher_head"][a:b]) for a, b in ((0, 20), (20, 37))]
    logits = torch.randn(N, V)
    wanted = leaf(logits.double())
    functional.kl_div(wanted, LinearLogits(x["teacher"].double(), x["teacher_head"].double())).backward()
    for inplace in (False, True):
        group, grads = Group(2), {}

        def of_rank(rank, group=group, grads=grads, inplace=inplace):
            own = leaf(logits[:, (slice(0, 20), slice(20, 37))[rank]])
            functional.kl_div(own * 1, teachers[rank], group=group, inplace=inplace).backward()
            grads[rank] = own.grad

        on_ranks(group, of_rank)
        assert error(torch.cat([grads[0], grads[1]], 1), wanted.grad) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_strides_may_differ_from_rank_to_rank(backend, reduction):
    """Slabs and what is summed over ranks follow from shapes alone."""
    # slabs of two rows: 2, 2, 1 of each of the three where rows are strided, 2, 2, 2 and so on where they are not
    hidden, weight = torch.randn(3, 5, H), torch.randn(V, H)
    teacher, teacher_head, logits = torch.randn(3, 5, 4), torch.randn(V, 4), torch.randn(3, 5, V)
    sides = [LinearLogits(hidden, weight), logits]
    for student in sides:
        x = (student.hidden if student is sides[0] else student).detach().double().requires_grad_()
        z = LinearLogits(x, weight.double()).logits() if student is sides[0] else x
        loss = functional.kl_div(z, LinearLogits(teacher.double(), teacher_head.double()).logits(), reduction=reduction)
        (wanted,) = torch.autograd.grad(loss.sum(), x)
        group, grads = Group(2), {}

        def of_rank(rank, group=group, grads=grads, of_head=student is sides[0]):
            own = (slice(0, 20), slice(20, V))[rank]
            x = leaf(hidden) if of_head else leaf(logits[..., own])
            strided = x.transpose(0, 1).contiguous().transpose(0, 1) if rank else x
            one = LinearLogits(strided, weight[own]) if of_head else strided
            other = LinearLogits(teacher, teacher_head[own])
            functional.kl_div(one, other, reduction=reduction, group=group).sum().backward()
            grads[rank] = x.grad

        on_ranks(group, of_rank)
        found = [grads[0], grads[1]] if student is sides[0] else [torch.cat([grads[0], grads[1]], -1)]
        for grad in found:
            assert error(grad, wanted) <= 20 * FLOOR[torch.float32]


def test_what_is_exchanged():
    """Per slab what ops/group.py sends of its rows; the loss once, and the gradient of hidden states once, in forward
    where that makes it."""
    x = given()
    for name, reduction, numbers in (
        ("kl_div", "batchmean", [3 * 3] * 3 + [2 * 3, 1, N * H]),
        ("kl_div", "none", [3 * 3] * 3 + [2 * 3, N, N * H]),
        ("reverse_kl_div", "batchmean", [3 * 3, 3 * 3] * 3 + [2 * 3, 2 * 3, N * H]),
    ):
        group = Group(3)
        of_ranks(cases.LOSSES[name], x, {}, group, reduction=reduction)
        assert group.exchanges == numbers, name


def test_a_frozen_head(kernel):
    """What learns nothing costs nothing, and is exchanged by nobody."""
    x, group = given(), Group(2)

    def of_rank(rank):
        own = (slice(0, 20), slice(20, 37))[rank]
        head = leaf(x["weight"][own])
        teacher = LinearLogits(x["teacher"], x["teacher_head"][own])
        functional.kl_div(LinearLogits(x["hidden"], head), teacher, group=group).backward()
        return head.grad

    assert all(grad.abs().max() > 0 for grad in on_ranks(group, of_rank))
    assert N * H not in group.exchanges


def test_slabs_have_the_same_rows_on_every_rank():
    few, many = torch.randn(1, H), torch.randn(1000, H)
    assert group_forms.rows_of_slab(few, None, 4) == group_forms.rows_of_slab(many, None, 4)
    bytes_of_row = 4 * group_forms.CLASSES // 4
    assert group_forms.rows_of_slab(few, 5 * bytes_of_row, 4) == 5
    assert group_forms.rows_of_slab(few.double(), 5 * bytes_of_row, 4) == 2
    assert group_forms.rows_of_slab(few, 1, 4) == 1


def test_bad_input(computed_by):
    x, group = given(), Group(2)
    student = LinearLogits(x["hidden"], x["weight"])
    with pytest.raises(ValueError, match="num_classes: not with classes that are split"):
        functional.kl_div(student, student.logits(), group=group, num_classes=5)
    with pytest.raises(ValueError, match=r"teacher: the student's shape \[11, 37\] wanted"):
        functional.kl_div(student, torch.randn(N, V - 1), group=group)
