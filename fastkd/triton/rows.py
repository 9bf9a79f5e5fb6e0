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

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._calls import InverseDivisor, RowsBackward, RowsCall, RowsForward
from .._divergences import ENTRIES
from ..reference import compute_dtype
from .divergences import FUNCTIONS, log1p
from .registers import limited

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))

# In the kernels
#   inputs  what _load needs: pointers to the rows [ROWS] and the step between classes, for
#           student and teacher; which rows to read [ROWS]; V
#   of_row  constants of a row, [ROWS] each: a = 1 / T, b = 1 / T - 1 / T_teacher, the maxima and
#           the sums of e^((z - max) / T) of student and teacher


@triton.jit
def _rows_of_program(N, side_by_side, ROWS: tl.constexpr):
    """The rows [ROWS] that a program takes, which of them there are, and, where so many lie side by side that they form
    runs of that length, the number of the run and the rows' places in it."""
    program, places = tl.program_id(0), tl.arange(0, ROWS)
    if side_by_side is not None:
        blocks = tl.cdiv(side_by_side, ROWS)
        run = (program // blocks).to(tl.int64)
        at = program % blocks * ROWS + places
        row = run * side_by_side + at
        live = at < side_by_side
    else:
        run = tl.full((), 0, tl.int64)
        at = program * ROWS + places
        row = at
        live = row < N
    return row, live, run, at


@triton.jit
def _row_offsets(row, here, run, at, side_by_side, index, inner, outer_stride, stride):
    """Where rows begin: see Layout. Of rows in runs the compiler sees that they are neighbours in memory."""
    if side_by_side is not None:
        offsets = at.to(tl.int64) * stride
        if outer_stride is not None:
            offsets += run * outer_stride
    elif index is not None:
        offsets = tl.load(index + row, mask=here, other=0) * stride
    elif inner is not None:
        offsets = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * stride
    else:
        offsets = row.to(tl.int64) * stride
    return offsets


@triton.jit
def _per_row(values, stride, value_of_all, row, read, dtype: tl.constexpr):
    if values is None:
        found = tl.full(row.shape, value_of_all, dtype)
    else:
        found = tl.load(values + row * stride, mask=read, other=1.0)
    return found


@triton.jit
def _temperatures(
    temperature_rows, temperature_stride, temperature,
    teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read,
    dtype: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """T, and of_row's a and b."""
    T = _per_row(temperature_rows, temperature_stride, temperature, row, read, dtype)
    a = 1.0 / T
    b = tl.zeros_like(a)
    if not SAME_TEMPERATURE:
        b = a - 1.0 / _per_row(
            teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype
        )
    return T, a, b


@triton.jit
def _load_side(rows, step, read, V, columns, dtype: tl.constexpr, EVICT: tl.constexpr):
    pointers = rows[:, None] + (columns.to(tl.int64) * step)[None, :]
    mask = read[:, None] & (columns < V)[None, :]
    return tl.load(pointers, mask=mask, other=-INF, eviction_policy=EVICT).to(dtype)


@triton.jit
def _load(inputs, columns, dtype: tl.constexpr, EVICT: tl.constexpr):
    """[ROWS, BLOCK] logits of student and teacher; -inf where there are none."""
    student, student_step, teacher, teacher_step, read, V = inputs
    s = _load_side(student, student_step, read, V, columns, dtype, EVICT)
    t = _load_side(teacher, teacher_step, read, V, columns, dtype, EVICT)
    return s, t


@triton.jit
def _store(grad, step, live, V, columns, values):
    pointers = grad[:, None] + (columns.to(tl.int64) * step)[None, :]
    mask = live[:, None] & (columns < V)[None, :]
    tl.store(pointers, values.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def _finite(maximum):
    """Of -inf alone anything finite will do: every exponential is 0."""
    return tl.where(maximum == -INF, 0.0, maximum)


@triton.jit
def _exp(z, maximum, inv_temperature):
    """e^((z - maximum) / T)"""
    return tl.exp2((z - maximum[:, None]) * (inv_temperature * LOG2E)[:, None])


@triton.jit
def _accumulate(z, maximum, total, inv_temperature):
    """The running maximum, and the running sum of e^((z - maximum) / T)."""
    larger = tl.maximum(maximum, tl.max(z, 1))
    base = _finite(larger)
    total = total * tl.exp2((maximum - base) * (inv_temperature * LOG2E)) + tl.sum(_exp(z, base, inv_temperature), 1)
    return larger, total


@triton.jit
def _probabilities(s, t, of_row, SAME_TEMPERATURE: tl.constexpr):
    """p, q and w of a tile. A class that is not there has p = q = 0."""
    a, b, max_student, sum_student, max_teacher, sum_teacher = of_row
    p = _exp(s, max_student, a) * tl.where(sum_student == 0.0, 0.0, 1.0 / sum_student)[:, None]
    q = _exp(t, max_teacher, a - b) * tl.where(sum_teacher == 0.0, 0.0, 1.0 / sum_teacher)[:, None]
    # Where student and teacher differ by a constant, which changes nothing, the difference would be
    # rounded at the size of that constant: there both are taken from their maxima. Where they do
    # not, s - t itself is the most exact, and near convergence it is what counts.
    shifted = tl.abs(max_student - max_teacher) > 4.0
    offset = log1p((sum_student - sum_teacher) / sum_teacher)  # log(sum_student / sum_teacher)
    offset += tl.where(shifted, 0.0, (max_student - max_teacher) * a + max_teacher * b)
    from_centre = t - tl.where(shifted, max_teacher, 0.0)[:, None]
    difference = (s - tl.where(shifted, max_student, 0.0)[:, None]) - from_centre
    w = difference * a[:, None] - offset[:, None]
    if not SAME_TEMPERATURE:
        w += tl.where(t == -INF, 0.0, from_centre * b[:, None])
    return p, q, w


@triton.jit
def _visit(
    s, t, of_row, parameter,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] each: loss, slope and p of the classes of a tile."""
    p, q, w = _probabilities(s, t, of_row, SAME_TEMPERATURE)
    loss, slope = DIVERGENCE(p, q, w, parameter, OF_ROWS)
    if ENTROPY:  # the teacher's entropy is this and log sum_teacher
        a, b, _max_student, _sum_student, max_teacher, _sum_teacher = of_row
        loss += tl.where(q == 0.0, 0.0, q * ((max_teacher[:, None] - t) * (a - b)[:, None]))
    return loss, slope, p


@triton.jit
def _grad(slope, p, sum_slope, of_row, scale):
    """The gradient of a tile. None where a row has no possible class, nor out of an infinite loss:
    no finite step changes that."""
    _a, _b, _max_student, sum_student, _max_teacher, sum_teacher = of_row
    nothing = (sum_teacher == 0.0) | ((sum_student == 0.0) & (sum_teacher > 0.0)) | (sum_slope == INF)
    scale += 0.0 * (sum_student + sum_teacher)  # a NaN anywhere in a row is one everywhere in it
    return tl.where(nothing[:, None], 0.0, (slope - p * sum_slope[:, None]) * scale[:, None])


@triton.jit
def _row_loss(total, of_row, scale, ENTROPY: tl.constexpr):
    _a, _b, _max_student, sum_student, _max_teacher, sum_teacher = of_row
    if ENTROPY:
        total += log1p(sum_teacher - 1.0)
    total = tl.where(sum_student == 0.0, INF, total) + 0.0 * (sum_student + sum_teacher)  # NaN: as in _grad
    return tl.where(sum_teacher == 0.0, 0.0, total * scale)


@triton.jit
def _rows_to_read(mask, row, live):
    read = live
    if mask is not None:
        read = live & (tl.load(mask + row, mask=live, other=0) != 0)
    return read


@triton.jit
def _walk_for_statistics(inputs, a, b, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """of_row of rows longer than a tile."""
    V = inputs[5]
    max_student, sum_student = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    max_teacher, sum_teacher = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    for first in range(0, V, BLOCK):
        s, t = _load(inputs, first + tl.arange(0, BLOCK), dtype, "evict_last")
        max_student, sum_student = _accumulate(s, max_student, sum_student, a)
        max_teacher, sum_teacher = _accumulate(t, max_teacher, sum_teacher, a - b)
    return a, b, _finite(max_student), sum_student, _finite(max_teacher), sum_teacher


@triton.jit
def _walk_for_loss(
    inputs, of_row, parameter, grad, grad_step, live, grad_scale,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, IS_CENTRED: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of losses and slopes over rows longer than a tile; the gradient where it needs no sum of slopes."""
    V = inputs[5]
    total, sum_slope = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    last = (V - 1) // BLOCK * BLOCK
    for first in range(0, V, BLOCK):
        columns = last - first + tl.arange(0, BLOCK)
        s, t = _load(inputs, columns, dtype, "evict_first" if IS_CENTRED else "evict_last")
        losses, slopes, p = _visit(s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE)
        total += tl.sum(losses, 1)
        if not IS_CENTRED:
            sum_slope += tl.sum(slopes, 1)
        elif grad is not None:
            _store(grad, grad_step, live, V, columns, _grad(slopes, p, sum_slope, of_row, grad_scale))
    return total, sum_slope


@triton.jit
def _walk_for_grad(
    inputs, of_row, parameter, grad, grad_step, live, grad_scale, sum_slope,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
    dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    V = inputs[5]
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = _load(inputs, columns, dtype, "evict_first")
        _losses, slopes, p = _visit(s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE)
        _store(grad, grad_step, live, V, columns, _grad(slopes, p, sum_slope, of_row, grad_scale))


@triton.jit
def _store_statistics(stats, row, live, of_row, sum_slope):
    _a, _b, max_student, sum_student, max_teacher, sum_teacher = of_row
    stats += row.to(tl.int64) * 5
    tl.store(stats, max_student.to(tl.float64), mask=live)
    tl.store(stats + 1, sum_student.to(tl.float64), mask=live)
    tl.store(stats + 2, max_teacher.to(tl.float64), mask=live)
    tl.store(stats + 3, sum_teacher.to(tl.float64), mask=live)
    tl.store(stats + 4, tl.where(sum_teacher == 0.0, 0.0, sum_slope).to(tl.float64), mask=live)


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
    loss,  # [N] where PER_ROW; else [programs], of each the sum over its rows
    stats,  # [N, 5], or None
    N, V, side_by_side,
    DIVERGENCE: tl.constexpr, IS_CENTRED: tl.constexpr, ENTROPY: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr, T_SQUARED: tl.constexpr,
    PER_ROW: tl.constexpr, ONE_TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = loss.dtype.element_ty
    row, live, run, at = _rows_of_program(N, side_by_side, ROWS)
    read = _rows_to_read(mask, row, live)
    T, a, b = _temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    loss_scale = _per_row(weight, 1, 1.0, row, read, dtype)
    if T_SQUARED:
        loss_scale *= T * T
    grad_scale = loss_scale * a * _per_row(None, 0, scale, row, read, dtype)
    if scale_tensor is not None:
        grad_scale *= tl.load(scale_tensor).to(dtype)
    student += _row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += _row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    if grad is not None:
        grad += _row_offsets(row, live, run, at, side_by_side, grad_index, grad_inner, grad_outer, grad_stride)
    inputs = (student, student_step, teacher, teacher_step, read, V)
    OF_ROWS: tl.constexpr = parameter_rows is not None
    parameter = _per_row(parameter_rows, parameter_stride, parameter, row, read, tl.float64)[:, None]

    if ONE_TILE:
        columns = tl.arange(0, BLOCK)
        s, t = _load(inputs, columns, dtype, "evict_first")
        max_student, max_teacher = _finite(tl.max(s, 1)), _finite(tl.max(t, 1))
        sum_student, sum_teacher = tl.sum(_exp(s, max_student, a), 1), tl.sum(_exp(t, max_teacher, a - b), 1)
        of_row = (a, b, max_student, sum_student, max_teacher, sum_teacher)
        losses, slopes, p = _visit(s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE)
        total = tl.sum(losses, 1)
        sum_slope = tl.zeros((ROWS,), dtype) if IS_CENTRED else tl.sum(slopes, 1)
        if grad is not None:
            _store(grad, grad_step, live, V, columns, _grad(slopes, p, sum_slope, of_row, grad_scale))
    else:
        of_row = _walk_for_statistics(inputs, a, b, dtype, ROWS, BLOCK)
        total, sum_slope = _walk_for_loss(
            inputs, of_row, parameter, grad, grad_step, live, grad_scale,
            DIVERGENCE, OF_ROWS, ENTROPY, IS_CENTRED, SAME_TEMPERATURE, dtype, ROWS, BLOCK,
        )  # fmt: skip
        if grad is not None and not IS_CENTRED:
            _walk_for_grad(
                inputs, of_row, parameter, grad, grad_step, live, grad_scale, sum_slope,
                DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE, dtype, BLOCK,
            )  # fmt: skip

    total = _row_loss(total, of_row, loss_scale, ENTROPY)
    if PER_ROW:
        tl.store(loss + row, total, mask=live)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(total, 0))
    if stats is not None:
        _store_statistics(stats, row, live, of_row, sum_slope)


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
    stats,  # [N, 5]
    upstream, upstream_stride,  # [N], or [1] with stride 0
    N, V, side_by_side,
    DIVERGENCE: tl.constexpr, SAME_TEMPERATURE: tl.constexpr, T_SQUARED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = upstream.dtype.element_ty
    row, live, run, at = _rows_of_program(N, side_by_side, ROWS)
    read = _rows_to_read(mask, row, live)
    T, a, b = _temperatures(
        temperature_rows, temperature_stride, temperature,
        teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype, SAME_TEMPERATURE,
    )  # fmt: skip
    grad_scale = _per_row(weight, 1, 1.0, row, read, dtype) * (T if T_SQUARED else a)
    grad_scale *= tl.load(upstream + row * upstream_stride, mask=read, other=0.0)
    grad_scale *= _per_row(None, 0, scale, row, read, dtype)
    if scale_tensor is not None:
        grad_scale *= tl.load(scale_tensor).to(dtype)
    student += _row_offsets(
        row, read, run, at, side_by_side, student_index, student_inner, student_outer, student_stride
    )
    teacher += _row_offsets(
        row, read, run, at, side_by_side, teacher_index, teacher_inner, teacher_outer, teacher_stride
    )
    grad += _row_offsets(row, live, run, at, side_by_side, grad_index, grad_inner, grad_outer, grad_stride)
    stats += row.to(tl.int64) * 5
    max_student = tl.load(stats, mask=read, other=0.0).to(dtype)
    sum_student = tl.load(stats + 1, mask=read, other=0.0).to(dtype)
    max_teacher = tl.load(stats + 2, mask=read, other=0.0).to(dtype)
    sum_teacher = tl.load(stats + 3, mask=read, other=0.0).to(dtype)
    sum_slope = tl.load(stats + 4, mask=read, other=0.0).to(dtype)
    of_row = (a, b, max_student, sum_student, max_teacher, sum_teacher)

    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s, t = _load((student, student_step, teacher, teacher_step, read, V), columns, dtype, "evict_first")
    OF_ROWS: tl.constexpr = parameter_rows is not None
    parameter = _per_row(parameter_rows, parameter_stride, parameter, row, read, tl.float64)[:, None]
    _loss, slopes, p = _visit(s, t, of_row, parameter, DIVERGENCE, OF_ROWS, False, SAME_TEMPERATURE)
    _store(grad, grad_step, live, V, columns, _grad(slopes, p, sum_slope, of_row, grad_scale))


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


# By the bytes of the wider of student's and teacher's elements. The first: a row of 8192 takes 128 registers of
# each of 512 threads. The second: a longer row is walked in 59 to 101, few rows sharing the L2 cache.
ONE_TILE = {2: 8192, 4: 8192, 8: 2048}  # the longest row that is kept in registers
TILE = {2: 8192, 4: 8192, 8: 2048}  # of a longer row
TILE_OF_BACKWARD = {2: 4096, 4: 4096, 8: 1024}  # of any row: tiles do not wait for each other
PER_THREAD = {2: 16, 4: 16, 8: 8}  # elements: with fewer, too little is under way; with more, registers run out
ELEMENTS = 2048  # of a program, as far as rows are shorter
FEW_NEIGHBOURS = 16  # rows side by side, of a program: with fewer, lines are read in parts
SUM_BLOCK = 4096


class Configuration(NamedTuple):
    rows: int  # of a program
    block: int  # classes of a tile
    warps: int


def configuration(V: int, element_size: int, side_by_side: int | None = None) -> Configuration:
    """The schedule of the forward pass; all in one tile where block >= V."""
    if side_by_side is not None:
        return _neighbours(V, element_size, side_by_side)
    if ONE_TILE[element_size] >= V:
        return _whole_rows(V, element_size)
    block = TILE[element_size]
    return Configuration(1, block, _warps(block, element_size))


def backward_configuration(V: int, element_size: int, side_by_side: int | None = None) -> Configuration:
    if side_by_side is not None:
        return _neighbours(V, element_size, side_by_side)
    block = TILE_OF_BACKWARD[element_size]
    if block >= V:
        return _whole_rows(V, element_size)
    return Configuration(1, block, _warps(block, element_size))


def _whole_rows(V, element_size):
    block = max(16, triton.next_power_of_2(V))
    rows = max(1, ELEMENTS // block)
    return Configuration(rows, block, _warps(rows * block, element_size))


def _neighbours(V, element_size, side_by_side):
    """Of rows side by side as many as make whole lines, and no more classes than registers hold: half as many elements
    a thread as of other rows, as sums go over threads that a row's classes are dealt to."""
    most, block = ONE_TILE[element_size] // 2, max(16, triton.next_power_of_2(V))
    rows = max(FEW_NEIGHBOURS, min(64, triton.next_power_of_2(side_by_side)))
    while rows > FEW_NEIGHBOURS and rows * block > most:
        rows //= 2
    block = min(block, most // rows)
    return Configuration(rows, block, _warps(2 * rows * block, element_size))


def _warps(elements, element_size):
    return min(16, max(1, elements // (32 * PER_THREAD[element_size])))


class Layout(NamedTuple):
    """Where the rows of a tensor [*, V] are, in elements: row n begins at index[n] * stride, where
    there is an index; else at n // inner * outer_stride + n % inner * stride, where there is an
    inner; else at n * stride. So the compiler sees by which powers of 2 the strides divide."""

    data: torch.Tensor | None
    index: torch.Tensor | None = None  # [N]
    inner: int | None = None
    outer_stride: int | None = None
    stride: int = 0
    step: int = 1  # between classes


def layout_of(x: torch.Tensor) -> Layout:
    dims = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:  # dimensions that lie one after the other in memory are one
            dims[-1] = (dims[-1][0] * size, stride)
        elif size != 1:
            dims.append((size, stride))
    step = x.stride(-1)
    if not dims:
        return Layout(x, step=step)
    if len(dims) == 1:
        return Layout(x, stride=dims[0][1], step=step)
    if len(dims) == 2:
        return Layout(x, None, dims[1][0], dims[0][1], dims[1][1], step)
    unit = math.gcd(*(stride for _, stride in dims)) or 1
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in dims:
        index = index[..., None] + torch.arange(size, device=x.device) * (stride // unit)
    return Layout(x, index.reshape(-1), stride=unit, step=step)


NO_LAYOUT = Layout(None)


def side_by_side(N: int, layouts: Sequence[Layout]) -> int | None:
    """How many rows lie side by side in every tensor, their elements of a class one after the other; or None."""
    layouts = [x for x in layouts if x.data is not None]
    if any(x.index is not None or x.stride != 1 or x.step == 1 for x in layouts):
        return None
    runs = {x.inner or N for x in layouts}
    run = runs.pop()
    return run if not runs and run >= FEW_NEIGHBOURS // 2 else None


def _same_temperature(call):
    if call.temperature_rows is None and call.teacher_temperature_rows is None:
        return call.temperature == call.teacher_temperature
    return call.temperature_rows is call.teacher_temperature_rows


def _sizes(call):
    """N, V and the bytes of the wider of both sides' elements."""
    V = call.student.shape[-1]
    return call.student.numel() // V, V, max(call.student.element_size(), call.teacher.element_size())


def _layouts(call, grad):
    """Of student, teacher and gradient."""
    return layout_of(call.student), layout_of(call.teacher), NO_LAYOUT if grad is None else layout_of(grad)


def _number(rows, number):
    return rows, int(rows is not None and rows.dim() > 0), number


def _arguments(call, layouts):
    """Those that both kernels begin with."""
    return (
        *(value for layout in layouts for value in layout),
        *_number(call.temperature_rows, call.temperature),
        *_number(call.teacher_temperature_rows, call.teacher_temperature),
        call.mask,
        call.weight,
        call.scale_tensor,
        call.scale,
        *_number(call.parameter_rows, call.parameter),
    )


def _programs(N, run, rows):
    return triton.cdiv(N, rows) if run is None else N // run * triton.cdiv(run, rows)


def rows_fwd(*arguments: Any) -> None:
    call, out = RowsCall(*arguments[: len(RowsCall._fields)]), RowsForward(*arguments[len(RowsCall._fields) :])
    N, V, element_size = _sizes(call)
    dtype, per_row = compute_dtype(call.student, call.teacher), out.loss.dim() > 0
    entry = ENTRIES[call.divergence]
    if N == 0:
        out.loss.zero_()
        return
    layouts = _layouts(call, out.grad)
    run = side_by_side(N, layouts)
    rows, block, warps = configuration(V, element_size, run)
    limits = limited(dtype)
    if limits and entry.parameter is not None:  # js_div holds more of each class: half as many in a thread fit
        warps = min(16, 2 * warps)
    programs = _programs(N, run, rows)
    parts = out.loss if per_row else out.loss.new_empty(programs)
    with torch.cuda.device_of(call.student):
        rows_fwd_kernel[(programs,)](
            *_arguments(call, layouts), parts, out.stats, N, V, run,
            DIVERGENCE=FUNCTIONS[call.divergence], IS_CENTRED=entry.centred, ENTROPY=entry.teacher_entropy,
            SAME_TEMPERATURE=_same_temperature(call), T_SQUARED=call.t_squared, PER_ROW=per_row,
            ONE_TILE=block >= V, ROWS=rows, BLOCK=block, num_warps=warps, **limits,
        )  # fmt: skip
        if not per_row:
            sum_kernel[(1,)](
                parts, call.scale_tensor, call.scale, out.loss, programs, BLOCK=SUM_BLOCK, num_warps=8
            )  # fmt: skip


def rows_bwd(*arguments: Any) -> None:
    call, rest = RowsCall(*arguments[: len(RowsCall._fields)]), RowsBackward(*arguments[len(RowsCall._fields) :])
    N, V, element_size = _sizes(call)
    if N == 0:
        return
    layouts = _layouts(call, rest.grad)
    run = side_by_side(N, layouts)
    rows, block, warps = backward_configuration(V, element_size, run)
    with torch.cuda.device_of(call.student):
        rows_bwd_kernel[(_programs(N, run, rows), triton.cdiv(V, block))](
            *_arguments(call, layouts), rest.stats, rest.upstream, int(rest.upstream.numel() > 1), N, V, run,
            DIVERGENCE=FUNCTIONS[call.divergence], SAME_TEMPERATURE=_same_temperature(call), T_SQUARED=call.t_squared,
            ROWS=rows, BLOCK=block, num_warps=warps, **limited(compute_dtype(call.student, call.teacher)),
        )  # fmt: skip


def inverse_divisor(*arguments: Any) -> None:
    call = InverseDivisor(*arguments)
    with torch.cuda.device_of(call.scale):
        inverse_divisor_kernel[(1,)](
            call.mask, call.normalizer, call.scale, float(call.each), call.rows, BLOCK=SUM_BLOCK, num_warps=8
        )  # fmt: skip
