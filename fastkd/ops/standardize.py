"""Standardized logits: (x - mean) / (std + 1e-7) of each row, std unbiased, before the rows schedule sees them.

With z = c / (std + eps), c = x - mean, of the n classes of a row that are not -inf, and g = dL/dz

    dL/dx_v = (g_v - mean(g) - c_v sum_u g_u c_u / ((n - 1) std (std + eps))) / (std + eps)

Rows are taken in slabs that the caches hold: the standardized logits of both sides are written there, the rows schedule
writes g over the student's, and from x and g comes the gradient, which is rounded once, also over x itself. Of every
loss that the schedule computes the definition holds so, with its temperatures and T^2 as they are, in logits that agree
to the last digit where the inputs do. A hard loss, which sees x, is a second call of the schedule. Traffic: student +
teacher + gradient, once each, as far as a slab stays in the caches. Saved for backward: the gradient; or nothing but
the call, and backward computes both passes anew, with the upstream gradient for weights.

The dist schedule finds its columns in all rows: forward it has the standardized logits of both sides whole, backward in
slabs.
"""

import functools
import math
from typing import Any, NamedTuple

import torch

from .. import _library
from .._calls import (
    DistBackward,
    DistCall,
    DistForward,
    HeadWeight,
    RowsBackward,
    RowsCall,
    RowsForward,
    Standardize,
    StandardizeBackward,
)
from .._dtypes import compute_dtype
from . import dist, head, rows
from ._namespaces import ops_of
from .slabs import Room, slabs

# Elements of a slab. On a GPU launches cost as much as many elements do.
SLAB = {"cpu": 2**20, "cuda": 2**23}


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    bwd: Any


