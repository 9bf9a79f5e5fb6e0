"""The rows schedule in Triton: a divergence per row of student and teacher logits [N, V], and its gradient.

    p = softmax(student / T), q = softmax(teacher / T_teacher), w = log p - log q
    loss[n]    = T^2 weight[n] sum_v loss(p, q, w)
    grad[n, v] = T^2 weight[n] upstream[n] / divisor / T * (slope(p, q, w) - p sum_v slope)

A row that fits one tile is read once and stays in registers. A longer one is walked twice: an
online walk for maxima and sums, then, backwards because the last tiles are the likeliest to be in
cache, one for the loss and the gradient; where the slopes do not add up to 0, the gradient takes a
third. Traffic: student + teacher + gradient, once each, as far as the L2 cache holds long rows.
Saved for backward: the gradient; or the statistics, from which backward recomputes in one pass.

A row that is masked out is never read: it is taken for -inf alone.
"""

import triton
import triton.language as tl

from .rows_targets import hard_sums, target_part, whole_gradient, whole_loss
from .rows_tile import (
    exp,
    finite,
    functor_parameters,
    load_parted,
    loss_scales,
    per_row,
    per_row_times,
    row_loss,
    row_of_sums,
    row_offsets,
    rows_of_program,
    rows_to_read,
    store,
    store_statistics,
    sums_of_softmax,
    temperatures,
    visit,
)
from .rows_walks import walk_for_grad, walk_for_loss, walk_for_statistics


