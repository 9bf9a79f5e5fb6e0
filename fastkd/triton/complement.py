"""Sums the classes of a row beside K of them in Triton, and takes a gradient back to all: see ops/top_k.py.

Which classes are among the K a bit of memory says forward: V / 8 bytes a row, beside logits of 2 V or 4 V. A program
takes the rows that one of the rows schedule takes, and walks over their classes for the maximum, for the sum, and for
the gradient.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._calls import Complement, ComplementBackward
from .registers import limited
from .rows import backward_configuration, layout_of, number, programs, side_by_side
from .rows_tile import INF, exp, finite, load_side, per_row, row_offsets, rows_of_program, rows_to_read, store

AT_ONCE = 64  # of the K


@triton.jit
def _known(indices, row, read, k, K, V):
    """[ROWS, AT_ONCE] of the K classes, and which of them there are."""
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    here = read[:, None] & (k < K)[None, :]
    classes = tl.load(indices + at, mask=here, other=-1)
    return classes, here, here & (classes >= 0) & (classes < V)


@triton.jit
def listed_kernel(indices, bits, mask, N, V, K, words, ROWS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Sets the bits of the K classes of each row; bits [N, words] int32, of zeros."""
    row, live, _run, _at = rows_of_program(N, None, ROWS)
    read = rows_to_read(mask, row, live)
    for first in range(0, K, AT_ONCE):
        classes, _here, there = _known(indices, row, read, first + tl.arange(0, AT_ONCE), K, V)
        word = row.to(tl.int64)[:, None] * words + classes // 32
        tl.atomic_or(bits + word, (1 << (classes % 32)).to(tl.int32), mask=there, sem="relaxed")


