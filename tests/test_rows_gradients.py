"""How the logit losses go through autograd: upstream, retained and accumulated gradients, and second derivatives."""

import cases
import pytest
import torch
from rows_checks import DTYPES, run
from tolerances import FLOOR, error
from truth import kl_div as truth

import fastkd
from fastkd import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_teacher_made_in_inference_mode(backend, reduction, dtype):
    student = torch.randn(4, 20).to(dtype)
    with torch.inference_mode():
        teacher, mask = torch.randn(4, 20).to(dtype), torch.tensor([True, False, True, True])
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction, mask=mask)
    expected = run(functional.kl_div, student, teacher.clone(), reduction=reduction, mask=mask.clone())
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


def test_float16_gradients_survive_a_loss_scaler(backend):
    """Gradients below 2^-24 times a scale of 2^16 are numbers again: they must not be rounded to
    float16 before they are multiplied."""
    student, teacher, _ = cases.Case("scaled", "", (4, 4000)).inputs(torch.float16)
    s = student.requires_grad_()
    loss = functional.kl_div(s, teacher, normalizer=512) * 2.0**16
    (grad,) = torch.autograd.grad(loss, s)
    _, grad_ref = truth(student, teacher, normalizer=512)
    assert error(grad_ref.half(), grad_ref) > 4 * FLOOR[torch.float16]  # or this test is too easy
    assert error(grad, grad_ref * 2.0**16) < 2 * FLOOR[torch.float16]


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, -3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_is_applied(backend, dtype, factor):
    student, teacher, _ = cases.Case("upstream", "", (6, 50)).inputs(dtype)
    (plain,) = torch.autograd.grad(functional.kl_div(student.requires_grad_(), teacher), student)
    (grad,) = torch.autograd.grad(functional.kl_div(student, teacher) * factor, student)
    assert error(grad, plain.double() * factor) <= 2 * FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_retained_graph_gives_the_same_again(backend, reduction, factor):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    loss = (functional.kl_div(student, teacher, reduction=reduction) * factor).sum()
    grads = [torch.autograd.grad(loss, student, retain_graph=again)[0] for again in (True, True, False)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_gradients_accumulate(backend):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    functional.kl_div(student, teacher).backward()
    once = student.grad.clone()
    functional.kl_div(student, teacher).backward()
    assert torch.equal(student.grad, 2 * once)


def test_no_gradient_is_computed_for_nobody(backend):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    with torch.no_grad():
        assert not functional.kl_div(student, teacher).requires_grad
    assert not functional.kl_div(student.detach(), teacher).requires_grad


def test_second_derivatives_of_the_reference():
    student = torch.randn(2, 4, dtype=torch.float64)
    for name, loss in cases.LOSSES.items():
        if name == "adaptive_kl_div":  # of which a part is a constant
            continue
        kinked = name in ("total_variation", "negative_log_acceptance")
        equal = [] if kinked else [student.clone()]
        for teacher in (torch.randn(2, 4, dtype=torch.float64), *equal):
            with fastkd.backend("torch"):
                hessian = torch.autograd.functional.hessian(lambda s, f=loss, t=teacher: f(s, t), student).reshape(8, 8)
                step = 1e-5 * torch.eye(8, dtype=torch.float64).reshape(8, 2, 4)
                slopes = [run(loss, student + h, teacher)[1] - run(loss, student - h, teacher)[1] for h in step]
            assert error(hessian, torch.stack(slopes).reshape(8, 8) / 2e-5) < 1e-5
