"""Losses of what stands in place of logits, a slab of rows at a time: of hidden states with a head, and of a teacher's
best classes (which are brought to logits in ops/top_k.py).

Logits of a head are never whole. For each slab: both sides' logits z = scale (hidden W^T + b), capped where there is a
softcap, in float32 at least; the rows schedule, whose gradient g takes the place of the student's logits; and the
products back, g W to the hidden states and g^T hidden to the weight. All of that is done in forward, so that no logits
are made twice. Where the gradient can not be made in forward (one upstream gradient per row; float16, which would
underflow before a loss scaler multiplies it) backward makes the slabs once more, with the upstream gradient for
weights.

Of rows that a mask leaves out nothing is computed where the host knows the mask, on the CPU; elsewhere their hidden
states are taken for 0, as 0 times what they hold would be NaN where they hold that.
"""

import collections
import math
from typing import Any, NamedTuple

import torch

from .. import _library
from .._calls import FormOutputs, FormRows, HeadWeight, RowsCall, RowsForward
from .._check import LogitsOptions
from .._divergences import DERIVED
from .._inplace import overwritten
from ..forms import LinearLogits, TopKLogProbs, logits_of
from ..reference import without_autocast
from . import head, numbers, rows, standardize
from ._head_products import Gradients, Side, rows_of_slab
from .gradient import all_scaled, forbid_double_backward
from .saved import restored, save
from .slabs import evenly, gathered, slabs
from .top_k import StudentOfTopK, teacher_logits

_Call = collections.namedtuple("_Call", (*RowsCall._fields, *FormRows._fields))


class _SideParts(NamedTuple):
    """What a side is made of: hidden states with a head, or logits."""

    x: torch.Tensor
    head: torch.Tensor | None
    bias: torch.Tensor | None
    numbers: tuple[float, float]  # scale, softcap


def _parts_of(side, num_classes):
    """num_classes: that count, or None: all."""
    if isinstance(side, TopKLogProbs):
        return _SideParts(side.log_probs, None, None, (side.temperature, math.inf))
    if not isinstance(side, LinearLogits):
        return _SideParts(rows.first_classes(side, num_classes), None, None, (1.0, math.inf))
    weight, bias = side.weight, side.bias
    if num_classes is not None:  # not else: the gradient of a view is a copy
        weight, bias = weight[:num_classes], bias if bias is None else bias[:num_classes]
    softcap = math.inf if side.softcap is None else side.softcap
    return _SideParts(side.hidden, weight, bias, (side.scale, softcap))


def _flat(tensors):
    """Rows [N, *] where all tensors [*, *] have them so without a copy."""
    if all(x is None or x.is_contiguous() for x in tensors):
        return [x if x is None else x.view(-1, x.shape[-1]) for x in tensors]
    return tensors


@torch.no_grad()
def _form_rows(namespace, *arguments):
    """The implementation of the op."""
    ends = len(RowsCall._fields), len(RowsCall._fields) + len(FormRows._fields)
    call, linear = RowsCall(*arguments[: ends[0]]), FormRows(*arguments[ends[0] : ends[1]])
    out = FormOutputs(*arguments[ends[1] :])
    with without_autocast(call.student.device):
        _run(namespace, call, linear, out)


# What a call has in the dtype that is computed in.
OF_COMPUTE_DTYPE = ("temperature_rows", "teacher_temperature_rows", "weight")


def _double(x):
    return None if x is None else x.double()


class _Hard(NamedTuple):
    loss: torch.Tensor
    grad: torch.Tensor | None