@triton.jit
def _is_listed(bits, row, read, columns, V):
    word = row.to(tl.int64)[:, None] * ((V + 31) // 32) + (columns // 32)[None, :]
    found = tl.load(bits + word, mask=read[:, None] & (columns < V)[None, :], other=0)
    return ((found >> (columns % 32)[None, :]) & 1) != 0


@triton.jit
def complement_fwd_kernel(
    student, index, inner, outer, stride, step,  # [N, V]
    temperature_rows, temperature_stride, temperature: tl.float64,  # [N]; [] with stride 0; or None: the number
    indices, bits, mask, logits, sums,
    N, V, K, neighbours,
    dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, neighbours, ROWS)
    read = rows_to_read(mask, row, live)
    T = per_row(temperature_rows, temperature_stride, temperature, row, read, dtype)
    student += row_offsets(row, read, run, at, neighbours, index, inner, outer, stride)
    largest = tl.full((ROWS,), -INF, dtype)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = load_side(student, step, read, V, columns, dtype, "evict_last")
        z = tl.where(_is_listed(bits, row, read, columns, V), -INF, z)
        largest = tl.maximum(largest, tl.max(z, 1))
    largest = finite(largest)
    total, inverse = tl.zeros((ROWS,), tl.float64), 1.0 / T
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = load_side(student, step, read, V, columns, dtype, "evict_last")
        z = tl.where(_is_listed(bits, row, read, columns, V), -INF, z)
        total += tl.sum(exp(z, largest, inverse), 1).to(tl.float64)
    total = tl.where(read, total, 0.0)
    of_row = row.to(tl.int64)
    tl.store(sums + of_row * 2, tl.where(read, largest.to(tl.float64), 0.0), mask=live)
    tl.store(sums + of_row * 2 + 1, total, mask=live)
    rest = largest.to(tl.float64) + T.to(tl.float64) * tl.log(tl.where(total == 0.0, 1.0, total))
    rest = tl.where(total == 0.0, -INF, rest)
    tl.store(logits + of_row * (K + 1) + K, tl.where(read, rest, 0.0), mask=live)
    for first in range(0, K, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        classes, here, there = _known(indices, row, read, k, K, V)
        z = tl.load(student[:, None] + classes * step, mask=there, other=0.0).to(tl.float64)
        z = tl.where(there, z, tl.where(classes < 0, -INF, float("nan")))
        written = live[:, None] & (k < K)[None, :]
        tl.store(logits + of_row[:, None] * (K + 1) + k[None, :], tl.where(here, z, 0.0), mask=written)


@triton.jit
def complement_bwd_kernel(
    student, index, inner, outer, stride, step,  # [N, V]
    grad, grad_index, grad_inner, grad_outer, grad_stride, grad_step,  # [N, V]; may be the student
    addend, add_index, add_inner, add_outer, add_stride, add_step,  # [N, V]; as the student where there is none
    temperature_rows, temperature_stride, temperature: tl.float64,
    indices, mask, sums, upstream,
    N, V, K, neighbours,
    ADDS: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row, live, run, at = rows_of_program(N, neighbours, ROWS)
    read = rows_to_read(mask, row, live)
    inverse = 1.0 / per_row(temperature_rows, temperature_stride, temperature, row, read, dtype)
    student += row_offsets(row, read, run, at, neighbours, index, inner, outer, stride)
    grad += row_offsets(row, live, run, at, neighbours, grad_index, grad_inner, grad_outer, grad_stride)
    addend += row_offsets(row, live, run, at, neighbours, add_index, add_inner, add_outer, add_stride)
    of_row = row.to(tl.int64)
    largest = tl.load(sums + of_row * 2, mask=read, other=0.0).to(dtype)
    total = tl.load(sums + of_row * 2 + 1, mask=read, other=0.0)
    share = tl.load(upstream + of_row * (K + 1) + K, mask=read, other=0.0)
    share = tl.where(total == 0.0, 0.0, share / tl.where(total == 0.0, 1.0, total)).to(dtype)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        z = load_side(student, step, read, V, columns, dtype, "evict_first")
        values = exp(z, largest, inverse) * share[:, None]
        values = tl.where(read[:, None], values, 0.0)
        if ADDS:
            values += load_side(addend, add_step, live, V, columns, dtype, "evict_first")
        store(grad, grad_step, live, V, columns, values)
    tl.debug_barrier()  # what follows is written over it, by other threads of the program
    for first in range(0, K, AT_ONCE):
        k = first + tl.arange(0, AT_ONCE)
        classes, here, there = _known(indices, row, read, k, K, V)
        g = tl.load(upstream + of_row[:, None] * (K + 1) + k[None, :], mask=here, other=0.0).to(dtype)
        if ADDS:
            g += tl.load(addend[:, None] + classes * add_step, mask=there, other=0.0).to(dtype)
        tl.store(grad[:, None] + classes * grad_step, g.to(grad.dtype.element_ty), mask=there)


def _bits(call, N, V, K, dtype):
    words = (V + 31) // 32
    bits = torch.zeros(N, words, dtype=torch.int32, device=call.student.device)
    listed_kernel[(N,)](
        call.indices, bits, call.mask, N, V, K, words, ROWS=1, AT_ONCE=AT_ONCE, num_warps=1, **limited(dtype)
    )
    return bits


def _launch(kernel, tensors, call, *others, bits=False, **constants):
    """tensors: [*, V], the first that of the logits. bits: whether the kernel looks at those of the K classes."""
    student, K = tensors[0], call.indices.shape[1]
    V = student.shape[-1]
    N = student.numel() // V
    if N == 0:
        return
    layouts = [layout_of(tensor) for tensor in tensors]
    run = side_by_side(N, layouts)
    rows, block, warps = backward_configuration(V, max(tensor.element_size() for tensor in tensors), run)
    dtype = torch.float64 if student.dtype is torch.float64 else torch.float32
    with torch.cuda.device_of(student):
        listed = (_bits(call, N, V, K, dtype),) if bits else ()
        kernel[(programs(N, run, rows),)](
            *(value for layout in layouts for value in layout), *number(call.temperature_rows, call.temperature),
            call.indices, *listed, call.mask, *others, N, V, K, run, **constants,
            dtype=tl.float64 if dtype is torch.float64 else tl.float32,
            ROWS=rows, BLOCK=block, AT_ONCE=AT_ONCE, num_warps=warps, **limited(dtype),
        )  # fmt: skip


def complement_fwd(*arguments: Any) -> None:
    call = Complement(*arguments)
    _launch(complement_fwd_kernel, (call.student,), call, call.logits, call.sums, bits=True)


def complement_bwd(*arguments: Any) -> None:
    call = ComplementBackward(*arguments)
    addend = call.student if call.addend is None else call.addend
    tensors = call.student, call.grad, addend
    _launch(complement_bwd_kernel, tensors, call, call.sums, call.upstream, ADDS=call.addend is not None)
