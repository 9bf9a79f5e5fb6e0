"""The dist schedule in Triton: correlations of p = softmax(student / T) and q = softmax(teacher / T) along rows and
along columns; the mathematics stands in csrc/math/correlation.h.

Rows are walked for maxima and sums, and once more for their moments. Then tiles of rows and classes go down a chunk of
rows; a program adds up what all chunks have found of its classes. Backward walks rows again, for the sum of their
slopes and for what is written. Traffic: student + teacher twice forward, student + teacher + gradient backward, as far
as the L2 cache holds long rows. Nothing is saved but numbers of rows and classes.
"""

import triton
import triton.language as tl

from .divergences import bregman_series, is_near
from .rows_tile import (
    load,
    probabilities,
    row_offsets,
    rows_of_program,
    rows_to_read,
    store,
)
from .rows_walks import walk_for_statistics


@triton.jit
def _sides(s, t, of_row):
    """p, q and p - q of a tile."""
    p, q, w = probabilities(s, t, of_row, True, False)
    return p, q, tl.where(is_near(w), q * (w + w * w * bregman_series(w)), p - q)


@triton.jit
def _is_constant(squares, n, mean, rounding, least):
    return (squares <= least) | (squares <= rounding * rounding * (squares + n * mean * mean))


@triton.jit
def correlation(aa, bb, ab, aD, DD, n, mean, teacher_mean, eps, dtype: tl.constexpr):
    """The loss of a row or a column, and its slopes."""
    rounding: tl.constexpr = 4 * 2.0**-52 if dtype == tl.float64 else 4 * 2.0**-23
    least: tl.constexpr = 2.2250738585072014e-308 if dtype == tl.float64 else 1.1754943508222875e-38
    constant = _is_constant(aa, n, mean, rounding, least) | _is_constant(bb, n, teacher_mean, rounding, least)
    a, b = tl.sqrt(tl.where(constant, 1.0, aa)), tl.sqrt(tl.where(constant, 1.0, bb))
    inverse = 1.0 / (a * b + eps)
    near = a * b / 2.0 > DD
    apart = (2.0 * aD - DD) / (a + b)
    rest = DD - apart * apart
    rest = tl.where(rest < 0.0, 0.0, rest) / 2.0
    loss = (tl.where(near, rest, a * b - ab) + eps) * inverse
    slope = tl.where(near, inverse, -inverse)
    own = tl.where(near, -(b / a * aD + eps), ab * b / a) * inverse * inverse
    return tl.where(constant, 1.0, loss), tl.where(constant, 0.0, slope), tl.where(constant, 0.0, own)


@triton.jit
def _of_rows(of_rows, row, read, temperature, dtype: tl.constexpr):
    """What visit is told of rows."""
    a = tl.full(row.shape, 1.0, dtype) / tl.full(row.shape, temperature, dtype)
    at = of_rows + row.to(tl.int64) * 6
    return (
        a, tl.zeros_like(a),
        tl.load(at, mask=read, other=0.0).to(dtype), tl.load(at + 1, mask=read, other=1.0).to(dtype),
        tl.load(at + 2, mask=read, other=0.0).to(dtype), tl.load(at + 3, mask=read, other=1.0).to(dtype),
    )  # fmt: skip


