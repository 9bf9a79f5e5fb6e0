"""The pairs schedule in Triton: a loss over all pairs of embeddings [N, D], and its gradient.

    d_ij = |x_i - x_j|, of the student s, of the teacher t; w_ij = (weight_i + weight_j) / 2, or 1
    loss = 1/N^2 sum_ij pair(s_ij, t_ij, w_ij), W_ij = 2/N^2 weight(s_ij, t_ij, w_ij), gradient = diag(W 1) X - W X
    pair and weight are a functor's, see relations.py; what they know of all pairs are means of s, t and a slope

Tiles of both Gram matrices become distances of a strip of rows, which stays in the L2 cache; loss
and W are functions of these, and tiles of W are made in registers where they are multiplied by X.
Up to STRIP elements all of N x N is one strip: distances are computed once. Beyond that they are
computed anew for the means, the loss (both in the upper triangle of strips) and the gradient.
Of rows that are not there whole tiles are skipped, and where they meet others the distances are 0.
Memory: the strips, a constant; of float32, a centred copy of the embeddings.
Saved for backward: the gradient.

Where a pair is so close that its distance, or the difference of its rows in W X, would cancel
between products, both come from the differences of the rows as they were given. In float64
everything does.
"""

import triton
import triton.language as tl

from .embeddings import (
    MIN_DISTANCE,
    NEAR_SHARE,
    any_of,
    row_pointer,
    rows_there,
    scale_there,
    squared_distances,
    total,
    width_there,
)

# In the kernels
#   strip   pointers to the distances of student and teacher, [rows of the strip, pitch]: 0 on the
#           diagonal and, as pitch is N rounded up so that rows are aligned, beyond N
#   count   pointer to the number of rows that are there, or None: all N
#   weight  pointer to the weights of rows [N], or None: all 1
#   means   pointer to the means of the distances of student and teacher, or None: both are 1
#   PAIR, WEIGHT   the functor


