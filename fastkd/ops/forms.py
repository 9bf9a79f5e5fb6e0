"""Losses of what stands in place of logits, a slab of rows at a time: of hidden states with a head; of a teacher's best
classes, or of its probabilities, which are brought to logits in ops/top_k.py and ops/probabilities.py.

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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import _library
from .._calls import FormOutputs, FormRows, RowsCall, RowsForward
from .._check import LogitsOptions
from .._divergences import DERIVED
from .._dtypes import compute_dtype, without_autocast
from .._inplace import overwritten
from ..forms import LinearLogits, Probabilities, TopKLogProbs, logits_of
from . import numbers, rows, standardize, top_k
from ._head_products import Gradients, Side, rows_of_slab
from .gradient import all_scaled, forbid_double_backward
from .probabilities import OfProbabilities
from .saved import restored, save
from .slabs import evenly, gathered, slabs
from .teachers import Teacher
from .top_k import TAILS, FewClasses

Call: Any = collections.namedtuple("Call", (*RowsCall._fields, *FormRows._fields))


class SideParts(NamedTuple):
    """What a side is made of: hidden states with a head, or logits."""

    x: torch.Tensor
    head: torch.Tensor | None
    bias: torch.Tensor | None
    numbers: tuple[float, float]  # scale, softcap


def parts_of(side: Any, num_classes: int | None) -> SideParts:
    """num_classes: that count, or None: all."""
    if isinstance(side, TopKLogProbs):
        return SideParts(side.log_probs, None, None, (side.temperature, math.inf))
    if isinstance(side, Probabilities):
        return SideParts(rows.first_classes(side.probabilities, num_classes), None, None, (side.temperature, math.inf))
    if not isinstance(side, LinearLogits):
        return SideParts(rows.first_classes(side, num_classes), None, None, (1.0, math.inf))
    weight, bias = side.weight, side.bias
    if num_classes is not None:  # not else: the gradient of a view is a copy
        weight, bias = weight[:num_classes], bias if bias is None else bias[:num_classes]
    softcap = math.inf if side.softcap is None else side.softcap
    return SideParts(side.hidden, weight, bias, (side.scale, softcap))


def _flat(tensors):
    """Rows [N, *] where all tensors [*, *] have them so without a copy."""
    if all(x is None or x.is_contiguous() for x in tensors):
        return [x if x is None else x.view(math.prod(x.shape[:-1]), x.shape[-1]) for x in tensors]
    return tensors


@torch.no_grad()
def _form_rows(namespace, *arguments):
    """The implementation of the op."""
    ends = len(RowsCall._fields), len(RowsCall._fields) + len(FormRows._fields)
    call, linear = RowsCall(*arguments[: ends[0]]), FormRows(*arguments[ends[0] : ends[1]])
    out = FormOutputs(*arguments[ends[1] :])
    with without_autocast(call.student.device):
        run(namespace, call, linear, out)


def checked(numbers_: list[float]) -> list[float]:
    """Scale and softcap of both sides. They were not checked where torch.compile had made them symbols."""
    for name, x in zip(
        ("student.scale", "student.softcap", "teacher.scale", "teacher.softcap"), numbers_, strict=False
    ):
        if not x > 0 or (x == math.inf and "scale" in name):  # of a softcap it means none
            raise RuntimeError(f"{name}: a positive finite number wanted, got {x}")
    if not numbers_[4] < 0:
        raise RuntimeError(f"teacher.log_prob_min: a negative number wanted, got {numbers_[4]}")
    return numbers_


def _leaves_out_rows(mask):
    """Whether the host knows that there are rows which do not count."""
    return mask is not None and mask.device.type == "cpu" and not bool(mask.all())


def _teacher(namespace, linear, given, dtype):
    """What computes the loss of a slab."""
    adaptive = linear.adaptive
    if linear.indices is not None:
        return FewClasses(namespace, linear, given[2], given[4], dtype)
    if linear.probabilities:
        standardizes = namespace.startswith(rows.standardized(""))
        return OfProbabilities(namespace, adaptive, linear.as_given, given[2], dtype, standardizes)
    return Teacher(namespace, adaptive)


def run(namespace: str, call: RowsCall, linear: FormRows, out: FormOutputs, of_teacher: Any = None) -> None:
    """Fills out, slab by slab; of_teacher: what computes the loss of one, where it is not to be chosen here."""
    N = math.prod(call.student.shape[:-1])
    student_x, teacher_x, grad, indices = call.student, call.teacher, out.grad, linear.indices
    if of_teacher is None:  # else slabs follow from shapes alone, which ranks have alike, and not from strides
        student_x, teacher_x, grad, indices = _flat([student_x, teacher_x, grad, indices])
        call, out = call._replace(student=student_x, teacher=teacher_x), out._replace(grad=grad)
        linear = linear._replace(indices=indices)
    leading, most = student_x.shape[:-1], max(1, evenly(N, linear.slab_rows))
    given = checked(linear.numbers.tolist())
    student = Side(student_x, linear.student_head, linear.student_bias, *given[:2], most)
    teacher = Side(teacher_x, linear.teacher_head, linear.teacher_bias, *given[2:4], most)
    back = None if student.head is None else Gradients(student, out)
    of_teacher = of_teacher or _teacher(namespace, linear, given, out.loss.dtype)
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
        of_teacher.loss(part, slab, RowsForward(loss, grad, None, of_parts))
        at = slab.rows if packs else slice(slab.first, slab.last)
        if per_row:
            losses[at] = loss.view(-1)
        if parts is not None:
            parts[at] = of_parts.view(-1, rows.PARTS_SIZE)
        if back and back.wanted:
            back.add(slab, grad)
        del s, t, part, grad  # not two of them at a time, where they are copies
    if not per_row:
        out.loss.copy_(sums.sum(dtype=torch.float64))
    if back:
        back.finish()


_library.fastkd.impl("form_rows", _form_rows, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::form_rows", lambda *_: None)


class Learns(NamedTuple):
    """What of the student wants a gradient."""

    x: bool  # its hidden states or logits
    head: bool
    bias: bool


class _Forms(torch.autograd.Function):
    """The loss of a student that wants a gradient, where student or teacher are no logits."""

    @staticmethod
    def forward(ctx, namespace, inplace, per_row, return_parts, num_classes, learns, *fields):
        call = Call(*fields)
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
            grads = new_grads(call, learns, inplace)
            _op(namespace, call, num_classes, loss, grads, parts)
            ctx.save_for_backward(*(x for x in grads if x is not None))
        if parts is None:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, upstream, *_):
        return *(None for _ in range(6)), *gradients(ctx, upstream, _recomputed)


def gradients(ctx: Any, upstream: torch.Tensor, recomputed: Callable[..., Any]) -> list[torch.Tensor | None]:
    """For each field of a call: those that forward has made and saved, or recomputed(ctx, upstream), of the student's
    x, head and bias. None where none is wanted."""
    found = forbid_double_backward(recomputed if ctx.recompute else _saved, ctx, upstream)
    grads = dict(zip(("student", "student_head", "student_bias"), found, strict=True))
    return [grads.get(name) for name in Call._fields]


def _saved(ctx, upstream):
    found = iter(all_scaled(rows.OPS[ctx.namespace].scale_, list(ctx.saved_tensors), upstream))
    return [next(found) if wanted else None for wanted in ctx.learns]


def _recomputed(ctx, upstream):
    (call,) = restored(ctx, Call)
    N = math.prod(call.student.shape[:-1])
    upstream = upstream.expand(call.student.shape[:-1]).reshape(N)
    weight = upstream.contiguous() if call.weight is None else call.weight * upstream
    grads = new_grads(call, ctx.learns, ctx.inplace)
    _op(ctx.namespace, call._replace(weight=weight), ctx.num_classes, weight.new_empty(()), grads, None)
    if ctx.inplace:
        torch.autograd.graph.increment_version(call.student)  # another backward must not read it
    return grads


def new_grads(call: Any, learns: Learns, inplace: bool, of_ranks: bool = False) -> list[torch.Tensor | None]:
    """Memory for the gradients that are wanted; that of hidden states, where ranks sum it up, as it is computed in."""
    x = call.student if inplace else rows.new_grad(call.student) if learns.x else None
    if of_ranks and x is not None and call.student_head is not None:
        dtype = compute_dtype(call.student_head)
        x = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return [x, *(torch.empty_like(y) if wanted else None for y, wanted in
                 zip((call.student_head, call.student_bias), learns[1:], strict=True))]  # fmt: skip


def rounded(grads: list[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """That of the student's x in its dtype."""
    return [x if x is None or i else x.to(dtype) for i, x in enumerate(grads)]


