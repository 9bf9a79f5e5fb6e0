"""Where rows of features lie: student, teacher and gradient as [outer, middle, inner] rows of D features each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

UNFUSED = {"enable_fp_fusion": False}  # launch option: of equal rows the differences are 0


class Place(NamedTuple):
    """The steps of one tensor, in elements."""

    outer: int
    middle: int
    inner: int
    feature: int


class Rows(NamedTuple):
    """What several tensors of one shape have in common."""

    D: int
    outer: int
    middle: int
    inner: int
    places: tuple[Place, ...]  # of each tensor

    @property
    def count(self) -> int:
        return self.outer * self.middle * self.inner

    @property
    def side_by_side(self) -> bool:
        """Neighbouring rows lie next to each other, neighbouring features do not."""
        return all(p.inner == 1 and p.feature != 1 for p in self.places) and self.inner > 1


def rows_of(feature_dim: int, *tensors: torch.Tensor) -> Rows | None:
    """The rows of tensors of one shape, or None where they lie in more than three steps."""
    shape = tensors[0].shape
    sizes, steps = [], []
    for d, size in enumerate(shape):
        if d == feature_dim or size == 1:
            continue
        strides = [x.stride(d) for x in tensors]
        if sizes and steps[-1] == [size * stride for stride in strides]:
            sizes[-1] *= size
            steps[-1] = strides
        else:
            sizes.append(size)
            steps.append(strides)
    if len(sizes) > 3:
        return None
    while len(sizes) < 3:
        sizes.insert(0, 1)
        steps.insert(0, [0] * len(tensors))
    features = [x.stride(feature_dim) for x in tensors]
    places = tuple(Place(*place) for place in zip(*steps, features, strict=True))
    return Rows(shape[feature_dim], *sizes, places)


def same_rows(feature_dim: int, *tensors: torch.Tensor) -> tuple[Sequence[torch.Tensor], Rows]:
    """The tensors, made contiguous where they must be, and their rows."""
    rows = rows_of(feature_dim, *tensors)
    if rows is None:  # contiguous ones lie in two
        tensors = [x.contiguous() for x in tensors]
        rows = rows_of(feature_dim, *tensors)
    return tensors, rows


def is_dense(x: torch.Tensor) -> bool:
    """Whether it lies in memory without gaps, in whatever order."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Tile(NamedTuple):
    """What a program takes at a time."""

    rows: int
    features: int
    whole: bool  # all features
    warps: int


# Elements of a tile on each side, which stay in registers: 16 to 32 a thread.
MAX_BLOCK = {4: 8192, 8: 4096}
FEW_ROWS = 16  # side by side, that fill what is read at a time


def tile_of(rows: Rows, compute_size: int, kept: bool = True) -> Tile:
    """kept: the features of a row should all be there at once."""
    most, features = MAX_BLOCK[compute_size], triton.next_power_of_2(rows.D)
    if rows.side_by_side:
        across = min(64, triton.next_power_of_2(rows.inner))
        while kept and across > FEW_ROWS and across * features > most:
            across //= 2
        whole = kept and across * features <= most
        features = features if whole else min(features, most // 4 // across)
    else:
        whole = features <= most
        features = min(features, most // 2 if not whole else most)
        across = max(1, min(most // 4 // features, triton.next_power_of_2(rows.count), 64))
    warps = max(1, min(16, across * features * compute_size // 4 // 512))
    return Tile(across, features, whole, warps)


def programs(rows: Rows, tile: Tile) -> int:
    """Of all rows: each takes neighbours of one outer and middle."""
    return rows.outer * rows.middle * triton.cdiv(rows.inner, tile.rows)


@triton.jit
def rows_of_program(program, middle, inner, ROWS: tl.constexpr):
    """Which outer, middle and inner [ROWS] a program has, and their numbers among all rows [ROWS]."""
    blocks = tl.cdiv(inner, ROWS)
    at = (program % blocks) * ROWS + tl.arange(0, ROWS)
    above = (program // blocks).to(tl.int64)
    return above // middle, above % middle, at, above * inner + at


@triton.jit
def row_pointers(x, place, outer, middle, inner):
    return x + outer * place[0] + middle * place[1] + inner.to(tl.int64) * place[2]


@triton.jit
def one_of(tensors, which, COUNT: tl.constexpr):
    """Of a tuple."""
    found = tensors[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(which == i, tensors[i], found)
    return found


@triton.jit
def load_features(rows, step, here, D, begin, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] features; 0 where there are none."""
    columns = begin + tl.arange(0, BLOCK)
    pointers = rows[:, None] + (columns.to(tl.int64) * step)[None, :]
    return tl.load(pointers, mask=here[:, None] & (columns < D)[None, :], other=0.0).to(dtype)


@triton.jit
def store_features(rows, step, exists, D, begin, values, BLOCK: tl.constexpr):
    columns = begin + tl.arange(0, BLOCK)
    pointers = rows[:, None] + (columns.to(tl.int64) * step)[None, :]
    mask = exists[:, None] & (columns < D)[None, :]
    tl.store(pointers, values.to(rows.dtype.element_ty), mask=mask, eviction_policy="evict_first")