@triton.jit
def rows_fwd_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    grad, grad_index, grad_inner, grad_outer, grad_stride, grad_step,  # [N, V], or None
    temperature_rows, temperature_stride, temperature: tl.float64,  # [N]; [] with stride 0; or None: the number
    teacher_temperature_rows, teacher_temperature_stride, teacher_temperature: tl.float64,
    mask,  # [N], or None
    weight,  # [N], or None
    scale_tensor, scale: tl.float64,  # [1], or None: 1 / divisor
    parameter_rows, parameter_stride, parameter: tl.float64,  # the same, in float64
    second_rows, second_stride, second: tl.float64,
    target,  # [N], or None
    hard_weight: tl.float64, soft_weight: tl.float64, smoothing: tl.float64, in_all: tl.float64,
    loss,  # [N] where PER_ROW; else [programs], of each the sum over its rows
    stats,  # [N, 7], or None
    soft_losses, soft_stride,  # [N] with a stride, or None: before they are weighed
    N, V, side_by_side,
    DIVERGENCE: tl.constexpr, IS_CENTRED: tl.constexpr, ENTROPY: tl.constexpr, GIVEN: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr, T_SQUARED: tl.constexpr,
    HARD: tl.constexpr, PER_ROW: tl.constexpr, ONE_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = loss.dtype.element_ty
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    T, a, b = temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    OF_ROWS: tl.constexpr = parameter_rows is not None
    parameter = per_row(parameter_rows, parameter_stride, parameter, row, read, tl.float64)
    soft_scale, hard_scale, (classes, smoothings, soft_weights, all_classes) = loss_scales(
        per_row(weight, 1, 1.0, row, read, dtype), T, parameter, second_rows, second_stride, second,
        target, hard_weight, soft_weight, smoothing, in_all, row, read, dtype, T_SQUARED, HARD,
    )  # fmt: skip
    parameters = functor_parameters(parameter, second_rows, second_stride, second, row, read, GIVEN)
    one_over_divisor = per_row_times(scale_tensor, scale, row, read, dtype)
    grad_scale = soft_scale * a * one_over_divisor
    grad_of_hard = hard_scale * one_over_divisor * (a if HARD == 2 else 1.0)
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    if grad is not None:
        grad += row_offsets(row, live, run, at, side_by_side, grad_index, grad_inner, grad_outer, grad_stride)
    inputs = (student, student_step, teacher, teacher_step, read, V)

    if ONE_TILE:
        columns = tl.arange(0, BLOCK)
        s, t, logit, teacher_logit = load_parted(inputs, columns, classes, dtype, "evict_first", HARD)
        max_student, max_teacher = finite(tl.max(s, 1)), finite(tl.max(t, 1))
        sum_student, sum_teacher = tl.sum(exp(s, max_student, a), 1), tl.sum(exp(t, max_teacher, a - b), 1)
        of_row = sums_of_softmax((a, b, max_student, sum_student, max_teacher, sum_teacher), read, GIVEN)
        sum_hard, logits = hard_sums(s, t, max_student, max_teacher, columns, V, HARD)
        part, factor = target_part(of_row, sum_hard, logits, logit, teacher_logit, HARD)
        hard = (classes, read, grad_of_hard * factor, sum_hard, smoothings, V, soft_weights, all_classes)
        losses, slopes, p, seconds = visit(
            s, t, of_row, parameters, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE, GIVEN
        )  # fmt: skip
        sum_slope = tl.zeros((ROWS,), dtype) if IS_CENTRED else tl.sum(slopes, 1)
        total, sum_slope, factor, grad_scale = row_of_sums(
            tl.sum(losses, 1), sum_slope, tl.sum(seconds, 1), factor, grad_scale, GIVEN
        )
        if grad is not None:
            values = whole_gradient(slopes, p, sum_slope, of_row, grad_scale, s, hard, columns, HARD)
            store(grad, grad_step, live, V, columns, values)
    else:
        of_row, sum_hard, logits, logit, teacher_logit = walk_for_statistics(
            inputs, a, b, classes, dtype, ROWS, BLOCK, HARD
        )
        of_row = sums_of_softmax(of_row, read, GIVEN)
        part, factor = target_part(of_row, sum_hard, logits, logit, teacher_logit, HARD)
        hard = (classes, read, grad_of_hard * factor, sum_hard, smoothings, V, soft_weights, all_classes)
        total, sum_slope, sum_second = walk_for_loss(
            inputs, of_row, parameters, grad, grad_step, live, grad_scale, hard,
            DIVERGENCE, OF_ROWS, ENTROPY, IS_CENTRED, SAME_TEMPERATURE, GIVEN, HARD, dtype, ROWS, BLOCK,
        )  # fmt: skip
        total, sum_slope, factor, grad_scale = row_of_sums(total, sum_slope, sum_second, factor, grad_scale, GIVEN)
        if grad is not None and not IS_CENTRED:
            walk_for_grad(
                inputs, of_row, parameters, grad, grad_step, live, grad_scale, sum_slope, hard,
                DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE, GIVEN, HARD, dtype, BLOCK,
            )  # fmt: skip

    if soft_losses is not None:
        soft = row_loss(total, of_row, T * T if T_SQUARED else T * 0.0 + 1.0, ENTROPY)
        tl.store(soft_losses + row.to(tl.int64) * soft_stride, soft.to(tl.float64), mask=read)
    total = whole_loss(
        total, part, of_row, soft_scale, hard, hard_weight, hard_scale, logits, logit, ENTROPY, HARD
    )  # fmt: skip
    if PER_ROW:
        tl.store(loss + row, total, mask=live)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(total, 0))
    if stats is not None:
        store_statistics(stats, row, live, of_row, sum_slope, sum_hard, factor)