NAMES = ("standardize_fwd", "standardize_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here and to the rows schedule."""
    OPS[namespace] = ops_of(namespace, Ops, NAMES)
    rows.OPS[rows.standardized(namespace)] = rows.OPS[namespace]._replace(
        fwd=functools.partial(torch.ops.fastkd.standardized_rows_fwd.default, namespace),
        bwd=functools.partial(torch.ops.fastkd.standardized_rows_bwd.default, namespace),
    )
    head.OPS[rows.standardized(namespace)] = functools.partial(
        torch.ops.fastkd.standardized_head_weight.default, namespace
    )
    dist.OPS[rows.standardized(namespace)] = dist.Ops(
        fwd=functools.partial(torch.ops.fastkd.standardized_dist_fwd.default, namespace),
        bwd=functools.partial(torch.ops.fastkd.standardized_dist_bwd.default, namespace),
    )


def rows_of_slab(student: torch.Tensor) -> int:
    """At most."""
    return max(SLAB.get(student.device.type, SLAB["cpu"]) // student.shape[-1], 1)


def _soft(namespace, call, room, moments, loss, grad, parts):
    """The loss of a slab's standardized logits; where it is wanted, the gradient with respect to these."""
    standardize, of_rows = OPS[namespace].fwd, rows.OPS[namespace].fwd
    s, t = room.of("student", call.student), room.of("teacher", call.teacher)
    standardize(*Standardize(call.student, call.mask, s, moments))
    standardize(*Standardize(call.teacher, call.mask, t, None))
    of_rows(*call._replace(student=s, teacher=t), *RowsForward(loss, s if grad else None, None, parts))
    return s


def _hard(namespace, call, room, loss, grad, parts):
    """The hard loss of a slab, which sees the student's logits as they are; its gradient."""
    x = room.of("hard", call.student).copy_(call.student)
    of_rows = rows.OPS[namespace].fwd  # the soft loss is left out: the teacher is one that has been read already
    of_rows(*call._replace(student=x, teacher=x), *RowsForward(loss, x if grad else None, None, parts))
    return x


def _parts(call):
    """A call of the soft loss, and one of the hard loss or None. Divergences see the standardized logits."""
    if call.target is None or call.target_loss != 0:
        return call, None
    numbers = call.target_numbers
    soft, hard = numbers.new_tensor([0, 1, 1]), numbers.new_tensor([1, 0, 1])
    return call._replace(target_numbers=numbers * soft), call._replace(target_numbers=numbers * hard)


@torch.no_grad()
def _run(namespace, call, loss, grad, parts=None):
    """Loss, [*] or [], and gradient and parts where they are wanted."""
    student, leading = call.student, call.student.shape[:-1]
    dtype, per_row = compute_dtype(student, call.teacher), loss.dim() > 0
    soft, hard = _parts(call)
    found = list(slabs(leading, rows_of_slab(student)))
    room = Room(dtype)
    losses = loss.view(-1) if per_row else student.new_empty((2 if hard else 1, len(found)), dtype=dtype)
    of_hard = torch.empty_like(losses) if per_row and hard else None
    parts = None if parts is None else parts.view(-1, rows.PARTS_SIZE)
    hard_parts = None if parts is None else torch.empty_like(parts)
    for i, slab in enumerate(found):
        part = slab.call(soft)
        of_slab = slab.of_rows(losses) if per_row else losses[0, i]
        moments = None if grad is None else student.new_empty((slab.last - slab.first, 3), dtype=torch.float64)
        g = _soft(namespace, part, room, moments, of_slab, grad is not None, slab.of_rows(parts))
        h = None
        if hard:
            of_slab = slab.of_rows(of_hard) if per_row else losses[1, i]
            h = _hard(namespace, slab.call(hard), room, of_slab, grad is not None, slab.of_rows(hard_parts))
        if grad is not None:
            OPS[namespace].bwd(*StandardizeBackward(part.student, part.mask, moments, g, h, grad[slab.index]))
    if not per_row:
        loss.copy_(losses.sum(dtype=torch.float64))
    elif of_hard is not None:
        losses += of_hard
    if parts is not None:  # the soft call has seen standardized logits
        parts[:, 0] = hard_parts[:, 0]


def _standardized_rows_fwd(namespace, *arguments):
    call, out = RowsCall(*arguments[: len(RowsCall._fields)]), RowsForward(*arguments[len(RowsCall._fields) :])
    _run(namespace, call, out.loss, out.grad, out.parts)
    if out.stats is not None:  # backward needs none
        out.stats.zero_()


def _standardized_rows_bwd(namespace, *arguments):
    call, rest = RowsCall(*arguments[: len(RowsCall._fields)]), RowsBackward(*arguments[len(RowsCall._fields) :])
    N = math.prod(call.student.shape[:-1])
    weight = rest.upstream.expand(N) if call.weight is None else call.weight * rest.upstream
    _run(namespace, call._replace(weight=weight.contiguous()), weight.new_empty(N), rest.grad)


@torch.no_grad()
def _standardized_head_weight(namespace, *arguments):
    """``head_weight`` of the standardized logits."""
    call = HeadWeight(*arguments)
    student, leading = call.student, call.student.shape[:-1]
    room, standardize = Room(compute_dtype(student, call.teacher)), OPS[namespace].fwd
    for slab in slabs(leading, rows_of_slab(student)):
        of_rows = ("temperature_rows", "teacher_temperature_rows", "mask")
        part = call._replace(
            student=student[slab.index], teacher=call.teacher[slab.index],
            student_weight=slab.of_rows(call.student_weight.view(-1)),
            **{name: slab.of_rows(getattr(call, name)) for name in of_rows},
        )  # fmt: skip
        s, t = room.of("student", part.student), room.of("teacher", part.teacher)
        standardize(*Standardize(part.student, part.mask, s, None))
        standardize(*Standardize(part.teacher, part.mask, t, None))
        head.OPS[namespace](*part._replace(student=s, teacher=t))


def _standardized_dist_fwd(namespace, *arguments):
    call, out = DistCall(*arguments[: len(DistCall._fields)]), DistForward(*arguments[len(DistCall._fields) :])
    dtype, standardize = compute_dtype(call.student, call.teacher), OPS[namespace].fwd
    sides = [torch.empty_like(x, dtype=dtype) for x in (call.student, call.teacher)]
    for x, side in zip((call.student, call.teacher), sides, strict=True):
        standardize(*Standardize(x, call.mask, side, None))
    dist.OPS[namespace].fwd(*call._replace(student=sides[0], teacher=sides[1]), *out)


@torch.no_grad()
def _standardized_dist_bwd(namespace, *arguments):
    call, rest = DistCall(*arguments[: len(DistCall._fields)]), DistBackward(*arguments[len(DistCall._fields) :])
    student, teacher, mask = call.student, call.teacher, call.mask
    room, standardize = Room(compute_dtype(student, teacher)), OPS[namespace].fwd
    for slab in slabs(student.shape[:-1], rows_of_slab(student)):
        x, y, counts = student[slab.index], teacher[slab.index], slab.of_rows(mask)
        s, t = room.of("student", x), room.of("teacher", y)
        moments = student.new_empty((slab.last - slab.first, 3), dtype=torch.float64)
        standardize(*Standardize(x, counts, s, moments))
        standardize(*Standardize(y, counts, t, None))
        part = call._replace(student=s, teacher=t, mask=counts)
        dist.OPS[namespace].bwd(*part, *rest._replace(rows=rest.rows[slab.index], grad=s))
        OPS[namespace].bwd(*StandardizeBackward(x, counts, moments, s, None, rest.grad[slab.index]))


for _name, _implementation in (
    ("dist_fwd", _standardized_dist_fwd),
    ("dist_bwd", _standardized_dist_bwd),
    ("rows_fwd", _standardized_rows_fwd),
    ("rows_bwd", _standardized_rows_bwd),
    ("head_weight", _standardized_head_weight),
):
    _library.fastkd.impl(f"standardized_{_name}", _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::standardized_{_name}", lambda *_: None)
use_namespace("fastkd")
