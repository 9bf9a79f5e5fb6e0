"""The angles schedule in Triton: RKD angle over all triples of embeddings [N, D], and its gradient.

    D_ai = |x_a - x_i|^2, q = 1 / sqrt(D), 0 where D is
    psi_aik = q_ai q_ak (D_ai + D_ak - D_ik) / 2   the cosine at vertex a
    loss = 1/N^3 sum_aik huber(psi_aik of the student - psi_aik of the teacher), r = clamp(difference, -delta, delta)
    alpha_ai = sum_k r_aik q_ak, beta_ai = sum_k r_aik psi_aik, K_ik = sum_a r_aik q_ai q_ak
    W_ik = 2/N^3 (q (alpha + alpha^T) - q^2 (beta + beta^T) - K)_ik, gradient_i = sum_k W_ik (x_i - x_k)

A program has a tile of pairs (u, v), u < v, walks over all w, and computes of the triple u, v, w
the three cosines: those at u and v are what alpha and beta of the pair want, that at w is what K
does. So one pass over half of N x N x N yields loss and W. Up to STRIP elements D is one matrix; a
larger one is never there as a whole: for two blocks of rows at a time there are their two strips of
D, and of W the block where they meet. Of rows that are not there whole tiles are skipped.
Memory: these, a constant. Saved for backward: the gradient.

Where u is close to w and v far, D_uv - D_vw is smaller than either by d_uw / d_uv. So distances are
sums in float64, kept as two float32: the difference of the leading ones is then exact.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .._dtypes import compute_dtype
from .._relation_calls import AnglesCall
from ..ops.numbers import read
from ..ops.relations import RKD_DISTANCE
from ..reference import gradient_dtype
from .embeddings import add_up, clamp, row_pointer, rows_there, scale_there, squared_distances, total, width_there
from .pairs import _Pairs, new_gradient
from .registers import limited
from .relations import RELATIONS

STRIP = 2**21  # squared distances of each side in a strip, for N >= 64
NONE = tl.constexpr(1e-24)  # squared distances below are of equal rows

# In the kernels
#   strip   pointer to the squared distances [student and teacher][leading and rest][N][pitch] of
#           all rows to those of a block; 0 on the diagonal and, as pitch is the number of rows
#           rounded up so that rows are aligned, beyond N. In float64 there is no rest.
#   count   pointer to the number of rows that are there, n, or None: all N


@triton.jit
def _store_distances(
    strip, x, first_i, first_j, first, n, N, D, pitch,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i, j = first_i + tl.arange(0, ROWS), first_j + tl.arange(0, COLUMNS)
    squares = squared_distances(x, first_i, first_j, n, D, tl.float64, ROWS, COLUMNS)
    squares = tl.where((i[:, None] == j[None, :]) | (j >= n)[None, :], squares * 0.0, squares)  # NaN stays
    at, mask = i[:, None] * pitch + (j - first)[None, :], (i < n)[:, None] & (j - first < pitch)[None, :]
    leading = squares.to(strip.dtype.element_ty)
    tl.store(strip + at, leading, mask=mask)
    if not EXACT:
        tl.store(strip + N * pitch + at, (squares - leading.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def squares_kernel(
    student, teacher,  # [N, student_D], [N, teacher_D]
    strip, pitch,
    count, first, N, student_D, teacher_D,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The strip of the block that begins with row first."""
    i, j = tl.program_id(0) * ROWS, first + tl.program_id(1) * COLUMNS
    n = rows_there(count, N)
    if count is not None and (i >= n) | (j >= n):
        return
    if tl.program_id(2) == 0:
        _store_distances(strip, student, i, j, first, n, N, student_D, pitch, EXACT, ROWS, COLUMNS)
    else:
        side = N * pitch * (1 if EXACT else 2)
        _store_distances(strip + side, teacher, i, j, first, n, N, teacher_D, pitch, EXACT, ROWS, COLUMNS)


@triton.jit
def _load_squares(leading, plane, at, mask, EXACT: tl.constexpr):
    """Squared distances: leading and rest."""
    squares = tl.load(leading + at, mask=mask, other=0.0)
    rest = tl.zeros_like(squares) if EXACT else tl.load(leading + plane + at, mask=mask, other=0.0)
    return squares, rest


