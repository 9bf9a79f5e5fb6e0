"""A teacher's best classes beside a student whose classes are split over ranks: the loss of whole logits."""

import cases
import pytest
import split_ranks
import torch
from split_ranks import Group, agree, on_ranks, upstream_of
from tolerances import FLOOR, error

import fastkd
from fastkd import LinearLogits, TopKLogProbs, functional
from fastkd.ops import group_forms

N, V, K, H = 9, 40, 6, 5
BOUNDS = (0, 3, 20, 40)
LOSSES = list(cases.LOSSES)


@pytest.fixture(autouse=True)
def threads():
    with split_ranks.threads():
        yield


def teacher_of(tail, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    log_probs, indices = logits.log_softmax(-1).topk(K)
    indices[3, 4:] = -1  # padding
    indices[4] = -1
    return TopKLogProbs(indices, log_probs.to(dtype), tail=tail, **options)


def in_double(teacher):
    names = ("tail", "temperature", "log_prob_min")
    options = {name: getattr(teacher, name) for name in names}
    log_tail = None if teacher.log_tail is None else teacher.log_tail.double()
    return TopKLogProbs(teacher.indices, teacher.log_probs.double(), log_tail=log_tail, **options)


def of_ranks(loss_function, student, teacher, group=None, bounds=BOUNDS, **options):
    return split_ranks.of_ranks(loss_function, student, teacher, bounds, group, **options)


def whole(loss_function, student, teacher, **options):
    x = student.double().requires_grad_()
    with fastkd.backend("torch"):
        loss = loss_function(x, in_double(teacher), **options)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream_of(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "mean"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_it_is_the_loss_of_whole_logits(backend, name, tail, reduction, dtype):
    if tail == "ignore" and name in ("negative_log_acceptance", "adaptive_kl_div"):
        name = "kl_div"
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(N, V, generator=generator).to(dtype)
    teacher = teacher_of(tail, log_tail=torch.full((N,), -2.0) if tail == "bucket" else None)
    options = {"reduction": reduction, "temperature": 2.0, "teacher_temperature": 1.0}
    found = of_ranks(cases.LOSSES[name], student, teacher, **options)
    agree(found, whole(cases.LOSSES[name], student, teacher, **options))


@pytest.mark.parametrize("divergence", ["kl_div", "adaptive_kl_div"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_targets_masks_and_weights(backend, tail, smoothing, inplace, divergence):
    student, teacher = torch.randn(N, V), teacher_of(tail)
    options = {
        "target": torch.arange(N) * 4, "mask": torch.arange(N) % 4 != 1, "weight": torch.linspace(0.5, 1.5, N),
        "label_smoothing": smoothing, "temperature": torch.linspace(1, 2, N), "teacher_temperature": 1.0,
        "divergence": divergence,
    }  # fmt: skip
    wanted = whole(functional.kd_loss, student, teacher, **options)
    student[1] = torch.nan  # of a row that does not count
    agree(of_ranks(functional.kd_loss, student, teacher, inplace=inplace, **options), wanted)


def test_a_small_tail_keeps_its_digits(kernel):
    """Of a mass of 1e-7, spread over the ranks."""
    student = torch.randn(N, V)
    indices = torch.arange(K).repeat(N, 1) * 7
    student.scatter_(1, indices, student.gather(1, indices) + 20)
    log_probs = torch.randn(N, K).log_softmax(-1)
    teacher = TopKLogProbs(indices, log_probs, log_tail=torch.full((N,), -15.0))
    found = of_ranks(functional.kl_div, student, teacher)
    wanted = whole(functional.kl_div, student, teacher)
    agree(found, wanted)
    others = torch.ones(N, V, dtype=torch.bool).scatter(1, indices, False)
    assert error(found[1][others], wanted[1][others]) <= 1e-4


def test_beside_a_students_head(backend):
    hidden, weight, teacher = torch.randn(N, H), torch.randn(V, H), teacher_of("bucket")
    whole_hidden, whole_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    with fastkd.backend("torch"):
        functional.kl_div(LinearLogits(whole_hidden, whole_weight), in_double(teacher)).backward()
    group, grads = Group(2), {}

    def of_rank(rank):
        x, own = hidden.clone().requires_grad_(), weight[(slice(0, 5), slice(5, V))[rank]].clone().requires_grad_()
        functional.kl_div(LinearLogits(x, own), teacher, group=group).backward()
        grads[rank] = x.grad, own.grad

    on_ranks(group, of_rank)
    for x, _ in grads.values():
        assert error(x, whole_hidden.grad) <= 20 * FLOOR[torch.float32]
    assert error(torch.cat([grads[0][1], grads[1][1]]), whole_weight.grad) <= 20 * FLOOR[torch.float32]


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_one_row_without_a_dimension_of_its_own(backend, tail):
    student, teacher = torch.randn(1, V), teacher_of(tail)
    row = TopKLogProbs(teacher.indices[0], teacher.log_probs[0], tail=tail)

    def of_row(x, _, **options):
        return functional.kl_div(x[0], row, **options)

    agree(of_ranks(of_row, student, row), whole(lambda x, t, **o: functional.kl_div(x[0], t, **o), student, row))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "ignore"])
def test_a_rank_without_classes(backend, tail):
    student, teacher = torch.randn(N, V), teacher_of(tail)
    options = {"target": torch.arange(N)} if tail == "bucket" else {}
    loss = functional.kd_loss if options else functional.js_div
    found = of_ranks(loss, student, teacher, bounds=(0, 0, 20, V), **options)
    agree(found, whole(loss, student, teacher, **options))


def test_what_is_exchanged():
    """How many classes there are, once; and the logits of each row's classes."""
    group = Group(3)
    of_ranks(functional.kl_div, torch.randn(N, V), teacher_of("bucket"), group)
    assert group.exchanges == [1, N * (K + 1)]


def test_bad_input(computed_by):
    student, teacher = torch.randn(N, V), teacher_of("bucket")
    teacher.indices[2, 1] = V
    with pytest.raises(ValueError, match=r"teacher.indices: classes below 40 wanted, .*row 2"):
        of_ranks(functional.kl_div, student, teacher)


def test_slabs(kernel, monkeypatch):
    monkeypatch.setattr(group_forms, "rows_of_few", lambda _: 2)
    student, teacher, group = torch.randn(N, V), teacher_of("bucket"), Group(3)
    found = of_ranks(functional.js_div, student, teacher, group)
    agree(found, whole(functional.js_div, student, teacher))
    assert len(group.exchanges) == 1 + 5