def of_first_classes(call: Any, num_classes: int | None, grads: Any) -> tuple[Any, Any]:
    """A call of the classes that count, and where the gradients of these go, or None; that of the others is 0."""
    if num_classes is None:
        return call, grads
    grad, head_grad, bias_grad = grads
    student, head, bias = call.student, call.student_head, call.student_bias
    if head is None:
        student = rows.first_classes(student, num_classes)
        grad = None if grad is None else rows.of_first_classes(grad, num_classes)
    else:
        head, bias = head[:num_classes], None if bias is None else bias[:num_classes]
        for x in (head_grad, bias_grad):
            if x is not None:
                x[num_classes:].zero_()
        head_grad, bias_grad = (None if x is None else x[:num_classes] for x in (head_grad, bias_grad))
    return call._replace(student=student, student_head=head, student_bias=bias), (grad, head_grad, bias_grad)


def _op(namespace, call, num_classes, loss, grads, parts):
    """Of the classes that count."""
    call, grads = of_first_classes(call, num_classes, grads)
    torch.ops.fastkd.form_rows(namespace, *call, *FormOutputs(loss, *grads, parts))


def _rows_of_slab(like, few, options):
    """At most; where there is a hard part beside a soft one it copies the slab."""
    if few is not None and options.target is None:
        return top_k.rows_of_slab(few.indices.shape[-1])
    return standardize.rows_of_slab(like)


