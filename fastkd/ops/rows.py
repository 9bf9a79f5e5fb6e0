"""The rows schedule: divergences between the rows of student and teacher logits."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .._calls import InverseDivisor, RowsBackward, RowsCall, RowsForward
from .._check import LogitsOptions
from .._divergences import NUMBERS, TARGET_LOSSES, parameters_of
from .._dtypes import compute_dtype
from .._inplace import overwritten
from . import numbers
from ._namespaces import ops_of
from .gradient import forbid_double_backward, scaled
from .saved import restored, save

STATS_SIZE = 7  # doubles a row
PARTS_SIZE = 5  # hard, soft, student_entropy, teacher_entropy, agreement


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    bwd: Any
    inverse_divisor: Any
    scale_: Any
    statistics: Any
    sums: Any


NAMES = ("rows_fwd", "rows_bwd", "inverse_divisor", "scale_", "rows_statistics", "rows_sums")
OPS: dict[str, Ops] = {}  # by namespace


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    OPS[namespace] = ops_of(namespace, Ops, NAMES)


use_namespace("fastkd")


def standardized(namespace: str) -> str:
    """What the ops of a namespace are known by that standardize their logits first: see ops/standardize.py."""
    return f"standardized {namespace}"


class _Rows(torch.autograd.Function):
    """The loss of a student that wants a gradient.

    The gradient is computed in forward, where both logits are at hand, and saved. Where the
    upstream gradient is one per row ("none"), or the gradient in float16 would underflow before
    the loss scaler multiplies it, the statistics are saved and backward recomputes.
    """

    @staticmethod
    def forward(ctx, namespace, inplace, per_row, return_parts, num_classes, *fields):
        call = RowsCall(*fields)  # of the whole student
        student, loss = call.student, new_loss(call, per_row)
        parts = new_parts(call) if return_parts else None
        ctx.ops, ctx.inplace, ctx.num_classes = OPS[namespace], inplace, num_classes
        ctx.recompute = per_row or student.dtype is torch.float16
        if inplace:
            overwritten(student)
            call = call._replace(student=student.detach())
        counted = call._replace(student=first_classes(call.student, num_classes))
        if ctx.recompute:
            stats = student.new_empty((*student.shape[:-1], STATS_SIZE), dtype=torch.float64)
            ctx.ops.fwd(*counted, *RowsForward(loss, None, stats, parts))
            save(ctx, call, stats)
        else:
            grad = call.student if inplace else new_grad(student)
            ctx.ops.fwd(*counted, *RowsForward(loss, of_first_classes(grad, num_classes), None, parts))
            ctx.save_for_backward(grad)
        if parts is None:
            return loss
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx, upstream, *_):
        grad = forbid_double_backward(_gradient, ctx, upstream)
        student = 5 + RowsCall._fields.index("student")
        return tuple(grad if i == student else None for i in range(len(ctx.needs_input_grad)))


def _gradient(ctx, upstream):
    if not ctx.recompute:
        return scaled(ctx.ops.scale_, *ctx.saved_tensors, upstream)
    call, stats = restored(ctx, RowsCall)
    student = call.student
    grad = student if ctx.inplace else new_grad(student)
    counted = call._replace(student=first_classes(student, ctx.num_classes))
    of_counted = of_first_classes(grad, ctx.num_classes)
    ctx.ops.bwd(*counted, *RowsBackward(stats, upstream.reshape(-1).contiguous(), of_counted))
    if ctx.inplace:
        torch.autograd.graph.increment_version(student)  # another backward must not read it
    return grad


def first_classes(x: torch.Tensor, num_classes: int | None) -> torch.Tensor:
    """Those that count, as a view."""
    return x if num_classes is None else x[..., :num_classes]


def of_first_classes(grad: torch.Tensor, num_classes: int | None) -> torch.Tensor:
    """Where their gradient goes; that of the others is 0 from here on. It may be written over the student, whose other
    classes nobody reads."""
    if num_classes is not None:
        grad[..., num_classes:].zero_()
    return first_classes(grad, num_classes)


def new_loss(call: RowsCall, per_row: bool) -> torch.Tensor:
    """Memory for the loss of a call: one per row, or their sum."""
    student = call.student
    return student.new_empty(student.shape[:-1] if per_row else (), dtype=compute_dtype(student, call.teacher))


def new_parts(call: RowsCall) -> torch.Tensor:
    """Memory for what is told of each row besides its loss."""
    return call.student.new_empty((*call.student.shape[:-1], PARTS_SIZE), dtype=torch.float64)


def new_grad(student: torch.Tensor) -> torch.Tensor:
    """Memory for the gradient, in the order in which the student's lies: rows side by side stay side by side."""
    return torch.empty_like(student)


