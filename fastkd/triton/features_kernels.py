"""The features schedule in Triton: distances between rows of features, and their gradient.

    x = (s - m_s) a_s, y = (t - m_t) a_t, e = x - y;  m and a from the row's statistics, or 0 and 1
    loss[n]    = share weight[n] sum l(e), u = l'(e) / 2
    grad[n, d] = 2 share a_s weight[n] upstream[n] / divisor (u - mean - x p)

with the l, a square or smooth L1, the mean and p of csrc/math/feature.h. A program takes some rows of one layer; these
stay in registers from the first sum to the gradient, unless they are too long: then they are read again for every sum.
Layers of one shape, dtype and layout are one launch. Traffic: student + teacher + gradient, once each.
Saved for backward: the gradient, or nothing, and backward computes it from the features.

Products are not fused with sums: of equal rows the differences are 0.
"""

import triton
import triton.language as tl

from ..ops.features import FEATURES
from .layout import load_features, one_of, row_pointers, rows_of_program, store_features

PLAIN, L2, STANDARDIZE, COSINE = (tl.constexpr(FEATURES[x]) for x in ("plain", "l2", "standardize", "cosine"))


@triton.jit
def _weight_of_layer(weights, layer, LAYERS: tl.constexpr):
    """One of a tuple of float64, each as two float32: arguments have no more digits."""
    high, low = tl.full((), weights[0][0], tl.float64), tl.full((), weights[0][1], tl.float64)
    for i in tl.static_range(1, LAYERS):
        high = tl.where(layer == i, tl.full((), weights[i][0], tl.float64), high)
        low = tl.where(layer == i, tl.full((), weights[i][1], tl.float64), low)
    return high + low


@triton.jit
def _centred(x, first, offset, D, begin, BLOCK: tl.constexpr, FEATURE: tl.constexpr):
    """x less its mean, which is first + offset; 0 beyond the row."""
    if FEATURE == STANDARDIZE:
        within = (begin + tl.arange(0, BLOCK) < D)[None, :]
        x = tl.where(within, (x - first[:, None]) - offset[:, None], 0.0)
    return x


@triton.jit
def _factor(squares, D, FEATURE: tl.constexpr):
    """What a row is multiplied by; whether that changes with the row."""
    if FEATURE == STANDARDIZE:
        return 1.0 / tl.sqrt(squares / D + tl.full((), 1e-6, tl.float64)), squares >= 0.0
    length, shortest = tl.sqrt(squares), tl.full((), 1e-12, tl.float64)
    return tl.where(length == 0.0, 0.0, 1.0 / tl.maximum(length, shortest)), length >= shortest


# A row is `tile` where it is whole; else it is read once more, block by block. side: pointers to rows [ROWS], the step
# between features, which rows to read, D.


