"""What the kernels of the rows schedule do with rows that have a target: the hard loss, and both losses together. Names
are those of rows_tile."""

import triton
import triton.language as tl

from .divergences import log1p, two_classes
from .rows_tile import INF, exp, gradient_of, row_loss


@triton.jit
def hard_sums(s, t, maximum, max_teacher, columns, V, HARD: tl.constexpr):
    """Of a tile: the student's sum at temperature 1, and the sum of z - max. Where the target is parted, the teacher's
    sum in its place."""
    total = tl.zeros(maximum.shape, s.dtype)
    logits = total
    if HARD:
        one = tl.full(maximum.shape, 1.0, s.dtype)
        total = tl.sum(exp(s, maximum, one), 1)
        if HARD >= 2:
            logits = tl.sum(exp(t, max_teacher, one), 1)
        else:
            logits = tl.sum(tl.where((columns < V)[None, :], s - maximum[:, None], 0.0), 1)
    return total, logits


@triton.jit
def _log_odds(below_max, total):
    """Of a class that lies so far above the others' maximum, whose exponentials add up to the total."""
    return tl.where(total == 0.0, INF, below_max - log1p(total - 1.0))


@triton.jit
def target_part(of_row, sum_hard, sum_teacher_hard, logit, teacher_logit, HARD: tl.constexpr):
    """What a target that is parted from the others has in its row's loss, and the factor of its gradient; of another
    0 and 1."""
    part = tl.zeros(logit.shape, logit.dtype)
    factor = part + 1.0
    if HARD >= 2:
        part, factor = _parted(of_row, sum_hard, sum_teacher_hard, logit, teacher_logit, HARD)
    return part, factor


@triton.jit
def _parted(of_row, sum_hard, sum_teacher_hard, logit, teacher_logit, HARD: tl.constexpr):
    a, b, max_student, sum_student, max_teacher, sum_teacher = of_row
    nan = float("nan")
    student = tl.where(logit == INF, nan, logit) - max_student
    teacher = tl.where(teacher_logit == INF, nan, teacher_logit) - max_teacher
    if HARD == 2:
        of_student = _log_odds(student * a, sum_student)
        of_teacher = _log_odds(teacher * (a - b), sum_teacher)
        # w of the target as of another class: see _probabilities
        shift = max_student - max_teacher
        shifted = tl.abs(shift) > 4.0
        difference = tl.where(shifted, student - teacher, logit - teacher_logit) - tl.where(shifted, 0.0, shift)
        at_other = tl.where(teacher_logit == -INF, 0.0, teacher * b)
        difference = difference * a + at_other - log1p((sum_student - sum_teacher) / sum_teacher)
        loss, slope, _minus_log, _q, _p = two_classes(of_student, of_teacher, difference)
        factor = -slope
    else:
        of_student = _log_odds(student, sum_hard)
        of_teacher = _log_odds(teacher, sum_teacher_hard)
        _loss, _slope, minus_log, q, p_rest = two_classes(of_student, of_teacher, of_student - of_teacher)
        loss, factor = tl.where(q == 0.0, 0.0, q * minus_log), q * p_rest
    no_student = (sum_student == 0.0) & (logit == -INF)
    no_teacher = (sum_teacher == 0.0) & (teacher_logit == -INF)
    loss = tl.where(no_teacher, 0.0, tl.where(no_student, INF, loss))
    return loss, tl.where(no_teacher | no_student, 0.0, factor)


@triton.jit
def hard_gradient(s, of_row, hard, columns, HARD: tl.constexpr):
    """What the hard loss adds to the gradient of a tile. Nothing where no class is possible; NaN where the target is
    none of the classes: as loud as a device may be that cannot raise."""
    target, has_target, scale, sum_hard, smoothing, V, _soft_weight, in_all = hard
    max_student = of_row[2]
    inv_temperature = tl.full(max_student.shape, 1.0, s.dtype)
    if HARD == 2:
        inv_temperature, sum_hard = of_row[0], of_row[3]
    scale = tl.where(sum_hard == 0.0, 0.0, scale)
    scale = tl.where(((target >= 0) | (in_all > V)) & (target < V), scale, float("nan"))
    scale = tl.where(has_target, scale, 0.0)[:, None]
    p = exp(s, max_student, inv_temperature)
    p *= tl.where(sum_hard == 0.0, 0.0, 1.0 / sum_hard)[:, None]
    is_target = columns[None, :] == target[:, None]
    if HARD == 1:
        everywhere, of_target = (smoothing / in_all)[:, None] * scale, (1.0 - smoothing)[:, None] * scale
        values = p * scale - everywhere - tl.where(is_target, of_target, 0.0)
    else:
        values = p * scale - tl.where(is_target, scale, 0.0)
    return values


@triton.jit
def hard_loss(of_row, hard, hard_weight, scale, logits, logit):
    """Cross-entropy with the target. With a weight of 0 it is left out, however large it is."""
    target, has_target, _scale, sum_hard, smoothing, V, _soft_weight, _in_all = hard
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
def whole_loss(
    total, part, of_row, soft_scale, hard, hard_weight, hard_scale, logits, logit,
    ENTROPY: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """The loss of a row, of both parts where it has a target. A part of weight 0 is left out, however large it is."""
    total = row_loss(total, of_row, soft_scale, ENTROPY)
    if HARD == 1:
        total = tl.where(hard[6] == 0.0, 0.0, total)
        total += hard_loss(of_row, hard, hard_weight, hard_scale, logits, logit)
    if HARD >= 2:
        target, has_target, V = hard[0], hard[1], hard[5]
        total = tl.where(soft_scale == 0.0, 0.0, total)
        part = tl.where(hard_scale == 0.0, 0.0, part * hard_scale)
        part = tl.where((target >= 0) & (target < V), part, float("nan"))
        total += tl.where(has_target, part, 0.0)
    return total


@triton.jit
def whole_gradient(slope, p, sum_slope, of_row, scale, s, hard, columns, HARD: tl.constexpr):
    """The gradient of a tile, of both losses where rows have targets."""
    grad = gradient_of(slope, p, sum_slope, of_row, scale)
    if HARD:
        grad = tl.where(hard[6][:, None] == 0.0, 0.0, grad)  # what has no weight is left out, be it NaN
        grad += hard_gradient(s, of_row, hard, columns, HARD)
    return grad