@triton.jit
def dist_rows_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    mask,  # [N], or None
    scale_tensor, scale: tl.float64,  # [1], or None: 1 / rows that count
    weight: tl.float64, temperature: tl.float64, eps: tl.float64,
    losses,  # [N] float64, out
    of_rows,  # [N, 6] float64, out
    N, V, side_by_side,
    dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    inputs = (student, student_step, teacher, teacher_step, read, V)
    one = tl.full((ROWS,), 1.0, dtype)
    a = one / tl.full((ROWS,), temperature, dtype)
    of_row, _sum_hard, _logits, _logit, _of_teacher = walk_for_statistics(
        inputs, a, tl.zeros_like(a), row, dtype, ROWS, BLOCK, False
    )
    _a, _b, max_student, sum_student, max_teacher, sum_teacher = of_row
    mean = one / tl.full((ROWS,), V, dtype)
    aa, bb, ab = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    aD, DD = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    last = (V - 1) // BLOCK * BLOCK
    for first in range(0, V, BLOCK):
        columns = last - first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_first")
        p, q, D = _sides(s, t, of_row)
        less = tl.where((columns < V)[None, :], mean[:, None], 0.0)
        x, y = p - less, q - less
        aa += tl.sum(x * x, 1).to(tl.float64)
        bb += tl.sum(y * y, 1).to(tl.float64)
        ab += tl.sum(x * y, 1).to(tl.float64)
        aD += tl.sum(x * D, 1).to(tl.float64)
        DD += tl.sum(D * D, 1).to(tl.float64)
    n = tl.full((ROWS,), V, tl.float64)
    loss, slope, own = correlation(aa, bb, ab, aD, DD, n, 1.0 / n, 1.0 / n, tl.full((), eps, tl.float64), dtype)
    impossible = (sum_student == 0.0) | (sum_teacher == 0.0)
    factor = tl.full((ROWS,), weight, tl.float64) * scale
    if scale_tensor is not None:
        factor *= tl.load(scale_tensor)
    tl.store(losses + row, tl.where(read, tl.where(impossible, 1.0, loss), 0.0), mask=live)
    of_rows += row.to(tl.int64) * 6
    tl.store(of_rows, max_student.to(tl.float64), mask=live)
    tl.store(of_rows + 1, sum_student.to(tl.float64), mask=live)
    tl.store(of_rows + 2, max_teacher.to(tl.float64), mask=live)
    tl.store(of_rows + 3, sum_teacher.to(tl.float64), mask=live)
    tl.store(of_rows + 4, tl.where(impossible, 0.0, slope * factor), mask=live)
    tl.store(of_rows + 5, tl.where(impossible, 0.0, own * factor), mask=live)


@triton.jit
def _merged(all, some):
    """Count, means and moments of some values and others."""
    n, p, D, q, aa, bb, ab, aD, DD = all
    m, other_p, other_D, other_q, other_aa, other_bb, other_ab, other_aD, other_DD = some
    share = m / tl.maximum(n + m, 1.0)
    weight = n * share
    x, y, z = other_p - p, other_D - D, other_q - q
    return (
        n + m, p + x * share, D + y * share, q + z * share,
        aa + other_aa + x * x * weight, bb + other_bb + z * z * weight, ab + other_ab + x * z * weight,
        aD + other_aD + x * y * weight, DD + other_DD + y * y * weight,
    )  # fmt: skip


@triton.jit
def _centred(x, here, share):
    """The mean over rows, and x less it. From one of the values, so that equal ones have none but themselves."""
    base = tl.max(tl.where(here, x, -float("inf")), 0)
    base = tl.where(base == -float("inf"), 0.0, base)
    less = tl.where(here, x - base[None, :], 0.0)
    moved = tl.sum(less, 0) * share
    return base + moved, tl.where(here, less - moved[None, :], 0.0)


@triton.jit
def _nothing(BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float64)
    return (zero, zero, zero, zero, zero, zero, zero, zero, zero)


@triton.jit
def dist_columns_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    mask,  # [N], or None
    temperature: tl.float64,
    of_rows,  # [N, 6] float64
    parts,  # [chunks, 9, V] float64, out
    N, V, rows_of_chunk,
    dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns, chunk = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    begin = chunk * rows_of_chunk
    end = tl.minimum(begin + rows_of_chunk, N)
    all = _nothing(BLOCK)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        read = rows_to_read(mask, row, row < end)
        s_rows = student + row_offsets(
            row, read, 0, row, None, student_index, student_inner, student_outer, student_stride
        )
        t_rows = teacher + row_offsets(
            row, read, 0, row, None, teacher_index, teacher_inner, teacher_outer, teacher_stride
        )
        s, t = load((s_rows, student_step, t_rows, teacher_step, read, V), columns, dtype, "evict_first")
        of_row = _of_rows(of_rows, row, read, temperature, dtype)
        p, q, D = _sides(s, t, of_row)
        count = tl.sum(read.to(dtype), 0)
        share, here = 1.0 / tl.maximum(count, 1.0), read[:, None]
        mean, x = _centred(p, here, share)
        apart, y = _centred(D, here, share)
        other, z = _centred(q, here, share)
        some = (
            tl.zeros((BLOCK,), tl.float64) + count.to(tl.float64),
            mean.to(tl.float64), apart.to(tl.float64), other.to(tl.float64),
            tl.sum(x * x, 0).to(tl.float64), tl.sum(z * z, 0).to(tl.float64), tl.sum(x * z, 0).to(tl.float64),
            tl.sum(x * y, 0).to(tl.float64), tl.sum(y * y, 0).to(tl.float64),
        )  # fmt: skip
        all = _merged(all, some)
    parts += chunk.to(tl.int64) * 9 * V + columns
    for i in tl.static_range(9):
        tl.store(parts + i * V, all[i], mask=columns < V)


