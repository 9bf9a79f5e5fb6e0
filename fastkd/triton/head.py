"""The weights of adaptive_kl_div in Triton: of each row the share of sum |p - q| that lies outside of the teacher's
head.

The head is found as in csrc/math/head.h: by halving the logits between which its bound lies, with masses that are whole
numbers. A row that fits one tile is read once; a longer one is walked once for its sums, once for each step and once
for the differences.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._calls import HeadWeight
from .._dtypes import compute_dtype
from .divergences import total_variation
from .registers import limited
from .rows import configuration, layout_of, number, programs, same_temperature, side_by_side, sizes
from .rows_tile import (
    INF,
    exp,
    finite,
    load,
    load_side,
    per_row,
    probabilities,
    row_offsets,
    rows_of_program,
    rows_to_read,
    temperatures,
)
from .rows_walks import walk_for_statistics


@triton.jit
def _masses(t, of_row):
    """e^((t - max) / T_teacher) as whole numbers: their sums do not depend on their order."""
    a, b, _max_student, _sum_student, max_teacher, _sum_teacher = of_row
    best: tl.constexpr = 1 << 40 if t.dtype == tl.float64 else 1 << 30
    return (exp(t, max_teacher, a - b) * best + 0.5).to(tl.int64)


@triton.jit
def _split(t, there, middle, of_row):
    """The mass above the middle, the least logit there, and the largest below."""
    above = there & (t > middle[:, None])
    mass = tl.sum(tl.where(above, _masses(t, of_row), 0), 1)
    least = tl.min(tl.where(above, t, INF), 1)
    largest = tl.max(tl.where(there & (t <= middle[:, None]), t, -INF), 1)
    return mass, least, largest


@triton.jit
def _split_of_row(
    t, inputs, middle, of_row,
    ONE_TILE: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same of a row: of its only tile, or of all."""
    _student, _student_step, teacher, teacher_step, read, V = inputs
    if ONE_TILE:
        mass, least, largest = _split(t, (tl.arange(0, BLOCK) < V)[None, :] & read[:, None], middle, of_row)
    else:
        mass = tl.zeros((ROWS,), tl.int64)
        least, largest = tl.full((ROWS,), INF, dtype), tl.full((ROWS,), -INF, dtype)
        for first in range(0, V, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            tile = load_side(teacher, teacher_step, read, V, columns, dtype, "evict_last")
            part, low, high = _split(tile, (columns < V)[None, :] & read[:, None], middle, of_row)
            mass += part
            least, largest = tl.minimum(least, low), tl.maximum(largest, high)
    return mass, least, largest


@triton.jit
def _shares(s, t, bound, of_row, SAME_TEMPERATURE: tl.constexpr):
    """The differences in the head and in the tail of a tile."""
    p, q, w = probabilities(s, t, of_row, SAME_TEMPERATURE, False)
    of_class, _slope = total_variation(p, q, w, 0.0, False)
    in_head = t > bound[:, None]
    return tl.sum(tl.where(in_head, of_class, 0.0), 1), tl.sum(tl.where(in_head, 0.0, of_class), 1)


@triton.jit
def head_weight_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    temperature_rows, temperature_stride, temperature: tl.float64,  # [N]; [] with stride 0; or None: the number
    teacher_temperature_rows, teacher_temperature_stride, teacher_temperature: tl.float64,
    mask,  # [N], or None
    mu_tensor, mu: tl.float64,  # [], or None: the number
    weight,  # [N]
    N, V, side_by_side,
    SAME_TEMPERATURE: tl.constexpr, dtype: tl.constexpr,
    ONE_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    _T, a, b = temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    inputs = (student, student_step, teacher, teacher_step, read, V)
    mus = per_row(mu_tensor, 0, mu, row, read, tl.float64)
    columns = tl.arange(0, BLOCK)
    s, t = load(inputs, columns, dtype, "evict_last")
    if ONE_TILE:
        max_student, max_teacher = finite(tl.max(s, 1)), finite(tl.max(t, 1))
        sum_student, sum_teacher = tl.sum(exp(s, max_student, a), 1), tl.sum(exp(t, max_teacher, a - b), 1)
        of_row = (a, b, max_student, sum_student, max_teacher, sum_teacher)
    else:
        of_row, _sum, _hard, _logit, _of_teacher = walk_for_statistics(inputs, a, b, row, dtype, ROWS, BLOCK, False)
        _a, _b, max_student, sum_student, max_teacher, sum_teacher = of_row
    possible = (sum_student > 0.0) & (sum_student < INF) & (sum_teacher > 0.0) & (sum_teacher < INF)

    # The least logit is a bound that is too low, or right; what is above the largest is too high, and so is the best.
    least, largest = tl.full((ROWS,), -INF, dtype), max_teacher
    total, _least, _largest = _split_of_row(t, inputs, least, of_row, ONE_TILE, dtype, ROWS, BLOCK)
    limit = (mus * total.to(tl.float64)).to(tl.int64)
    least = tl.where(possible, least, largest)
    going = tl.max((least < largest).to(tl.int32), 0)
    while going > 0:
        middle = 0.5 * least + 0.5 * largest
        middle = tl.where((middle < largest) & (middle >= least), middle, least)
        mass, low, high = _split_of_row(t, inputs, middle, of_row, ONE_TILE, dtype, ROWS, BLOCK)
        is_open = least < largest
        too_low = (mass > limit) & (low < max_teacher)
        least = tl.where(is_open & too_low, low, least)
        largest = tl.where(is_open & (too_low == 0), high, largest)
        going = tl.max((least < largest).to(tl.int32), 0)

    if ONE_TILE:
        head, tail = _shares(s, t, least, of_row, SAME_TEMPERATURE)
    else:
        head, tail = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
        for first in range(0, V, BLOCK):
            s_tile, t_tile = load(inputs, first + columns, dtype, "evict_first")
            in_head, in_tail = _shares(s_tile, t_tile, least, of_row, SAME_TEMPERATURE)
            head += in_head
            tail += in_tail
    differ = head.to(tl.float64) + tail.to(tl.float64)
    known = possible & (differ > 0.0) & (differ < INF)
    share = tl.where(known, tail.to(tl.float64) / tl.where(known, differ, 1.0), 0.5)
    tl.store(weight + row, tl.where(possible & (mus == 1.0), 0.0, share), mask=live)


def head_weight(*arguments: Any) -> None:
    call = HeadWeight(*arguments)
    N, V, element_size = sizes(call)
    if N == 0:
        return
    dtype = compute_dtype(call.student, call.teacher)
    layouts = layout_of(call.student), layout_of(call.teacher)
    run = side_by_side(N, layouts)
    rows, block, warps = configuration(V, element_size, run)
    with torch.cuda.device_of(call.student):
        head_weight_kernel[(programs(N, run, rows),)](
            *(value for layout in layouts for value in layout),
            *number(call.temperature_rows, call.temperature),
            *number(call.teacher_temperature_rows, call.teacher_temperature),
            call.mask, call.mu_tensor, call.mu, call.student_weight, N, V, run,
            SAME_TEMPERATURE=same_temperature(call), dtype=tl.float64 if dtype is torch.float64 else tl.float32,
            ONE_TILE=block >= V, ROWS=rows, BLOCK=block, num_warps=warps, **limited(dtype),
        )  # fmt: skip