def _as_given(teacher, temperature, leading):
    """Compared as the user gave them: what is computed in rounds them otherwise."""
    if not (isinstance(teacher, Probabilities) and isinstance(temperature, torch.Tensor)):
        return None
    same = temperature.detach() == teacher.temperature
    return same if same.dim() == 0 else same.expand(leading).reshape(-1).contiguous()


def call_of(
    rows_call: RowsCall, sides: list[SideParts], teacher: Any, teacher_temperature: Any, slab_rows: int, adaptive: bool
) -> Any:
    """The op's call: of what the rows schedule would be called with were both sides logits, which are on the meta
    device; teacher: the form."""
    few = teacher if isinstance(teacher, TopKLogProbs) else None
    # detached also because torch.compile gives an autograd.Function no tensor twice, and both may have one head
    teacher_x, teacher_head, teacher_bias = (x if x is None else x.detach() for x in sides[1][:3])
    least = -math.inf if few is None or few.log_prob_min is None else few.log_prob_min
    return Call(
        *rows_call._replace(student=sides[0].x, teacher=teacher_x),
        *FormRows(
            sides[0].head, sides[0].bias, teacher_head, teacher_bias,
            None if few is None else few.indices.to(torch.int64),
            None if few is None or few.log_tail is None else few.log_tail.reshape(-1),
            TAILS.index(few.tail) if few else 0,
            isinstance(teacher, Probabilities),
            _as_given(teacher, teacher_temperature, rows_call.student.shape[:-1]),
            numbers.as_tensor(*sides[0].numbers, *sides[1].numbers, least), slab_rows, adaptive,
        ),
    )  # fmt: skip


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
    sides = [parts_of(student, None), parts_of(teacher, count)]
    like = logits_of(student, count)
    rows_call = rows.call_of(namespace, divergence, like, logits_of(teacher, count, like), options)
    few = teacher if isinstance(teacher, TopKLogProbs) else None
    heads = [rows_of_slab(x) for x in (student, teacher) if isinstance(x, LinearLogits)]
    slab_rows = min(heads) if heads else _rows_of_slab(like, few, options)
    call = call_of(rows_call, sides, teacher, options.teacher_temperature, slab_rows, adaptive)
    learns = Learns(*(x is not None and x.requires_grad for x in sides[0][:3]))

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
