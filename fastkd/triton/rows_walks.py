"""How the kernels of the rows schedule walk over the tiles of a row that is longer than one. Names are those of
rows_tile."""

import triton
import triton.language as tl

from .rows_targets import whole_gradient
from .rows_tile import INF, LOG2E, exp, finite, load_parted, store, visit


@triton.jit
def _accumulate(z, maximum, total, inv_temperature):
    """The running maximum, and the running sum of e^((z - maximum) / T)."""
    larger = tl.maximum(maximum, tl.max(z, 1))
    base = finite(larger)
    total = total * tl.exp2((maximum - base) * (inv_temperature * LOG2E)) + tl.sum(exp(z, base, inv_temperature), 1)
    return larger, total


@triton.jit
def walk_for_statistics(
    inputs, a, b, target, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr
):  # fmt: skip
    """of_row of rows longer than a tile; and of those with targets what hard_sums gives, and the target's logits."""
    V = inputs[5]
    max_hard, sum_hard = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    max_of_teacher = max_hard
    logits, logit = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    teacher_logit = logit
    max_student, sum_student = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    max_teacher, sum_teacher = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t, of_student, of_teacher = load_parted(inputs, columns, target, dtype, "evict_last", HARD)
        logit += of_student
        teacher_logit += of_teacher
        max_student, sum_student = _accumulate(s, max_student, sum_student, a)
        max_teacher, sum_teacher = _accumulate(t, max_teacher, sum_teacher, a - b)
        if HARD:
            before = finite(max_hard)
            max_hard, sum_hard = _accumulate(s, max_hard, sum_hard, tl.full((ROWS,), 1.0, dtype))
            maximum = finite(max_hard)
            if HARD >= 2:
                max_of_teacher, logits = _accumulate(t, max_of_teacher, logits, tl.full((ROWS,), 1.0, dtype))
            else:
                logits += first * (before - maximum)
                logits += tl.sum(tl.where((columns < V)[None, :], s - maximum[:, None], 0.0), 1)
    of_row = (a, b, finite(max_student), sum_student, finite(max_teacher), sum_teacher)
    return of_row, sum_hard, logits, logit, teacher_logit


@triton.jit
def walk_for_loss(
    inputs, of_row, parameter, grad, grad_step, live, grad_scale, hard,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, IS_CENTRED: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr, GIVEN: tl.constexpr, HARD: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of losses and slopes over rows longer than a tile, and a second one; the gradient where it needs no sum of
    slopes."""
    V = inputs[5]
    total, sum_slope, second = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    last = (V - 1) // BLOCK * BLOCK
    for first in range(0, V, BLOCK):
        columns = last - first + tl.arange(0, BLOCK)
        s, t, _, _ = load_parted(inputs, columns, hard[0], dtype, "evict_first" if IS_CENTRED else "evict_last", HARD)
        losses, slopes, p, seconds = visit(
            s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE, GIVEN
        )  # fmt: skip
        total += tl.sum(losses, 1)
        if GIVEN == 3:
            second += tl.sum(seconds, 1)
        if not IS_CENTRED:
            sum_slope += tl.sum(slopes, 1)
        elif grad is not None:
            values = whole_gradient(slopes, p, sum_slope, of_row, grad_scale, s, hard, columns, HARD)
            store(grad, grad_step, live, V, columns, values)
    return total, sum_slope, second


@triton.jit
def walk_for_grad(
    inputs, of_row, parameter, grad, grad_step, live, grad_scale, sum_slope, hard,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
    GIVEN: tl.constexpr, HARD: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    V = inputs[5]
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t, _, _ = load_parted(inputs, columns, hard[0], dtype, "evict_first", HARD)
        _losses, slopes, p, _seconds = visit(
            s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE, GIVEN
        )  # fmt: skip
        values = whole_gradient(slopes, p, sum_slope, of_row, grad_scale, s, hard, columns, HARD)
        store(grad, grad_step, live, V, columns, values)
