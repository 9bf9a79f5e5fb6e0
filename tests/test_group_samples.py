"""Losses of relations whose samples are split over ranks: those of all samples, in values and gradients."""

import functools

import pytest
import relation_cases
import split_ranks
import torch
from split_ranks import Group, on_ranks
from tolerances import FLOOR, error

from fastkd import functional

N = 14
COUNTS = (3, 0, 10, 1)  # of each rank
LOSSES = {
    **relation_cases.LOSSES,
    "relation_kl_js": functools.partial(functional.relation_kl, divergence="js_div", temperature=0.7),
    "triplet_of_teacher": functional.relational_triplet,
    "triplet_of_labels": lambda s, t, **options: functional.relational_triplet(
        s, **{"labels": torch.arange(len(s)) % 3, **options}
    ),
}


@pytest.fixture(autouse=True)
def threads():
    with split_ranks.threads():
        yield


def given(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype) for D in (6, 9)]


def of_ranks(loss_function, student, teacher, counts=COUNTS, group=None, of_rows=None, **options):
    """Loss and gradient by ranks that have some of the samples each."""
    group, grads = group or Group(len(counts)), {}
    shares = [x.split(counts) for x in (student, teacher)]
    rows = {name: x.split(counts) for name, x in (of_rows or {}).items()}

    def of_rank(rank):
        x = shares[0][rank].clone().requires_grad_()
        own = {name: parts[rank] for name, parts in rows.items()}
        loss = loss_function(x, shares[1][rank], group=group, **own, **options)
        (grads[rank],) = torch.autograd.grad(loss, x)
        return loss.detach()

    losses = on_ranks(group, of_rank)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    return losses[0], torch.cat([grads[rank] for rank in range(len(counts))])


def whole(loss_function, student, teacher, **options):
    x = student.clone().requires_grad_()
    loss = loss_function(x, teacher, **options)
    return loss.detach(), *torch.autograd.grad(loss, x)