def logits_loss(
    namespace: str, divergence: str, student: torch.Tensor, teacher: torch.Tensor, options: LogitsOptions
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there. And, where they are asked for, the
    means over rows of its parts."""
    if options.standardize:
        namespace = standardized(namespace)
    # the teacher has the first classes alone
    call = call_of(namespace, divergence, first_classes(student, options.num_classes), teacher.detach(), options)

    def learned(per_row, return_parts):
        how = namespace, options.inplace, per_row, return_parts, options.num_classes
        return _Rows.apply(*how, *call._replace(student=student))

    of_constants = functools.partial(forward, namespace)
    return with_parts(namespace, call, options, student.requires_grad, of_constants, learned)


def call_of(
    namespace: str, divergence: str, student: torch.Tensor, teacher: torch.Tensor, options: LogitsOptions
) -> RowsCall:
    """What the ops are told. Of student and teacher, which have the classes that count, only shape, dtype and device
    are looked at here."""
    dtype, leading = compute_dtype(student, teacher), student.shape[:-1]
    parameters = [options.parameter, options.second]
    if torch.compiler.is_compiling():
        for i, _ in enumerate(parameters_of(options.target_loss or divergence)):
            parameters[i] = changeable(parameters[i], student, torch.float64)
    parameter, parameter_rows = number_or_rows(parameters[0], leading, torch.float64)
    mask = None if options.mask is None else options.mask.reshape(-1).contiguous()
    scale, scale_tensor = inverse_divisor(
        OPS[namespace], student, options.reduction, mask, options.normalizer, dtype
    )  # fmt: skip
    return RowsCall(
        student,
        teacher,
        NUMBERS[divergence],
        parameter,
        parameter_rows,
        *temperatures(student, dtype, options),
        options.t_squared,
        mask,
        None if options.weight is None else options.weight.to(dtype).reshape(-1).contiguous(),
        scale,
        scale_tensor,
        *_target(options),
        # no field's default: torch.compile takes one that is a number for one that may change
        *((0.0, None) if options.second is None else number_or_rows(parameters[1], leading, torch.float64)),
    )


def with_parts(
    namespace: str,
    call: RowsCall,
    options: LogitsOptions,
    learns: bool,
    of_constants: Callable[..., torch.Tensor],
    learned: Callable[..., Any],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the means over rows of its parts where they are asked for. learns: whether a gradient is wanted
    where gradients are recorded; of_constants(call, per_row, parts): the loss without one, which fills parts;
    learned(per_row, return_parts): that of ``call`` with one, and its parts."""
    per_row = options.reduction == "none"
    differentiates = learns and torch.is_grad_enabled()
    parts = None
    if options.return_parts and (options.soft_weight == 0 or not differentiates):
        parts = new_parts(call)
    if options.return_parts and options.soft_weight == 0:  # the kernels leave out what has no weight: a pass of its own
        weights = numbers.as_tensor(options.hard_weight, 1.0, options.label_smoothing)
        of_constants(call._replace(student=call.student.detach(), target_numbers=weights), per_row, parts=parts)
    parts_too = options.return_parts and options.soft_weight != 0
    if differentiates:
        loss = learned(per_row, parts_too)
        loss, parts = loss if parts_too else (loss, parts)
    else:
        loss = of_constants(call, per_row, parts=parts if parts_too else None)
    if not options.return_parts:
        return loss
    dtype = compute_dtype(call.student, call.teacher)
    share, share_tensor = inverse_divisor(OPS[namespace], call.student, "batchmean", call.mask, None, dtype)
    means = parts.reshape(-1, PARTS_SIZE).sum(0) * (share if share_tensor is None else share_tensor)
    return loss, means.to(dtype)


def temperatures(
    student: torch.Tensor, dtype: torch.dtype, options: LogitsOptions
) -> tuple[float, torch.Tensor | None, float, torch.Tensor | None]:
    """Both temperatures, each as an op takes it."""
    both, leading = [options.temperature, options.teacher_temperature], student.shape[:-1]
    if torch.compiler.is_compiling():
        both = [positive(changeable(x, student, dtype)) for x in both]
    of_student = number_or_rows(both[0], leading, dtype)
    # under torch.compile an autograd.Function takes no tensor twice
    if options.teacher_temperature is options.temperature and not torch.compiler.is_compiling():
        return *of_student, *of_student
    return *of_student, *number_or_rows(both[1], leading, dtype)


def _target(options):
    """The target of each row, the numbers of the hard loss, and which loss it is."""
    if options.target is None:
        return None, None, 0
    target = options.target.reshape(-1).contiguous()
    if options.target_loss is not None:
        return target, None, TARGET_LOSSES[options.target_loss].number
    return target, numbers.as_tensor(options.hard_weight, options.soft_weight, options.label_smoothing), 0


def forward(
    namespace: str,
    call: RowsCall,
    per_row: bool = False,
    grad: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of a call, outside of autograd. grad: where its gradient goes; it may be the student."""
    loss = new_loss(call, per_row)
    OPS[namespace].fwd(*call, *RowsForward(loss, grad, None, parts))
    return loss


def changeable(number: torch.Tensor | float, student: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a tensor: a graph has its numbers built in, and this one may change."""
    if isinstance(number, torch.Tensor):
        return number
    return student.new_ones((), dtype=dtype) * number


def positive(rows: torch.Tensor) -> torch.Tensor:
    """The op looks at the values on the CPU; on other devices, where that would wait, one that is not positive gives
    NaN."""
    return rows if rows.device.type == "cpu" else torch.where(rows > 0, rows, torch.nan)


def number_or_rows(
    number: torch.Tensor | float, leading: torch.Size, dtype: torch.dtype
) -> tuple[float, torch.Tensor | None]:
    """As an op takes it: a number; or a tensor, [N] or [], which is no other's: what is saved for backward does not
    change with it, and an autograd.Function that is compiled takes no tensor twice."""
    if not isinstance(number, torch.Tensor):
        return float(number), None
    if number.dim() == 0:
        return 1.0, number.to(dtype, copy=True)
    return 1.0, number.to(dtype).expand(leading).reshape(-1).contiguous()


def inverse_divisor(
    ops: Ops,
    student: torch.Tensor,
    reduction: str,
    mask: torch.Tensor | None,
    normalizer: torch.Tensor | float | None,
    dtype: torch.dtype,
) -> tuple[float, torch.Tensor | None]:
    """1 / divisor of the sum over rows: a number, or a tensor where only the device knows it."""
    N, V = math.prod(student.shape[:-1]), student.shape[-1]
    each = V if reduction == "mean" else 1
    if reduction == "none":
        return 1.0, None
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(dtype).reshape(())
    elif normalizer is not None or mask is None or reduction == "sum":
        divisor = normalizer if normalizer is not None else 1 if reduction == "sum" else max(N, 1) * each
        if torch.compiler.is_compiling():  # a graph has its numbers built in, and sizes and normalizers change
            return 1.0, student.new_ones((), dtype=torch.float64) / divisor
        return 1.0 / divisor, None
    scale = student.new_empty((), dtype=torch.float64)
    ops.inverse_divisor(*InverseDivisor(mask, normalizer, N, each, scale))
    return 1.0, scale