@triton.jit
def _block(tile, side, begin, dtype: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        return tile
    rows, step, here, D = side
    return load_features(rows, step, here, D, begin, dtype, BLOCK)


@triton.jit
def _mean(tile, side, first, dtype: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Beyond the first value."""
    D = side[3]
    part = (1.0 / tl.full((), D, tl.float64)).to(dtype)  # of each: the sum of large values overflows
    mean = tl.zeros(first.shape, tl.float64)
    for begin in range(0, BLOCK if WHOLE else D, BLOCK):
        x = _block(tile, side, begin, dtype, BLOCK, WHOLE)
        mean += tl.sum(_centred(x, first, tl.zeros_like(first), D, begin, BLOCK, STANDARDIZE) * part, 1).to(tl.float64)
    return mean.to(dtype)


@triton.jit
def _sum_of_squares(
    tile, side, first, offset, scale,
    dtype: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """Of what is centred, and scaled."""
    squares = tl.zeros(first.shape, tl.float64)
    for begin in range(0, BLOCK if WHOLE else side[3], BLOCK):
        x = _centred(_block(tile, side, begin, dtype, BLOCK, WHOLE), first, offset, side[3], begin, BLOCK, FEATURE)
        scaled = x * scale[:, None]
        squares += tl.sum(scaled * scaled, 1).to(tl.float64)
    return squares


@triton.jit
def _scale_to_one(
    tile, side, first, offset,
    dtype: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """A power of 2 that brings the largest element near 1."""
    largest = tl.zeros_like(first)
    for begin in range(0, BLOCK if WHOLE else side[3], BLOCK):
        x = _centred(_block(tile, side, begin, dtype, BLOCK, WHOLE), first, offset, side[3], begin, BLOCK, FEATURE)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    return tl.exp2(-tl.floor(tl.log2(tl.minimum(tl.maximum(largest, 1.2e-38), 8e37))))  # of which both are numbers


@triton.jit
def _statistics(
    tile, side, first,
    dtype: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """The mean beyond the first value, the factor, whether it changes with the row."""
    offset = tl.zeros_like(first)
    if FEATURE == STANDARDIZE:
        offset = _mean(tile, side, first, dtype, BLOCK, WHOLE)
    one = tl.full(first.shape, 1.0, dtype)
    squares = _sum_of_squares(tile, side, first, offset, one, dtype, BLOCK, WHOLE, FEATURE)
    if dtype == tl.float32:
        beyond = (squares <= 1e-30) | (squares >= 1e37)
        if tl.max(beyond.to(tl.int32), 0) > 0:
            scale = _scale_to_one(tile, side, first, offset, dtype, BLOCK, WHOLE, FEATURE)
            again = _sum_of_squares(tile, side, first, offset, scale, dtype, BLOCK, WHOLE, FEATURE)
            wide = scale.to(tl.float64)
            squares = tl.where(beyond, again / (wide * wide), squares)
    factor, changes = _factor(squares, side[3], FEATURE)
    return offset, factor, changes


@triton.jit
def _first(rows, here, dtype: tl.constexpr, FEATURE: tl.constexpr):
    return tl.load(rows, mask=here & (FEATURE == STANDARDIZE), other=0.0).to(dtype)


@triton.jit
def _normalized(x, first, offset, factor, D, begin, BLOCK: tl.constexpr, FEATURE: tl.constexpr):
    if FEATURE != PLAIN:
        x = _centred(x, first, offset, D, begin, BLOCK, FEATURE) * factor[:, None]
    return x


@triton.jit
def _differences(
    s, s_side, of_s, t, t_side, of_t, begin,
    dtype: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FEATURE: tl.constexpr,
):  # fmt: skip
    """x and e of a block. of_s, of_t: first value, offset and factor of each row."""
    x = _block(s, s_side, begin, dtype, BLOCK, WHOLE)
    y = _block(t, t_side, begin, dtype, BLOCK, WHOLE)
    x = _normalized(x, of_s[0], of_s[1], of_s[2], s_side[3], begin, BLOCK, FEATURE)
    return x, x - _normalized(y, of_t[0], of_t[1], of_t[2], t_side[3], begin, BLOCK, FEATURE)


@triton.jit
def _half_slope(e, half_inverse, SMOOTH_L1: tl.constexpr):
    """u."""
    if SMOOTH_L1:
        u = e * half_inverse
        u = tl.where(u > 0.5, 0.5, u)  # NaN stays, which a minimum may not leave
        return tl.where(u < -0.5, -0.5, u)
    return e


@triton.jit
def _value(e, u, beta, SMOOTH_L1: tl.constexpr):
    """l(e)."""
    if SMOOTH_L1:
        size = tl.abs(e)
        return tl.where(size < beta, e * u, size - 0.5 * beta)
    return e * u


@triton.jit
def _gradient(x, u, k, along, total, D, dtype: tl.constexpr, FEATURE: tl.constexpr):
    if FEATURE == STANDARDIZE:
        u = u - (total / D).to(dtype)[:, None]
        along = along / D
    if FEATURE != PLAIN:
        u = u - x * along.to(dtype)[:, None]
    return k.to(dtype)[:, None] * u


@triton.jit
def _row_scales(
    row_weights, layer_weight, upstreams, scales, scale, layer, row, here,
    LAYERS: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """What a row's loss, and its gradient, are multiplied by."""
    weight = tl.full(row.shape, 1.0, tl.float64)
    if row_weights is not None:
        weight = tl.load(one_of(row_weights, layer, LAYERS) + row, mask=here, other=0.0).to(tl.float64)
    slope = weight * layer_weight * (tl.full((), scale, tl.float64) if scales is None else tl.load(scales + layer))
    if PER_ROW:
        slope *= tl.load(one_of(upstreams, layer, LAYERS) + row, mask=here, other=0.0).to(tl.float64)
    elif upstreams is not None:
        slope *= tl.load(upstreams[0]).to(tl.float64)
    return weight, slope


@triton.jit
def features_kernel(
    students, teachers, grads,  # of LAYERS tensors each; no grads: None
    masks, row_weights,  # [rows], or None
    layer_weights,
    row_losses,  # [rows], or None
    upstreams,  # [rows] where PER_ROW, or one [1] for all layers, or None: 1
    scales,  # [LAYERS], or None: scale
    partials,  # [LAYERS, programs of a layer]
    scale: tl.float64,
    student_place, teacher_place, grad_place,
    middle, inner, D,
    beta: tl.float64, half_inverse: tl.float64,
    FEATURE: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    PER_ROW: tl.constexpr, SMOOTH_L1: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    layer, program = tl.program_id(1), tl.program_id(0)
    outer_at, middle_at, inner_at, row = rows_of_program(program, middle, inner, ROWS)
    exists = inner_at < inner
    here = exists
    if masks is not None:
        here = exists & (tl.load(one_of(masks, layer, LAYERS) + row, mask=exists, other=0) != 0)
    s_rows = row_pointers(one_of(students, layer, LAYERS), student_place, outer_at, middle_at, inner_at)
    t_rows = row_pointers(one_of(teachers, layer, LAYERS), teacher_place, outer_at, middle_at, inner_at)
    s_side, t_side = (s_rows, student_place[3], here, D), (t_rows, teacher_place[3], here, D)
    g_rows = s_rows
    if grads is not None:
        g_rows = row_pointers(one_of(grads, layer, LAYERS), grad_place, outer_at, middle_at, inner_at)
    layer_weight = _weight_of_layer(layer_weights, layer, LAYERS)
    weight, k = _row_scales(row_weights, layer_weight, upstreams, scales, scale, layer, row, here, LAYERS, PER_ROW)

    # the rows, where they are whole; else what is not looked at
    s = load_features(s_rows, student_place[3], here, D, 0, dtype, BLOCK)
    t = load_features(t_rows, teacher_place[3], here, D, 0, dtype, BLOCK)
    s_first, t_first = _first(s_rows, here, dtype, FEATURE), _first(t_rows, here, dtype, FEATURE)
    s_offset, s_factor, t_offset, t_factor, changes = s_first, s_first, s_first, s_first, here
    if FEATURE != PLAIN:
        s_offset, s_wide, changes = _statistics(s, s_side, s_first, dtype, BLOCK, WHOLE, FEATURE)
        t_offset, t_wide, _ = _statistics(t, t_side, t_first, dtype, BLOCK, WHOLE, FEATURE)
        s_factor, t_factor = s_wide.to(dtype), t_wide.to(dtype)
        k *= s_wide
    share: tl.constexpr = 0.5 if FEATURE == COSINE else 1.0
    k *= 2.0 * share
    of_s, of_t = (s_first, s_offset, s_factor), (t_first, t_offset, t_factor)
    beta = tl.full((), beta, tl.float64).to(dtype)
    half_inverse = tl.full((), half_inverse, tl.float64).to(dtype)

    values, along, total = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    for begin in range(0, BLOCK if WHOLE else D, BLOCK):
        x, e = _differences(s, s_side, of_s, t, t_side, of_t, begin, dtype, BLOCK, WHOLE, FEATURE)
        u = _half_slope(e, half_inverse, SMOOTH_L1)
        values += tl.sum(_value(e, u, beta, SMOOTH_L1), 1).to(tl.float64)
        if FEATURE != PLAIN:
            along += tl.sum(x * u, 1).to(tl.float64)
            total += tl.sum(u, 1).to(tl.float64)
        elif grads is not None:
            g = _gradient(x, u, k, along, total, D, dtype, FEATURE)
            store_features(g_rows, grad_place[3], exists, D, begin, tl.where(here[:, None], g, 0.0), BLOCK)
    if grads is not None and FEATURE != PLAIN:
        along = tl.where(changes, along, 0.0)
        for begin in range(0, BLOCK if WHOLE else D, BLOCK):
            x, e = _differences(s, s_side, of_s, t, t_side, of_t, begin, dtype, BLOCK, WHOLE, FEATURE)
            u = _half_slope(e, half_inverse, SMOOTH_L1)
            g = _gradient(x, u, k, along, total, D, dtype, FEATURE)
            store_features(g_rows, grad_place[3], exists, D, begin, tl.where(here[:, None], g, 0.0), BLOCK)
    loss = tl.where(here, values * share * weight, 0.0)
    if row_losses is not None:
        losses = (loss * layer_weight).to(dtype)
        tl.store(one_of(row_losses, layer, LAYERS) + row, losses, mask=exists)
    tl.store(partials + layer.to(tl.int64) * tl.num_programs(0) + program, tl.sum(loss, 0))


@triton.jit
def flat_kernel(
    students, teachers, grads,  # of LAYERS tensors that lie alike; no grads: None
    layer_weights,
    upstream,  # [1], or None: 1
    partials,  # [LAYERS, programs of a layer]
    scale: tl.float64,
    n,
    beta: tl.float64, half_inverse: tl.float64,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr, SMOOTH_L1: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    layer, program = tl.program_id(1), tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    within = at < n
    s = tl.load(one_of(students, layer, LAYERS) + at, mask=within, other=0.0).to(dtype)
    t = tl.load(one_of(teachers, layer, LAYERS) + at, mask=within, other=0.0).to(dtype)
    e = s - t
    beta = tl.full((), beta, tl.float64).to(dtype)
    half_inverse = tl.full((), half_inverse, tl.float64).to(dtype)
    u = _half_slope(e, half_inverse, SMOOTH_L1)
    if grads is not None:
        k = 2.0 * tl.full((), scale, tl.float64) * _weight_of_layer(layer_weights, layer, LAYERS)
        if upstream is not None:
            k *= tl.load(upstream).to(tl.float64)
        grad = one_of(grads, layer, LAYERS)
        values = (u * k.to(dtype)).to(grad.dtype.element_ty)
        tl.store(grad + at, values, mask=within, eviction_policy="evict_first")
    total = tl.sum(_value(e, u, beta, SMOOTH_L1), 0)
    tl.store(partials + layer.to(tl.int64) * tl.num_programs(0) + program, total.to(tl.float64))


@triton.jit
def count_kernel(
    masks,  # of LAYERS, [n]
    scales,  # [LAYERS]: 1 / (each * rows that count), 0 where none does
    n, each: tl.float64,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    mask = one_of(masks, layer, LAYERS)
    valid = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid += tl.load(mask + at, mask=at < n, other=0).to(tl.int64)
    divisor = tl.sum(valid, 0).to(tl.float64) * each
    tl.store(scales + layer, tl.where(divisor == 0.0, 0.0, 1.0 / divisor))


@triton.jit
def finish_kernel(
    partials,  # [LAYERS, n]
    scales,  # [LAYERS], or None: scale
    scale: tl.float64,
    layer_weights,
    positions,  # of the LAYERS among all
    layers, weighted,  # [all layers]: each one's loss, and what it adds to the total
    n,
    LAYERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + layer.to(tl.int64) * n + at, mask=at < n, other=0.0)
    by = tl.full((), scale, tl.float64) if scales is None else tl.load(scales + layer)
    found = tl.where(by == 0.0, 0.0, tl.sum(sums, 0) * by)
    position = tl.full((), positions[0], tl.int32)
    for i in tl.static_range(1, LAYERS):
        position = tl.where(layer == i, positions[i], position)
    tl.store(layers + position, found.to(layers.dtype.element_ty))
    tl.store(weighted + position, found * _weight_of_layer(layer_weights, layer, LAYERS))
