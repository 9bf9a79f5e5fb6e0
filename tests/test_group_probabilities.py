"""A teacher's probabilities beside a student whose classes are split over ranks: the loss of whole rows."""

import cases
import pytest
import split_ranks
import torch
from split_ranks import Group, agree, on_ranks, upstream_of
from tolerances import FLOOR, error

import fastkd
from fastkd import LinearLogits, Probabilities, _masses, functional

N, V, H = 9, 40, 5
BOUNDS = (0, 3, 17, 40)
LOSSES = [name for name in cases.LOSSES if name not in (*_masses.WITHOUT, "adaptive_kl_div")]


@pytest.fixture(autouse=True)
def threads():
    with split_ranks.threads():
        yield


def given(dtype=torch.float32):
    """Probabilities that do not sum to 1."""
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(N, V, generator=generator, dtype=torch.float64)
    q = torch.randn(N, V, generator=generator, dtype=torch.float64).softmax(-1)
    return student.to(dtype), (q * torch.linspace(0.7, 1.2, N)[:, None]).to(dtype)


def of_ranks(loss_function, student, q, own, **options):
    def teacher(classes):
        return Probabilities(q[:, classes], temperature=own)

    return split_ranks.of_ranks(loss_function, student, teacher, BOUNDS, **options)


def whole(loss_function, student, q, own, **options):
    x = student.double().requires_grad_()
    with fastkd.backend("torch"):
        loss = loss_function(x, Probabilities(q.double(), temperature=own), **options)
    return loss.detach(), *torch.autograd.grad(loss, x, upstream_of(loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "mean"])
@pytest.mark.parametrize("own", [1.0, 2.0])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_it_is_the_loss_of_whole_rows(backend, name, own, reduction, dtype):
    """At the temperature that they were taken at, and softened."""
    student, q = given(dtype)
    options = {"reduction": reduction, "temperature": 2.0}
    agree(
        of_ranks(cases.LOSSES[name], student, q, own, **options), whole(cases.LOSSES[name], student, q, own, **options)
    )


@pytest.mark.parametrize("divergence", ["kl_div", "js_div", "bernoulli_kl_div"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("inplace", [False, True])
def test_targets_masks_and_weights(backend, inplace, smoothing, divergence):
    student, q = given()
    options = {
        "target": torch.arange(N) * 4, "mask": torch.arange(N) % 4 != 1, "weight": torch.linspace(0.5, 1.5, N),
        "label_smoothing": smoothing, "temperature": torch.linspace(1, 2, N), "teacher_temperature": 1.0,
        "divergence": divergence,
    }  # fmt: skip
    q = q.clamp(max=1)
    wanted = whole(functional.kd_loss, student, q, 1.0, **options)
    student[1] = torch.nan  # of a row that does not count
    agree(of_ranks(functional.kd_loss, student, q, 1.0, inplace=inplace, **options), wanted)


def test_beside_a_students_head(backend):
    hidden, weight, (_, q) = torch.randn(N, H), torch.randn(V, H), given()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    with fastkd.backend("torch"):
        functional.kl_div(LinearLogits(x, w), Probabilities(q.double())).backward()
    group, grads = Group(2), {}

    def of_rank(rank):
        classes = (slice(0, 5), slice(5, V))[rank]
        mine, own = hidden.clone().requires_grad_(), weight[classes].clone().requires_grad_()
        functional.kl_div(LinearLogits(mine, own), Probabilities(q[:, classes]), group=group).backward()
        grads[rank] = mine.grad, own.grad

    on_ranks(group, of_rank)
    for found, _ in grads.values():
        assert error(found, x.grad) <= 20 * FLOOR[torch.float32]
    assert error(torch.cat([grads[0][1], grads[1][1]]), w.grad) <= 20 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", _masses.WITHOUT)
def test_divergences_that_know_no_masses_are_refused(computed_by, name):
    student, q = given()
    with pytest.raises(ValueError, match=rf"^group: not with {name} of Probabilities"):
        getattr(functional, name)(student, Probabilities(q), group=Group(1))
