"""The rows schedule: divergences between the rows of student and teacher logits."""

from typing import Any, NamedTuple

import torch

from .._check import REDUCTIONS, LogitsOptions
from .._inplace import overwritten
from ..reference import DIVERGENCES, compute_dtype
from .gradient import once, times

# The numbers are those of csrc/common/params.h.
DIVERGENCE_NUMBERS = {name: number for number, name in enumerate(DIVERGENCES)}
REDUCTION_NUMBERS = {name: number for number, name in enumerate(REDUCTIONS)}
NOTHING, GRAD, STATS = 0, 1, 2  # what rows_fwd saves
STATS_SIZE = 5  # doubles a row

REDUCTION_AT = 11  # where an op's arguments have the reduction
TENSORS_AT = (5, 7, 9, 10, 13)  # and the optional tensors


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    fwd_: Any
    bwd: Any
    bwd_: Any
    scale_: Any


NAMES = ("rows_fwd", "rows_fwd_", "rows_bwd", "rows_bwd_", "scale_")
OPS: dict[str, Ops] = {}  # by namespace


def _loss_like(student, teacher, reduction):
    shape = student.shape[:-1] if reduction == 0 else ()
    return student.new_empty(shape, dtype=compute_dtype(student, teacher))


def _fake_fwd(student, teacher, *options):
    save = options[-1]
    return (
        _loss_like(student, teacher, options[REDUCTION_AT - 2]),
        student.new_empty(student.shape if save == GRAD else (0,)),
        student.new_empty((*student.shape[:-1], STATS_SIZE) if save == STATS else (0,), dtype=torch.float64),
    )


def _fake_fwd_(student, teacher, *options):
    return _loss_like(student, teacher, options[REDUCTION_AT - 2])


def _fake_bwd(student, *_):
    return student.new_empty(student.shape)


def _fake_nothing(*_):
    return None


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    fakes = (_fake_fwd, _fake_fwd_, _fake_bwd, _fake_nothing, _fake_nothing)
    for name, fake in zip(NAMES, fakes, strict=True):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    OPS[namespace] = Ops(*(getattr(getattr(torch.ops, namespace), name).default for name in NAMES))


use_namespace("fastkd")


class _Rows(torch.autograd.Function):
    """The loss of a student that wants a gradient.

    The gradient is computed in forward, where both logits are at hand, and saved. Where the
    upstream gradient is one per row ("none"), or the gradient in float16 would underflow before
    the loss scaler multiplies it, the statistics are saved and backward recomputes.
    """

    @staticmethod
    def forward(ctx, namespace, student, teacher, inplace, *options):
        arguments, ops = (student, teacher, *options), OPS[namespace]
        ctx.ops = ops
        ctx.recompute = arguments[REDUCTION_AT] == 0 or student.dtype is torch.float16
        ctx.inplace = inplace
        if inplace:
            overwritten(student)
        if ctx.recompute:
            loss, _, stats = ops.fwd(*arguments, STATS)
            ctx.options = tuple(None if isinstance(x, torch.Tensor) else x for x in arguments)
            saved = [student.detach() if inplace else student, teacher]
            saved += [arguments[i] for i in TENSORS_AT]
            # autograd refuses to watch over tensors that were made in inference mode
            ctx.inference = tuple(x if _is_inference(x) else None for x in saved)
            ctx.save_for_backward(*(None if _is_inference(x) else x for x in saved), stats)
        elif inplace:
            loss = ops.fwd_(*arguments)
            ctx.save_for_backward(student.detach())
        else:
            loss, grad, _ = ops.fwd(*arguments, GRAD)
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grad = once(_gradient, ctx, upstream)
        return None, grad, *(None for _ in ctx.needs_input_grad[2:])


def _is_inference(x):
    return x is not None and not torch.compiler.is_compiling() and x.is_inference()


def _gradient(ctx, upstream):
    if not ctx.recompute:
        return times(ctx.ops.scale_, *ctx.saved_tensors, upstream)
    *saved, stats = ctx.saved_tensors
    student, teacher, *tensors = (x if y is None else y for x, y in zip(saved, ctx.inference, strict=True))
    arguments = [student, teacher, *ctx.options[2:]]
    for i, x in zip(TENSORS_AT, tensors, strict=True):
        arguments[i] = x
    upstream = upstream.reshape(-1).contiguous()
    if not ctx.inplace:
        return ctx.ops.bwd(*arguments, stats, upstream)
    ctx.ops.bwd_(*arguments, stats, upstream)
    torch.autograd.graph.increment_version(student)  # another backward must not read it
    return student


def logits_loss(
    namespace: str, divergence: str, student: torch.Tensor, teacher: torch.Tensor, options: LogitsOptions
) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    dtype, leading = compute_dtype(student, teacher), student.shape[:-1]
    temperature, temperature_rows = number_or_rows(options.temperature, leading, dtype)
    teacher_temperature, teacher_temperature_rows = temperature, temperature_rows
    # under torch.compile an autograd.Function takes no tensor twice
    if options.teacher_temperature is not options.temperature or torch.compiler.is_compiling():
        teacher_temperature, teacher_temperature_rows = number_or_rows(options.teacher_temperature, leading, dtype)
    mask, weight, normalizer, normalizer_tensor = options.mask, options.weight, options.normalizer, None
    if isinstance(normalizer, torch.Tensor):
        normalizer, normalizer_tensor = None, normalizer.to(dtype).reshape(())
    arguments = (
        DIVERGENCE_NUMBERS[divergence],
        options.parameter,
        temperature,
        temperature_rows,
        teacher_temperature,
        teacher_temperature_rows,
        options.t_squared,
        None if mask is None else mask.reshape(-1).contiguous(),
        None if weight is None else weight.to(dtype).reshape(-1).contiguous(),
        REDUCTION_NUMBERS[options.reduction],
        None if normalizer is None else float(normalizer),
        normalizer_tensor,
    )
    if student.requires_grad and torch.is_grad_enabled():
        return _Rows.apply(namespace, student, teacher.detach(), options.inplace, *arguments)
    return OPS[namespace].fwd(student, teacher, *arguments, NOTHING)[0]


def number_or_rows(
    temperature: torch.Tensor | float, leading: torch.Size, dtype: torch.dtype
) -> tuple[float, torch.Tensor | None]:
    if isinstance(temperature, torch.Tensor):
        return 1.0, temperature.to(dtype).expand(leading).reshape(-1).contiguous()
    return float(temperature), None
