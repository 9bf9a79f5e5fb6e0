"""What pairs and angles have in common: the embeddings, their squared distances, sums in a fixed order.

Embeddings are contiguous [N, D]. Of N rows the first n may be all there are: how many, `count`, only the device
knows. Sums over elements are short in float32, then in float64, and in the same order in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SUM_BLOCK = 4096
# csrc/math/distance.h says why.
MIN_DISTANCE = tl.constexpr(1e-6)  # samples that are equal have no gradient from each other
NEAR_SHARE = tl.constexpr(2.0**-8)  # d^2 / (|x|^2 + |y|^2), below which products cancel: a pair is near
SAMPLED_ROWS = 512  # of which the centre is the mean: any point among the embeddings will do


@triton.jit
def clamp(x, bound):
    """Into [-bound, bound]; NaN stays NaN."""
    if x.dtype == tl.float64:
        clamped = tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))
    else:
        clamped = tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    return clamped


@triton.jit
def total(values):
    """The sum of a tile, in float64."""
    return tl.sum(tl.sum(values, 1).to(tl.float64), 0)


@triton.jit
def any_of(condition):
    # not axis by axis: of what tl.dot yields, Triton 3.7 for Blackwell fails to reduce the second
    return tl.max(tl.ravel(condition.to(tl.int32)), 0) > 0


@triton.jit
def row_pointer(x, row, D):
    """To one row. Offsets from it fit 32 bits, and half as many registers as pointers."""
    return x + tl.full((), row, tl.int64) * D


@triton.jit
def rows_there(count, N):
    """n; count: pointer to it, or None: all N."""
    if count is not None:
        N = tl.load(count).to(tl.int32)
    return N


@triton.jit
def width_there(pitch, count, n):
    """Columns of a strip that are written: all, or n rounded up as pitch is, so that their loads are still wide."""
    if count is not None:
        pitch = (n + 15) // 16 * 16
    return pitch


@triton.jit
def scale_there(scale, count, n, N, POWER: tl.constexpr):
    """What is a scale / N^POWER, as scale / n^POWER, for n > 0."""
    scale = tl.full((), scale, tl.float64)
    if count is not None:
        ratio = tl.full((), N, tl.float64) / tl.full((), n, tl.float64)
        for _ in tl.static_range(POWER):
            scale *= ratio
    return scale


@triton.jit
def squared_distances(x, first_i, first_j, N, D, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] sums of squared differences: exact where embeddings are close, wherever they lie."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    i_there, j_there = first_i + i < N, first_j + j < N
    i_row, j_row = row_pointer(x, first_i, D), row_pointer(x, first_j, D)
    sums = tl.zeros((ROWS, COLUMNS), dtype)
    for k in range(0, D):
        a = tl.load(i_row + k + i * D, mask=i_there, other=0.0).to(dtype)
        b = tl.load(j_row + k + j * D, mask=j_there, other=0.0).to(dtype)
        difference = a[:, None] - b[None, :]
        sums += difference * difference
    return sums


@triton.jit
def _add_rows(x, N, D, step, centre, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sums = tl.zeros((COLUMNS,), tl.float64)
    for first in range(0, N, ROWS * step):
        row = first + tl.arange(0, ROWS) * step
        pointers = x + row.to(tl.int64)[:, None] * D + columns[None, :]
        values = tl.load(pointers, mask=(row < N)[:, None] & (columns < D)[None, :], other=0.0)
        sums += tl.sum(values.to(tl.float32), 0).to(tl.float64)
    count = (N + step - 1) // step
    tl.store(centre + columns, (sums / count).to(tl.float32), mask=columns < D)


@triton.jit
def centre_kernel(
    student, student_centre,  # [N, student_D], [student_D], or None
    teacher, teacher_centre,  # [N, teacher_D], [teacher_D], or None
    count,  # [], or None: see rows_there
    N, student_D, teacher_D, step,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The mean of every step-th row."""
    N = rows_there(count, N)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if tl.program_id(1) == 0:
        if student_centre is not None:
            _add_rows(student, N, student_D, step, student_centre, columns, ROWS, COLUMNS)
    elif teacher_centre is not None:
        _add_rows(teacher, N, teacher_D, step, teacher_centre, columns, ROWS, COLUMNS)