@triton.jit
def dist_slopes_kernel(
    parts,  # [chunks, 9, V] float64
    weight: tl.float64, eps: tl.float64,
    losses,  # [V] float64, out
    slopes,  # [3, padded], out
    chunks, V, padded,
    BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here, there = columns < V, columns < padded
    all = _nothing(BLOCK)
    for chunk in range(0, chunks):
        at = parts + chunk * 9 * V + columns
        all = _merged(
            all,
            (
                tl.load(at, mask=here, other=0.0), tl.load(at + V, mask=here, other=0.0),
                tl.load(at + 2 * V, mask=here, other=0.0), tl.load(at + 3 * V, mask=here, other=0.0),
                tl.load(at + 4 * V, mask=here, other=0.0), tl.load(at + 5 * V, mask=here, other=0.0),
                tl.load(at + 6 * V, mask=here, other=0.0), tl.load(at + 7 * V, mask=here, other=0.0),
                tl.load(at + 8 * V, mask=here, other=0.0),
            ),
        )  # fmt: skip
    n, mean, apart, other, aa, bb, ab, aD, DD = all
    dtype: tl.constexpr = slopes.dtype.element_ty
    loss, slope, own = correlation(aa, bb, ab, aD, DD, n, mean, other, tl.full((), eps, tl.float64), dtype)
    constant = -(slope * tl.where(slope < 0.0, other, apart) + own * mean)
    tl.store(losses + columns, loss, mask=here)
    tl.store(slopes + columns, (slope * weight).to(dtype), mask=there)
    tl.store(slopes + padded + columns, (own * weight).to(dtype), mask=there)
    tl.store(slopes + 2 * padded + columns, (constant * weight).to(dtype), mask=there)


@triton.jit
def _times_slopes(slopes, padded, columns, of_row, own_of_row, constant_of_row, p, q, D):
    """p G of a tile."""
    here = columns < padded
    slope = tl.load(slopes + columns, mask=here, other=0.0)[None, :]
    own = tl.load(slopes + padded + columns, mask=here, other=0.0)[None, :]
    constant = tl.load(slopes + 2 * padded + columns, mask=here, other=0.0)[None, :]
    G = slope * tl.where(slope < 0.0, q, D) + of_row[:, None] * tl.where(of_row[:, None] < 0.0, q, D)
    return p * (G + (own + own_of_row[:, None]) * p + (constant + constant_of_row[:, None]))


@triton.jit
def dist_bwd_kernel(
    student, student_index, student_inner, student_outer, student_stride, student_step,  # [N, V]
    teacher, teacher_index, teacher_inner, teacher_outer, teacher_stride, teacher_step,  # [N, V]
    grad, grad_index, grad_inner, grad_outer, grad_stride, grad_step,  # [N, V]
    mask,  # [N], or None
    temperature: tl.float64,
    of_rows,  # [N, 6] float64
    slopes,  # [3, padded]
    upstream,  # [1]
    N, V, padded, side_by_side,
    dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, side_by_side, ROWS)
    read = rows_to_read(mask, row, live)
    student += row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    grad += row_offsets(row, live, run, at, side_by_side, grad_index, grad_inner, grad_outer, grad_stride)
    inputs = (student, student_step, teacher, teacher_step, read, V)
    of_row = _of_rows(of_rows, row, read, temperature, dtype)
    at = of_rows + row.to(tl.int64) * 6
    slope, own = tl.load(at + 4, mask=read, other=0.0), tl.load(at + 5, mask=read, other=0.0)
    constant = (-(tl.where(slope < 0.0, slope, 0.0) + own) / tl.full((), V, tl.float64)).to(dtype)
    slope, own = slope.to(dtype), own.to(dtype)
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_last")
        p, q, D = _sides(s, t, of_row)
        total += tl.sum(_times_slopes(slopes, padded, columns, slope, own, constant, p, q, D), 1).to(tl.float64)
    less, scale = total.to(dtype)[:, None], (tl.load(upstream).to(dtype) * of_row[0])[:, None]
    last = (V - 1) // BLOCK * BLOCK
    for first in range(0, V, BLOCK):
        columns = last - first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_first")
        p, q, D = _sides(s, t, of_row)
        values = (_times_slopes(slopes, padded, columns, slope, own, constant, p, q, D) - p * less) * scale
        store(grad, grad_step, live, V, columns, tl.where(read[:, None], values, 0.0))