@triton.jit
def _inverse(squares):
    """q"""
    return tl.where(squares < NONE, 0.0, 1.0 / tl.sqrt(squares))


@triton.jit
def _twice_product(uv, uw, vw, rest, EXACT: tl.constexpr):
    """D_uv + D_uw - D_vw; rest: the same sum of the rests. A NaN that maximum and minimum drop is in q."""
    small = tl.minimum(uv, uw)
    if not EXACT:
        small += rest
    return (tl.maximum(uv, uw) - vw) + small


@triton.jit
def _cosines(uv, uv_rest, uw, uw_rest, vw, vw_rest, half_q_uv, AT_W: tl.constexpr, EXACT: tl.constexpr):
    """Those at u, v and w, and q_uw, q_vw; uv: [U, V], uw: [U, 1], vw: [1, V]."""
    q_uw, q_vw = _inverse(uw), _inverse(vw)
    difference = uw_rest - vw_rest
    at_u = _twice_product(uv, uw, vw, uv_rest + difference, EXACT) * (half_q_uv * q_uw)
    at_v = _twice_product(uv, vw, uw, uv_rest - difference, EXACT) * (half_q_uv * q_vw)
    at_w = at_u
    if AT_W:
        at_w = _twice_product(uw, vw, uv, (uw_rest + vw_rest) - uv_rest, EXACT) * (0.5 * q_uw * q_vw)
    return at_u, at_v, at_w, q_uw, q_vw