@triton.jit
def rows_bwd_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    grad, grad_index, grad_inner, grad_outer, grad_stride, grad_step,  # [N, V]
    temperature_rows, temperature_stride, temperature: tl.float64,  # [N]; [] with stride 0; or None: the number
    teacher_temperature_rows, teacher_temperature_stride, teacher_temperature: tl.float64,
    mask,  # [N], or None
    weight,  # [N], or None
    scale_tensor, scale: tl.float64,  # [1], or None: 1 / divisor
    parameter_rows, parameter_stride, parameter: tl.float64,  # the same, in float64
    second_rows, second_stride, second: tl.float64,
    target,  # [N], or None
    hard_weight: tl.float64, soft_weight: tl.float64, smoothing: tl.float64, in_all: tl.float64,
    stats,  # [N, 7]
    upstream, upstream_stride,  # [N], or [1] with stride 0
    N, V, side_by_side,
    DIVERGENCE: tl.constexpr, GIVEN: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, T_SQUARED: tl.constexpr,
    HARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = upstream.dtype.element_ty
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    T, a, b = temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    of_loss = per_row(weight, 1, 1.0, row, read, dtype)
    of_loss *= tl.load(upstream + row * upstream_stride, mask=read, other=0.0)
    of_loss *= per_row_times(scale_tensor, scale, row, read, dtype)
    OF_ROWS: tl.constexpr = parameter_rows is not None
    parameter = per_row(parameter_rows, parameter_stride, parameter, row, read, tl.float64)
    soft_scale, hard_scale, (classes, smoothings, soft_weights, all_classes) = loss_scales(
        of_loss, T, parameter, second_rows, second_stride, second,
        target, hard_weight, soft_weight, smoothing, in_all, row, read, dtype, T_SQUARED, HARD,
    )  # fmt: skip
    parameters = functor_parameters(parameter, second_rows, second_stride, second, row, read, GIVEN)
    grad_scale = soft_scale * a
    hard_scale *= a if HARD == 2 else 1.0
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    grad += row_offsets(row, live, run, at, side_by_side, grad_index, grad_inner, grad_outer, grad_stride)
    stats += row.to(tl.int64) * 7
    max_student = tl.load(stats, mask=read, other=0.0).to(dtype)
    sum_student = tl.load(stats + 1, mask=read, other=0.0).to(dtype)
    max_teacher = tl.load(stats + 2, mask=read, other=0.0).to(dtype)
    sum_teacher = tl.load(stats + 3, mask=read, other=0.0).to(dtype)
    sum_slope = tl.load(stats + 4, mask=read, other=0.0).to(dtype)
    of_row = (a, b, max_student, sum_student, max_teacher, sum_teacher)

    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inputs = (student, student_step, teacher, teacher_step, read, V)
    s, t, _, _ = load_parted(inputs, columns, classes, dtype, "evict_first", HARD)
    _loss, slopes, p, _second = visit(
        s, t, of_row, parameters, DIVERGENCE, OF_ROWS, False, SAME_TEMPERATURE, GIVEN
    )  # fmt: skip
    sum_hard = tl.load(stats + 5, mask=read, other=0.0).to(dtype) if HARD else max_student
    if HARD >= 2:
        hard_scale *= tl.load(stats + 6, mask=read, other=0.0).to(dtype)
    if GIVEN == 3:
        grad_scale *= tl.load(stats + 6, mask=read, other=0.0).to(dtype)
    hard = (classes, read, hard_scale, sum_hard, smoothings, V, soft_weights, all_classes)
    values = whole_gradient(slopes, p, sum_slope, of_row, grad_scale, s, hard, columns, HARD)
    store(grad, grad_step, live, V, columns, values)


@triton.jit
def inverse_divisor_kernel(
    mask,  # [N], or None: every row counts
    normalizer,  # [1], or None
    scale,  # [1]: 1 / (normalizer, or valid rows x each); 0 where no row counts
    each: tl.float64, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    valid = tl.full((), N, tl.int64)
    if mask is not None:
        counts = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, N, BLOCK):
            row = first + tl.arange(0, BLOCK)
            counts += tl.load(mask + row, mask=row < N, other=0).to(tl.int32)
        valid = tl.sum(counts.to(tl.int64), 0)
    divisor = valid.to(tl.float64) * each if normalizer is None else tl.load(normalizer).to(tl.float64)
    result = tl.where(valid == 0, 0.0, 1.0 / tl.where(valid == 0, 1.0, divisor))
    tl.store(scale, result.to(scale.dtype.element_ty))


@triton.jit
def sum_kernel(
    parts,  # [n]
    scale_tensor, scale: tl.float64,  # [1], or None
    out,  # []
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(parts + at, mask=at < n, other=0.0).to(tl.float64)
    result = tl.sum(total, 0) * scale
    if scale_tensor is not None:
        result *= tl.load(scale_tensor).to(tl.float64)
    tl.store(out, result.to(out.dtype.element_ty))
