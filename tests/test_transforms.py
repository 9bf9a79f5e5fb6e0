"""torch.func and forward-mode AD: right in plain PyTorch, refused by kernels; never silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad

from fastkd import functional

LOSSES = {
    name: getattr(functional, name)
    for name in (
        "kl_div", "soft_cross_entropy", "reverse_kl_div", "js_div", "rkd_distance", "rkd_angle", "rkd_loss",
        "similarity_preserving", "gram_mse", "pkt", "relation_kl", "relational_triplet", "feature_mse",
        "feature_cosine", "attention_transfer",
    )
}  # fmt: skip
NO_FORWARD_MODE = ("rkd_distance", "rkd_loss", "relational_triplet")  # torch.cdist has none


def inputs(name):
    shape = (3, 4, 2, 2) if name == "attention_transfer" else (5, 9)
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def derivative(loss, student, teacher, direction):
    student = student.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(student, teacher), student)
    return grad, (grad * direction).sum()


def dual(loss, student, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(student, direction))).tangent


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", ["jvp", "dual", "dual of a leaf"])
def test_forward_mode(backend, name, mode):
    loss, (student, teacher, direction) = LOSSES[name], inputs(name)
    expected = derivative(loss, student, teacher, direction)[1]

    def tangent():
        if mode == "jvp":
            return torch.func.jvp(lambda s: loss(s, teacher), (student,), (direction,))[1]
        of = student.clone().requires_grad_() if mode == "dual of a leaf" else student
        return dual(lambda s: loss(s, teacher), of, direction)

    if backend == "torch" and name not in NO_FORWARD_MODE:
        torch.testing.assert_close(tangent(), expected, rtol=1e-4, atol=1e-6)
        return
    with pytest.raises(RuntimeError, match=r"student: fastkd.*(jvp|forward-mode AD)"):
        tangent()


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func_grad(backend, name):
    loss, (student, teacher, direction) = LOSSES[name], inputs(name)
    expected = derivative(loss, student, teacher, direction)[0]
    if backend == "torch":
        found = torch.func.grad(lambda s: loss(s, teacher))(student)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        return
    with pytest.raises(RuntimeError, match=r"student: fastkd.*torch\.func\.grad"):
        torch.func.grad(lambda s: loss(s, teacher))(student)


def test_vmap_and_gradients_in_a_batch(backend):
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    rows = functional.kl_div(student, teacher, reduction="none")
    if backend == "torch":
        found = torch.func.vmap(functional.kl_div)(student.detach(), teacher)
        torch.testing.assert_close(found, rows.detach())
        return
    with pytest.raises(RuntimeError, match=r"student: fastkd.*torch\.func\.vmap"):
        torch.func.vmap(functional.kl_div)(student.detach(), teacher)
    with pytest.raises(RuntimeError, match=r"grad_outputs: fastkd.*is_grads_batched=True"):
        torch.autograd.grad(rows, student, torch.eye(4), is_grads_batched=True)


def test_a_tangent_of_something_else_does_not_matter(backend):
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    expected = functional.kl_div(student, teacher)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.randn(3), torch.randn(3))
        assert torch.equal(functional.kl_div(student, teacher), expected)
