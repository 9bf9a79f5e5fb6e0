"""Standardizes rows of logits in Triton, and brings a gradient back through that: the formulas are in
ops/standardize.py.

A program takes the rows that one of the rows schedule takes. It walks over their classes tile by tile: for the largest,
which the others are taken from, so that a row of equal classes is 0 exactly; for the mean; for what is left beyond it
and the squares; and to write. Backward it walks twice. All walks but the first are served by the caches.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._calls import Standardize, StandardizeBackward
from .registers import limited
from .rows import backward_configuration, layout_of, programs, side_by_side
from .rows_tile import INF, finite, load_side, row_offsets, rows_of_program, rows_to_read, store


@triton.jit
def _scale(mean, deviation, dtype: tl.constexpr):
    """The mean as a value of what is computed in, and what lies between; what rows are multiplied by."""
    rounded = mean.to(dtype)
    inverse = 1.0 / (deviation + tl.full((), 1e-7, tl.float64))
    return rounded, (mean - rounded.to(tl.float64)).to(dtype), inverse


@triton.jit
def _centred(x, rounded, rest):
    return (x - rounded[:, None]) - rest[:, None]


@triton.jit
def _sum(counts, values):
    return tl.sum(tl.where(counts, values, 0.0), 1).to(tl.float64)


@triton.jit
def standardize_fwd_kernel(
    x, x_index, x_inner, x_outer, x_stride, x_step,  # [N, V]
    out, out_index, out_inner, out_outer, out_stride, out_step,  # [N, V]
    mask,  # [N], or None
    moments,  # [N, 3], or None
    N, V, neighbours,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    row, live, run, at = rows_of_program(N, neighbours, ROWS)
    read = rows_to_read(mask, row, live)
    x += row_offsets(row, read, run, at, neighbours, x_index, x_inner, x_outer, x_stride)
    out += row_offsets(row, live, run, at, neighbours, out_index, out_inner, out_outer, out_stride)
    largest = tl.full((ROWS,), -INF, dtype)
    for first in range(0, V, BLOCK):
        s = load_side(x, x_step, read, V, first + tl.arange(0, BLOCK), dtype, "evict_last")
        largest = tl.maximum(largest, tl.max(s, 1))
    largest = finite(largest)
    total, count = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for first in range(0, V, BLOCK):
        s = load_side(x, x_step, read, V, first + tl.arange(0, BLOCK), dtype, "evict_last")
        total += _sum(s != -INF, s - largest[:, None])
        count += _sum(s != -INF, 1.0)
    at_least_one = tl.where(count == 0.0, 1.0, count)
    mean = (largest.to(tl.float64) + total / at_least_one).to(dtype)
    left, squares = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for first in range(0, V, BLOCK):
        s = load_side(x, x_step, read, V, first + tl.arange(0, BLOCK), dtype, "evict_last")
        d = s - mean[:, None]
        left += _sum(s != -INF, d)
        squares += _sum(s != -INF, d * d)
    rest = left / at_least_one
    squares -= left * rest
    squares = tl.where(squares < 0.0, 0.0, squares)  # what rounding leaves; NaN stays
    exact = mean.to(tl.float64) + rest
    deviation = tl.where(count > 1.0, tl.sqrt(squares / tl.where(count > 1.0, count - 1.0, 1.0)), squares * 0.0)
    if moments is not None:
        of_row = moments + row.to(tl.int64) * 3
        tl.store(of_row, exact, mask=read)
        tl.store(of_row + 1, deviation, mask=read)
        tl.store(of_row + 2, count, mask=read)
    rounded, between, inverse = _scale(exact, deviation, dtype)
    inverse = inverse.to(dtype)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = load_side(x, x_step, read, V, columns, dtype, "evict_first")
        values = tl.where(s != -INF, _centred(s, rounded, between) * inverse[:, None], s)
        store(out, out_step, live, V, columns, values)


@triton.jit
def standardize_bwd_kernel(
    x, x_index, x_inner, x_outer, x_stride, x_step,  # [N, V]
    upstream, up_index, up_inner, up_outer, up_stride, up_step,  # [N, V]
    grad, grad_index, grad_inner, grad_outer, grad_stride, grad_step,  # [N, V]; may be x
    addend,  # as upstream, or None
    mask,  # [N], or None
    moments,  # [N, 3]
    N, V, neighbours,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = upstream.dtype.element_ty
    row, live, run, at = rows_of_program(N, neighbours, ROWS)
    read = rows_to_read(mask, row, live)
    x += row_offsets(row, read, run, at, neighbours, x_index, x_inner, x_outer, x_stride)
    of_upstream = row_offsets(row, read, run, at, neighbours, up_index, up_inner, up_outer, up_stride)
    upstream += of_upstream
    grad += row_offsets(row, live, run, at, neighbours, grad_index, grad_inner, grad_outer, grad_stride)
    of_row = moments + row.to(tl.int64) * 3
    mean, deviation = tl.load(of_row, mask=read, other=0.0), tl.load(of_row + 1, mask=read, other=0.0)
    count = tl.load(of_row + 2, mask=read, other=0.0)
    rounded, between, inverse = _scale(mean, deviation, dtype)
    total, along = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = load_side(x, x_step, read, V, columns, dtype, "evict_last")
        g = load_side(upstream, up_step, read, V, columns, dtype, "evict_last")
        total += _sum(s != -INF, g)
        along += _sum(s != -INF, g * _centred(s, rounded, between))
    constant = deviation == 0.0
    factor = inverse / tl.where(constant, 1.0, (count - 1.0) * deviation)
    average = (total / tl.where(constant, 1.0, count)).to(dtype)
    slope, inverse = (along * factor).to(dtype), inverse.to(dtype)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s = load_side(x, x_step, read, V, columns, dtype, "evict_first")
        g = load_side(upstream, up_step, read, V, columns, dtype, "evict_first")
        values = ((g - average[:, None]) - _centred(s, rounded, between) * slope[:, None]) * inverse[:, None]
        values = tl.where((s != -INF) & (~constant)[:, None], values, 0.0)
        if addend is not None:
            more = load_side(addend + of_upstream, up_step, read, V, columns, dtype, "evict_first")
            values += tl.where(read[:, None], more, 0.0)
        store(grad, grad_step, live, V, columns, values)


def _launch(kernel, tensors, others):
    """tensors: [*, V], the first that of the logits."""
    x = tensors[0]
    V = x.shape[-1]
    N = x.numel() // V
    if N == 0:
        return
    layouts = [layout_of(tensor) for tensor in tensors]
    run = side_by_side(N, layouts)
    rows, block, warps = backward_configuration(V, max(tensor.element_size() for tensor in tensors), run)
    dtype = torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32
    with torch.cuda.device_of(x):
        kernel[(programs(N, run, rows),)](
            *(value for layout in layouts for value in layout), *others, N, V, run,
            ROWS=rows, BLOCK=block, num_warps=warps, **limited(dtype),
        )  # fmt: skip


def standardize_fwd(*arguments: Any) -> None:
    call = Standardize(*arguments)
    _launch(standardize_fwd_kernel, (call.x, call.out), (call.mask, call.moments))


def standardize_bwd(*arguments: Any) -> None:
    call = StandardizeBackward(*arguments)
    _launch(standardize_bwd_kernel, (call.x, call.upstream, call.grad), (call.addend, call.mask, call.moments))
