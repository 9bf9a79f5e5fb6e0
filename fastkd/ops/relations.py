"""Relations between the samples of a batch of embeddings."""

import torch

from ..reference import compute_dtype
from . import similarity
from .gradient import once, times
from .rows import OPS


def _fake_fwd(student, teacher, save):
    """The gradient is in float32 where the student is in float16, whose range it would leave."""
    dtype = torch.float32 if student.dtype is torch.float16 else student.dtype
    grad = student.new_empty(student.shape if save else (0,), dtype=dtype)
    return student.new_empty((), dtype=compute_dtype(student, teacher)), grad


torch.library.register_fake("fastkd::similarity_fwd", _fake_fwd)


class _Relation(torch.autograd.Function):
    """The loss of a student that wants a gradient, which is computed in forward and saved."""

    @staticmethod
    def forward(ctx, namespace, student, teacher):
        ctx.scale_, ctx.dtype = OPS[namespace].scale_, student.dtype
        loss, grad = similarity.FWD(student, teacher, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return None, once(_gradient, ctx, upstream), None


def _gradient(ctx, upstream):
    return times(ctx.scale_, *ctx.saved_tensors, upstream).to(ctx.dtype)


def similarity_preserving(namespace, student, teacher):
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    if student.requires_grad and torch.is_grad_enabled():
        return _Relation.apply(namespace, student, teacher.detach())
    return similarity.FWD(student, teacher, False)[0]