class _FewClasses:
    """The loss of a slab whose teacher has K classes of each row."""

    def __init__(self, linear, scale, dtype, stays):
        """stays: whether the student's logits must."""
        self.linear, self.scale, self.dtype, self.stays = linear, scale, dtype, stays
        self.room = None

    def _room(self, z):
        """For exponentials: where the logits lie, if nobody needs these after them."""
        if self.linear.renormalize:
            return None
        if not self.stays and z.dtype is self.dtype:
            return z
        if self.room is None or self.room.numel() < z.numel():
            self.room = z.new_empty(z.numel(), dtype=self.dtype)
        return self.room[: z.numel()].view(z.shape)

    def loss(self, namespace, part, slab, loss, grad):
        """Fills loss and, where it is wanted, the gradient of the student's logits, which may be these."""
        z, leading = part.student, part.student.shape[:-1]
        hard = None if part.target is None else self._hard(namespace, part, loss, grad)
        if hard is not None:
            soft_weight = part.target_numbers[1].item()
            if soft_weight == 0:
                loss.copy_(hard.loss)
                if grad is not None:
                    grad.copy_(hard.grad)
                return
            ones = z.new_ones(math.prod(leading), dtype=self.dtype) if part.weight is None else part.weight
            part = part._replace(target=None, target_numbers=None, weight=ones * soft_weight)
        index = self.linear.indices[slab.index]
        pad = index < 0
        log_tail = self.linear.log_tail
        if log_tail is not None:
            log_tail = slab.of_rows(log_tail).view(leading)
        t = teacher_logits(part.teacher.double(), pad, log_tail, self.scale, self.linear.renormalize, z.shape[-1])
        T = part.temperature
        if part.temperature_rows is not None:
            T = part.temperature_rows if part.temperature_rows.dim() == 0 else part.temperature_rows.view(*leading, 1)
        student = StudentOfTopK(z, index, pad, T, self._room(z))
        u = student.logits(z)
        of_double = {name: _double(getattr(part, name)) for name in OF_COMPUTE_DTYPE}
        soft = RowsForward(torch.empty_like(loss, dtype=torch.float64), u if grad is not None else None, None, None)
        _fwd(namespace, part._replace(student=u, teacher=t, **of_double), self.linear.adaptive, soft)
        loss.copy_(soft.loss if hard is None else soft.loss + hard.loss)
        if grad is not None:
            of_hard = None if hard is None else hard.grad
            student.gradient(u, None if part.mask is None else part.mask.view(leading), of_hard, grad)

    def _hard(self, namespace, part, like, grad):
        """The hard loss of a slab, of all classes, and its gradient."""
        x = part.student.to(self.dtype, copy=True)
        numbers_ = part.target_numbers * part.target_numbers.new_tensor([1, 0, 1])
        # the soft loss is left out: the teacher is one that has been read already
        part = part._replace(student=x, teacher=x, target_numbers=numbers_)
        found = _Hard(torch.empty_like(like), x if grad is not None else None)
        rows.OPS[namespace].fwd(*part, *RowsForward(found.loss, found.grad, None, None))
        return found


def _checked(numbers_):
    """Scale and softcap of both sides. They were not checked where torch.compile had made them symbols."""
    for name, x in zip(("student.scale", "student.softcap", "teacher.scale", "teacher.softcap"), numbers_, strict=True):
        if not x > 0 or (x == math.inf and "scale" in name):  # of a softcap it means none
            raise RuntimeError(f"{name}: a positive finite number wanted, got {x}")
    return numbers_


