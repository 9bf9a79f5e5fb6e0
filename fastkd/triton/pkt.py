"""A strip of cosines of probabilistic knowledge transfer in Triton: both orders of a pair at once.

    k = (cos + 1) / 2, s = k / r of the student, t of the teacher, a = 1 - t / (s + eps)
    w_ij = c_i a_ij + c_j a_ji in the student's place; q_i += sum_j s_ij a_ij;
    loss += sum of t log((t + eps) / (s + eps)), in terms that are of second order in s - t

The twin of csrc/math/pkt.h and csrc/cuda/pkt_kernel.cuh. Pairs beyond the strip's own rows count in both orders, the
others as each other's. One pass: the student's cosines are read and written once, the teacher's read once. A program
has some columns of some rows; sums of both are added up by another, in the order of the tiles. Nothing is saved.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._relation_calls import PktStripCall
from .divergences import log_ratio
from .embeddings import row_pointer, sum_up, total
from .registers import limited

ROWS, COLUMNS = {4: 16, 8: 8}, 128  # of a tile, of elements of so many bytes
STEPS = 4  # tiles of a program, one below the other
FEW = 2**19  # pairs, of which every tile has its program
SUM_COLUMNS, SUM_PARTS = 64, 16


@triton.jit
def _similarity(cosine, valid):
    k = 0.5 * (cosine + valid)
    return tl.where(k < 0.0, 0.0, k)  # of opposite directions rounding may leave less; a NaN stays


@triton.jit
def _pair(s, t, eps):
    """a, the loss, s a"""
    d = s - t
    v, u = s + eps, t + eps
    a = (d + eps) / v
    log, _r, _tail = log_ratio(v, u, d, False)
    return a, d - t * log, s * a


@triton.jit
def pkt_kernel(
    student, teacher,  # [rows, columns]
    valid, student_inverse, teacher_inverse, weight, scale,  # [columns]
    row_parts, column_parts, losses,  # [column tiles, rows], [row tiles, columns], [row tiles, column tiles]: sums
    rows, columns,
    eps: tl.float64,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    j_there = j < columns
    valid_j = tl.load(valid + j, mask=j_there, other=0.0)[None, :]
    inverse_j = tl.load(student_inverse + j, mask=j_there, other=0.0)[None, :]
    teacher_inverse_j = tl.load(teacher_inverse + j, mask=j_there, other=0.0)[None, :]
    weight_j = tl.load(weight + j, mask=j_there, other=0.0)[None, :]
    scale_j = tl.load(scale + j, mask=j_there, other=0.0)[None, :]
    beyond = (j >= rows)[None, :]
    eps = tl.full((), eps, student.dtype.element_ty)
    column_slopes = tl.zeros((COLUMNS,), student.dtype.element_ty)
    loss = tl.zeros((), tl.float64)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * ROWS
        of_tile = tl.arange(0, ROWS)
        i_there = first + of_tile < rows
        at = of_tile[:, None] * columns + j[None, :]
        mask = i_there[:, None] & j_there[None, :]
        student_row = row_pointer(student, first, columns)
        cosines = tl.load(student_row + at, mask=mask, other=0.0)
        teacher_cosines = tl.load(
            row_pointer(teacher, first, columns) + at, mask=mask, other=0.0, eviction_policy="evict_first"
        )
        i = first + of_tile
        both = tl.load(valid + i, mask=i_there, other=0.0)[:, None] * valid_j
        k, h = _similarity(cosines, both), _similarity(teacher_cosines, both)
        inverse_i = tl.load(student_inverse + i, mask=i_there, other=0.0)[:, None]
        teacher_inverse_i = tl.load(teacher_inverse + i, mask=i_there, other=0.0)[:, None]
        a, own, slope = _pair(k * inverse_i, h * teacher_inverse_i, eps)
        b, other, other_slope = _pair(k * inverse_j, h * teacher_inverse_j, eps)
        weight_i = tl.load(weight + i, mask=i_there, other=0.0)[:, None]
        loss += total(weight_i * own + tl.where(beyond, weight_j * other, 0.0))
        column_slopes += tl.sum(tl.where(beyond, other_slope, 0.0), 0)
        row_slopes = tl.sum(slope, 1).to(tl.float64)
        tl.store(row_parts + tl.program_id(1).to(tl.int64) * rows + i, row_slopes, mask=i_there)
        w = tl.load(scale + i, mask=i_there, other=0.0)[:, None] * a + scale_j * b
        tl.store(student_row + at, w, mask=mask)
    tl.store(row_pointer(column_parts, tl.program_id(0), columns) + j, column_slopes.to(tl.float64), mask=j_there)
    tl.store(losses + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), loss)


@triton.jit
def _add_parts(sums, parts, j, count, width, PARTS: tl.constexpr):
    part = tl.arange(0, PARTS)
    for first in range(0, count, PARTS):
        mask = (first + part < count)[:, None] & (j < width)[None, :]
        sums += tl.load(row_pointer(parts, first, width) + part[:, None] * width + j[None, :], mask=mask, other=0.0)
    return sums


@triton.jit
def slopes_kernel(
    row_parts, column_parts, slopes,  # [column_tiles, rows], [row_tiles, columns], [columns]: +=
    rows, columns, row_tiles, column_tiles,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((PARTS, COLUMNS), tl.float64)
    sums = _add_parts(sums, column_parts, j, row_tiles, columns, PARTS)
    sums = _add_parts(sums, row_parts, j, column_tiles, rows, PARTS)
    there = j < columns
    tl.store(slopes + j, tl.load(slopes + j, mask=there, other=0.0) + tl.sum(sums, 0), mask=there)


def pkt_strip_(*arguments: Any) -> torch.Tensor:
    call = PktStripCall(*arguments)
    student, slopes, row = call.student, call.slopes, call.row
    rows, columns = student.shape
    height = ROWS[student.element_size()]
    steps = STEPS if rows * columns >= FEW else 1
    row_tiles, column_tiles = triton.cdiv(rows, height * steps), triton.cdiv(columns, COLUMNS)
    if rows == 0:
        return slopes.new_zeros(())
    losses = slopes.new_empty(1, row_tiles * column_tiles)
    row_parts, column_parts = slopes.new_empty(column_tiles, rows), slopes.new_empty(row_tiles, columns)
    of_samples = (call.valid, call.student_inverse, call.teacher_inverse, call.weight, call.scale)
    with torch.cuda.device_of(student):
        pkt_kernel[(row_tiles, column_tiles)](
            student, call.teacher, *(x[row:] for x in of_samples),
            row_parts, column_parts, losses, rows, columns, call.eps,
            STEPS=steps, ROWS=height, COLUMNS=COLUMNS, num_warps=8, **limited(student.dtype),
        )  # fmt: skip
        slopes_kernel[(triton.cdiv(columns, SUM_COLUMNS),)](
            row_parts, column_parts, slopes[row:], rows, columns, row_tiles, column_tiles,
            COLUMNS=SUM_COLUMNS, PARTS=SUM_PARTS, num_warps=4,
        )  # fmt: skip
        return sum_up(losses).view(())
