"""Losses of logits that are no Kullback-Leibler divergence between two softmaxes, as far as they are like no other."""

import functools
import math

import cases
import pytest
import torch
import torch.nn.functional as F
from rows_checks import DTYPES, logit_size, run, storage_error
from tolerances import FLOOR, error
from truth import truth, upstream_like

import fastkd
from fastkd import functional, reference
from fastkd.functional import alpha_beta_div, bernoulli_kl_div, kl_div, negative_log_acceptance, reverse_kl_div

# Ends, where the formula has limits, and beside them, where it would cancel.
POWERS = [
    (0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.0), (0.0, 0.3), (2.0, 0.1), (1e-3, 1.0), (1.0, 1e-3),
    (0.02, 0.03), (0.5, 0.5),
]  # fmt: skip
# Logits that any number may stand for: no class is impossible, and no row is shifted.
COINS = [case for case in cases.FINITE if "impossible" not in case.name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", COINS, ids=str)
def test_coins_match_float64(backend, case, dtype):
    student, teacher, options = case.inputs(dtype)
    for reduction in ("none", "batchmean"):
        given = {key: x for key, x in options.items() if key != "normalizer" or reduction != "none"}
        loss, grad = run(bernoulli_kl_div, student, teacher, reduction=reduction, **given)
        loss_ref, grad_ref = truth("bernoulli_kl_div", student, teacher, reduction=reduction, **given)
        compute = reference.compute_dtype(student, teacher)
        assert loss.dtype == compute
        tolerance = 4 * FLOOR[compute] * logit_size(student)
        assert error(loss, loss_ref) <= tolerance * (20 if backend == "torch" else 1)
        assert error(grad, grad_ref) <= tolerance + 2 * storage_error(grad, grad_ref)


def test_coins_are_what_people_write(backend):
    student, teacher = torch.randn(9, 20), torch.randn(9, 20)
    loss, grad = run(bernoulli_kl_div, student, teacher, temperature=2.0)

    def eager(s, t):
        p, q = (s / 2).sigmoid(), (t / 2).sigmoid()
        rows = F.binary_cross_entropy(p, q, reduction="none") - F.binary_cross_entropy(q, q, reduction="none")
        return 4 * rows.sum(-1).mean()

    theirs, their_grad = run(eager, student, teacher)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(grad, their_grad)


@pytest.mark.parametrize("V", [3, 2000])
def test_coins_that_never_fall(backend, V):
    student, teacher = torch.randn(6, V), torch.randn(6, V)
    student[0, 1] = teacher[1, 1] = -torch.inf
    student[2, 2] = teacher[2, 2] = -torch.inf
    student[3], teacher[4] = -torch.inf, -torch.inf
    student[5], teacher[5] = -torch.inf, -torch.inf
    loss, grad = run(bernoulli_kl_div, student, teacher, reduction="none")
    assert loss.isinf().tolist() == [True, False, False, True, False, False]
    finite = loss.isfinite()
    loss_ref, grad_ref = truth("bernoulli_kl_div", student, teacher, reduction="none")
    assert error(loss[finite], loss_ref[finite]) <= 8 * FLOOR[torch.float32]
    assert error(grad[finite], grad_ref[finite]) <= 8 * FLOOR[torch.float32]
    assert grad.isfinite().all()
    assert loss[5] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["far", "near"])
@pytest.mark.parametrize("powers", POWERS, ids=str)
@pytest.mark.parametrize("shape", [(6, 30), (3, 2500)], ids=str)
def test_powers(backend, shape, powers, kind, dtype):
    alpha, beta = powers
    teacher = 2 * torch.randn(shape, dtype=dtype)
    student = 2 * torch.randn(shape, dtype=dtype) if kind == "far" else teacher + 1e-3 * torch.randn(shape, dtype=dtype)
    options = {"alpha": alpha, "beta": beta, "temperature": 2.0, "reduction": "none"}
    loss, grad = run(alpha_beta_div, student, teacher, **options)
    loss_ref, grad_ref = truth("alpha_beta_div", student, teacher, **options)
    terms = truth("alpha_beta_div", student, teacher, terms_of_gradient=True, **options)[1]
    # near convergence w = log p - log q is as good as the sums of the exponentials
    bound = 16 * FLOOR[dtype] if kind == "far" else 16 * FLOOR[dtype] / 1e-3
    bound *= math.log(shape[1]) if backend == "torch" else 1
    if kind == "near" and 0 < min(powers) < 0.1:
        bound = max(bound, 1e-9)  # of the truth: its formula cancels there, in extended precision too
    assert error(loss, loss_ref) <= bound
    assert error(grad, grad_ref) <= bound * max(1.0, (terms.norm() / grad_ref.norm()).item())


def test_powers_at_their_ends_are_other_divergences(backend):
    student, teacher = torch.randn(5, 40), torch.randn(5, 40)
    teacher[0, 3] = student[1, 4] = -torch.inf
    for powers, other in (((1.0, 0.0), kl_div), ((0.0, 1.0), reverse_kl_div)):
        alpha, beta = powers
        ours = run(alpha_beta_div, student, teacher, alpha=alpha, beta=beta, reduction="none")
        theirs = run(other, student, teacher, reduction="none")
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])


def test_powers_of_rows(backend):
    student, teacher = torch.randn(len(POWERS), 60), torch.randn(len(POWERS), 60)
    alpha, beta = torch.tensor(POWERS, dtype=torch.float64).unbind(-1)
    loss, grad = run(alpha_beta_div, student, teacher, alpha=alpha, beta=beta, reduction="none")
    for row, (a, b) in enumerate(POWERS):
        one = student[row : row + 1], teacher[row : row + 1]
        alone = run(alpha_beta_div, *one, alpha=a, beta=b, reduction="none")
        factor = upstream_like(loss)[row] / upstream_like(alone[0])
        assert error(loss[row], alone[0][0]) <= 8 * FLOOR[torch.float32]
        assert error(grad[row], alone[1][0] * factor) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("V", [9, 1500])