def _leaves_out_rows(mask):
    """Whether the host knows that there are rows which do not count."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.all())


def _run(namespace, call, linear, out):
    N = math.prod(call.student.shape[:-1])
    student_x, teacher_x, grad, indices = _flat([call.student, call.teacher, out.grad, linear.indices])
    call, out = call._replace(student=student_x, teacher=teacher_x), out._replace(grad=grad)
    linear = linear._replace(indices=indices)
    leading, most = student_x.shape[:-1], max(1, evenly(N, linear.slab_rows))
    given = _checked(linear.numbers.tolist())
    student = Side(student_x, linear.student_head, linear.student_bias, *given[:2], most)
    teacher = Side(teacher_x, linear.teacher_head, linear.teacher_bias, *given[2:], most)
    back = None if student.head is None else Gradients(student, out)
    stays = student.head is None or student.head.softcap < math.inf
    few = None if indices is None else _FewClasses(linear, given[2], out.loss.dtype, stays)
    per_row = out.loss.dim() > 0
    losses = out.loss.view(-1) if per_row else None
    parts = None if out.parts is None else out.parts.view(-1, rows.PARTS_SIZE)
    packs = student.head is not None and _leaves_out_rows(call.mask)
    if packs:  # nothing else is written of the rows that do not count
        found = list(gathered(leading, call.mask, most))
        for x in (out.grad, losses, parts):
            if x is not None:
                x.zero_()
    else:
        found = list(slabs(leading, most))
    sums = call.student.new_zeros(0 if per_row else len(found), dtype=out.loss.dtype)
    for i, slab in enumerate(found):
        options = slab.options(call)
        s, t = student.logits(slab, options["mask"]), teacher.logits(slab, options["mask"])
        part = call._replace(student=s, teacher=t, **options)
        grad = back.of(s) if back else None if out.grad is None else out.grad[slab.index]
        loss = s.new_empty(s.shape[:-1], dtype=out.loss.dtype) if per_row else sums[i]
        of_parts = None if parts is None else s.new_empty(*s.shape[:-1], rows.PARTS_SIZE, dtype=parts.dtype)
        if few:
            few.loss(namespace, part, slab, loss, grad)
        else:
            _fwd(namespace, part, linear.adaptive, RowsForward(loss, grad, None, of_parts))
        at = slab.rows if packs else slice(slab.first, slab.last)
        if per_row:
            losses[at] = loss.view(-1)
        if parts is not None:
            parts[at] = of_parts.view(-1, rows.PARTS_SIZE)
        if back and back.wanted:
            back.add(slab, s, grad)
        del s, t, part, grad  # not two of them at a time, where they are copies
    if not per_row:
        out.loss.copy_(sums.sum(dtype=torch.float64))
    if back:
        back.finish()


def _fwd(namespace, part, adaptive, outputs):
    """The rows schedule, of a slab."""
    if adaptive:
        part = part._replace(parameter_rows=_student_weight(namespace, part))
    rows.OPS[namespace].fwd(*part, *outputs)


def _student_weight(namespace, part):
    """Of each row of a slab, as ``adaptive_kl_div`` has it."""
    weight = part.student.new_empty(part.student.shape[:-1], dtype=torch.float64)
    temperatures = (
        part.temperature, part.temperature_rows, part.teacher_temperature, part.teacher_temperature_rows,
    )  # fmt: skip
    mu = part.parameter, part.parameter_rows
    head.OPS[namespace](*HeadWeight(part.student, part.teacher, *temperatures, part.mask, *mu, weight))
    return weight.view(-1)


_library.fastkd.impl("form_rows", _form_rows, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::form_rows", lambda *_: None)


class _Learns(NamedTuple):
    """What of the student wants a gradient."""

    x: bool  # its hidden states or logits
    head: bool
    bias: bool


class _Forms(torch.autograd.Function):
    """The loss of a student that wants a gradient, where student or teacher are no logits."""

    @staticmethod
    def forward(ctx, namespace, inplace, per_row, return_parts, num_classes, learns, *fields):
        call = _Call(*fields)
        ctx.namespace, ctx.inplace, ctx.num_classes, ctx.learns = namespace, inplace, num_classes, learns
        loss = rows.new_loss(call, per_row)
        parts = rows.new_parts(call) if return_parts else None
        ctx.recompute = per_row or call.student.dtype is torch.float16
        if inplace:
            overwritten(call.student)
            call = call._replace(student=call.student.detach())
        if ctx.recompute:
            _op(namespace, call, num_classes, loss, (None, None, None), parts)
            save(ctx, call)
        else:
            grads = _new_grads(call, learns, inplace)
            _op(namespace, call, num_classes, loss, grads, parts)
            ctx.save_for_backward(*(x for x in grads if x is not None))
        if parts is None:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, upstream, *_):
        grads = forbid_double_backward(_gradients, ctx, upstream)
        found = dict(zip(("student", "student_head", "student_bias"), grads, strict=True))
        return *(None for _ in range(6)), *(found.get(name) for name in _Call._fields)


def _gradients(ctx, upstream):
    """Of the student's x, head and bias; None where it is not wanted."""
    if not ctx.recompute:
        found = iter(all_scaled(rows.OPS[ctx.namespace].scale_, list(ctx.saved_tensors), upstream))
        return [next(found) if wanted else None for wanted in ctx.learns]
    (call,) = restored(ctx, _Call)
    N = math.prod(call.student.shape[:-1])
    upstream = upstream.expand(call.student.shape[:-1]).reshape(N)
    weight = upstream.contiguous() if call.weight is None else call.weight * upstream
    grads = _new_grads(call, ctx.learns, ctx.inplace)
    _op(ctx.namespace, call._replace(weight=weight), ctx.num_classes, weight.new_empty(()), grads, None)
    if ctx.inplace:
        torch.autograd.graph.increment_version(call.student)  # another backward must not read it
    return grads


