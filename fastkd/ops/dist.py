"""The dist schedule: correlations of student's and teacher's probabilities along rows and along columns."""

import math
from typing import Any, NamedTuple

import torch

from .._calls import DistBackward, DistCall, DistForward
from .._check import SMALLEST_EPS, DistOptions
from .._dtypes import compute_dtype
from .._inplace import overwritten
from . import rows
from ._namespaces import ops_of
from .gradient import forbid_double_backward
from .numbers import as_tensor
from .saved import restored, save

STATS_SIZE = 6  # doubles a row
SLOPES_SIZE = 3  # numbers a class
PADDING = 16  # classes: whole vectors of the CPU's widest


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    bwd: Any


NAMES = ("dist_fwd", "dist_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    OPS[namespace] = ops_of(namespace, Ops, NAMES)


use_namespace("fastkd")


def read_numbers(numbers: torch.Tensor) -> list[float]:
    """Those of a call, for implementations in Python: inter_weight, intra_weight, temperature and eps."""
    names = ("inter_weight", "intra_weight", "temperature", "eps")
    values = numbers.tolist()
    for name, value, least in zip(names, values, (0.0, 0.0, 1e-300, SMALLEST_EPS), strict=True):
        if not least <= value < math.inf:
            raise ValueError(f"{name}: a finite number of at least {least} wanted, got {value}")
    return values


class _Dist(torch.autograd.Function):
    """The loss of a student that wants a gradient. It follows from what forward has found of all rows and of all
    columns; backward reads both logits once more and writes it, in float16 too times the upstream gradient."""

    @staticmethod
    def forward(ctx, namespace, inplace, num_classes, *fields):
        call = DistCall(*fields)  # of the whole student
        if inplace:
            overwritten(call.student)
            call = call._replace(student=call.student.detach())
        ctx.ops, ctx.inplace, ctx.num_classes = OPS[namespace], inplace, num_classes
        loss, of_rows, columns = _forward(
            namespace, call._replace(student=rows.first_classes(call.student, num_classes))
        )
        save(ctx, call, of_rows, columns)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grad = forbid_double_backward(_gradient, ctx, upstream)
        student = 3 + DistCall._fields.index("student")
        return tuple(grad if i == student else None for i in range(len(ctx.needs_input_grad)))


def new_outputs(call: DistCall) -> DistForward:
    """Memory for what dist_fwd finds."""
    student = call.student
    loss = student.new_empty((), dtype=compute_dtype(student, call.teacher))
    of_rows = student.new_empty((*student.shape[:-1], STATS_SIZE), dtype=torch.float64)
    padded = (student.shape[-1] + PADDING - 1) // PADDING * PADDING
    return DistForward(loss, of_rows, student.new_empty((SLOPES_SIZE, padded), dtype=loss.dtype))


def _forward(namespace, call):
    out = new_outputs(call)
    OPS[namespace].fwd(*call, *out)
    return out


def _gradient(ctx, upstream):
    call, of_rows, columns = restored(ctx, DistCall)
    student = call.student
    grad = student if ctx.inplace else rows.new_grad(student)
    counted = call._replace(student=rows.first_classes(student, ctx.num_classes))
    ctx.ops.bwd(*counted, *DistBackward(of_rows, columns, upstream, rows.of_first_classes(grad, ctx.num_classes)))
    if ctx.inplace:
        torch.autograd.graph.increment_version(student)  # another backward must not read it
    return grad


def dist_loss(namespace: str, student: torch.Tensor, teacher: torch.Tensor, options: DistOptions) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    whole, student = student, rows.first_classes(student, options.num_classes)  # the teacher has the first alone
    if options.standardize:
        namespace = rows.standardized(namespace)
    mask = None if options.mask is None else options.mask.reshape(-1).contiguous()
    dtype = compute_dtype(student, teacher)
    scale, scale_tensor = rows.inverse_divisor(rows.OPS[namespace], student, "batchmean", mask, None, dtype)
    numbers = as_tensor(options.inter_weight, options.intra_weight, options.temperature, options.eps)
    call = DistCall(student, teacher.detach(), mask, scale, scale_tensor, numbers)
    if whole.requires_grad and torch.is_grad_enabled():
        return _Dist.apply(namespace, options.inplace, options.num_classes, *call._replace(student=whole))
    return _forward(namespace, call)[0]