def test_classes_of_one_side_alone(backend, V):
    student, teacher = torch.randn(4, V), torch.randn(4, V)
    student[:, ::3], teacher[:, 1::3] = -torch.inf, -torch.inf
    for alpha, beta in ((0.2, 0.7), (0.0, 0.0), (0.5, 0.0), (0.0, 0.5)):
        loss, grad = run(alpha_beta_div, student, teacher, alpha=alpha, beta=beta, reduction="none")
        loss_ref, grad_ref = truth("alpha_beta_div", student, teacher, alpha=alpha, beta=beta, reduction="none")
        assert torch.equal(loss.isinf(), loss_ref.isinf())
        if alpha and beta:
            assert error(loss, loss_ref) <= 16 * FLOOR[torch.float32]
        assert grad.isfinite().all()
        assert error(grad, grad_ref) <= 32 * FLOOR[torch.float32] if alpha else not grad.any()


@pytest.mark.parametrize("V", [9, 1500])
def test_what_is_never_accepted(backend, V):
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    student[0, ::2], teacher[0, 1::2] = -torch.inf, -torch.inf  # disjoint
    student[1], teacher[1] = 20 * student[1], 20 * teacher[1]
    loss, grad = run(negative_log_acceptance, student, teacher, reduction="none")
    loss_ref, grad_ref = truth("negative_log_acceptance", student, teacher, reduction="none")
    assert loss[0] == torch.inf
    assert not grad[0].any()
    assert error(loss[1:], loss_ref[1:]) <= 1e-4 / 4
    assert error(grad[1:], grad_ref[1:]) <= 1e-4 / 4
    accepted = torch.minimum(student[2].softmax(-1), teacher[2].softmax(-1)).sum()
    torch.testing.assert_close(loss[2].neg().exp(), accepted)


@pytest.mark.parametrize("name", ["negative_log_acceptance", "alpha_beta_div", "bernoulli_kl_div"])
def test_derivatives_and_maps(backend, name):
    loss = getattr(functional, name)
    student, teacher = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8).double()
    for reduction in ("none", "batchmean"):
        called = functools.partial(loss, teacher=teacher, temperature=1.5, reduction=reduction)
        assert torch.autograd.gradcheck(called, (student,), fast_mode=True)
    student, teacher = torch.randn(2, 19, 3, 9), torch.randn(2, 19, 3, 9)
    for reduction in ("none", "batchmean"):
        options = {"temperature": 2.0, "reduction": reduction}
        found, grad = run(loss, student, teacher, dim=1, **options)
        rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
        other, other_grad = run(loss, *rows, **options)
        torch.testing.assert_close(found, other)
        torch.testing.assert_close(grad, other_grad.movedim(-1, 1))


def test_the_modules_are_the_functions(backend):
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    for module, expected in (
        (fastkd.NegativeLogAcceptanceLoss(temperature=2.0), negative_log_acceptance(student, teacher, temperature=2.0)),
        (fastkd.AlphaBetaDivLoss(alpha=0.5, beta=0.3), alpha_beta_div(student, teacher, alpha=0.5, beta=0.3)),
        (fastkd.BernoulliKLDivLoss(), bernoulli_kl_div(student, teacher)),
    ):
        assert torch.equal(module(student, teacher), expected)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"alpha": -0.1}, ValueError, "alpha: a number of at least 0 wanted, got -0.1"),
        ({"beta": math.nan}, ValueError, "beta: a number of at least 0 wanted"),
        ({"beta": math.inf}, ValueError, "beta: a number of at least 0 wanted"),
        ({"alpha": "1"}, TypeError, "alpha: a number or a tensor wanted"),
        ({"beta": torch.tensor([0.1, -0.1, 0.0, 1.0])}, ValueError, "beta: values of at least 0 wanted"),
        ({"beta": torch.zeros(3)}, ValueError, "beta: "),
    ],
)
def test_bad_powers(backend, changed, kind, message):
    with pytest.raises(kind, match=message):
        alpha_beta_div(torch.randn(4, 9), torch.randn(4, 9), **changed)
    if not isinstance(next(iter(changed.values())), torch.Tensor):
        with pytest.raises(kind, match=message.replace(" or a tensor", "")):
            fastkd.AlphaBetaDivLoss(**changed)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_acceptance_keeps_its_digits_near_convergence(backend, T):
    """What rounding makes all classes of a side off by alike cancels; the contract allows 2e-4."""
    teacher = 2 * torch.randn(8, 1000)
    student = teacher + 2e-3 * torch.randn(8, 1000)
    found, _ = run(negative_log_acceptance, student, teacher, temperature=T, reduction="none")
    p, q = (torch.softmax(x.double() / T, -1) for x in (student, teacher))
    wanted = -T * T * torch.log1p(-(p - q).abs().sum(-1) / 2)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), [(1e-25, 0.7), (1e-22, 0.7), (0.7, 1e-25), (1e-30, 0.0)])
def test_a_number_next_to_nothing_has_a_gradient(backend, alpha, beta):
    student, teacher = torch.randn(4, 11), torch.randn(4, 11)
    found = run(alpha_beta_div, student, teacher, alpha=alpha, beta=beta)
    with fastkd.backend("torch"):
        wanted = run(alpha_beta_div, student.double(), teacher.double(), alpha=alpha, beta=beta)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)
