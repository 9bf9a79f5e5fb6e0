"""What the tests of recipes share: inputs, and a comparison with a formula in float64."""

import torch

DTYPES = [torch.float64, torch.float32]
PRECISION = {torch.float64: 1e-10, torch.float32: 2e-5}


def logits(*shape, dtype=torch.float64, scale=2.0):
    """A student that learns, and a teacher."""
    student, teacher = (scale * torch.randn(*shape, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def in_float64(x):
    """The same values, for a formula to be computed with."""
    return x.detach().double().requires_grad_(x.requires_grad)


def kl_of(log_q, log_p):
    """KL(q || p) of each row, by its definition."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def agree(loss, expected, student, plain_student):
    """The loss and its gradient; relative to the largest entry of each."""
    bound = PRECISION[student.dtype]
    got, wanted = torch.autograd.grad(loss, student)[0], torch.autograd.grad(expected, plain_student)[0]
    for ours, theirs in ((loss.detach(), expected.detach()), (got, wanted)):
        assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()