def _new_grads(call, learns, inplace):
    """Memory for the gradients that are wanted."""
    x = call.student if inplace else rows.new_grad(call.student) if learns.x else None
    return [x, *(torch.empty_like(y) if wanted else None for y, wanted in
                 zip((call.student_head, call.student_bias), learns[1:], strict=True))]  # fmt: skip


def _op(namespace, call, num_classes, loss, grads, parts):
    """Of the classes that count; the gradient of the others is 0."""
    grad, head_grad, bias_grad = grads
    student, head_, bias = call.student, call.student_head, call.student_bias
    if num_classes is not None:
        if head_ is None:
            student = rows.first_classes(student, num_classes)
            grad = None if grad is None else rows.of_first_classes(grad, num_classes)
        else:
            head_, bias = head_[:num_classes], None if bias is None else bias[:num_classes]
            for x in (head_grad, bias_grad):
                if x is not None:
                    x[num_classes:].zero_()
            head_grad, bias_grad = (None if x is None else x[:num_classes] for x in (head_grad, bias_grad))
    call = call._replace(student=student, student_head=head_, student_bias=bias)
    torch.ops.fastkd.form_rows(namespace, *call, *FormOutputs(loss, grad, head_grad, bias_grad, parts))


def logits_loss(
    namespace: str, divergence: str, student: Any, teacher: Any, options: LogitsOptions
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As that of the rows schedule; student or teacher, or both, are no logits, and a teacher with a head has all
    classes."""
    if options.standardize:
        namespace = rows.standardized(namespace)
    adaptive = divergence in DERIVED
    if adaptive:
        divergence = DERIVED[divergence].divergence
    count = options.num_classes
    of_teacher = _parts_of(teacher, count)
    # detached also because torch.compile gives an autograd.Function no tensor twice, and both may have one head
    constants = (x if x is None else x.detach() for x in of_teacher[:3])
    sides = [_parts_of(student, None), _SideParts(*constants, of_teacher.numbers)]
    like = logits_of(student, count)
    rows_call = rows.call_of(namespace, divergence, like, logits_of(teacher, count, like), options)
    few = teacher if isinstance(teacher, TopKLogProbs) else None
    heads = [rows_of_slab(x) for x in (student, teacher) if isinstance(x, LinearLogits)]
    call = _Call(
        *rows_call._replace(student=sides[0].x, teacher=sides[1].x),
        *FormRows(
            sides[0].head, sides[0].bias, sides[1].head, sides[1].bias,
            None if few is None else few.indices.to(torch.int64),
            None if few is None or few.log_tail is None else few.log_tail.reshape(-1),
            few is not None and few.tail == "renormalize",
            numbers.as_tensor(*sides[0].numbers, *sides[1].numbers),
            min(heads) if heads else standardize.rows_of_slab(like), adaptive,
        ),
    )  # fmt: skip
    learns = _Learns(*(x is not None and x.requires_grad for x in sides[0][:3]))

    def learned(per_row, return_parts):
        how = namespace, options.inplace, per_row, return_parts, count, learns
        return _Forms.apply(*how, *call)

    def of_constants(of, per_row, parts):
        of = call._replace(**of._asdict())
        loss = rows.new_loss(of, per_row)
        _op(namespace, of, count, loss, (None, None, None), parts)
        return loss

    of_rows = RowsCall(*call[: len(RowsCall._fields)])
    return rows.with_parts(namespace, of_rows, options, any(learns), of_constants, learned)