@triton.jit
def _gram(
    x, first_i, first_j, N, D,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    i_row, j_row = row_pointer(x, first_i, D), row_pointer(x, first_j, D)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, D, BLOCK_D):
        k = first + tl.arange(0, BLOCK_D)
        a_mask, b_mask = (first_i + i < N)[:, None] & (k < D)[None, :], (first_j + j < N)[None, :] & (k < D)[:, None]
        a = tl.load(i_row + (i[:, None] * D + k[None, :]), mask=a_mask, other=0.0)
        b = tl.load(j_row + (j[None, :] * D + k[:, None]), mask=b_mask, other=0.0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit
def _distances(
    given, x, norms, first_i, first_j, n, N, D, dtype: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]; 0 on the diagonal and from n on. Up to N rows are read, whatever they hold: it takes fewer
    registers."""
    i, j = first_i + tl.arange(0, ROWS), first_j + tl.arange(0, COLUMNS)
    pair = (i < n)[:, None] & (j < n)[None, :] & (i[:, None] != j[None, :])
    if EXACT:
        squares = squared_distances(given, first_i, first_j, N, D, dtype, ROWS, COLUMNS)
    else:
        i_norms, j_norms = tl.load(norms + i, mask=i < N, other=0.0), tl.load(norms + j, mask=j < N, other=0.0)
        of_rows = i_norms[:, None] + j_norms[None, :]
        squares = of_rows - 2.0 * _gram(x, first_i, first_j, N, D, PRECISION, ROWS, COLUMNS, BLOCK_D)
        close = pair & (squares < of_rows * NEAR_SHARE)
        if any_of(close):
            exact = squared_distances(given, first_i, first_j, N, D, dtype, ROWS, COLUMNS)
            squares = tl.where(close, exact, squares)
    distances = tl.where(squares < MIN_DISTANCE * MIN_DISTANCE, tl.full((), MIN_DISTANCE, dtype), tl.sqrt(squares))
    return tl.where(pair, distances, 0.0)


@triton.jit
def _store_nothing(parts, part, parts_n):
    tl.store(parts + part, tl.zeros((), tl.float64))
    tl.store(parts + parts_n + part, tl.zeros((), tl.float64))


@triton.jit(do_not_specialize=["first_part", "parts_n"])
def distances_kernel(
    student, student_operand, student_norms,  # [N, student_D] twice, [N]; see embeddings.Side
    teacher, teacher_operand, teacher_norms,
    student_strip, teacher_strip, pitch,  # or None: not to be stored
    parts, first_part, parts_n,  # [2, parts_n], or None: sums of the distances, from first_part on
    count, first, end, first_column, N, student_D, teacher_D,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STUDENT_BLOCK_D: tl.constexpr, TEACHER_BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The distances of rows first ... end - 1 to the rows from first_column on."""
    dtype: tl.constexpr = tl.float64 if EXACT else tl.float32
    first_i, first_j = first + tl.program_id(0) * ROWS, first_column + tl.program_id(1) * COLUMNS
    i, j = first_i + tl.arange(0, ROWS), first_j + tl.arange(0, COLUMNS)
    at = (i - first)[:, None] * pitch + j[None, :]
    stored = (i < end)[:, None] & (j < pitch)[None, :]
    part = first_part + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    n = rows_there(count, N)
    if count is not None and (first_i >= n) | (first_j >= n):
        if parts is not None:
            _store_nothing(parts, part, parts_n)
        return
    twice = tl.where(first_j < end, 1.0, 2.0)  # for the triangle below
    student_distances = _distances(
        student, student_operand, student_norms, first_i, first_j, n, N, student_D, dtype, EXACT,
        PRECISION, ROWS, COLUMNS, STUDENT_BLOCK_D,
    )  # fmt: skip
    if student_strip is not None:
        tl.store(student_strip + at, student_distances, mask=stored)
    if parts is not None:
        tl.store(parts + part, total(student_distances) * twice)
    teacher_distances = _distances(
        teacher, teacher_operand, teacher_norms, first_i, first_j, n, N, teacher_D, dtype, EXACT,
        PRECISION, ROWS, COLUMNS, TEACHER_BLOCK_D,
    )  # fmt: skip
    if student_strip is not None:
        tl.store(teacher_strip + at, teacher_distances, mask=stored)
    if parts is not None:
        tl.store(parts + parts_n + part, total(teacher_distances) * twice)


@triton.jit
def _constants(means, totals, delta, dtype: tl.constexpr):
    """What a functor is told of all pairs: 1 / each mean, the mean slope, delta."""
    by_mu = tl.full((), 1.0, tl.float64)
    by_tau = by_mu
    if means is not None:
        by_mu /= tl.load(means)
        by_tau /= tl.load(means + 1)
    slope = tl.zeros((), dtype) if totals is None else tl.load(totals + 1).to(dtype)
    return by_mu.to(dtype), by_tau.to(dtype), slope, tl.full((), delta, dtype)


@triton.jit
def _weights_of_pairs(half_weights, weight, j, n, dtype: tl.constexpr):
    """half_weights: of the rows of a tile; j: its columns."""
    w = tl.full((), 1.0, dtype)
    if weight is not None:
        w = half_weights[:, None] + 0.5 * tl.load(weight + j, mask=j < n, other=0.0)[None, :]
    return w


@triton.jit(do_not_specialize=["first_part", "parts_n"])
def loss_kernel(
    student_strip, teacher_strip, pitch,
    means,  # [2], or None
    parts, first_part, parts_n,  # [2, parts_n]: sums of the loss and of the slope, from first_part on
    count, weight, first, end, first_column, N,
    delta: tl.float64,
    PAIR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = student_strip.dtype.element_ty
    first_i, first_j = tl.program_id(0) * ROWS, first_column + tl.program_id(1) * COLUMNS
    i, j = first_i + tl.arange(0, ROWS), first_j + tl.arange(0, COLUMNS)
    part = first_part + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    n = rows_there(count, N)
    if count is not None:
        if (first + first_i >= n) | (first_j >= n):
            _store_nothing(parts, part, parts_n)
            return
        end = tl.minimum(end, n)
    at, width = i[:, None] * pitch + j[None, :], width_there(pitch, count, n)
    i_there = first + i < end
    here = i_there[:, None] & (j < width)[None, :]
    s = tl.load(student_strip + at, mask=here, other=0.0)
    t = tl.load(teacher_strip + at, mask=here, other=0.0)
    half_weights = 0.5 * tl.load(weight + first + i, mask=i_there, other=0.0) if weight is not None else None
    w = _weights_of_pairs(half_weights, weight, j, n, dtype)
    by_mu, by_tau, _slope, bound = _constants(means, None, delta, dtype)
    loss, slope = PAIR(s, t, w, by_mu, by_tau, bound)
    twice = tl.where(first_j < end, 1.0, 2.0)
    tl.store(parts + part, total(tl.where(s == 0.0, 0.0, loss)) * twice)  # NaN is a pair
    tl.store(parts + parts_n + part, total(tl.where(s == 0.0, 0.0, slope)) * twice)


@triton.jit
def _weights(s, teacher_at, there, w, constants, WEIGHT: tl.constexpr):
    """0 where there is no pair, and of equal rows, whose distance does not depend on them."""
    t = tl.load(teacher_at, mask=there, other=0.0)
    by_mu, by_tau, slope, delta = constants
    return tl.where(s <= MIN_DISTANCE, 0.0, WEIGHT(s, t, w, by_mu, by_tau, slope, delta))


@triton.jit
def _add_differences(
    acc, given, norms_of_rows, norms, student_rows, teacher_rows, half_weights, weight, constants,
    i, row_there, columns, begin, end, N, D, WEIGHT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """acc - sum_j w_ij (x_i - x_j), over all pairs or over the close ones, from the rows as they were given."""
    dtype: tl.constexpr = acc.dtype
    mask = row_there[:, None] & (columns < D)[None, :]
    mine = tl.load(given + i.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0).to(dtype)
    for j in range(begin, end):
        s = tl.load(student_rows + j, mask=row_there, other=0.0)
        w = half_weights + 0.5 * tl.load(weight + j) if weight is not None else tl.full((), 1.0, dtype)
        w = _weights(s, teacher_rows + j, row_there, w, constants, WEIGHT)
        if not EXACT:
            w = tl.where(s * s < (norms_of_rows + tl.load(norms + j)) * NEAR_SHARE, w, 0.0)
        row = row_pointer(given, j, D)
        acc -= w[:, None] * (mine - tl.load(row + columns, mask=columns < D, other=0.0).to(dtype)[None, :])
    return acc


@triton.jit
def grad_kernel(
    given, x, norms,  # [N, D] twice, [N]; see embeddings.Side
    student_strip, teacher_strip, pitch,
    means,  # [2], or None
    totals,  # [2], or None: the mean slope is its second
    added,  # [N, D], or None: to be added
    grad,  # [N, D]: of the rows that are there
    count, weight, first, end, N, D,
    delta: tl.float64, scale: tl.float64,
    WEIGHT: tl.constexpr, EXACT: tl.constexpr, CLOSE_APART: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """CLOSE_APART: close pairs are to be kept out of the product."""
    dtype: tl.constexpr = student_strip.dtype.element_ty
    half: tl.constexpr = x.dtype.element_ty == tl.bfloat16  # float16 has not the range of the weights
    first_row = first + tl.program_id(0) * ROWS
    i, columns = first_row + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n = rows_there(count, N)
    if count is not None:
        if first_row >= n:
            return
        end = tl.minimum(end, n)
    there, width = i < end, width_there(pitch, count, n)
    constants = _constants(means, totals, delta, dtype)
    of_row = (i - first) * pitch
    norms_of_rows = tl.load(norms + i, mask=there, other=0.0) if CLOSE_APART else None
    half_weights = 0.5 * tl.load(weight + i, mask=there, other=0.0) if weight is not None else None

    acc, sums = tl.zeros((ROWS, COLUMNS), dtype), tl.zeros((ROWS,), dtype)
    if EXACT:
        acc = _add_differences(
            acc, given, None, None, student_strip + of_row, teacher_strip + of_row, half_weights, weight,
            constants, i, there, columns, 0, n, n, D, WEIGHT, EXACT,
        )  # fmt: skip
    else:
        for begin in range(0, n, OTHERS):
            j = begin + tl.arange(0, OTHERS)
            at, here = of_row[:, None] + j[None, :], there[:, None] & (j < width)[None, :]
            s = tl.load(student_strip + at, mask=here, other=0.0)
            w = _weights_of_pairs(half_weights, weight, j, n, dtype)
            w = _weights(s, teacher_strip + at, here, w, constants, WEIGHT)
            if CLOSE_APART:
                of_pair = norms_of_rows[:, None] + tl.load(norms + j, mask=j < n, other=0.0)[None, :]
                close = (s > MIN_DISTANCE) & (s * s < of_pair * NEAR_SHARE)
                if any_of(close):
                    acc = _add_differences(
                        acc, given, norms_of_rows, norms, student_strip + of_row, teacher_strip + of_row,
                        half_weights, weight, constants, i, there, columns,
                        begin, tl.minimum(begin + OTHERS, n), n, D, WEIGHT, EXACT,
                    )  # fmt: skip
                w = tl.where(close, 0.0, w)
            mask = (j < n)[:, None] & (columns < D)[None, :]
            at = tl.arange(0, OTHERS)[:, None] * D + columns[None, :]
            others = tl.load(row_pointer(x, begin, D) + at, mask=mask, other=0.0)
            if half:  # the sum is of the weights as they are multiplied: or a translation would matter
                w = w.to(tl.bfloat16)
            else:
                others = others.to(tl.float32)
            sums += tl.sum(w.to(tl.float32), 1)
            acc = tl.dot(w, others, acc, input_precision=PRECISION)

    at, mask = tl.arange(0, ROWS)[:, None] * D + columns[None, :], there[:, None] & (columns < D)[None, :]
    mine = tl.load(row_pointer(x, first_row, D) + at, mask=mask, other=0.0).to(dtype)
    result = (sums[:, None] * mine - acc) * scale_there(scale, count, n, N, 2).to(dtype)
    if added is not None:
        result += tl.load(row_pointer(added, first_row, D) + at, mask=mask, other=0.0)
    tl.store(row_pointer(grad, first_row, D) + at, result.to(grad.dtype.element_ty), mask=mask)
