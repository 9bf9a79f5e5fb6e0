"""What the tests of dist_loss share: logits, and a comparison with its formula in extended precision."""

import torch
from dist_truth import dist_truth
from tolerances import FLOOR, error

from fastkd.functional import dist_loss

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def logits(shape, dtype=torch.float32, teacher_dtype=None, near=None):
    """near: how far the student is from the teacher."""
    generator = torch.Generator().manual_seed(sum(shape))
    teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if near is not None:
        student = teacher + near * student
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def some_rows(shape):
    return torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.6


def run(student, teacher, upstream=1.0, **options):
    student = student.detach().requires_grad_()
    loss = dist_loss(student, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss * upstream, student)[0]


def check(student, teacher, upstream=1.0, tolerance=1.0, constant=1e-15, **options):
    loss, grad = run(student, teacher, upstream, **options)
    loss_ref, grad_ref = dist_truth(student, teacher, constant=constant, **options)
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    assert loss.dtype is compute
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert error(loss, loss_ref) <= 2 * tolerance * FLOOR[compute]
    grad_ref = grad_ref * upstream
    stored = 2 * error(grad_ref.to(grad.dtype), grad_ref)
    assert error(grad, grad_ref) <= 40 * tolerance * FLOOR[compute] + stored
