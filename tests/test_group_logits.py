"""Losses of classes that are split over ranks, of whose rows more is exchanged than what divergences need: standardized
logits, adaptive_kl_div, and targets that are parted from the other classes."""

import functools

import cases
import pytest
import split_ranks
import torch
from rows_checks import run
from split_ranks import Group, agree, on_ranks, split, upstream_of
from tolerances import FLOOR, error

import fastkd
from fastkd import LinearLogits, Probabilities, functional
from fastkd.ops import group_forms

N, V, H = 9, 40, 5
BOUNDS = (0, 3, 17, 40)
TARGET = torch.arange(N) * 4 % V

LOSSES = {
    "adaptive_kl_div": (functional.adaptive_kl_div, {}),
    "dkd_loss": (functional.dkd_loss, {"target": TARGET, "alpha": 0.7}),
    "nkd_loss": (functional.nkd_loss, {"target": TARGET}),
    "standardized kl_div": (functional.kl_div, {"standardize": True}),
    "standardized js_div": (functional.js_div, {"standardize": True}),
    "standardized kd_loss": (functional.kd_loss, {"target": TARGET, "standardize": True, "label_smoothing": 0.1}),
    "standardized dkd_loss": (functional.dkd_loss, {"target": TARGET, "standardize": True}),
    "standardized adaptive_kl_div": (functional.adaptive_kl_div, {"standardize": True, "mu": 0.3}),
    "adaptive kd_loss": (functional.kd_loss, {"target": TARGET, "divergence": "adaptive_kl_div"}),
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


def given(dtype=torch.float32, size=2.0):
    generator = torch.Generator().manual_seed(7)
    return [(size * torch.randn(N, V, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def of_ranks(loss_function, student, teacher, bounds=BOUNDS, **options):
    def of_classes(classes):
        return teacher[:, classes]

    return split_ranks.of_ranks(loss_function, student, of_classes, bounds, **options)


def whole(loss_function, student, teacher, **options):
    x = student.double().clone().requires_grad_()
    with fastkd.backend("torch"):
        loss = loss_function(x, teacher.double(), **options)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream_of(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "mean"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_it_is_the_loss_of_whole_rows(backend, name, inplace, reduction, dtype):
    loss_function, options = LOSSES[name]
    if reduction == "mean" and "target" in options:
        reduction = "sum"
    student, teacher = given(dtype)
    options = {"temperature": 2.0, "reduction": reduction} | options
    found = of_ranks(loss_function, student, teacher, inplace=inplace, **options)
    agree(found, whole(loss_function, student, teacher, **options), 40)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_masks_weights_and_numbers_of_rows(backend, name, reduction):
    loss_function, options = LOSSES[name]
    student, teacher = given()
    rows = torch.linspace(0.5, 1.5, N)
    options = {
        "mask": torch.arange(N) % 4 != 1, "weight": rows, "temperature": rows + 1, "teacher_temperature": rows.flip(0),
        "reduction": reduction,
    } | options  # fmt: skip
    if "dkd" in name:
        options |= {"alpha": rows, "beta": rows.flip(0)}
    wanted = whole(loss_function, student, teacher, **options)
    student[1], teacher[1] = torch.nan, torch.nan  # of a row that does not count
    agree(of_ranks(loss_function, student, teacher, **options), wanted, 40)


@pytest.mark.parametrize("bounds", [(0, 0, 20, V), (0, 1, 2, V), (0, 39, 40, 40), (0, V)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_some_ranks_have_few_classes_or_none(kernel, name, bounds):
    loss_function, options = LOSSES[name]
    student, teacher = given()
    found = of_ranks(loss_function, student, teacher, bounds, **options)
    agree(found, whole(loss_function, student, teacher, **options), 40)


@pytest.mark.parametrize("name", LOSSES)
def test_beside_heads(backend, name):
    loss_function, options = LOSSES[name]
    hidden, weight, (_, teacher) = torch.randn(N, H), torch.randn(V, H), given()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    with fastkd.backend("torch"):
        loss_function(LinearLogits(x, w), teacher.double(), **options).backward()
    group, grads = Group(2), {}

    def of_rank(rank):
        classes = (slice(0, 5), slice(5, V))[rank]
        mine, own = hidden.clone().requires_grad_(), weight[classes].clone().requires_grad_()
        loss_function(LinearLogits(mine, own), teacher[:, classes], group=group, **options).backward()
        grads[rank] = mine.grad, own.grad

    on_ranks(group, of_rank)
    for found, _ in grads.values():
        assert error(found, x.grad) <= 40 * FLOOR[torch.float32]
    assert error(torch.cat([grads[0][1], grads[1][1]]), w.grad) <= 40 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", [name for name in LOSSES if "adaptive" not in name])
def test_beside_probabilities(backend, name):
    loss_function, options = LOSSES[name]
    student, teacher = given()
    q = teacher.softmax(-1) * torch.linspace(0.7, 1.0, N)[:, None]
    options = {"temperature": 1.5} | options
    wanted = whole(lambda x, t, **o: loss_function(x, Probabilities(t, temperature=1.5), **o), student, q, **options)

    def of_classes(classes):
        return Probabilities(q[:, classes], temperature=1.5)

    found = split_ranks.of_ranks(loss_function, student, of_classes, BOUNDS, **options)
    agree(found, wanted, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_head_is_that_of_whole_rows(kernel, mu, dtype):
    """With classes of equal logits, on several ranks, and some that are impossible."""
    student, teacher = given(dtype, 3.0)
    teacher[0] = 1.0
    teacher[1, ::3] = 2.0
    teacher[2, 5:] = -torch.inf
    student[2, 20:] = -torch.inf
    teacher[3] = teacher[3].round()
    teacher[4, 7], teacher[4, 30] = 0.0, -0.0
    options = {"mu": mu, "reduction": "none"}
    found = of_ranks(functional.adaptive_kl_div, student, teacher, **options)
    agree(found, run_whole(functional.adaptive_kl_div, student, teacher, **options))


def run_whole(loss_function, student, teacher, **options):
    x = student.clone().requires_grad_()
    loss = loss_function(x, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream_of(loss))


@pytest.mark.parametrize("name", ["standardized kl_div", "standardized dkd_loss"])
def test_constant_rows_and_impossible_classes(backend, name):
    loss_function, options = LOSSES[name]
    student, teacher = given()
    student[0], teacher[1] = 0.1, 0.1
    student[2, 7:], teacher[2, 9:] = -torch.inf, -torch.inf
    student[3], teacher[4] = -torch.inf, -torch.inf
    student[5, 1:] = -torch.inf
    options = options | {"reduction": "none"}
    found = of_ranks(loss_function, student, teacher, **options)
    assert not found[1][0].any()
    assert_alike(found, run_whole(loss_function, student, teacher, **options))


def assert_alike(found, wanted, times=40):
    for ours, right in zip(found, wanted, strict=True):
        assert torch.equal(ours.isnan(), right.isnan())
        assert torch.equal(ours.isinf(), right.isinf())
        assert error(ours.nan_to_num(0, 0, 0), right.nan_to_num(0, 0, 0).double()) <= times * FLOOR[torch.float32]


@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
def test_rows_without_a_target_or_without_other_classes(backend, name):
    loss_function, options = LOSSES[name]
    student, teacher = given()
    target = options["target"].clone()
    target[8] = -100
    at = torch.arange(N), target.clamp(min=0)
    student[0], teacher[1] = -torch.inf, -torch.inf  # no class at all
    for x, rows in ((student, (2, 4)), (teacher, (3, 4))):  # the target alone
        for row in rows:
            kept = x[row, target[row]].item()
            x[row] = -torch.inf
            x[row, target[row]] = kept
    student[5][at[1][5]] = -torch.inf
    teacher[6][at[1][6]] = -torch.inf
    student[7, 1] = torch.nan
    options = options | {"target": target, "reduction": "none"}
    assert_alike(
        of_ranks(loss_function, student, teacher, **options), run_whole(loss_function, student, teacher, **options)
    )
    for value in (torch.inf, torch.nan):  # of the target
        student, teacher = given()
        student[0, target[0]], teacher[1, target[1]] = value, value
        found = of_ranks(loss_function, student, teacher, **options)
        assert_alike(found, run_whole(loss_function, student, teacher, **options))
    student, teacher = given()
    student[0, 5] = -torch.inf
    options |= {"beta": 0.0, "alpha": 0.0} if name == "dkd_loss" else {"gamma": 0.0}
    found = of_ranks(loss_function, student, teacher, **options)
    assert_alike(found, run_whole(loss_function, student, teacher, **options))
    if name == "dkd_loss":  # nothing is left that a row without any class could be far from
        student[:] = -torch.inf
        assert_alike(of_ranks(loss_function, student, teacher, **options)[:1], [torch.zeros(N)])
        assert_alike(run_whole(loss_function, student, teacher, **options)[:1], [torch.zeros(N)])


@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
def test_a_row_of_weight_0_may_be_infinite(kernel, name):
    loss_function, options = LOSSES[name]
    student, teacher = given()
    student[0, 1] = -torch.inf
    weight = torch.ones(N)
    found = of_ranks(loss_function, student, teacher, weight=weight, **options)
    assert found[0].isinf()
    weight[0] = 0
    found = of_ranks(loss_function, student, teacher, weight=weight, **options)
    right = run_whole(loss_function, student, teacher, weight=weight, **options)
    assert right[0].isfinite()
    assert_alike(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dkd_near_convergence(kernel, dtype):
    generator = torch.Generator().manual_seed(3)
    teacher = 3 * torch.randn(N, 1000, generator=generator, dtype=dtype)
    student = teacher + 2e-3 * torch.randn(N, 1000, generator=generator, dtype=dtype)
    loss = functools.partial(functional.dkd_loss, target=TARGET, beta=2.0)
    found, grad = run(split(loss, Group(3)), student, teacher)
    right, right_grad = run(loss, student.double(), teacher.double())
    assert error(found, right) <= (2e-4 if dtype is torch.float32 else 1e-9)
    assert error(grad, right_grad) <= FLOOR[dtype] / (2e-3 / 4)


def test_what_is_exchanged():
    """Per slab of four rows, or what is left of them, after the number of classes."""
    student, teacher = given()
    sizes = (3, 3, 3)
    of_head = [x for n in sizes for x in ([n * 3] + [n * 256] * 4 + [n * 2, n * 3])]
    for loss, options, sent in (
        (functional.adaptive_kl_div, {}, of_head),
        (functional.kl_div, {"standardize": True}, [x for n in sizes for x in (n * 6, n * 3, 1, n * 2)]),
        (functional.dkd_loss, {"target": TARGET}, [x for n in sizes for x in (n * 2, n * 3, 1)]),
        (functional.nkd_loss, {"target": TARGET}, [x for n in sizes for x in (n * 2, n * 3, n * 3, 1)]),
    ):
        group = Group(3)
        of_ranks(loss, student, teacher, group=group, **options)
        assert group.exchanges == [1, *sent], loss


@pytest.mark.parametrize("name", cases.LOSSES)
def test_every_loss_may_be_standardized(kernel, name):
    student, teacher = given()
    options = {"standardize": True, "temperature": 1.5}
    found = of_ranks(cases.LOSSES[name], student, teacher, **options)
    agree(found, whole(cases.LOSSES[name], student, teacher, **options), 40)


def test_bad_input(computed_by):
    student, teacher = given()
    bad = TARGET.clone()
    bad[3] = V
    for loss in (functional.dkd_loss, functional.nkd_loss):
        with pytest.raises(ValueError, match=r"target: classes from 0 to 39 wanted, .*got 40"):
            of_ranks(loss, student, teacher, target=bad)
    with pytest.raises(ValueError, match="return_parts: not with classes that are split"):
        of_ranks(functional.kd_loss, student, teacher, target=TARGET, return_parts=True)
    with pytest.raises(ValueError, match="group: not with adaptive_kl_div of Probabilities"):
        functional.adaptive_kl_div(student, Probabilities(teacher.softmax(-1)), group=Group(1))