def agree(found, wanted):
    for ours, right in zip(found, wanted, strict=True):
        assert ours.dtype == right.dtype
        assert error(ours, right.double()) <= FLOOR[right.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [(N,), (5, 9), COUNTS], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_of_all_samples(computed_by, name, counts, dtype):
    student, teacher = given(dtype)
    of_rows = {"labels": torch.arange(N) % 3} if name == "triplet_of_labels" else {}
    found = of_ranks(LOSSES[name], student, teacher, counts, of_rows=of_rows)
    agree(found, whole(LOSSES[name], student, teacher, **of_rows))


@pytest.mark.parametrize(
    "name", ["rkd_distance", "similarity_preserving", "gram_mse", "relation_kl", "pkt", "triplet_of_teacher"]
)
def test_what_is_said_of_rows_goes_with_them(computed_by, name):
    student, teacher = given()
    of_rows = {"mask": torch.arange(N) % 4 != 1, "weight": torch.linspace(0.5, 2, N)}
    student[1] = torch.nan  # which is not there
    agree(of_ranks(LOSSES[name], student, teacher, of_rows=of_rows), whole(LOSSES[name], student, teacher, **of_rows))


@pytest.mark.parametrize("name", ["rkd_angle", "rkd_loss"])
def test_masks_of_triples(computed_by, name):
    student, teacher = given()
    of_rows = {"mask": torch.arange(N) % 4 != 1}
    agree(of_ranks(LOSSES[name], student, teacher, of_rows=of_rows), whole(LOSSES[name], student, teacher, **of_rows))


def test_numbers_of_rows(computed_by):
    student, teacher = given()
    of_rows = {"temperature": torch.linspace(0.5, 1, N), "beta": torch.linspace(0, 1, N)}
    loss = functools.partial(functional.relation_kl, divergence="js_div", teacher_temperature=0.8)
    agree(of_ranks(loss, student, teacher, of_rows=of_rows), whole(loss, student, teacher, **of_rows))
    with_itself = {"divergence": "reverse_kl_div"}

    def of_itself(s, t, **options):
        return functional.relation_kl(s, t, student_keys=s, teacher_keys=t, **with_itself, **options)

    agree(of_ranks(of_itself, student, teacher), whole(of_itself, student, teacher))


def test_embeddings_travel_once_and_no_gradient():
    student, teacher = given()
    group = Group(2)
    of_ranks(functional.rkd_distance, student, teacher, (5, 9), group, {"mask": torch.ones(N, dtype=torch.bool)})
    bytes_of_row = 4 * (6 + 9) + 1
    assert group.exchanges == [1 + 2 * 4, 9 * bytes_of_row]


def test_no_samples_at_all(computed_by):
    student, teacher = given()
    for name, loss in relation_cases.LOSSES.items():
        found, grad = of_ranks(loss, student[:0], teacher[:0], (0, 0))
        assert found == 0, name
        assert grad.shape == (0, 6)


def test_ranks_that_do_not_fit_together_all_say_so(computed_by):
    student, teacher = given()
    group = Group(2)
    told = []

    def of_rank(rank):
        x = student[:, : 5 + rank]
        with pytest.raises(ValueError, match=r"^group: the same arguments on every rank.*5 wide.*6 wide"):
            functional.pkt(x, teacher, group=group)
        weight = torch.ones(N) if rank else None
        with pytest.raises(ValueError, match=r"^group: the same arguments on every rank"):
            functional.pkt(student, teacher, weight=weight, group=group)
        told.append(rank)

    on_ranks(group, of_rank)
    assert sorted(told) == [0, 1]


def test_rows_of_any_strides(computed_by):
    """What a rank sends is bytes, also of one row, of none and of one feature."""
    student, teacher = given()
    for one, other in ((student[:, ::2], teacher[:, :1]), (student.T.contiguous().T, teacher[:, 3:8])):
        found = of_ranks(functional.gram_mse, one, other, (1, 0, 13))
        agree(found, whole(functional.gram_mse, one, other))
    group, shares = Group(2), [x.split((1, 13)) for x in (student, teacher)]
    weight = torch.tensor(2.0)  # one for all rows
    losses = on_ranks(group, lambda r: functional.pkt(shares[0][r], shares[1][r], weight=weight, group=group))
    assert error(losses[0], functional.pkt(student, teacher, weight=weight).double()) <= FLOOR[torch.float32]


def test_a_number_of_rows_on_one_rank_alone_is_an_error_on_all(computed_by):
    student, teacher = given()
    group = Group(2)

    def of_rank(rank):
        temperature = torch.ones(N) if rank else 1.0
        with pytest.raises(ValueError, match=r"^group: the same arguments on every rank"):
            functional.relation_kl(student, teacher, temperature=temperature, group=group)

    on_ranks(group, of_rank)


def test_forward_mode_is_refused(computed_by):
    student, teacher = given()
    group = Group(1)

    def of_rank(_):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(student, torch.ones_like(student))
            with pytest.raises(RuntimeError, match=r"student: fastkd.*forward-mode AD"):
                functional.similarity_preserving(x, teacher, group=group)

    on_ranks(group, of_rank)


def test_what_is_not_finite_on_one_rank_is_an_error_on_all():
    student, teacher = given()
    student[2, 3] = torch.inf
    group, shares = Group(2), [x.split((5, 9)) for x in (student, teacher)]

    def of_rank(rank):
        with pytest.raises(ValueError, match="student: finite embeddings wanted"):
            functional.gram_mse(shares[0][rank], shares[1][rank], group=group)

    on_ranks(group, of_rank)


def test_bad_input(computed_by):
    student, teacher = given()

    def raises(words, loss, *arguments, error_type=ValueError, **options):
        group = Group(1)
        with pytest.raises(error_type, match=words):
            on_ranks(group, lambda _: loss(*arguments, group=group, **options))

    raises(r"student: embeddings of shape \[N, D\] wanted", functional.gram_mse, student[None], teacher[None])
    raises("teacher: the student's 14 rows wanted", functional.pkt, student, teacher[1:])
    raises("group: not with keys", functional.relation_kl, student, teacher, student_keys=student, teacher_keys=student)
    raises("group: not with keys", functional.relation_kl, student, teacher, key_mask=torch.ones(N, dtype=torch.bool))
    raises("labels: shape", functional.relational_triplet, student, labels=torch.arange(3))
    raises("mask: torch.bool wanted", functional.rkd_loss, student, teacher, mask=torch.ones(N), error_type=TypeError)
    raises("teacher", functional.rkd_distance, student.requires_grad_(), teacher.clone().requires_grad_())
    x = student.detach().clone().requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        on_ranks(
            group := Group(1),
            lambda _: torch.autograd.grad(functional.pkt(x, teacher, group=group), x, create_graph=True),
        )


def test_modules():
    import fastkd

    student, teacher = given()
    for name in ("RKDDistanceLoss", "RKDAngleLoss", "RKDLoss", "SimilarityPreservingLoss", "GramMSELoss", "PKTLoss",
                 "RelationKLLoss", "RelationalTripletLoss"):  # fmt: skip
        module = getattr(fastkd, name)
        found = of_ranks(lambda s, t, group, module=module: module(group=group)(s, t), student, teacher)
        agree(found, whole(module(), student, teacher))
