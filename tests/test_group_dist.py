"""dist_loss of classes that are split over ranks: that of whole rows, in values and gradients, on every backend."""

import pytest
import split_ranks
import torch
from split_ranks import Group, agree, on_ranks, upstream_of
from tolerances import FLOOR, NEAR_CONVERGENCE, error

import fastkd
from fastkd import LinearLogits, Probabilities
from fastkd.functional import dist_loss
from fastkd.ops import group_forms

N, V, H = 9, 40, 5
BOUNDS = (0, 3, 17, 40)
OPTIONS = {
    "plain": {},
    "masked": {"mask": torch.arange(N) % 4 != 1, "temperature": 2.0},
    "one of both": {"inter_weight": 0.0, "intra_weight": 3.0, "eps": 1e-3},
    "standardized": {"standardize": True, "mask": torch.arange(N) % 4 != 1},
}


@pytest.fixture(autouse=True)
def threads():
    with split_ranks.threads():
        yield


@pytest.fixture(autouse=True)
def several_slabs(monkeypatch):
    monkeypatch.setattr(group_forms, "ROWS", 1)
    rows_of_three_ranks = 4
    monkeypatch.setitem(group_forms.SLAB_BYTES, "cpu", rows_of_three_ranks * 4 * -(-group_forms.CLASSES // 3))


def given(dtype=torch.float32, near=None):
    generator = torch.Generator().manual_seed(7)
    student, teacher = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64) for _ in range(2))
    if near is not None:
        student = teacher + near * student
    return student.to(dtype), teacher.to(dtype)


def of_ranks(student, teacher, bounds=BOUNDS, form=lambda x: x, **options):
    return split_ranks.of_ranks(dist_loss, student, lambda classes: form(teacher[:, classes]), bounds, **options)


def whole(student, teacher, form=lambda x: x, **options):
    x = student.double().clone().requires_grad_()
    with fastkd.backend("torch"):
        loss = dist_loss(x, form(teacher.double()), **options)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream_of(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_loss_of_whole_rows(backend, options, inplace, dtype):
    options, (student, teacher) = OPTIONS[options], given(dtype)
    wanted = whole(student, teacher, **options)
    if "mask" in options:
        student[1], teacher[1] = torch.nan, torch.nan  # of a row that does not count
    agree(of_ranks(student, teacher, inplace=inplace, **options), wanted, 60)


@pytest.mark.parametrize("bounds", [(0, 0, 20, V), (0, 1, 2, V), (0, 39, 40, 40), (0, V)], ids=str)
def test_some_ranks_have_few_classes_or_none(kernel, bounds):
    student, teacher = given()
    agree(of_ranks(student, teacher, bounds), whole(student, teacher), 60)


@pytest.mark.parametrize("own", [1.0, 2.0])
@pytest.mark.parametrize("standardize", [False, True])
def test_beside_probabilities(backend, standardize, own):
    student, teacher = given()
    q = teacher.softmax(-1) * torch.linspace(0.7, 1.0, N)[:, None]
    options = {"standardize": standardize, "temperature": 2.0, "form": lambda x: Probabilities(x, temperature=own)}
    agree(of_ranks(student, q, **options), whole(student, q, **options), 60)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_heads(backend, dtype, standardize):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(size, generator=generator).to(dtype) for size in ((N, H), (V, H)))
    _, teacher = given(dtype)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    with fastkd.backend("torch"):
        dist_loss(LinearLogits(x, w), teacher.double(), standardize=standardize).backward()
    group, grads = Group(2), {}

    def of_rank(rank):
        classes = (slice(0, 5), slice(5, V))[rank]
        mine, own = hidden.clone().requires_grad_(), weight[classes].clone().requires_grad_()
        side = LinearLogits(mine, own)
        dist_loss(side, teacher[:, classes], standardize=standardize, group=group).backward()
        grads[rank] = mine.grad, own.grad

    on_ranks(group, of_rank)
    assert torch.equal(grads[0][0], grads[1][0])
    for found, right in ((grads[0][0], x.grad), (torch.cat([grads[0][1], grads[1][1]]), w.grad)):
        assert found.dtype is dtype
        assert error(found, right) <= 60 * FLOOR[torch.float32] + (2 * FLOOR[dtype] if dtype.itemsize == 2 else 0)


def test_near_convergence(kernel):
    student, teacher = given(near=1e-3)
    options = {"eps": 1e-12}
    loss, grad = of_ranks(student, teacher, **options)
    right, right_grad = whole(student, teacher, **options)
    assert error(loss, right) <= NEAR_CONVERGENCE
    assert error(grad, right_grad) <= NEAR_CONVERGENCE


def test_rows_and_columns_that_are_constant(backend):
    student, teacher = given()
    student[0], teacher[1] = 0.5, 0.5
    student[2], teacher[3] = -torch.inf, -torch.inf
    student[:, 20], teacher[:, 3] = -torch.inf, -torch.inf
    agree(of_ranks(student, teacher), whole(student, teacher), 60)
    agree(of_ranks(student, teacher, mask=torch.zeros(N, dtype=torch.bool)), (torch.zeros(()), torch.zeros(N, V)))


def test_what_is_exchanged():
    """Of slabs of three rows; backward one number a row."""
    group = Group(3)
    of_ranks(*given(), group=group)
    assert group.exchanges == [3 * 4, 3 * 9] * 3 + [1] + [3] * 3


def test_bad_input(computed_by):
    student, teacher = given()
    with pytest.raises(ValueError, match="num_classes: not with classes that are split over ranks"):
        dist_loss(student, teacher, num_classes=5, group=Group(1))
    with pytest.raises(ValueError, match=r"teacher: the student's shape \[9, 40\] wanted"):
        dist_loss(student, teacher[:, 1:], group=Group(1))
