"""torch.func and forward-mode AD: right in plain PyTorch, refused by kernels; never silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad

import fastkd
from fastkd import functional

LOSSES = {
    name: getattr(functional, name)
    for name in (
        "kl_div", "soft_cross_entropy", "reverse_kl_div", "js_div", "negative_log_acceptance", "alpha_beta_div",
        "bernoulli_kl_div", "rkd_distance", "rkd_angle", "rkd_loss",
        "similarity_preserving", "gram_mse", "pkt", "relation_kl", "relational_triplet", "feature_mse",
        "feature_smooth_l1", "feature_cosine", "attention_transfer", "dist_loss",
    )
}  # fmt: skip
TARGET = torch.tensor([0, 8, 3, 3, 1])
LOSSES["kd_loss"] = lambda s, t: functional.kd_loss(s, t, TARGET, label_smoothing=0.1)
LOSSES["dkd_loss"] = lambda s, t: functional.dkd_loss(s, t, TARGET)
LOSSES["nkd_loss"] = lambda s, t: functional.nkd_loss(s, t, TARGET)
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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("of", ["a leaf", "a model", "float16"])
def test_second_derivatives_never_count_as_0(kernel, name, of):
    """Whichever way autograd is asked: what it finds no path to counts for nothing, so no graph of a gradient is made."""
    loss, (student, teacher, _) = LOSSES[name], inputs(name)
    student = (student.half() if of == "float16" else student).requires_grad_()
    logits = student * 1 if of == "a model" else student
    for ask in (
        lambda: torch.autograd.grad(loss(logits, teacher), student, create_graph=True),
        lambda: loss(logits, teacher).backward(create_graph=True),
        lambda: loss(logits, teacher).backward(inputs=[logits], create_graph=True),
        lambda: torch.autograd.functional.hessian(lambda s: loss(s, teacher), student.detach()),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True: fastkd's kernels have no second derivatives"):
            ask()


def test_second_derivatives_of_projectors_and_keys(kernel):
    student, teacher, weight = torch.randn(5, 3), torch.randn(5, 4), torch.randn(4, 3, requires_grad=True)
    keys = torch.randn(6, 3, requires_grad=True)
    for loss, learned in (
        (functional.linear_feature_mse(student, weight, teacher), weight),
        (functional.relation_kl(student, teacher, student_keys=keys, teacher_keys=torch.randn(6, 4)), keys),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(loss, learned, create_graph=True)


def test_second_derivatives_in_plain_pytorch():
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    with fastkd.backend("torch"):
        (grad,) = torch.autograd.grad(functional.kl_div(student, teacher), student, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), student)
    assert second.abs().sum() > 0


COMPILED = {
    "grad": lambda loss, x: torch.func.grad(loss)(x),
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,))[1],
    "vjp": lambda loss, x: torch.func.vjp(loss, x)[1](torch.ones(()))[0],
    "vmap": lambda loss, x: torch.func.vmap(lambda row: loss(row[None]))(x),
}


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("transform", COMPILED)
def test_transforms_inside_a_compiled_function(transform, fullgraph):
    """Compiled by itself before, the loss is traced anew there."""
    torch._dynamo.reset()
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)

    def loss(s):
        return functional.kl_div(s, teacher[: len(s)])

    torch.compile(loss, backend="aot_eager")(student)
    compiled = torch.compile(lambda x: COMPILED[transform](loss, x), backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"fastkd's kernels have no rules|Observed exception"):
        compiled(student)


def test_a_dual_number_inside_a_compiled_function():
    torch._dynamo.reset()
    student, teacher = torch.randn(4, 9), torch.randn(4, 9)
    compiled = torch.compile(lambda s: functional.kl_div(s, teacher), backend="aot_eager")
    compiled(student)
    with forward_ad.dual_level(), pytest.raises(Exception, match="fastkd's kernels have no rules for forward-mode AD"):
        compiled(forward_ad.make_dual(student, student))


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
