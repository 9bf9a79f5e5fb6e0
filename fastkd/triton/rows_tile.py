"""What the kernels of the rows schedule do with a tile of classes: load it, sum over it, and write its gradient."""

import triton
import triton.language as tl

from .divergences import acceptance_of_row, log1p

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))

# In the kernels
#   HARD    0: rows have no target; else 1 + the number of the loss that they have of it, see TargetLoss in
#           csrc/common/rows_params.h: from 2 on the target is parted from the other classes, whose sums of_row has
#   hard    of rows with a target, [ROWS] each: the target, which rows have one, and what they are multiplied by in the
#           gradient; the sum of e^(z - max) of the student; smoothing; V; the weight of the soft loss; and how many
#           classes a row has in all: where more than V, others may have the target, which is negative here
#   inputs  what load needs: pointers to the rows [ROWS] and the step between classes, for
#           student and teacher; which rows to read [ROWS]; V
#   GIVEN   what a divergence is given of a class: 0 p and q, 1 their logarithms, 2 log odds; 3: p and q, and its loss
#           is made of two sums
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
def loss_scales(
    of_loss, T, parameter, second_rows, second_stride, second, target, hard_weight, soft_weight, smoothing,
    in_all, row, read, dtype: tl.constexpr, T_SQUARED: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Of each row: what its soft loss is multiplied by, and its hard loss; and of_target: the target, the smoothing,
    the weight of the soft loss, and how many classes there are in all. Without targets numbers that nobody reads, and a
    weight of 1."""
    soft = tl.full(row.shape, 1.0, dtype)
    hard, smoothed, classes = of_loss, soft, row
    if HARD:
        classes = tl.load(target + row, mask=read, other=0)
    if HARD == 1:
        hard = of_loss * per_row(None, 0, hard_weight, row, read, dtype)
        soft = per_row(None, 0, soft_weight, row, read, dtype)
        smoothed = per_row(None, 0, smoothing, row, read, dtype)
    if HARD == 2:
        hard = of_loss * per_row(second_rows, second_stride, second, row, read, dtype)
        if T_SQUARED:
            hard *= T * T
    if HARD >= 2:
        of_loss *= parameter.to(dtype)
    if T_SQUARED:
        of_loss *= T * T
    return of_loss * soft, hard, (classes, smoothed, soft, per_row(None, 0, in_all, row, read, dtype))


@triton.jit
def functor_parameters(parameter, second_rows, second_stride, second, row, read, GIVEN: tl.constexpr):
    """What a divergence is made of: its parameter, or both where it is given logarithms, as that has two."""
    found = parameter[:, None]
    if GIVEN == 1:
        found = (found, per_row(second_rows, second_stride, second, row, read, tl.float64)[:, None])
    return found


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
def _logits_of(x, target, columns):
    return tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1)


@triton.jit
def load_parted(inputs, columns, target, dtype: tl.constexpr, EVICT: tl.constexpr, HARD: tl.constexpr):
    """The same without the rows' targets, where they are parted from the other classes; and the targets' logits."""
    s, t = load(inputs, columns, dtype, EVICT)
    logit = tl.zeros(target.shape, dtype)
    teacher_logit = logit
    if HARD:
        logit = _logits_of(s, target, columns)
    if HARD >= 2:
        teacher_logit = _logits_of(t, target, columns)
        out = columns[None, :] == target[:, None]
        s, t = tl.where(out, -INF, s), tl.where(out, -INF, t)
    return s, t, logit, teacher_logit


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
def _log_odds_of(s, t, of_row, SAME_TEMPERATURE: tl.constexpr):
    a, b = of_row[0][:, None], of_row[1][:, None]
    w = (s - t) * a
    if not SAME_TEMPERATURE:
        w += tl.where(t == -INF, 0.0, t * b)
    return s * a, t * (a - b), w


@triton.jit
def _log_of(z, maximum, total, inv_temperature):
    """The logarithm of a side's probability."""
    log_sum = tl.where(total == 0.0, 0.0, log1p(total - 1.0))
    return (z - maximum[:, None]) * inv_temperature[:, None] - log_sum[:, None]


@triton.jit
def probabilities(s, t, of_row, SAME_TEMPERATURE: tl.constexpr, LOGS: tl.constexpr):
    """p, q and w of a tile, or the logarithms of p and q. A class that is not there has p = q = 0."""
    a, b, max_student, sum_student, max_teacher, sum_teacher = of_row
    if LOGS:
        p, q = _log_of(s, max_student, sum_student, a), _log_of(t, max_teacher, sum_teacher, a - b)
    else:
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
    GIVEN: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] each: loss, slope and p of the classes of a tile; and what a second sum is of."""
    if GIVEN == 2:
        p, q, w = _log_odds_of(s, t, of_row, SAME_TEMPERATURE)
    else:
        p, q, w = probabilities(s, t, of_row, SAME_TEMPERATURE, GIVEN == 1)
    loss, slope = DIVERGENCE(p, q, w, parameter, OF_ROWS)
    second = tl.minimum(p, q)
    if GIVEN == 1:
        p = tl.exp(p)
    if GIVEN == 2:  # a gradient without a softmax has no use for it
        p = tl.zeros_like(p)
    if ENTROPY:  # the teacher's entropy is this and log sum_teacher
        a, b, _max_student, _sum_student, max_teacher, _sum_teacher = of_row
        loss += tl.where(q == 0.0, 0.0, q * ((max_teacher[:, None] - t) * (a - b)[:, None]))
    return loss, slope, p, second


@triton.jit
def sums_of_softmax(of_row, read, GIVEN: tl.constexpr):
    """Where every class is by itself none is impossible, and no sum over them is asked for."""
    a, b, max_student, sum_student, max_teacher, sum_teacher = of_row
    if GIVEN == 2:
        sum_student = tl.where(read, 1.0, 0.0).to(a.dtype)
        sum_teacher = sum_student
    return a, b, max_student, sum_student, max_teacher, sum_teacher


@triton.jit
def row_of_sums(total, sum_slope, second, factor, grad_scale, GIVEN: tl.constexpr):
    """What a row's sums come to; the factor is what its slopes are multiplied by."""
    if GIVEN == 3:
        total, factor = acceptance_of_row(total, second)
        sum_slope = tl.where(total == INF, INF, sum_slope)
        grad_scale *= factor
    return total, sum_slope, factor, grad_scale


