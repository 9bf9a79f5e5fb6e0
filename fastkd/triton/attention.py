"""Attention transfer in Triton, of maps [B, C, H, W] of student and teacher:

    A = 1/C sum_c |x_c|^p, f = A / max(|A|, 1e-12) over H W; loss = 1/(B H W) sum (f_s - f_t)^2
    grad = 2 / (B H W) a_s (e - f_s sum f_s e) p / C |x|^(p - 1) sign x,  e = f_s - f_t

Positions are rows of channels: powers are added up, a program a sample compares both maps, and the student is
read once more for its gradient. Traffic: student twice, teacher and gradient once; 16 bytes a position between
the launches. Powers are taken of what is divided by a length of the row, where they would leave float32's range.
Saved for backward: the gradient, or nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .._dtypes import compute_dtype
from .._feature_calls import AttentionBackward, AttentionCall, AttentionForward
from ..ops.numbers import read
from .layout import UNFUSED, load_features, programs, row_pointers, rows_of_program, same_rows, store_features, tile_of

POSITIONS = 2048  # of a map at a time


@triton.jit
def _power(x, p, P: tl.constexpr):
    """|x|^p; P: p where it is a small whole number, else 0."""
    a = tl.abs(x)
    if P == 0:
        return tl.where(a == 0.0, 0.0, tl.exp2(tl.log2(a) * p))
    y = tl.full(a.shape, 1.0, a.dtype)
    for _ in tl.static_range(P):
        y *= a
    return y


@triton.jit
def _slope(x, p, P: tl.constexpr):
    """|x|^(p - 1) sign x"""
    if P == 1:
        return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
    y = _power(x, p - 1.0, 0) if P == 0 else _power(x, p, P - 1)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def powers_kernel(
    x, place, map,  # map: [rows], out
    p: tl.float64,
    middle, inner, D,
    P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    outer_at, middle_at, inner_at, row = rows_of_program(tl.program_id(0), middle, inner, ROWS)
    here = inner_at < inner
    rows, step = row_pointers(x, place, outer_at, middle_at, inner_at), place[3]
    power = tl.full((), p, dtype)
    sums = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, D, BLOCK):
        values = load_features(rows, step, here, D, begin, dtype, BLOCK)
        sums += tl.sum(_power(values, power, P), 1).to(tl.float64)
    if dtype == tl.float32:
        beyond = here & ((sums <= 1e-30) | (sums >= 1e37))
        if tl.max(beyond.to(tl.int32), 0) > 0:
            largest = tl.zeros((ROWS,), dtype)
            for begin in range(0, D, BLOCK):
                largest = tl.maximum(
                    largest, tl.max(tl.abs(load_features(rows, step, here, D, begin, dtype, BLOCK)), 1)
                )
            largest = tl.where(largest == 0.0, 1.0, largest)
            again = tl.zeros((ROWS,), tl.float64)
            for begin in range(0, D, BLOCK):
                values = load_features(rows, step, here, D, begin, dtype, BLOCK) / largest[:, None]
                again += tl.sum(_power(values, power, P), 1).to(tl.float64)
            again *= _power(largest.to(tl.float64), tl.full((), p, tl.float64), P)
            sums = tl.where(beyond, again, sums)
    tl.store(map + row, sums / D, mask=here)


@triton.jit
def maps_kernel(
    student, teacher,  # [B, positions]; the slopes take the teacher's place where they are wanted
    losses,  # [B]
    upstream,  # [1], or None: 1
    positions, scale: tl.float64,
    SLOPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    student += sample * positions
    teacher += sample * positions
    ss, tt = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, positions, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        s, t = (
            tl.load(student + at, mask=at < positions, other=0.0),
            tl.load(teacher + at, mask=at < positions, other=0.0),
        )
        ss += s * s
        tt += t * t
    s_length, t_length = tl.sqrt(tl.sum(ss, 0)), tl.sqrt(tl.sum(tt, 0))
    a = tl.where(s_length == 0.0, 0.0, 1.0 / tl.maximum(s_length, 1e-12))
    b = tl.where(t_length == 0.0, 0.0, 1.0 / tl.maximum(t_length, 1e-12))
    ee, xe = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, positions, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(student + at, mask=at < positions, other=0.0) * a
        e = x - tl.load(teacher + at, mask=at < positions, other=0.0) * b
        ee += e * e
        xe += x * e
    tl.store(losses + sample, tl.sum(ee, 0))
    if SLOPES:
        along = tl.where(s_length >= 1e-12, tl.sum(xe, 0), 0.0)
        k = 2.0 * a * tl.full((), scale, tl.float64)
        if upstream is not None:
            k *= tl.load(upstream).to(tl.float64)
        for begin in range(0, positions, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(student + at, mask=at < positions, other=0.0) * a
            e = x - tl.load(teacher + at, mask=at < positions, other=0.0) * b
            tl.store(teacher + at, k * (e - x * along), mask=at < positions)


@triton.jit
def slopes_kernel(
    x, grad, place, grad_place,
    map, slopes,  # [rows]
    p: tl.float64,
    middle, inner, D,
    P: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Powers of x / r, where r^p = map: neither these nor what they are multiplied by leaves the range."""
    outer_at, middle_at, inner_at, row = rows_of_program(tl.program_id(0), middle, inner, ROWS)
    here = inner_at < inner
    rows, step = row_pointers(x, place, outer_at, middle_at, inner_at), place[3]
    g_rows, g_step = row_pointers(grad, grad_place, outer_at, middle_at, inner_at), grad_place[3]
    mean = tl.load(map + row, mask=here, other=0.0)
    r = tl.sqrt(mean) if P == 2 else tl.where(mean == 0.0, 0.0, tl.exp2(tl.log2(mean) / tl.full((), p, tl.float64)))
    inverse = tl.where(r == 0.0, 0.0, 1.0 / r).to(dtype)
    factor = tl.load(slopes + row, mask=here, other=0.0)
    factor = (factor * (r if P == 2 else tl.where(r == 0.0, 0.0, mean / r))).to(dtype)
    for begin in range(0, D, BLOCK):
        values = load_features(rows, step, here, D, begin, dtype, BLOCK) * inverse[:, None]
        values = _slope(values, tl.full((), p, dtype), P) * factor[:, None]
        store_features(g_rows, g_step, here, D, begin, values, BLOCK)


