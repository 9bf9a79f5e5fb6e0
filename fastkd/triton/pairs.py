"""Launches the kernels of the pairs schedule, strip by strip."""

from typing import Any, NamedTuple

import torch
import triton

from .._dtypes import compute_dtype
from .._relation_calls import PairsCall
from ..ops.numbers import read
from ..reference import gradient_dtype
from .embeddings import add_up, prepare
from .pairs_kernels import distances_kernel, grad_kernel, loss_kernel
from .relations import RELATIONS

STRIP = 2**22  # distances of student and of teacher that are in memory at a time, for N >= 128


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int  # of the sums of products
    warps: int
    stages: int = 3


def _up_to(limit, n):
    """A power of 2, at least the 16 that products need."""
    return min(limit, max(16, triton.next_power_of_2(n)))


def distances_tile(N: int, D: int, element_size: int) -> Tile:
    """For one side; rows and columns do not depend on it."""
    if element_size == 8:
        return Tile(_up_to(32, N), _up_to(32, N), 1, 4)
    return Tile(_up_to(64, N), _up_to(64, N), _up_to(64 if element_size == 2 else 16, D), 8 if N > 32 else 4)


def grad_tile(N: int, D: int, dtype: torch.dtype) -> Tile:
    if dtype is torch.float64:
        return Tile(_up_to(16, N), _up_to(64, D), 1, 4)
    others = _up_to(64 if dtype is torch.bfloat16 else 16, N)
    if N * D < 2**19:
        return Tile(_up_to(32, N), _up_to(64, D), others, 4, 2)
    return Tile(_up_to(64, N), _up_to(128 if dtype is torch.bfloat16 else 64, D), others, 8, 2)


def loss_tile(exact: bool) -> Tile:
    return Tile(16 if exact else 32, 128, 0, 4)


def _precision():
    """CDNA has no TF32 to take three of."""
    return "ieee" if triton.runtime.driver.active.get_current_target().backend == "hip" else "tf32x3"


class _Pairs:
    """The calls for one student and teacher; both contiguous, N > 1."""

    def __init__(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        count: torch.Tensor | None,
        weight: torch.Tensor | None,
        relation: int,
        delta: float,
        normalize: bool,
    ) -> None:
        self.dtype = compute_dtype(student, teacher)
        self.exact = self.dtype is torch.float64
        self.count, self.weight, self.relation = count, weight, relation
        self.delta, self.normalize = float(delta), normalize
        self.sides = prepare(student, teacher, count, self.exact)
        self.student, self.teacher = student, teacher
        self.N = len(student)
        self.pitch = triton.cdiv(self.N, 16) * 16
        self.strip_rows = self.N
        if self.N * self.pitch > STRIP:  # a multiple of every tile, so that a strip's own block ends with one
            self.strip_rows = max(128, STRIP // self.pitch // 128 * 128)
        self.strips = range(0, self.N, self.strip_rows)
        shape = (self.strip_rows, self.pitch)
        self.strip = tuple(student.new_empty(shape, dtype=self.dtype) for _ in range(2))
        self.precision = _precision()

    def _programs(self, tile):
        """Over the upper triangle of strips."""
        N, height = self.N, self.strip_rows
        return [
            triton.cdiv(min(height, N - first), tile.rows) * triton.cdiv(self.pitch - first, tile.columns)
            for first in self.strips
        ]

    def _distances(self, first, first_column, parts=None, first_part=0, parts_n=0):
        end = min(first + self.strip_rows, self.N)
        tiles = [
            distances_tile(self.N, x.shape[1], 8 if self.exact else x.element_size())
            for x in (self.student, self.teacher)
        ]
        tile = tiles[0]
        distances_kernel[(triton.cdiv(end - first, tile.rows), triton.cdiv(self.pitch - first_column, tile.columns))](
            *self.sides[0], *self.sides[1], *self.strip, self.pitch, parts, first_part, parts_n,
            self.count, first, end, first_column, self.N, self.student.shape[1], self.teacher.shape[1],
            EXACT=self.exact, PRECISION=self.precision, ROWS=tile.rows, COLUMNS=tile.columns,
            STUDENT_BLOCK_D=tile.depth, TEACHER_BLOCK_D=tiles[1].depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def forward(
        self, loss_weight: float, previous: torch.Tensor | None, loss: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """loss = loss_weight x the loss + previous, [1] or None. Returns the means and the totals."""
        N, one = self.N, len(self.strips) == 1
        means = None
        if self.normalize:
            programs = self._programs(distances_tile(N, 1, 8 if self.exact else 4))
            parts = self.student.new_empty((2, sum(programs)), dtype=torch.float64)
            at = 0
            for first, of_strip in zip(self.strips, programs, strict=True):
                self._distances(first, first, parts, at, parts.shape[1])
                at += of_strip
            means = add_up(parts, self.count, N)
        elif one:
            self._distances(0, 0)
        tile = loss_tile(self.exact)
        programs = self._programs(tile)
        parts = self.student.new_empty((2, sum(programs)), dtype=torch.float64)
        at = 0
        for first, of_strip in zip(self.strips, programs, strict=True):
            if not one:
                self._distances(first, first)
            end = min(first + self.strip_rows, N)
            loss_kernel[(triton.cdiv(end - first, tile.rows), triton.cdiv(self.pitch - first, tile.columns))](
                *self.strip, self.pitch, means, parts, at, parts.shape[1], self.count, self.weight,
                first, end, first, N, self.delta,
                PAIR=self.relation.pair, ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
            at += of_strip
        return means, add_up(parts, self.count, N, loss_weight, 2, previous, loss)

    def backward(
        self, means: torch.Tensor, totals: torch.Tensor, loss_weight: float, added: bool, grad: torch.Tensor
    ) -> None:
        N, D = self.student.shape
        side = self.sides[0]
        tile = grad_tile(N, D, torch.float64 if self.exact else self.student.dtype)
        for first in self.strips:
            if len(self.strips) > 1:
                self._distances(first, 0)
            end = min(first + self.strip_rows, N)
            grad_kernel[(triton.cdiv(end - first, tile.rows), triton.cdiv(D, tile.columns))](
                *side, *self.strip, self.pitch, means, totals if self.normalize else None, added, grad,
                self.count, self.weight, first, end, N, D, self.delta, 2.0 * loss_weight / N**2,
                WEIGHT=self.relation.weight, EXACT=self.exact,
                CLOSE_APART=not self.exact and side.operand.dtype is not torch.bfloat16, PRECISION=self.precision,
                ROWS=tile.rows, COLUMNS=tile.columns, OTHERS=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


def new_gradient(student: torch.Tensor, count: torch.Tensor | None, save: bool, dtype: torch.dtype) -> torch.Tensor:
    """0 where kernels write none: of rows that are not there."""
    new = student.new_empty if count is None else student.new_zeros
    return new(student.shape if save else 0, dtype=dtype)


def pairs_fwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient for an upstream gradient of 1; empty where it is not saved."""
    call = PairsCall(*arguments)
    student, teacher, count = call.student.contiguous(), call.teacher.contiguous(), call.count
    loss = student.new_zeros((), dtype=compute_dtype(student, teacher))
    grad = new_gradient(student, count, call.save, gradient_dtype(student))
    if len(student) < 2:
        return loss, grad.zero_()
    with torch.cuda.device_of(student):
        relation, delta = RELATIONS[call.relation], read("delta", call.delta)
        pairs = _Pairs(student, teacher, count, call.weight, relation, delta, call.normalize)
        means, totals = pairs.forward(1.0, None, loss)
        if call.save:
            pairs.backward(means, totals, 1.0, None, grad)
    return loss, grad
