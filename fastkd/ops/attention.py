"""Attention maps of student and teacher: sums over channels, compared over positions."""

from typing import Any, NamedTuple

import torch

from .._dtypes import compute_dtype
from .gradient import forbid_double_backward, scaled
from .numbers import as_tensor
from .saved import is_inference


class Ops(NamedTuple):
    """One implementation of the ops."""

    fwd: Any
    bwd: Any
    scale_: Any


NAMES = ("attention_fwd", "attention_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def _fake_fwd(student, teacher, p, save):
    loss = student.new_empty((), dtype=compute_dtype(student, teacher))
    return loss, torch.empty_like(student) if save else student.new_empty(0)


def _fake_bwd(student, *_):
    return torch.empty_like(student)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    for name, fake in zip(NAMES, (_fake_fwd, _fake_bwd), strict=True):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    OPS[namespace] = Ops(*(getattr(getattr(torch.ops, namespace), name).default for name in (*NAMES, "scale_")))


use_namespace("fastkd")


class _Attention(torch.autograd.Function):
    """The loss of a student that wants a gradient, which is computed in forward and saved; in float16 it
    would underflow before the loss scaler multiplies it, and backward computes it."""

    @staticmethod
    def forward(ctx, namespace, student, teacher, p):
        ctx.ops = OPS[namespace]
        ctx.recompute = student.dtype is torch.float16
        loss, grad = ctx.ops.fwd(student, teacher, p, not ctx.recompute)
        if not ctx.recompute:
            ctx.save_for_backward(grad)
            return loss
        inference = is_inference(teacher)
        ctx.teacher = teacher if inference else None  # autograd refuses to watch over it
        ctx.save_for_backward(student, None if inference else teacher, p)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return None, forbid_double_backward(_gradient, ctx, upstream), None, None


def _gradient(ctx, upstream):
    if not ctx.recompute:
        return scaled(ctx.ops.scale_, *ctx.saved_tensors, upstream)
    student, teacher, p = ctx.saved_tensors
    return ctx.ops.bwd(student, teacher if ctx.teacher is None else ctx.teacher, p, upstream)


def attention_transfer(namespace: str, student: torch.Tensor, teacher: torch.Tensor, p: float) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    teacher = teacher.detach()
    if student.requires_grad and torch.is_grad_enabled():
        return _Attention.apply(namespace, student, teacher, as_tensor(p))
    return OPS[namespace].fwd(student, teacher, as_tensor(p), False)[0]
