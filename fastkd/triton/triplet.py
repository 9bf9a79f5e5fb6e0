"""All triplets of the rows of a strip in Triton.

    a_j = margin + d_ij of row i's positives; of a negative k the triplets n_k = #{j: a_j > d_ik}
    loss_i = f sum_jk max(0, a_j - d_ik), f = weight_i / |neg(i)|
    dL/dd_ik = -f n_k, dL/dd_ij = f #{k: a_j > d_ik}, both over d are the weights of x_i - x_j

Inner products become distances, apart from the strip, which is to hold weights; there what is below 0 is the distance
of a positive. Every threshold is compared with every negative, for the negatives' sums and once more for the
positives': O(N P) a row, without a sort. 6 elements a pair, and P / 8 times those of the cache.

Near pairs, whose differences would cancel in a product with the strip, are added to the gradient from the rows as
they were given, first those of the strip's rows, then those of its columns, and are 0 in the strip then. Blocks without
any, which is known since the distances were made, are not looked at. Nothing is saved.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._relation_calls import TripletStripCall
from .embeddings import MIN_DISTANCE, NEAR_SHARE, any_of, row_pointer, sum_up

BLOCK = 512  # of a row at a time
POSITIVES = 8  # of a row at a time
SPLITS = 8  # programs for a row's positives
NEAR = 32  # samples of a tile of near pairs
ROW_FEATURES, COLUMN_FEATURES = 128, 64  # of a program that adds them


@triton.jit(do_not_specialize=["row"])
def distances_kernel(
    strip, distances,  # [rows, N]: inner products, distances; infinity of what is no pair
    close_blocks,  # [rows, blocks]: whether any pair is near
    x, norms, valid,  # [N, D], [N], [N]
    row, N, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = strip.dtype.element_ty
    i, self = tl.program_id(0), row + tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = j < N
    both_valid = tl.load(valid + j, mask=there, other=0).to(tl.int32) * tl.load(valid + self).to(tl.int32)
    pair = there & (j != self) & (both_valid > 0)
    both = tl.load(norms + self) + tl.load(norms + j, mask=there, other=0.0)
    squares = both - 2.0 * tl.load(row_pointer(strip, i, N) + j, mask=there, other=0.0)
    close = pair & (squares < both * NEAR_SHARE)
    found = any_of(close)
    if found:
        exact = tl.zeros((BLOCK,), dtype)
        for k in range(0, D):
            others = tl.load(x + j.to(tl.int64) * D + k, mask=close, other=0.0)
            difference = tl.load(row_pointer(x, self, D) + k) - others
            exact += difference * difference
        squares = tl.where(close, exact, squares)
    d = tl.where(squares < MIN_DISTANCE * MIN_DISTANCE, tl.full((), MIN_DISTANCE, dtype), tl.sqrt(squares))
    tl.store(row_pointer(distances, i, N) + j, tl.where(pair, d, float("inf")), mask=there)
    tl.store(close_blocks + i * tl.num_programs(1) + tl.program_id(1), found.to(tl.int32))


@triton.jit
def _positives(positives, valid, p, last, self):
    """Those of a row from p on, and which of them are some."""
    there = p < last
    j = tl.load(positives + p, mask=there, other=0)
    return j, there & (j != self) & tl.load(valid + j, mask=there, other=0).to(tl.int1)


@triton.jit(do_not_specialize=["row"])
def take_positives_kernel(
    distances,  # [rows, N]: those of positives become negative
    factors, triplets, ends,  # [rows]: f, how many triplets there are, where those of a row end that has some
    positives, firsts, lasts, valid, count, weight,  # [length], then [N], but for count
    row, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i, self = tl.program_id(0), row + tl.program_id(0)
    first, last = tl.load(firsts + self), tl.load(lasts + self)
    of_row = row_pointer(distances, i, N)
    found, nans = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(first, last, BLOCK):
        j, positive = _positives(positives, valid, begin + tl.arange(0, BLOCK), last, self)
        d = tl.load(of_row + j, mask=positive, other=0.0)
        tl.store(of_row + j, -d, mask=positive)
        found += positive.to(tl.int32)
        nans += (positive & ~(d > 0.0)).to(tl.int32)
    n = tl.sum(found, 0).to(tl.int64)
    negatives = tl.load(count) - 1 - n
    some = (n > 0) & (negatives > 0) & tl.load(valid + self).to(tl.int1)
    factor = tl.load(weight + self) / tl.where(some, negatives, 1).to(weight.dtype.element_ty)
    nan = tl.sum(nans, 0) > 0
    tl.store(factors + i, tl.where(some, tl.where(nan, float("nan"), factor), 0.0))
    tl.store(ends + i, tl.where(some & ~nan, last, first))
    tl.store(triplets + i, tl.where(some, n.to(tl.float64) * negatives.to(tl.float64), 0.0))


@triton.jit
def _weights(d, n, factor):
    """Of x_i - x_j, where n triplets are active; d: negative of a positive."""
    w = tl.where(n == 0, 0.0 * factor, -factor * n.to(d.dtype) / d)
    return tl.where(tl.abs(d) <= MIN_DISTANCE, 0.0, w)


@triton.jit(do_not_specialize=["row"])
def negatives_kernel(
    strip, distances,  # [rows, N]
    factors, triplets, ends,  # [rows]
    parts,  # [3, rows, blocks]: sums of the loss, the active triplets and all
    positives, firsts, valid,
    margin: tl.float64, row, rows, N,
    SAVE: tl.constexpr, BLOCK: tl.constexpr, POSITIVES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = strip.dtype.element_ty
    i, self = tl.program_id(0), row + tl.program_id(0)
    factor, first, end = tl.load(factors + i), tl.load(firsts + self), tl.load(ends + i)
    of_row = row_pointer(distances, i, N)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(of_row + k, mask=k < N, other=float("inf"))
    negative = tl.where(d < 0.0, 0, 1) > 0  # as is a NaN
    above, loss = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), dtype)
    for begin in range(first, end, POSITIVES):
        j, positive = _positives(positives, valid, begin + tl.arange(0, POSITIVES), end, self)
        threshold = tl.full((), margin, dtype) - tl.load(of_row + j, mask=positive, other=0.0)
        active = positive[:, None] & negative[None, :] & ~(threshold[:, None] <= d[None, :])
        above += tl.sum(active.to(tl.int32), 0)
        loss += tl.sum(tl.where(active, threshold[:, None] - d[None, :], 0.0), 0)
    if SAVE:
        written = negative | (tl.full((BLOCK,), first, tl.int64) >= end)  # where none counts, positives as well
        tl.store(row_pointer(strip, i, N) + k, _weights(d, above, factor), mask=(k < N) & written)
    part = parts + i.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    step = rows.to(tl.int64) * tl.num_programs(1)
    tl.store(part, factor.to(tl.float64) * tl.sum(loss.to(tl.float64), 0))
    tl.store(part + step, tl.sum(above.to(tl.int64), 0).to(tl.float64))
    tl.store(part + 2 * step, tl.where(tl.program_id(1) == 0, tl.load(triplets + i), 0.0))


@triton.jit(do_not_specialize=["row"])
def positives_kernel(
    strip, distances,  # [rows, N]
    factors, ends,  # [rows]
    positives, firsts, valid,
    margin: tl.float64, row, N,
    BLOCK: tl.constexpr, POSITIVES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = strip.dtype.element_ty
    i, self = tl.program_id(0), row + tl.program_id(0)
    factor, first, end = tl.load(factors + i), tl.load(firsts + self), tl.load(ends + i)
    of_row = row_pointer(distances, i, N)
    for begin in range(first + tl.program_id(1) * POSITIVES, end, tl.num_programs(1) * POSITIVES):
        j, positive = _positives(positives, valid, begin + tl.arange(0, POSITIVES), end, self)
        mine = tl.load(of_row + j, mask=positive, other=0.0)
        threshold = tl.full((), margin, dtype) - mine
        nearer = tl.zeros((POSITIVES,), tl.int32)
        for begin_k in range(0, N, BLOCK):
            k = begin_k + tl.arange(0, BLOCK)
            d = tl.load(of_row + k, mask=k < N, other=float("inf"))
            active = (k < N)[None, :] & ~(d < 0.0)[None, :] & ~(threshold[:, None] <= d[None, :])
            nearer += tl.sum(active.to(tl.int32), 1)
        tl.store(row_pointer(strip, i, N) + j, _weights(mine, nearer, factor), mask=positive)


@triton.jit
def _near(d, norm, norms):
    return d * d < (norm + norms) * NEAR_SHARE


@triton.jit(do_not_specialize=["row"])
def near_rows_kernel(
    strip, distances, close_blocks,  # [rows, N] twice, [rows, blocks]
    x, norms, grad,  # [N, D], [N], [N, D]: +=
    row, N, D, blocks,
    BLOCK: tl.constexpr, NEAR: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    i, self = tl.program_id(0), row + tl.program_id(0)
    columns = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mine = tl.load(row_pointer(x, self, D) + columns, mask=columns < D, other=0.0)
    norm = tl.load(norms + self)
    acc = tl.zeros((FEATURES,), strip.dtype.element_ty)
    for block in range(0, blocks):
        if tl.load(close_blocks + i * blocks + block) != 0:
            for begin in range(block * BLOCK, tl.minimum((block + 1) * BLOCK, N), NEAR):
                j = begin + tl.arange(0, NEAR)
                d = tl.load(row_pointer(distances, i, N) + j, mask=j < N, other=float("inf"))
                near = _near(d, norm, tl.load(norms + j, mask=j < N, other=0.0))
                if any_of(near):
                    for one in range(begin, tl.minimum(begin + NEAR, N)):
                        d_one = tl.load(row_pointer(distances, i, N) + one)
                        w = tl.load(row_pointer(strip, i, N) + one)
                        w = tl.where(_near(d_one, norm, tl.load(norms + one)), w, 0.0)
                        acc += w * (mine - tl.load(row_pointer(x, one, D) + columns, mask=columns < D, other=0.0))
    to = row_pointer(grad, self, D) + columns
    tl.store(to, tl.load(to, mask=columns < D, other=0.0) + acc, mask=columns < D)


@triton.jit(do_not_specialize=["row"])
def near_columns_kernel(
    strip, distances, close_blocks,  # [rows, N] twice, [rows, blocks]
    x, norms, grad,  # [N, D], [N], [N, D]: +=
    row, rows, N, D, blocks,
    BLOCK: tl.constexpr, NEAR: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * NEAR + tl.arange(0, NEAR)
    there = j < N
    columns = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mask = there[:, None] & (columns < D)[None, :]
    at = j.to(tl.int64)[:, None] * D + columns[None, :]
    of_j = tl.load(norms + j, mask=there, other=0.0)
    acc = tl.zeros((NEAR, FEATURES), strip.dtype.element_ty)
    found = tl.zeros((), tl.int32)
    for begin in range(0, rows, NEAR):
        i = begin + tl.arange(0, NEAR)
        block = tl.program_id(0) * NEAR // BLOCK
        close = tl.load(close_blocks + i * blocks + block, mask=i < rows, other=0)
        if any_of(close != 0):
            found += 1
            mine = tl.load(x + at, mask=mask, other=0.0)
            for one in range(begin, tl.minimum(begin + NEAR, rows)):
                if tl.load(close_blocks + one * blocks + block) != 0:
                    d = tl.load(row_pointer(distances, one, N) + j, mask=there, other=float("inf"))
                    near = _near(d, tl.load(norms + row + one), of_j)
                    if any_of(near):
                        w = tl.load(row_pointer(strip, one, N) + j, mask=there & near, other=0.0)
                        other = tl.load(row_pointer(x, row + one, D) + columns, mask=columns < D, other=0.0)
                        acc -= w[:, None] * (other[None, :] - mine)
    if found > 0:
        tl.store(grad + at, tl.load(grad + at, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit(do_not_specialize=["row"])
def apart_kernel(
    strip, distances, close_blocks,  # [rows, N] twice, [rows, blocks]
    norms,  # [N]
    row, N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if tl.load(close_blocks + i * tl.num_programs(1) + tl.program_id(1)) != 0:
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        d = tl.load(row_pointer(distances, i, N) + k, mask=k < N, other=float("inf"))
        near = _near(d, tl.load(norms + row + i), tl.load(norms + k, mask=k < N, other=0.0))
        tl.store(row_pointer(strip, i, N) + k, tl.zeros((BLOCK,), strip.dtype.element_ty), mask=(k < N) & near)


def _add_near(strip, distances, close_blocks, x, norms, grad, row):
    (rows, N), D = strip.shape, x.shape[1]
    blocks = close_blocks.shape[1]
    given = (strip, distances, close_blocks, x, norms, grad)
    tiles = {"BLOCK": BLOCK, "NEAR": NEAR, "num_warps": 4}
    near_rows_kernel[(rows, triton.cdiv(D, ROW_FEATURES))](*given, row, N, D, blocks, FEATURES=ROW_FEATURES, **tiles)
    near_columns_kernel[(triton.cdiv(N, NEAR), triton.cdiv(D, COLUMN_FEATURES))](
        *given, row, rows, N, D, blocks, FEATURES=COLUMN_FEATURES, **tiles
    )
    apart_kernel[(rows, blocks)](strip, distances, close_blocks, norms, row, N, BLOCK=BLOCK, num_warps=4)


def triplet_strip_(*arguments: Any) -> torch.Tensor:
    call = TripletStripCall(*arguments)
    strip, x, norms, row = call.strip, call.x, call.norms, call.row
    (rows, N), D = strip.shape, x.shape[1]
    blocks = triton.cdiv(N, BLOCK)
    if rows == 0:
        return strip.new_zeros(3, dtype=torch.float64)
    distances, close_blocks = torch.empty_like(strip), strip.new_empty(rows, blocks, dtype=torch.int32)
    factors, triplets = strip.new_empty(rows), strip.new_empty(rows, dtype=torch.float64)
    ends = call.first.new_empty(rows)
    parts = strip.new_empty(3, rows * blocks, dtype=torch.float64)
    options = {"BLOCK": BLOCK, "num_warps": 4}
    with torch.cuda.device_of(strip):
        distances_kernel[(rows, blocks)](
            strip, distances, close_blocks, x, norms, call.valid, row, N, D, BLOCK=BLOCK, num_warps=2
        )
        take_positives_kernel[(rows,)](
            distances, factors, triplets, ends, call.positives, call.first, call.last, call.valid, call.count,
            call.weight, row, N, **options,
        )  # fmt: skip
        negatives_kernel[(rows, blocks)](
            strip, distances, factors, triplets, ends, parts, call.positives, call.first, call.valid, call.margin, row,
            rows, N, SAVE=call.grad is not None, POSITIVES=POSITIVES, **options,
        )  # fmt: skip
        if call.grad is not None:
            positives_kernel[(rows, SPLITS)](
                strip, distances, factors, ends, call.positives, call.first, call.valid, call.margin, row, N,
                POSITIVES=POSITIVES, **options,
            )  # fmt: skip
            _add_near(strip, distances, close_blocks, x, norms, call.grad, row)
        return sum_up(parts)
