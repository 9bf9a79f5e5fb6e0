"""What the kernels of the rows schedule do with a tile of classes: load it, sum over it, and write its gradient."""

import triton
import triton.language as tl

from .divergences import log1p

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))

# In the kernels
#   hard    of rows with a target, [ROWS] each: the target, which rows have one, and what they are multiplied by in the
#           gradient; the sum of e^(z - max) of the student; smoothing; V; and the weight of the soft loss
#   inputs  what load needs: pointers to the rows [ROWS] and the step between classes, for
#           student and teacher; which rows to read [ROWS]; V
#   of_row  constants of a row, [ROWS] each: a = 1 / T, b = 1 / T - 1 / T_teacher, the maxima and
#           the sums of e^((z - max) / T) of student and teacher


@triton.jit
def rows_of_program(N, side_by_side, ROWS: tl.constexpr):
    """The rows [ROWS] that a program takes, which of them there are, and, where so many lie side by side that they form
    runs of that length, the number of the run and the rows' places in it."""
    program, places = tl.program_id(0), tl.arange(0, ROWS)
    if side_by_side is not None:
        blocks = tl.cdiv(side_by_side, ROWS)
        run = (program // blocks).to(tl.int64)
        at = program % blocks * ROWS + places
        row = run * side_by_side + at
        live = at < side_by_side
    else:
        run = tl.full((), 0, tl.int64)
        at = program * ROWS + places
        row = at
        live = row < N
    return row, live, run, at


@triton.jit
def row_offsets(row, here, run, at, side_by_side, index, inner, outer_stride, stride):
    """Where rows begin: see Layout. Of rows in runs the compiler sees that they are neighbours in memory."""
    if side_by_side is not None:
        offsets = at.to(tl.int64) * stride
        if outer_stride is not None:
            offsets += run * outer_stride
    elif index is not None:
        offsets = tl.load(index + row, mask=here, other=0) * stride
    elif inner is not None:
        offsets = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * stride
    else:
        offsets = row.to(tl.int64) * stride
    return offsets


@triton.jit
def per_row(values, stride, value_of_all, row, read, dtype: tl.constexpr):
    if values is None:
        found = tl.full(row.shape, value_of_all, dtype)
    else:
        found = tl.load(values + row * stride, mask=read, other=1.0)
    return found


@triton.jit
def per_row_times(factor, value_of_all, row, read, dtype: tl.constexpr):
    """A number for each row, and times another, which lies in memory where there is one."""
    found = per_row(None, 0, value_of_all, row, read, dtype)
    if factor is not None:
        found *= tl.load(factor).to(dtype)
    return found


@triton.jit
def hard_options(target, hard_weight, soft_weight, smoothing, of_loss, row, read, dtype: tl.constexpr):
    """Of each row: what its hard loss is multiplied by, what its soft loss is, the smoothing and the target. Without
    targets numbers that nobody reads, and 1."""
    soft = tl.full(row.shape, 1.0, dtype)
    hard, smoothed, classes = soft, soft, row
    if target is not None:
        classes = tl.load(target + row, mask=read, other=0)
        hard = of_loss * per_row(None, 0, hard_weight, row, read, dtype)
        soft = per_row(None, 0, soft_weight, row, read, dtype)
        smoothed = per_row(None, 0, smoothing, row, read, dtype)
    return hard, soft, smoothed, classes


@triton.jit
def temperatures(
    temperature_rows, temperature_stride, temperature,
    teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read,
    dtype: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """T, and of_row's a and b."""
    T = per_row(temperature_rows, temperature_stride, temperature, row, read, dtype)
    a = 1.0 / T
    b = tl.zeros_like(a)
    if not SAME_TEMPERATURE:
        b = a - 1.0 / per_row(
            teacher_temperature_rows, teacher_temperature_stride, teacher_temperature, row, read, dtype
        )
    return T, a, b


@triton.jit
def load_side(rows, step, read, V, columns, dtype: tl.constexpr, EVICT: tl.constexpr):
    pointers = rows[:, None] + (columns.to(tl.int64) * step)[None, :]
    mask = read[:, None] & (columns < V)[None, :]
    return tl.load(pointers, mask=mask, other=-INF, eviction_policy=EVICT).to(dtype)


@triton.jit
def load(inputs, columns, dtype: tl.constexpr, EVICT: tl.constexpr):
    """[ROWS, BLOCK] logits of student and teacher; -inf where there are none."""
    student, student_step, teacher, teacher_step, read, V = inputs
    s = load_side(student, student_step, read, V, columns, dtype, EVICT)
    t = load_side(teacher, teacher_step, read, V, columns, dtype, EVICT)
    return s, t


@triton.jit
def store(grad, step, live, V, columns, values):
    pointers = grad[:, None] + (columns.to(tl.int64) * step)[None, :]
    mask = live[:, None] & (columns < V)[None, :]
    tl.store(pointers, values.to(grad.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit
def finite(maximum):
    """Of -inf alone anything finite will do: every exponential is 0."""
    return tl.where(maximum == -INF, 0.0, maximum)


@triton.jit
def exp(z, maximum, inv_temperature):
    """e^((z - maximum) / T)"""
    return tl.exp2((z - maximum[:, None]) * (inv_temperature * LOG2E)[:, None])


@triton.jit
def _accumulate(z, maximum, total, inv_temperature):
    """The running maximum, and the running sum of e^((z - maximum) / T)."""
    larger = tl.maximum(maximum, tl.max(z, 1))
    base = finite(larger)
    total = total * tl.exp2((maximum - base) * (inv_temperature * LOG2E)) + tl.sum(exp(z, base, inv_temperature), 1)
    return larger, total


@triton.jit
def probabilities(s, t, of_row, SAME_TEMPERATURE: tl.constexpr):
    """p, q and w of a tile. A class that is not there has p = q = 0."""
    a, b, max_student, sum_student, max_teacher, sum_teacher = of_row
    p = exp(s, max_student, a) * tl.where(sum_student == 0.0, 0.0, 1.0 / sum_student)[:, None]
    q = exp(t, max_teacher, a - b) * tl.where(sum_teacher == 0.0, 0.0, 1.0 / sum_teacher)[:, None]
    # Where student and teacher differ by a constant, which changes nothing, the difference would be
    # rounded at the size of that constant: there both are taken from their maxima. Where they do
    # not, s - t itself is the most exact, and near convergence it is what counts.
    shifted = tl.abs(max_student - max_teacher) > 4.0
    offset = log1p((sum_student - sum_teacher) / sum_teacher)  # log(sum_student / sum_teacher)
    offset += tl.where(shifted, 0.0, (max_student - max_teacher) * a + max_teacher * b)
    from_centre = t - tl.where(shifted, max_teacher, 0.0)[:, None]
    difference = (s - tl.where(shifted, max_student, 0.0)[:, None]) - from_centre
    w = difference * a[:, None] - offset[:, None]
    if not SAME_TEMPERATURE:
        w += tl.where(t == -INF, 0.0, from_centre * b[:, None])
    return p, q, w


@triton.jit
def visit(
    s, t, of_row, parameter,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] each: loss, slope and p of the classes of a tile."""
    p, q, w = probabilities(s, t, of_row, SAME_TEMPERATURE)
    loss, slope = DIVERGENCE(p, q, w, parameter, OF_ROWS)
    if ENTROPY:  # the teacher's entropy is this and log sum_teacher
        a, b, _max_student, _sum_student, max_teacher, _sum_teacher = of_row
        loss += tl.where(q == 0.0, 0.0, q * ((max_teacher[:, None] - t) * (a - b)[:, None]))
    return loss, slope, p


@triton.jit
def gradient_of(slope, p, sum_slope, of_row, scale):
    """The gradient of a tile. None where a row has no possible class, nor out of an infinite loss:
    no finite step changes that."""
    _a, _b, _max_student, sum_student, _max_teacher, sum_teacher = of_row
    nothing = (sum_teacher == 0.0) | ((sum_student == 0.0) & (sum_teacher > 0.0)) | (sum_slope == INF)
    scale += 0.0 * (sum_student + sum_teacher)  # a NaN anywhere in a row is one everywhere in it
    return tl.where(nothing[:, None], 0.0, (slope - p * sum_slope[:, None]) * scale[:, None])


@triton.jit
def hard_sums(s, maximum, target, columns, V, HARD: tl.constexpr):
    """Of a tile: the student's sum at temperature 1, the sum of z - max, and the logit of the target."""
    total = tl.zeros(maximum.shape, s.dtype)
    logits, logit = total, total
    if HARD:
        total = tl.sum(exp(s, maximum, tl.full(maximum.shape, 1.0, s.dtype)), 1)
        logits = tl.sum(tl.where((columns < V)[None, :], s - maximum[:, None], 0.0), 1)
        logit = tl.sum(tl.where(columns[None, :] == target[:, None], s, 0.0), 1)
    return total, logits, logit


@triton.jit
def hard_gradient(s, of_row, hard, columns):
    """What the hard loss adds to the gradient of a tile. Nothing where no class is possible; NaN where the target is
    none of the classes: as loud as a device may be that cannot raise."""
    target, has_target, scale, sum_hard, smoothing, V, _soft_weight = hard
    max_student = of_row[2]
    scale = tl.where(sum_hard == 0.0, 0.0, scale)
    scale = tl.where((target >= 0) & (target < V), scale, float("nan"))
    scale = tl.where(has_target, scale, 0.0)[:, None]
    p = exp(s, max_student, tl.full(max_student.shape, 1.0, s.dtype))
    p *= tl.where(sum_hard == 0.0, 0.0, 1.0 / sum_hard)[:, None]
    everywhere, of_target = (smoothing / V)[:, None] * scale, (1.0 - smoothing)[:, None] * scale
    return p * scale - everywhere - tl.where(columns[None, :] == target[:, None], of_target, 0.0)


@triton.jit
def hard_loss(of_row, hard, hard_weight, scale, logits, logit):
    """Cross-entropy with the target. With a weight of 0 it is left out, however large it is."""
    target, has_target, _scale, sum_hard, smoothing, V, _soft_weight = hard
    max_student = of_row[2]
    loss = log1p(sum_hard - 1.0)
    loss += tl.where(smoothing < 1.0, (1.0 - smoothing) * (max_student - logit), 0.0)
    loss += tl.where(smoothing > 0.0, -smoothing * logits / V, 0.0)
    loss = tl.where(sum_hard == 0.0, INF, loss) * scale
    if hard_weight == 0.0:
        loss = tl.zeros_like(loss)
    loss = tl.where((target >= 0) & (target < V), loss, float("nan"))
    return tl.where(has_target, loss, 0.0)


@triton.jit
def row_loss(total, of_row, scale, ENTROPY: tl.constexpr):
    _a, _b, _max_student, sum_student, _max_teacher, sum_teacher = of_row
    if ENTROPY:
        total += log1p(sum_teacher - 1.0)
    total = tl.where(sum_student == 0.0, INF, total) + 0.0 * (sum_student + sum_teacher)  # NaN: as in grad
    return tl.where(sum_teacher == 0.0, 0.0, total * scale)


@triton.jit
def rows_to_read(mask, row, live):
    read = live
    if mask is not None:
        read = live & (tl.load(mask + row, mask=live, other=0) != 0)
    return read


@triton.jit
def whole_gradient(slope, p, sum_slope, of_row, scale, s, hard, columns, HARD: tl.constexpr):
    """The gradient of a tile, of both losses where rows have targets."""
    grad = gradient_of(slope, p, sum_slope, of_row, scale)
    if HARD:
        grad = tl.where(hard[6][:, None] == 0.0, 0.0, grad)  # what has no weight is left out, be it NaN
        grad += hard_gradient(s, of_row, hard, columns)
    return grad


@triton.jit
def walk_for_statistics(
    inputs, a, b, target, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr
):  # fmt: skip
    """of_row of rows longer than a tile; and of those with targets what hard_sums gives."""
    V = inputs[5]
    max_hard, sum_hard = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    logits, logit = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    max_student, sum_student = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    max_teacher, sum_teacher = tl.full((ROWS,), -INF, dtype), tl.zeros((ROWS,), dtype)
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_last")
        max_student, sum_student = _accumulate(s, max_student, sum_student, a)
        max_teacher, sum_teacher = _accumulate(t, max_teacher, sum_teacher, a - b)
        if HARD:
            before = finite(max_hard)
            max_hard, sum_hard = _accumulate(s, max_hard, sum_hard, tl.full((ROWS,), 1.0, dtype))
            maximum = finite(max_hard)
            logits += first * (before - maximum)
            logits += tl.sum(tl.where((columns < V)[None, :], s - maximum[:, None], 0.0), 1)
            logit += tl.sum(tl.where(columns[None, :] == target[:, None], s, 0.0), 1)
    of_row = (a, b, finite(max_student), sum_student, finite(max_teacher), sum_teacher)
    return of_row, sum_hard, logits, logit


@triton.jit
def walk_for_loss(
    inputs, of_row, parameter, grad, grad_step, live, grad_scale, hard,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, IS_CENTRED: tl.constexpr,
    SAME_TEMPERATURE: tl.constexpr, HARD: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of losses and slopes over rows longer than a tile; the gradient where it needs no sum of slopes."""
    V = inputs[5]
    total, sum_slope = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    last = (V - 1) // BLOCK * BLOCK
    for first in range(0, V, BLOCK):
        columns = last - first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_first" if IS_CENTRED else "evict_last")
        losses, slopes, p = visit(s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE)
        total += tl.sum(losses, 1)
        if not IS_CENTRED:
            sum_slope += tl.sum(slopes, 1)
        elif grad is not None:
            values = whole_gradient(slopes, p, sum_slope, of_row, grad_scale, s, hard, columns, HARD)
            store(grad, grad_step, live, V, columns, values)
    return total, sum_slope


@triton.jit
def walk_for_grad(
    inputs, of_row, parameter, grad, grad_step, live, grad_scale, sum_slope, hard,
    DIVERGENCE: tl.constexpr, OF_ROWS: tl.constexpr, ENTROPY: tl.constexpr, SAME_TEMPERATURE: tl.constexpr,
    HARD: tl.constexpr, dtype: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    V = inputs[5]
    for first in range(0, V, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        s, t = load(inputs, columns, dtype, "evict_first")
        _losses, slopes, p = visit(s, t, of_row, parameter, DIVERGENCE, OF_ROWS, ENTROPY, SAME_TEMPERATURE)
        values = whole_gradient(slopes, p, sum_slope, of_row, grad_scale, s, hard, columns, HARD)
        store(grad, grad_step, live, V, columns, values)


@triton.jit
def store_statistics(stats, row, live, of_row, sum_slope, sum_hard):
    _a, _b, max_student, sum_student, max_teacher, sum_teacher = of_row
    stats += row.to(tl.int64) * 6
    tl.store(stats, max_student.to(tl.float64), mask=live)
    tl.store(stats + 1, sum_student.to(tl.float64), mask=live)
    tl.store(stats + 2, max_teacher.to(tl.float64), mask=live)
    tl.store(stats + 3, sum_teacher.to(tl.float64), mask=live)
    tl.store(stats + 4, tl.where(sum_teacher == 0.0, 0.0, sum_slope).to(tl.float64), mask=live)
    tl.store(stats + 5, sum_hard.to(tl.float64), mask=live)