@triton.jit
def gradient_of(slope, p, sum_slope, of_row, scale):
    """The gradient of a tile. None where a row has no possible class, nor out of an infinite loss:
    no finite step changes that."""
    _a, _b, _max_student, sum_student, _max_teacher, sum_teacher = of_row
    nothing = (sum_teacher == 0.0) | ((sum_student == 0.0) & (sum_teacher > 0.0)) | (sum_slope == INF)
    scale += 0.0 * (sum_student + sum_teacher)  # a NaN anywhere in a row is one everywhere in it
    return tl.where(nothing[:, None], 0.0, (slope - p * sum_slope[:, None]) * scale[:, None])


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
def store_statistics(stats, row, live, of_row, sum_slope, sum_hard, factor):
    _a, _b, max_student, sum_student, max_teacher, sum_teacher = of_row
    stats += row.to(tl.int64) * 7
    tl.store(stats, max_student.to(tl.float64), mask=live)
    tl.store(stats + 1, sum_student.to(tl.float64), mask=live)
    tl.store(stats + 2, max_teacher.to(tl.float64), mask=live)
    tl.store(stats + 3, sum_teacher.to(tl.float64), mask=live)
    tl.store(stats + 4, tl.where(sum_teacher == 0.0, 0.0, sum_slope).to(tl.float64), mask=live)
    tl.store(stats + 5, sum_hard.to(tl.float64), mask=live)
    tl.store(stats + 6, factor.to(tl.float64), mask=live)
