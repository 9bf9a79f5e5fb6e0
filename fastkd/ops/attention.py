"""Attention maps of student and teacher: sums over channels, compared over positions."""

from typing import Any, NamedTuple

import torch

from .._dtypes import compute_dtype
from .._feature_calls import AttentionBackward, AttentionCall, AttentionForward
from .gradient import forbid_double_backward, scaled
from .numbers import as_tensor
from .saved import restored, save


class Ops(NamedTuple):
    """One implementation of the ops."""

    fwd: Any
    bwd: Any
    scale_: Any


NAMES = ("attention_fwd", "attention_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def _fake_fwd(*arguments):
    call = AttentionCall(*arguments[: len(AttentionCall._fields)])
    wanted = AttentionForward(*arguments[len(AttentionCall._fields) :]).save
    loss = call.student.new_empty((), dtype=compute_dtype(call.student, call.teacher))
    return loss, torch.empty_like(call.student) if wanted else call.student.new_empty(0)


def _fake_bwd(*arguments):
    return torch.empty_like(AttentionCall(*arguments[: len(AttentionCall._fields)]).student)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    for name, fake in zip(NAMES, (_fake_fwd, _fake_bwd), strict=True):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    OPS[namespace] = Ops(*(getattr(getattr(torch.ops, namespace), name).default for name in (*NAMES, "scale_")))


use_namespace("fastkd")
_STUDENT = AttentionCall._fields.index("student")


class _Attention(torch.autograd.Function):
    """The loss of a student that wants a gradient, which is computed in forward and saved; in float16 it
    would underflow before the loss scaler multiplies it, and backward computes it."""

    @staticmethod
    def forward(ctx, namespace, *fields):
        ctx.ops = OPS[namespace]
        ctx.recompute = fields[_STUDENT].dtype is torch.float16
        loss, grad = ctx.ops.fwd(*fields, *AttentionForward(not ctx.recompute))
        if ctx.recompute:
            save(ctx, fields)
        else:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grads = [None] * len(ctx.needs_input_grad)
        grads[1 + _STUDENT] = forbid_double_backward(_gradient, ctx, upstream)
        return tuple(grads)


def _gradient(ctx, upstream):
    if not ctx.recompute:
        return scaled(ctx.ops.scale_, *ctx.saved_tensors, upstream)
    (call,) = restored(ctx, AttentionCall)
    return ctx.ops.bwd(*call, *AttentionBackward(upstream))


def attention_transfer(namespace: str, student: torch.Tensor, teacher: torch.Tensor, p: float) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    call = AttentionCall(student=student, teacher=teacher.detach(), p=as_tensor(p))
    if student.requires_grad and torch.is_grad_enabled():
        return _Attention.apply(namespace, *call)
    return OPS[namespace].fwd(*call, *AttentionForward(False))[0]
