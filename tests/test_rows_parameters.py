"""Parameters of the logit losses, such as js_div's beta: near and at their ends, of all rows and of each."""

import functools
import math

import cases
import pytest
import torch
from rows_checks import eager, run
from tolerances import FLOOR, TIMES_EAGER, error
from truth import truth as truth_of
from truth import upstream_like

from fastkd import functional
from fastkd._divergences import REGISTRY


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("name", ["skew_kl_div", "skew_reverse_kl_div"])
def test_a_small_alpha_still_bounds_the_loss(backend, name, alpha):
    """An impossible class of one side costs -log alpha times the other's probability, and no more."""
    impossible, possible = torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    pair = (impossible, possible) if name == "skew_kl_div" else (possible, impossible)
    for number in (alpha, torch.tensor([alpha], dtype=torch.float64)):
        loss, grad = run(functools.partial(getattr(functional, name), alpha=number), *pair)
        loss_ref, grad_ref = truth_of(name, *pair, alpha=alpha)
        assert error(loss, loss_ref) <= 8 * FLOOR[torch.float32]
        assert error(grad, grad_ref) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", ["symmetric_kl_div", "skew_kl_div", "skew_reverse_kl_div"])
def test_parameters_of_rows_and_their_ends(backend, name):
    """Each row as a call of its own has it; an end is another divergence, for single rows as well."""
    entry = REGISTRY[name].parameter
    student, teacher, _ = cases.Case("parameters of rows", "", (5, 70)).inputs(torch.float32)
    numbers = torch.tensor([0.0, 0.3, 1e-3, 0.97, 1.0], dtype=torch.float64)
    function = getattr(functional, name)
    loss, grad = run(functools.partial(function, **{entry.name: numbers}), student, teacher, reduction="none")
    for row, number in enumerate(numbers.tolist()):
        one = student[row : row + 1], teacher[row : row + 1]
        alone = run(functools.partial(function, **{entry.name: number}), *one, reduction="none")
        factor = upstream_like(loss)[row] / upstream_like(alone[0])
        assert error(loss[row], alone[0][0]) <= 8 * FLOOR[torch.float32]
        assert error(grad[row], alone[1][0] * factor) <= 8 * FLOOR[torch.float32]
        if number in entry.ends:
            assert error(loss[row], run(getattr(functional, entry.ends[number]), *one)[0]) <= 8 * FLOOR[torch.float32]
        elif number == 1:
            assert loss[row] == 0
            assert not grad[row].any()


def test_js_div_ends_are_the_kl_divergences(backend):
    student, teacher = torch.randn(6, 50), torch.randn(6, 50)
    for beta, same in ((0, functional.kl_div), (1, functional.reverse_kl_div)):
        ours, theirs = (
            run(functools.partial(functional.js_div, beta=beta), student, teacher),
            run(same, student, teacher),
        )
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("V", [5, 300, 9000])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_beta_for_each_row(backend, dtype, reduction, V):
    """The ends too are those of single rows."""
    beta = torch.tensor([0.0, 0.5, 1.0, 0.01, 0.9, 1 - 1e-6, 1e-6, 0.3], dtype=dtype)
    if V == 9000:
        beta = beta[:4]
    student, teacher, _ = cases.Case("beta", "", (len(beta), V)).inputs(dtype)
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher, reduction=reduction)
    upstream = upstream_like(loss).expand(beta.shape)
    losses, bounds = [], []
    for row, b in enumerate(beta.tolist()):
        exact, exact_grad = truth_of("js_div", student[row : row + 1], teacher[row : row + 1], beta=b)
        losses.append(exact)
        skewed = 1 if b in (0, 1) else 1 / min(b, 1 - b)
        least = FLOOR[dtype] * max(8, skewed / 2)
        bounds.append(least * exact)
        if reduction == "none":
            assert error(loss[row], exact) < least
        assert error(grad[row], exact_grad[0] * upstream[row]) < least
    if reduction == "sum":
        assert (loss - sum(losses)).abs() < sum(bounds) + 8 * FLOOR[dtype] * sum(losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_beta_of_half_precision_is_taken_as_it_is(backend, dtype):
    student, teacher, _ = cases.Case("beta", "", (4, 50)).inputs(torch.float32)
    beta = torch.tensor(0.002, dtype=dtype)
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher)
    for out, exact in zip((loss, grad), truth_of("js_div", student, teacher, beta=beta.item()), strict=True):
        assert error(out, exact) < 8 * FLOOR[torch.float32] / beta.item()


@pytest.mark.parametrize("beta", [1e-8, 1 - 1e-9])
def test_js_div_of_a_beta_that_rounds_to_an_end(backend, beta):
    student, teacher = torch.tensor([[200.0, 0.0, -200.0]] * 2), torch.tensor([[-200.0, 0.0, 200.0]] * 2)
    student[1, 0] = teacher[1, 1] = -torch.inf
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher, reduction="none")
    assert ((loss > -1e-6) & (loss < math.log(2))).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("beta", [1e-3, 0.25, 0.9, 0.999])
def test_js_div_of_any_beta(backend, beta):
    student, teacher, _ = cases.Case("beta", "", (8, 300)).inputs(torch.float32)
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher)
    ref = truth_of("js_div", student, teacher, beta=beta)
    theirs = run(lambda s, t: eager(f"js_div-{beta}", s, t).mean(), student, teacher)
    for out, eager_out, exact in zip((loss, grad), theirs, ref, strict=True):
        tolerance = max(TIMES_EAGER * error(eager_out, exact), 4 * FLOOR[torch.float32])
        if backend == "torch":  # autograd's terms with q and with p cancel
            tolerance /= min(beta, 1 - beta)
        assert error(out, exact) < tolerance
