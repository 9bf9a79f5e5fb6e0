"""inplace=True: the gradient lies where the logits were, and autograd knows."""

import pytest
import torch
from tolerances import FLOOR, error

from fastkd import functional

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def head(dtype):
    """Logits as a model makes them: not a leaf."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator, dtype=dtype)
    weight = torch.randn(50, 8, generator=generator, dtype=dtype).requires_grad_()
    return weight, hidden @ weight.T, torch.randn(6, 50, generator=generator, dtype=dtype)


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_gradient(backend, dtype, reduction, factor):
    def grad_of_weight(**options):
        weight, logits, teacher = head(dtype)
        loss = (functional.kl_div(logits, teacher, reduction=reduction, **options) * factor).sum()
        loss.backward()
        return loss.detach(), weight.grad

    loss, grad = grad_of_weight()
    loss_inplace, grad_inplace = grad_of_weight(inplace=True)
    assert torch.equal(loss, loss_inplace)
    assert error(grad_inplace, grad) <= FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_the_gradient_is_where_the_logits_were(kernel, reduction):
    _, logits, teacher = head(torch.float32)
    place = logits.data_ptr()
    seen = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    functional.kl_div(logits, teacher, reduction=reduction, inplace=True).sum().backward()
    assert seen == [place]


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_views_of_logits(backend, reduction):
    """logits[:, :-1], as a language model's loss has it: the other positions keep their values."""
    weight, logits, _ = head(torch.float32)
    base = logits.view(2, 3, 50)
    teacher = torch.randn(2, 2, 50)
    before = base.detach().clone()
    functional.kl_div(base[:, :-1], teacher, reduction=reduction, inplace=True).sum().backward()
    grad = weight.grad.clone()
    assert torch.equal(base.detach()[:, -1], before[:, -1])

    weight, logits, _ = head(torch.float32)
    functional.kl_div(logits.view(2, 3, 50)[:, :-1], teacher, reduction=reduction).sum().backward()
    assert error(weight.grad, grad) < FLOOR[torch.float32]


def test_use_before_is_right_use_after_raises(backend):
    _, logits, teacher = head(torch.float32)
    early = logits.sum()
    loss = functional.kl_div(logits, teacher, inplace=True)
    (loss + early).backward()  # what was recorded before is right

    _, logits, teacher = head(torch.float32)
    loss = functional.kl_div(logits, teacher, inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True wrote its gradient over these logits"):
        (loss + logits.sum()).backward()


def test_logits_that_an_earlier_operation_saved(backend):
    """exp saved its output, the logits: its backward must not read a gradient there."""
    x = torch.randn(6, 50, requires_grad=True)
    logits = x.exp()
    loss = functional.kl_div(logits, torch.randn(6, 50), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_second_backward_is_right_or_raises(kernel, dtype, reduction):
    weight, logits, teacher = head(dtype)
    loss = functional.kl_div(logits, teacher, reduction=reduction, inplace=True).sum()
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    first = first.clone()
    if reduction == "none" or dtype == torch.float16:  # the logits it would need are gone
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, weight)
    else:
        (second,) = torch.autograd.grad(loss, weight)
        assert torch.equal(first, second)


def test_without_a_gradient_nothing_is_written(backend):
    logits, teacher = torch.randn(6, 50), torch.randn(6, 50)
    before = logits.clone()
    functional.kl_div(logits, teacher, inplace=True)
    with torch.no_grad():
        functional.kl_div(logits, teacher, inplace=True)
    assert torch.equal(logits, before)


def test_halves_of_one_tensor(backend):
    """Student and teacher from one storage, but not in the same places."""
    weight, logits, _ = head(torch.float32)
    with torch.no_grad():
        plain = functional.kl_div(logits[:3], logits[3:])
    loss = functional.kl_div(logits[:3], logits[3:].detach(), inplace=True)
    loss.backward()
    assert torch.equal(loss.detach(), plain)
    assert weight.grad.abs().sum() > 0


def test_validation_needs_no_other_module(backend):
    """A leaf is no error where no gradient is wanted."""
    leaf, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    with torch.no_grad():
        assert functional.kl_div(leaf, teacher, inplace=True) > 0


def test_masked_rows(kernel):
    _, logits, teacher = head(torch.float32)
    mask = torch.tensor([True, False, True, True, False, True])
    functional.kl_div(logits, teacher, mask=mask, inplace=True).backward()
    assert torch.equal(logits.detach()[~mask], torch.zeros(2, 50))


@pytest.mark.parametrize("part", [lambda x: x[3:], lambda x: x], ids=["slice", "whole"])
def test_a_second_loss_of_one_tensor_is_refused_inside_the_call(backend, part):
    """Its gradient would have to pass by the first, whose own stays right."""
    weight, logits, teacher = head(torch.float32)
    first = functional.kl_div(logits[:3], teacher[:3], inplace=True)
    before = logits.detach().clone()
    with pytest.raises(ValueError, match="inplace: the student's logits, or others of the same tensor, have been"):
        functional.kl_div(part(logits), part(teacher), inplace=True)
    assert torch.equal(logits.detach(), before)
    (grad,) = torch.autograd.grad(first, weight)
    weight, logits, _ = head(torch.float32)
    (expected,) = torch.autograd.grad(functional.kl_div(logits[:3], teacher[:3]), weight)
    torch.testing.assert_close(grad, expected)


def test_a_plain_loss_of_overwritten_logits_is_refused_inside_the_call(backend):
    """Also of a part that is not what was overwritten: its gradient would have to pass by that."""
    logits = torch.randn(6, 20, requires_grad=True) * 1.0
    teacher = torch.randn(3, 20)
    functional.kl_div(logits[:3], teacher, inplace=True)
    for rows in (slice(0, 3), slice(3, 6)):
        with pytest.raises(
            ValueError, match=r"^student: these logits, or others of the same tensor, have been overwritten"
        ):
            functional.kl_div(logits[rows], teacher)
        with torch.no_grad():  # what they hold may be looked at
            functional.kl_div(logits[rows], teacher)


@pytest.mark.parametrize("split", ["chunk", "split", "unbind"])
def test_views_that_came_together_are_refused_inside_the_call(backend, split):
    _, logits, teacher = head(torch.float32)
    before = logits.detach().clone()
    parts = {"chunk": lambda x: x.chunk(3), "split": lambda x: x.split(2), "unbind": lambda x: x.unbind()}[split]
    with pytest.raises(ValueError, match=r"inplace: .* of several views .* Compute the logits of each chunk"):
        functional.kl_div(parts(logits)[0], parts(teacher)[0], inplace=True)
    assert torch.equal(logits.detach(), before)


def test_a_view_of_a_leaf_is_called_that():
    """Autograd refuses it too, for a reason that is none of the caller's business."""
    leaf, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(5, 50)
    with pytest.raises(
        ValueError, match="inplace: the student's logits are a leaf that requires a gradient, or a view"
    ):
        functional.kl_div(leaf[1:], teacher, inplace=True)
