"""How dist_loss goes through autograd and torch.compile: numerical derivatives, the same bits, in place."""

import pytest
import torch
from conftest import gradcheck
from dist_checks import DTYPES, logits, run, some_rows
from dist_truth import dist_truth
from tolerances import error

import fastkd
from fastkd.functional import dist_loss


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4)], ids=str)
def test_gradcheck(backend, shape):
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)
    mask = some_rows(shape)
    assert gradcheck(backend, lambda s: dist_loss(s, teacher, mask=mask, temperature=2.0, eps=0.01), (student,))


@pytest.mark.parametrize("maps", [False, True])
def test_the_same_bits_again(kernel, maps):
    student, teacher = logits((300, 90))
    if maps:
        student, teacher = (x.T.contiguous().T for x in (student, teacher))
    first = run(student, teacher)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(student, teacher), strict=True))


@pytest.mark.parametrize("shape", [(700, 33), (40, 3001), (17, 5)], ids=str)
@pytest.mark.parametrize("maps", [False, True])
def test_the_same_bits_with_any_number_of_threads(threads, shape, maps):
    student, teacher = logits(shape)
    if maps:
        student, teacher = (x.T.contiguous().T for x in (student, teacher))
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        found.append(run(student, teacher))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_writes_the_gradient_over_the_student(backend, dtype, standardize):
    student, teacher = logits((60, 70), dtype)
    expected = run(student, teacher, upstream=3.0, standardize=standardize)
    leaf = student.clone().requires_grad_()
    z = leaf * 1
    loss = dist_loss(z, teacher, inplace=True, standardize=standardize)
    (3.0 * loss).backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])
    if backend != "torch":
        assert torch.equal(z.detach(), expected[1])


def test_after_inplace_the_logits_are_gone(backend):
    student, teacher = logits((6, 7))
    z = student.requires_grad_() * 1
    loss = dist_loss(z, teacher, inplace=True)
    with pytest.raises(ValueError, match=r"^student: these logits.* have been overwritten"):
        dist_loss(z, teacher)
    with pytest.raises(RuntimeError, match="used again"):
        (loss + z.sum()).backward()


def test_both_sides_learn_by_two_calls(backend):
    a, b = (x.requires_grad_() for x in logits((20, 30)))
    with pytest.raises(
        ValueError, match=r"^teacher: .*dist_loss\(student, teacher.detach\(\)\) and dist_loss\(teacher, "
    ):
        dist_loss(a, b)
    grads = torch.autograd.grad(dist_loss(a, b.detach()), a) + torch.autograd.grad(dist_loss(b, a.detach()), b)
    for x, y, grad in ((a, b, grads[0]), (b, a, grads[1])):
        assert error(grad, dist_truth(x, y)[1]) <= 1e-4


def test_backward_twice(backend):
    student, teacher = logits((20, 30))
    student.requires_grad_()
    loss = dist_loss(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


def test_without_gradients_the_loss_is_the_same(backend):
    student, teacher = logits((20, 30))
    expected, _ = run(student, teacher)
    with torch.inference_mode():
        assert torch.equal(dist_loss(student, teacher), expected)
        inference = teacher.clone()
        mask = torch.ones(20, dtype=torch.bool)
    loss, _ = run(student, inference, mask=mask)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compiled_exported_and_without_values(backend_name):
    class Step(torch.nn.Module):
        def forward(self, student, teacher, mask):
            return dist_loss(student, teacher, mask=mask, temperature=2.0)

    student, teacher = logits((9, 20))
    mask = some_rows(student.shape)
    with fastkd.backend(backend_name):
        torch.compiler.reset()
        compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager", dynamic=True)
        for N in (9, 7, 5):
            x = student[:N].clone().requires_grad_()
            loss = compiled(x, teacher[:N], mask[:N])
            expected, grad = run(student[:N], teacher[:N], mask=mask[:N], temperature=2.0)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], grad)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(Step(), (student, teacher, mask), dynamic_shapes=({0: batch},) * 3)
        torch.testing.assert_close(program.module()(student[:6], teacher[:6], mask[:6]), Step()(student[:6], teacher[:6], mask[:6]))  # fmt: skip
        meta = dist_loss(student.to("meta").requires_grad_(), teacher.to("meta"))
        assert (meta.shape, meta.device.type) == ((), "meta")
        meta.backward()


def test_autocast_does_not_round(backend):
    student, teacher = logits((20, 30))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = run(student, teacher)
    torch.testing.assert_close(loss, run(student, teacher)[0])
