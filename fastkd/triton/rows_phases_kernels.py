"""The phases of the rows schedule by themselves, in Triton: of rows some of whose classes are elsewhere."""

import triton
import triton.language as tl

from .rows_tile import (
    functor_parameters,
    loss_scales,
    per_row,
    per_row_times,
    row_offsets,
    rows_of_program,
    rows_to_read,
    store_statistics,
    temperatures,
)
from .rows_walks import walk_for_loss, walk_for_statistics


@triton.jit
def rows_statistics_kernel(
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
    stats,  # [N, 7]
    N, V, side_by_side,
    dtype: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, HARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    _T, a, b = temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    classes = row
    if HARD:
        classes = tl.load(target + row, mask=read, other=0)
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    inputs = (student, student_step, teacher, teacher_step, read, V)
    of_row, sum_hard, logits, _logit, _teacher_logit = walk_for_statistics(
        inputs, a, b, classes, dtype, ROWS, BLOCK, HARD
    )
    store_statistics(stats, row, live, of_row, tl.zeros((ROWS,), dtype), sum_hard, tl.where(read, logits, 0.0))


@triton.jit
def rows_sums_kernel(
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
    stats,  # [N, 7], of whole rows
    sums,  # [N, 3]
    N, V, side_by_side,
    DIVERGENCE: tl.constexpr, IS_CENTRED: tl.constexpr, ENTROPY: tl.constexpr, GIVEN: tl.constexpr,
    dtype: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, T_SQUARED: tl.constexpr, HARD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    T, a, b = temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    OF_ROWS: tl.constexpr = parameter_rows is not None
    parameter = per_row(parameter_rows, parameter_stride, parameter, row, read, tl.float64)
    soft_scale, hard_scale, (classes, smoothings, soft_weights, all_classes) = loss_scales(
        per_row(weight, 1, 1.0, row, read, dtype) * per_row_times(scale_tensor, scale, row, read, dtype), T, parameter,
        second_rows, second_stride, second, target, hard_weight, soft_weight, smoothing, in_all, row, read, dtype,
        T_SQUARED, HARD,
    )  # fmt: skip
    parameters = functor_parameters(parameter, second_rows, second_stride, second, row, read, GIVEN)
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    if grad is not None:
        grad += row_offsets(row, live, run, at, side_by_side, grad_index, grad_inner, grad_outer, grad_stride)
    stats += row.to(tl.int64) * 7
    max_student = tl.load(stats, mask=read, other=0.0).to(dtype)
    sum_student = tl.load(stats + 1, mask=read, other=0.0).to(dtype)
    max_teacher = tl.load(stats + 2, mask=read, other=0.0).to(dtype)
    sum_teacher = tl.load(stats + 3, mask=read, other=0.0).to(dtype)
    of_row = (a, b, max_student, sum_student, max_teacher, sum_teacher)
    sum_hard = tl.load(stats + 5, mask=read, other=0.0).to(dtype) if HARD else max_student
    hard = (classes, read, hard_scale, sum_hard, smoothings, V, soft_weights, all_classes)
    inputs = (student, student_step, teacher, teacher_step, read, V)
    total, sum_slope, second_sum = walk_for_loss(
        inputs, of_row, parameters, grad, grad_step, live, soft_scale * a, hard,
        DIVERGENCE, OF_ROWS, ENTROPY, IS_CENTRED, SAME_TEMPERATURE, GIVEN, HARD, dtype, ROWS, BLOCK,
    )  # fmt: skip
    sums += row.to(tl.int64) * 3
    there = read & (sum_teacher != 0.0)
    tl.store(sums, tl.where(there, total, 0.0).to(tl.float64), mask=live)
    tl.store(sums + 1, tl.where(there, sum_slope, 0.0).to(tl.float64), mask=live)
    tl.store(sums + 2, tl.where(there, second_sum, 0.0).to(tl.float64), mask=live)
