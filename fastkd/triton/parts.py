"""What is told of rows besides their loss, in Triton: entropies of student and teacher, whether their best class is the
same, and the cross-entropy with the target. The soft loss is rows_kernels' own.

A row is walked twice, for its maxima and for its sums, before the rows schedule writes a gradient, perhaps over it.
"""

import torch
import triton
import triton.language as tl

from .._calls import RowsCall
from .._divergences import ENTRIES
from .._dtypes import compute_dtype
from .divergences import log1p
from .registers import limited
from .rows import configuration, layout_of, number, programs, same_temperature, side_by_side, sizes
from .rows_tile import (
    INF,
    LOG2E,
    exp,
    finite,
    load,
    per_row,
    row_offsets,
    rows_of_program,
    rows_to_read,
    temperatures,
)

NOWHERE = tl.constexpr(2**62)


@triton.jit
def _side(z, there, maximum, inv_temperature, COINS: tl.constexpr):
    """Of a tile: the sum of e = e^((z - max) / T), and that of e (max - z) / T; of coins that of their entropies."""
    if COINS:
        a = tl.abs(z) * inv_temperature[:, None]
        e = tl.exp2(-a * LOG2E)
        terms = log1p(e) + tl.where(e == 0.0, 0.0, a * e / (1.0 + e))
        return maximum * 0.0, tl.sum(tl.where(there, terms, 0.0), 1)
    e = exp(z, maximum, inv_temperature)
    below = (maximum[:, None] - z) * inv_temperature[:, None]
    return tl.sum(e, 1), tl.sum(tl.where(e == 0.0, 0.0, e * below), 1)


@triton.jit
def _first(z, there, largest, columns):
    """The first class of a tile that has a row's maximum."""
    here = there & (z == largest[:, None])
    return tl.min(tl.where(here, columns.to(tl.int64)[None, :], NOWHERE), 1)


@triton.jit
def _entropy(total, terms, COINS: tl.constexpr):
    entropy = terms
    if not COINS:
        entropy = tl.where(total == 0.0, 0.0, log1p(total - 1.0) + terms / tl.where(total == 0.0, 1.0, total))
    return entropy.to(tl.float64)


@triton.jit
def parts_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    temperature_rows, temperature_stride, temperature: tl.float64,  # [N]; [] with stride 0; or None: the number
    teacher_temperature_rows, teacher_temperature_stride, teacher_temperature: tl.float64,
    mask,  # [N], or None
    target, smoothing: tl.float64,  # [N]
    parts,  # [N, 5]: hard, soft, student_entropy, teacher_entropy, agreement
    N, V, side_by_side,
    SAME_TEMPERATURE: tl.constexpr, COINS: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
    classes = tl.load(target + row, mask=read, other=0)
    best_student, best_teacher = tl.full((ROWS,), -INF, dtype), tl.full((ROWS,), -INF, dtype)
    for first in range(0, V, BLOCK):
        s, t = load(inputs, first + tl.arange(0, BLOCK), dtype, "evict_last")
        best_student = tl.maximum(best_student, tl.max(s, 1))
        best_teacher = tl.maximum(best_teacher, tl.max(t, 1))
    max_student, max_teacher = finite(best_student), finite(best_teacher)
    one, nothing = tl.full((ROWS,), 1.0, dtype), tl.zeros((ROWS,), dtype)
    sum_student, terms_student, sum_teacher, terms_teacher = nothing, nothing, nothing, nothing
    sum_hard, logits, logit = nothing, nothing, nothing
    class_student, class_teacher = tl.full((ROWS,), NOWHERE, tl.int64), tl.full((ROWS,), NOWHERE, tl.int64)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_last")
        there = read[:, None] & (columns < V)[None, :]
        total, terms = _side(s, there, max_student, a, COINS)
        sum_student += total
        terms_student += terms
        total, terms = _side(t, there, max_teacher, a - b, COINS)
        sum_teacher += total
        terms_teacher += terms
        class_student = tl.minimum(class_student, _first(s, there, best_student, columns))
        class_teacher = tl.minimum(class_teacher, _first(t, there, best_teacher, columns))
        sum_hard += tl.sum(exp(s, max_student, one), 1)
        logits += tl.sum(tl.where(there, s - max_student[:, None], 0.0), 1)
        logit += tl.sum(tl.where(columns[None, :] == classes[:, None], s, 0.0), 1)

    smoothed = per_row(None, 0, smoothing, row, read, tl.float64)
    hard = log1p(sum_hard - 1.0).to(tl.float64)
    hard += tl.where(smoothed < 1.0, (1.0 - smoothed) * (max_student - logit).to(tl.float64), 0.0)
    hard += tl.where(smoothed > 0.0, -smoothed * logits.to(tl.float64) / V, 0.0)
    hard = tl.where(sum_hard == 0.0, INF, hard)
    hard = tl.where((classes >= 0) & (classes < V), hard, float("nan"))
    parts += row.to(tl.int64) * 5
    tl.store(parts, tl.where(read, hard, 0.0), mask=live)
    tl.store(parts + 1, tl.zeros((ROWS,), tl.float64), mask=live)  # what the rows schedule leaves there
    of_student, of_teacher = _entropy(sum_student, terms_student, COINS), _entropy(sum_teacher, terms_teacher, COINS)
    tl.store(parts + 2, tl.where(read, of_student, 0.0), mask=live)
    tl.store(parts + 3, tl.where(read, of_teacher, 0.0), mask=live)
    agree = (class_student == class_teacher).to(tl.float64)
    tl.store(parts + 4, tl.where(read, agree, 0.0), mask=live)


def rows_parts(call: RowsCall, parts: torch.Tensor) -> None:
    """All of a row but its soft loss."""
    assert call.target_numbers is not None
    N, V, element_size = sizes(call)
    dtype = compute_dtype(call.student, call.teacher)
    layouts = layout_of(call.student), layout_of(call.teacher)
    run = side_by_side(N, layouts)
    rows, block, warps = configuration(V, element_size, run)
    block = max(16, min(block, 2048 // rows))  # more is held of each class than by the schedule
    with torch.cuda.device_of(call.student):
        parts_kernel[(programs(N, run, rows),)](
            *(value for layout in layouts for value in layout),
            *number(call.temperature_rows, call.temperature),
            *number(call.teacher_temperature_rows, call.teacher_temperature),
            call.mask, call.target, call.target_numbers.tolist()[2], parts, N, V, run,
            SAME_TEMPERATURE=same_temperature(call), COINS=ENTRIES[call.divergence].given == "LogOdds",
            dtype=tl.float64 if dtype is torch.float64 else tl.float32,
            ROWS=rows, BLOCK=block, num_warps=warps, **limited(dtype),
        )  # fmt: skip