@triton.jit
def _prepare(x, centre, centred, norms, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, D, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        here = (row < N)[:, None] & (columns < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + columns[None, :]
        values = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        if centre is not None:
            values -= tl.load(centre + columns, mask=columns < D, other=0.0)[None, :]
            tl.store(centred + at, values, mask=here)
            values = tl.where(here, values, 0.0)
        sums += tl.sum(values * values, 1)
    tl.store(norms + row, sums, mask=row < N)


@triton.jit
def prepare_kernel(
    student, student_centre, student_centred, student_norms,  # [N, D], [D] or None, [N, D] or None, [N]
    teacher, teacher_centre, teacher_centred, teacher_norms,
    count,  # [], or None
    N, student_D, teacher_D,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Embeddings less their centre, and the squared norms of the rows as they enter the products."""
    N = rows_there(count, N)
    if count is not None and tl.program_id(0) * ROWS >= N:
        return
    if tl.program_id(1) == 0:
        _prepare(student, student_centre, student_centred, student_norms, N, student_D, ROWS, COLUMNS)
    else:
        _prepare(teacher, teacher_centre, teacher_centred, teacher_norms, N, teacher_D, ROWS, COLUMNS)


@triton.jit
def totals_kernel(
    parts,  # [totals, parts_n]
    totals,  # [totals]: of the parts the mean over all pairs of different rows
    previous,  # [1], or None: added to the first
    loss,  # [], or None: the first once more
    count,  # [], or None
    N, parts_n,
    weight: tl.float64,
    POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """POWER: the first total is weight x the mean over n^POWER, or, where it is 0, like the others."""
    which = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, parts_n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(parts + which.to(tl.int64) * parts_n + at, mask=at < parts_n, other=0.0)
    result = tl.sum(sums, 0)
    n = tl.full((), rows_there(count, N), tl.float64)
    divisor = n * (n - 1.0)
    if POWER > 0:
        power = n
        for _ in tl.static_range(POWER - 1):
            power *= n
        divisor = tl.where(which == 0, power, divisor)
        result *= tl.where(which == 0, tl.full((), weight, tl.float64), 1.0)
    result /= tl.maximum(divisor, 1.0)  # of a row or none the sums are 0
    if which == 0:
        if previous is not None:
            result += tl.load(previous)
        if loss is not None:
            tl.store(loss, result.to(loss.dtype.element_ty))
    tl.store(totals + which, result)


def add_up(
    parts: torch.Tensor,
    count: torch.Tensor | None,
    N: int,
    weight: float = 1.0,
    power: int = 0,
    previous: torch.Tensor | None = None,
    loss: torch.Tensor | None = None,
) -> torch.Tensor:
    """The means that totals_kernel makes of parts [totals, parts_n]."""
    totals_n, parts_n = parts.shape
    totals = parts.new_empty(totals_n)
    block = min(SUM_BLOCK, max(16, triton.next_power_of_2(parts_n)))
    totals_kernel[(totals_n,)](
        parts, totals, previous, loss, count, N, parts_n, weight,
        POWER=power, BLOCK=block, num_warps=8 if block == SUM_BLOCK else 4,
    )  # fmt: skip
    return totals


def sum_up(parts: torch.Tensor) -> torch.Tensor:
    """The sums of parts [totals, parts_n]."""
    return add_up(parts, None, 1)  # one row has no pairs, and a mean over none is the sum


class Side(NamedTuple):
    """The embeddings of student or teacher."""

    rows: torch.Tensor  # [N, D]: as they were given
    operand: torch.Tensor  # [N, D]: what products are of; the float32 less their centre
    norms: torch.Tensor | None  # [N]: squared, of operand's rows


def prepare(student: torch.Tensor, teacher: torch.Tensor, count: torch.Tensor | None, exact: bool) -> tuple[Side, Side]:
    """Both sides; exact: no products will be taken."""
    if exact:
        return Side(student, student, None), Side(teacher, teacher, None)
    N, student_D, teacher_D = len(student), student.shape[1], teacher.shape[1]
    sides, centres = [], []
    for x in (student, teacher):
        single = x.dtype is torch.float32
        centres.append(x.new_empty(x.shape[1]) if single else None)
        sides.append(Side(x, torch.empty_like(x) if single else x, x.new_empty(N, dtype=torch.float32)))
    widest = max(student_D, teacher_D)
    columns = min(64, max(16, triton.next_power_of_2(widest)))
    if centres != [None, None]:
        step = triton.cdiv(N, SAMPLED_ROWS)
        centre_kernel[(triton.cdiv(widest, columns), 2)](
            student, centres[0], teacher, centres[1], count, N, student_D, teacher_D, step,
            ROWS=32, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    arguments = []
    for side, centre in zip(sides, centres, strict=True):
        arguments += [side.rows, centre, None if centre is None else side.operand, side.norms]
    columns = min(512, max(16, triton.next_power_of_2(widest)))
    prepare_kernel[(triton.cdiv(N, 8), 2)](
        *arguments, count, N, student_D, teacher_D, ROWS=8, COLUMNS=columns, num_warps=4
    )
    return sides