@triton.jit
def angles_kernel(
    u_strip, u_pitch, u_first, u_end,
    v_strip, v_pitch, v_first, v_end,
    weights, weights_pitch,  # [rows of u_strip, rows of v_strip], or None: W
    parts, first_part,  # sums of the loss, from first_part on
    count, N,
    delta: tl.float64, scale: tl.float64,
    EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = u_strip.dtype.element_ty
    part = first_part + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    # rows of the strips
    u = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n = rows_there(count, N)
    nothing = u_first + tl.program_id(0) * ROWS >= v_first + (tl.program_id(1) + 1) * COLUMNS  # below the diagonal
    if count is not None:
        nothing |= v_first + tl.program_id(1) * COLUMNS >= n
        nothing |= u_first + tl.program_id(0) * ROWS >= n
    if nothing:
        tl.store(parts + part, tl.zeros((), tl.float64))
    else:
        u_plane, v_plane = N * u_pitch, N * v_pitch
        u_other, v_other = (u_plane, v_plane) if EXACT else (2 * u_plane, 2 * v_plane)
        bound = tl.full((), delta, dtype)
        u_there = u_first + u < width_there(u_end, count, n)
        v_there = v_first + v < width_there(v_end, count, n)
        above = (u_first + u)[:, None] < (v_first + v)[None, :]
        pair = above & u_there[:, None] & (v_there[None, :] if count is None else (v_first + v < n)[None, :])
        at = (v_first + v)[None, :] * u_pitch + u[:, None]
        uv, uv_rest = _load_squares(u_strip, u_plane, at, pair, EXACT)
        teacher_uv, teacher_uv_rest = _load_squares(u_strip + u_other, u_plane, at, pair, EXACT)
        q_uv = _inverse(uv)
        half_q_uv, teacher_half_q_uv = 0.5 * q_uv, 0.5 * _inverse(teacher_uv)

        loss, alpha = tl.zeros((ROWS, COLUMNS), dtype), tl.zeros((ROWS, COLUMNS), dtype)
        beta, K = tl.zeros((ROWS, COLUMNS), dtype), tl.zeros((ROWS, COLUMNS), dtype)
        sum_of_loss = tl.zeros((), tl.float64)
        for begin in range(0, n, WALK):
            for w in range(begin, tl.minimum(begin + WALK, n)):
                at_u, at_v = w * u_pitch + u, w * v_pitch + v
                uw, uw_rest = _load_squares(u_strip, u_plane, at_u, u_there, EXACT)
                vw, vw_rest = _load_squares(v_strip, v_plane, at_v, v_there, EXACT)
                s_u, s_v, s_w, q_uw, q_vw = _cosines(
                    uv, uv_rest, uw[:, None], uw_rest[:, None], vw[None, :], vw_rest[None, :],
                    half_q_uv, weights is not None, EXACT,
                )  # fmt: skip
                uw, uw_rest = _load_squares(u_strip + u_other, u_plane, at_u, u_there, EXACT)
                vw, vw_rest = _load_squares(v_strip + v_other, v_plane, at_v, v_there, EXACT)
                t_u, t_v, t_w, _q_uw, _q_vw = _cosines(
                    teacher_uv, teacher_uv_rest, uw[:, None], uw_rest[:, None], vw[None, :], vw_rest[None, :],
                    teacher_half_q_uv, weights is not None, EXACT,
                )  # fmt: skip
                e_u, e_v = s_u - t_u, s_v - t_v
                r_u, r_v = clamp(e_u, bound), clamp(e_v, bound)
                loss += r_u * (e_u - 0.5 * r_u) + r_v * (e_v - 0.5 * r_v)
                if weights is not None:
                    alpha += r_u * q_uw + r_v * q_vw
                    beta += r_u * s_u + r_v * s_v
                    K += clamp(s_w - t_w, bound) * (q_uw * q_vw)
            sum_of_loss += total(tl.where(pair, loss, 0.0))
            loss = tl.zeros((ROWS, COLUMNS), dtype)
        tl.store(parts + part, sum_of_loss)
        if weights is not None:
            W = scale_there(scale, count, n, N, 3).to(dtype) * (q_uv * alpha - q_uv * q_uv * beta - K)
            tl.store(weights + u[:, None] * weights_pitch + v[None, :], W, mask=pair)
            if u_first == v_first:
                tl.store(weights + v[None, :] * weights_pitch + u[:, None], W, mask=pair)


@triton.jit
def differences_kernel(
    x,  # [N, D]
    weights, row_stride, other_stride,  # W, of the rows of a block and those of another
    grad,  # [N, D]: + sum_k W_ik (x_i - x_k), of the rows that are there
    count, first, end, others_first, others_end, D,
    SET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SET: grad has not been written before."""
    dtype: tl.constexpr = weights.dtype.element_ty
    i = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if count is not None:
        n = rows_there(count, end)
        if first + tl.program_id(0) * ROWS >= n:
            return
        end, others_end = tl.minimum(end, n), tl.minimum(others_end, n)
    at, mask = i.to(tl.int64)[:, None] * D + columns[None, :], (i < end)[:, None] & (columns < D)[None, :]
    mine = tl.load(x + at, mask=mask, other=0.0).to(dtype)
    acc = tl.zeros((ROWS, COLUMNS), dtype) if SET else tl.load(grad + at, mask=mask, other=0.0)
    of_row = weights + (i - first) * row_stride
    for k in range(others_first, others_end):
        w = tl.load(of_row + (k - others_first) * other_stride, mask=(i < end) & (i != k), other=0.0)
        other = tl.load(row_pointer(x, k, D) + columns, mask=columns < D, other=0.0).to(dtype)
        acc += w[:, None] * (mine - other[None, :])
    tl.store(grad + at, acc.to(grad.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


def _up_to(limit, n):
    return min(limit, max(16, triton.next_power_of_2(n)))


WALK = 128  # cosines at a time that are summed in float32


def angles_tile(N: int, exact: bool) -> Tile:
    """Small where there would not be a program for each multiprocessor, and in float64."""
    side = 16 if exact or 96 < N <= 384 else _up_to(32, N)
    return Tile(side, side, 8 if side == 32 else 4)


def squares_tile(N: int) -> Tile:
    return Tile(_up_to(32, N), _up_to(32, N), 4)


def differences_tile(N: int, D: int) -> Tile:
    return Tile(16, _up_to(64, D), 4)


class _Angles:
    """The calls for one student and teacher; both contiguous, N > 1."""

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, count: torch.Tensor | None, delta: float) -> None:
        self.student, self.teacher, self.count, self.delta = student, teacher, count, float(delta)
        self.dtype = compute_dtype(student, teacher)
        self.exact = self.dtype is torch.float64
        self.N, self.D = student.shape
        rows = self.N
        if rows * self.N > STRIP:
            rows = max(64, STRIP // self.N // 64 * 64)
        self.blocks = [(first, min(first + rows, self.N)) for first in range(0, self.N, rows)]
        self.pitch = triton.cdiv(rows, 16) * 16

    def _new_strip(self):
        shape = (2, 1 if self.exact else 2, self.N, self.pitch)
        return self.student.new_empty(shape, dtype=self.dtype)

    def _fill(self, strip, first):
        tile = squares_tile(self.N)
        squares_kernel[(triton.cdiv(self.N, tile.rows), triton.cdiv(self.pitch, tile.columns), 2)](
            self.student, self.teacher, strip, self.pitch, self.count, first, self.N, self.D, self.teacher.shape[1],
            EXACT=self.exact, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip

    def _add_differences(self, weights, row_stride, other_stride, rows, others, grad, is_new):
        tile = differences_tile(self.N, self.D)
        differences_kernel[(triton.cdiv(rows[1] - rows[0], tile.rows), triton.cdiv(self.D, tile.columns))](
            self.student, weights, row_stride, other_stride, grad, self.count, *rows, *others, self.D,
            SET=is_new, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
        )  # fmt: skip

    def run(self, weight: float, grad: torch.Tensor | None) -> torch.Tensor:
        """The sums of the losses [1, parts], to be scaled; the gradient, unless it is None, into grad."""
        tile = angles_tile(self.N, self.exact)
        programs = [
            [triton.cdiv(end - first, tile.rows) * triton.cdiv(e - f, tile.columns) for f, e in self.blocks[n:]]
            for n, (first, end) in enumerate(self.blocks)
        ]
        parts = self.student.new_empty((1, sum(map(sum, programs))), dtype=torch.float64)
        mine = self._new_strip()
        other = mine if len(self.blocks) == 1 else self._new_strip()
        weights = None if grad is None else self.student.new_empty((self.pitch, self.pitch), dtype=self.dtype)
        first_part = 0
        for n, (u, of_strip) in enumerate(zip(self.blocks, programs, strict=True)):
            self._fill(mine, u[0])
            for v, of_block in zip(self.blocks[n:], of_strip, strict=True):
                strip = mine if v == u else other
                if v != u:
                    self._fill(other, v[0])
                angles_kernel[(triton.cdiv(u[1] - u[0], tile.rows), triton.cdiv(v[1] - v[0], tile.columns))](
                    mine, self.pitch, *u, strip, self.pitch, *v, weights, self.pitch, parts, first_part,
                    self.count, self.N, self.delta, 2.0 * weight / self.N**3,
                    EXACT=self.exact, ROWS=tile.rows, COLUMNS=tile.columns, WALK=WALK, num_warps=tile.warps,
                    **limited(self.dtype),
                )  # fmt: skip
                first_part += of_block
                if grad is None:
                    continue
                if v == u:
                    self._add_differences(weights, 1, self.pitch, u, u, grad, n == 0)
                else:
                    self._add_differences(weights, self.pitch, 1, u, v, grad, False)
                    self._add_differences(weights, 1, self.pitch, v, u, grad, n == 0)
        return parts


def angles_fwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted losses, and the gradient for an upstream gradient of 1; empty where it is not saved."""
    call = AnglesCall(*arguments)
    angle_weight, distance_weight = (read("weight", x, 0.0) for x in call.numbers[::2])
    angle_delta, distance_delta = (read("delta", x) for x in call.numbers[1::2])
    student, teacher, count, save = call.student.contiguous(), call.teacher.contiguous(), call.count, call.save
    dtype, N = compute_dtype(student, teacher), len(student)
    loss = student.new_zeros((), dtype=dtype)
    grad = new_gradient(student, count, save, gradient_dtype(student))
    if N < 2 or (angle_weight == 0 and distance_weight == 0):
        return loss, grad.zero_()
    sums = added = None
    with torch.cuda.device_of(student):
        if angle_weight != 0:
            angles = _Angles(student, teacher, count, angle_delta)
            alone = distance_weight == 0
            if save:
                added = grad if alone and len(angles.blocks) == 1 else new_gradient(student, count, save, dtype)
            parts = angles.run(angle_weight, added)
            sums = add_up(parts, count, N, angle_weight, 3, loss=loss if alone else None)
            if save and alone and added is not grad:
                grad.copy_(added)
        if distance_weight != 0:
            pairs = _Pairs(student, teacher, count, None, RELATIONS[RKD_DISTANCE], distance_delta, True)
            means, totals = pairs.forward(distance_weight, sums, loss)
            if save:
                pairs.backward(means, totals, distance_weight, added, grad)
    return loss, grad