def _whole(p):
    return int(p) if p in (1.0, 2.0, 3.0, 4.0) else 0


def _powers(x, p, dtype, map):
    (x,), rows = same_rows(1, x)
    tile = tile_of(rows, dtype.itemsize, kept=False)
    powers_kernel[(programs(rows, tile),)](
        x, rows.places[0], map, p, rows.middle, rows.inner, rows.D,
        P=_whole(p), ROWS=tile.rows, BLOCK=tile.features, dtype=_triton(dtype), num_warps=tile.warps, **UNFUSED,
    )  # fmt: skip


def _triton(dtype):
    return tl.float64 if dtype is torch.float64 else tl.float32


def _run(call, grad, upstream=None):
    """The sum of the samples' losses."""
    student, teacher, p = call.student, call.teacher, read("p", call.p, 1.0)
    dtype, B, positions = compute_dtype(student, teacher), len(student), student.shape[2] * student.shape[3]
    maps = student.new_empty(2, B * positions, dtype=torch.float64)
    losses = student.new_empty(B, dtype=torch.float64)
    if maps.numel() == 0:
        return losses.new_zeros(())
    with torch.cuda.device_of(student):
        for x, map in zip((student, teacher), maps, strict=True):
            _powers(x, p, dtype, map)
        maps_kernel[(B,)](
            *maps, losses, upstream, positions, p / student.shape[1] / (B * positions),
            SLOPES=grad is not None, BLOCK=min(POSITIONS, triton.next_power_of_2(positions)), num_warps=8, **UNFUSED,
        )  # fmt: skip
        if grad is not None:
            (x, out), rows = same_rows(1, student, grad)
            tile = tile_of(rows, dtype.itemsize, kept=False)
            slopes_kernel[(programs(rows, tile),)](
                x, out, *rows.places, *maps, p, rows.middle, rows.inner, rows.D,
                P=_whole(p), ROWS=tile.rows, BLOCK=tile.features, dtype=_triton(dtype), num_warps=tile.warps, **UNFUSED,
            )  # fmt: skip
    return losses.sum() / (B * positions)


def attention_fwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = AttentionCall(*arguments[: len(AttentionCall._fields)])
    save = AttentionForward(*arguments[len(AttentionCall._fields) :]).save
    grad = torch.empty_like(call.student) if save else None
    loss = _run(call, grad).to(compute_dtype(call.student, call.teacher))
    return loss, call.student.new_empty(0) if grad is None else grad


def attention_bwd(*arguments: Any) -> torch.Tensor:
    call = AttentionCall(*arguments[: len(AttentionCall._fields)])
    grad = torch.empty_like(call.student)
    _run(call, grad, AttentionBackward(*arguments[len(AttentionCall._fields) :]).upstream)
    return grad
