"""Divergences class by class: the same mathematics as in csrc/math/divergences, which have the derivation.

With w = log p - log q all are written so that nothing cancels when student and teacher agree.
"""

import triton
import triton.language as tl

from .._divergences import NUMBERS


@triton.jit
def bregman_series(w):
    """(e^w - 1 - w) / w^2 for |w| < 0.3, where e^w - 1 - w itself would cancel."""
    if w.dtype == tl.float64:
        series = w * (1.0 / 87178291200.0) + 1.0 / 6227020800.0
        series = series * w + 1.0 / 479001600.0
        series = series * w + 1.0 / 39916800.0
        series = series * w + 1.0 / 3628800.0
        series = series * w + 1.0 / 362880.0
        series = series * w + 1.0 / 40320.0
        series = series * w + 1.0 / 5040.0
    else:
        series = tl.full(w.shape, 1.0 / 5040.0, tl.float32)
    series = series * w + 1.0 / 720.0
    series = series * w + 1.0 / 120.0
    series = series * w + 1.0 / 24.0
    series = series * w + 1.0 / 6.0
    return series * w + 0.5


@triton.jit
def bregman_series_to_0_7(w):
    """The same for |w| < 0.7."""
    w2 = w * w
    if w.dtype == tl.float64:
        series = w * (1.0 / 355687428096000.0) + 1.0 / 20922789888000.0
        series = series * w + 1.0 / 1307674368000.0
        return bregman_series(w) + w2 * w2 * w2 * (w2 * w2 * w2) * w * series
    else:
        return bregman_series(w) + w2 * w2 * w2 * (w * (1.0 / 362880.0) + 1.0 / 40320.0)


@triton.jit
def atanh_tail(x2):
    """(atanh(x) / x - 1) / x^2 as a function of x^2, for |x| <= 0.2."""
    if x2.dtype == tl.float64:
        series = x2 * (1.0 / 23.0) + 1.0 / 21.0
        series = series * x2 + 1.0 / 19.0
        series = series * x2 + 1.0 / 17.0
        series = series * x2 + 1.0 / 15.0
        series = series * x2 + 1.0 / 13.0
        series = series * x2 + 1.0 / 11.0
        series = series * x2 + 1.0 / 9.0
    else:
        series = tl.full(x2.shape, 1.0 / 9.0, tl.float32)
    series = series * x2 + 1.0 / 7.0
    series = series * x2 + 1.0 / 5.0
    return series * x2 + 1.0 / 3.0


@triton.jit
def atanh_tail_to_third(x2):
    """The same for |x| <= 1 / 3."""
    x4 = x2 * x2
    if x2.dtype == tl.float64:
        series = x2 * (1.0 / 35.0) + 1.0 / 33.0
        series = series * x2 + 1.0 / 31.0
        series = series * x2 + 1.0 / 29.0
        series = series * x2 + 1.0 / 27.0
        series = series * x2 + 1.0 / 25.0
        return atanh_tail(x2) + x4 * x4 * (x4 * x4) * (x4 * x2) * series
    else:
        return atanh_tail(x2) + x4 * x4 * (x2 * (1.0 / 13.0) + 1.0 / 11.0)


@triton.jit
def log_ratio(total, a, x, near):
    """log(total / a) for total = a + x > 0, right to a few ulp of itself however small x or the total is, each given as
    exactly as it is known; and its r and tail, with log = exponent log 2 + 2 r (1 + r^2 tail). near: the total is
    between 2 / 3 and 3 / 2 of a. Of 0 and 0: 0; of a NaN: anything."""
    # total = 2^exponent a fraction: the difference of the bit patterns is log2 to within 0.09, rounded
    if x.dtype == tl.float64:
        bits = total.to(tl.int64, bitcast=True) - a.to(tl.int64, bitcast=True) + 0x0008000000000000
        exponent = tl.where(near, 0, bits >> 52)
        base = a * ((exponent + 1023) << 52).to(tl.float64, bitcast=True)
        least = 2.2250738585072014e-308
    else:
        bits = total.to(tl.int32, bitcast=True) - a.to(tl.int32, bitcast=True) + 0x00400000
        exponent = tl.where(near, 0, bits >> 23)
        base = a * ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        least = 1.1754943508222875e-38
    above = tl.where(exponent == 0, x, total - base)  # x itself, not what is left of it in the total
    r = above / (total + (base + least))
    tail = atanh_tail(r * r)
    return exponent.to(x.dtype) * 0.69314718055994530942 + 2.0 * (r + r * (r * r) * tail), r, tail


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, right to a few ulp of itself however small x is."""
    log, _r, _tail = log_ratio(1.0 + x, tl.full(x.shape, 1.0, x.dtype), x, False)
    return log


@triton.jit
def is_near(w):
    """Where e^w - 1 - w would cancel and its series does not."""
    return w * w < 0.09


@triton.jit
def kl_div(p, q, w, parameter, OF_ROWS: tl.constexpr):
    bregman = w * w * bregman_series(w)
    loss = tl.where(is_near(w), q * bregman, (p - q) - q * w)
    loss = tl.where(q == 0.0, p, loss)  # never 0 * inf
    slope = tl.where(is_near(w), q * (w + bregman), p - q)
    return loss, slope


soft_cross_entropy = kl_div  # and the teacher's entropy, which the kernels add


@triton.jit
def reverse_kl_div(p, q, w, parameter, OF_ROWS: tl.constexpr):
    endless = w == float("inf")  # q = 0, also for a p so small that it became 0
    slope = tl.where(p == 0.0, tl.where(endless, w, 0.0), p * w)
    loss = tl.where(is_near(w), p * (w * w * bregman_series(-w)), (q - p) + p * w)
    loss = tl.where(p == 0.0, tl.where(endless, w, q), loss)
    return loss, slope


@triton.jit
def _inside(share, dtype: tl.constexpr):
    """A share of a mixture. Not 0, so that m is not where p or q is not. Outside of [0, 1], and of NaN: NaN."""
    least = 2.2250738585072014e-308 if dtype == tl.float64 else 1.1754943508222875e-38
    share = share.to(dtype)
    return tl.where(share > least, share, tl.where(share >= 0.0, tl.full((1, 1), least, dtype), float("nan")))


@triton.jit
def js_div(p, q, w, parameter, OF_ROWS: tl.constexpr):
    beta, rest = _inside(parameter, p.dtype), _inside(1.0 - parameter, p.dtype)
    near = is_near(w)
    student_larger = w > 0.0
    by_student = near | student_larger
    x = tl.where(student_larger, beta * (q - p), rest * (p - q))
    x = tl.where(near, beta * p * (w * (w * bregman_series(-w) - 1.0)), x)
    log, r, tail = log_ratio(beta * q + rest * p, tl.where(by_student, p, q), x, near)
    # finite, so that 0 times it is 0; of NaN, where p = q = 0, anything
    finite = tl.where(w < 1e30, tl.where(w > -1e30, w, -1e30), 1e30)
    u, v = tl.where(by_student, log + finite, log), tl.where(by_student, log, log - finite)
    slope = -rest * p * v
    loss = rest * r * (x - 2.0 * p * (r * r) * tail) + beta * q * (u * u * bregman_series(u))
    loss = tl.where(near, loss, slope - beta * q * u)
    if OF_ROWS:  # by convention the ends are others
        forward_loss, forward_slope = kl_div(p, q, w, parameter, False)
        reverse_loss, reverse_slope = reverse_kl_div(p, q, w, parameter, False)
        loss = tl.where(parameter == 0.0, forward_loss, tl.where(parameter == 1.0, reverse_loss, loss))
        slope = tl.where(parameter == 0.0, forward_slope, tl.where(parameter == 1.0, reverse_slope, slope))
    return loss, slope


@triton.jit
def symmetric_kl_div(p, q, w, parameter, OF_ROWS: tl.constexpr):
    forward_loss, forward_slope = kl_div(p, q, w, parameter, False)
    reverse_loss, reverse_slope = reverse_kl_div(p, q, w, parameter, False)
    student, rest = _inside(parameter, p.dtype), _inside(1.0 - parameter, p.dtype)
    loss, slope = rest * forward_loss + student * reverse_loss, rest * forward_slope + student * reverse_slope
    if OF_ROWS:  # 0 times +inf is not wanted at the ends
        loss = tl.where(parameter == 0.0, forward_loss, tl.where(parameter == 1.0, reverse_loss, loss))
        slope = tl.where(parameter == 0.0, forward_slope, tl.where(parameter == 1.0, reverse_slope, slope))
    return loss, slope


@triton.jit
def skewed(own, other, w, share, rest):
    """Of KL(own || m), m = share other + rest own: m, m - own, log(m / own), and what a class adds. w: log other - log
    own."""
    x = share * tl.where(is_near(w), own * (w + w * w * bregman_series(w)), other - own)
    m = share * other + rest * own
    close = (3.0 * x < own) & (-3.0 * x < own)
    by_other = (w > 0.0) & (close == 0)
    log, r, tail = log_ratio(m, tl.where(by_other, other, own), tl.where(by_other, rest * (own - other), x), close)
    # finite, so that 0 times it is 0; of NaN, where p = q = 0, anything
    finite = tl.where(w < 1e30, tl.where(w > -1e30, w, -1e30), 1e30)
    u = tl.where(by_other, log + finite, log)
    loss = tl.where(close, r * (x - 2.0 * own * (r * r) * tail), x - own * u)
    return m, x, u, loss


@triton.jit
def _over(x, m):
    """x / m, 0 where both are."""
    least = 2.2250738585072014e-308 if m.dtype == tl.float64 else 1.1754943508222875e-38
    return x / (m + least)


@triton.jit
def skew_kl_div(p, q, w, parameter, OF_ROWS: tl.constexpr):
    teacher, student = _inside(parameter, p.dtype), _inside(1.0 - parameter, p.dtype)
    m, x, _u, loss = skewed(q, p, w, student, teacher)
    slope = student * p * _over(x, m)
    if OF_ROWS:  # by convention the end is another
        end_loss, end_slope = kl_div(p, q, w, parameter, False)
        loss, slope = tl.where(parameter == 0.0, end_loss, loss), tl.where(parameter == 0.0, end_slope, slope)
    return loss, slope


@triton.jit
def skew_reverse_kl_div(p, q, w, parameter, OF_ROWS: tl.constexpr):
    student, teacher = _inside(parameter, p.dtype), _inside(1.0 - parameter, p.dtype)
    m, x, v, loss = skewed(p, q, -w, teacher, student)
    slope = student * p * _over(x, m) - p * v
    if OF_ROWS:  # by convention the end is another
        end_loss, end_slope = reverse_kl_div(p, q, w, parameter, False)
        loss, slope = tl.where(parameter == 0.0, end_loss, loss), tl.where(parameter == 0.0, end_slope, slope)
    return loss, slope


@triton.jit
def total_variation(p, q, w, parameter, OF_ROWS: tl.constexpr):
    difference = tl.where(is_near(w), q * (w + w * w * bregman_series(w)), p - q)
    slope = tl.where(w > 0.0, 0.5 * p, tl.where(w < 0.0, -0.5 * p, 0.0))
    slope = tl.where((w > 0.0) | (w <= 0.0), slope, p - q)  # NaN where one of them is, 0 where both are 0
    return 0.5 * tl.abs(difference), slope


@triton.jit
def negative_log_acceptance(p, q, w, parameter, OF_ROWS: tl.constexpr):
    loss, _slope = total_variation(p, q, w, parameter, OF_ROWS)
    slope = tl.where(w < 0.0, -p, 0.0)
    return loss, tl.where((w > 0.0) | (w <= 0.0), slope, p - q)


@triton.jit
def acceptance_of_row(variation, acceptance):
    """What the sums of a row's classes come to, and what its slopes are multiplied by."""
    none = acceptance == 0.0
    safe = tl.where(none, 1.0, acceptance)
    log_accepted, _r, _tail = log_ratio(safe, tl.full(safe.shape, 1.0, safe.dtype), safe - 1.0, False)
    loss = tl.where(variation < 0.5, -log1p(-variation), -log_accepted)
    loss, factor = tl.where(none, float("inf"), loss), tl.where(none, 0.0, 1.0 / safe)
    known = (variation < 0.5) | (variation >= 0.5)  # no NaN
    return tl.where(known, loss, variation), tl.where(known, factor, variation)


@triton.jit
def _inverse(x):
    return tl.where(x > 0.0, 1.0 / tl.where(x > 0.0, x, 1.0), 0.0)


@triton.jit
def _growth(x):
    """(e^x - 1) / x, |x| < 0.3"""
    return 1.0 + x * bregman_series(x)


@triton.jit
def alpha_beta_div(log_p, log_q, w, parameter, OF_ROWS: tl.constexpr):
    alpha, beta = parameter
    dtype: tl.constexpr = log_p.dtype
    TERMS: tl.constexpr = 13 if dtype == tl.float64 else 7
    a, b = alpha.to(dtype), beta.to(dtype)
    s = (alpha + beta).to(dtype)
    over_a, over_b, over_s = _inverse(a), _inverse(b), _inverse(s)
    # not -inf, so that 0 times it is 0; of a NaN it stays
    log_p, log_q = tl.where(log_p < -1e30, -1e30, log_p), tl.where(log_q < -1e30, -1e30, log_q)
    none = (log_p == -1e30) & (log_q == -1e30)
    of_p, of_q, both = tl.exp(s * log_p), tl.exp(s * log_q), tl.exp(a * log_q + b * log_p)
    near = (s * w) * (s * w) < 0.09
    z = tl.where(near, w, 0.0)
    series, step, factorial = tl.zeros_like(w), z * z, 2.0
    products = tl.full((1, 1), 1.0, dtype)
    power = products
    for k in tl.static_range(TERMS):
        series += step * (products / factorial)
        step *= z
        power *= b
        products = products * s + power
        factorial *= k + 3.0
    x, y = a * w, -b * w
    forth = tl.where(a > 0.0, (of_p - both) * over_a, tl.where(w > 0.0, float("inf"), 0.0))
    forth = tl.where(x * x < 0.09, both * w * _growth(x), forth)
    back = tl.where(b > 0.0, (of_q - both) * over_b, tl.where(w < 0.0, float("inf"), 0.0))
    back = tl.where(y * y < 0.09, -(both * w * _growth(y)), back)
    of_sums = (of_p - of_q) * over_s
    far = tl.where(b < a, (back + of_sums) * over_a, (forth - of_sums) * over_b)
    endless = (s == 0.0) & (tl.abs(w) == float("inf"))
    loss = tl.where(near, of_q * series, tl.where(s == 0.0, w * w, far))
    slope = tl.where(endless, float("inf"), forth)
    return tl.where(none, 0.0, loss), tl.where(none, 0.0, slope)


@triton.jit
def bernoulli_kl_div(a, b, d, parameter, OF_ROWS: tl.constexpr):
    loss, slope, _minus_log, _q, _p = two_classes(a, b, d)
    return loss, slope


non_target_kl = kl_div  # and the teacher's entropy, where the loss wants it


@triton.jit
def two_classes(a, b, d):
    """See csrc/math/two_classes.h. Of coins with log odds a of the student and b of the teacher, d = a - b: KL(q || p),
    its derivative by a, -log p of the one class, q of it, and p of the rest."""
    exchanged = b > 0.0
    against = tl.maximum(-a, 0.0)
    a, b, d = tl.where(exchanged, -a, a), tl.where(exchanged, -b, b), tl.where(exchanged, -d, d)
    d = tl.where(d - d == 0.0, d, a - b)  # where a side is certain of a class, the row's others have no difference
    x, y = tl.exp(-tl.abs(a)), tl.exp(b)
    over = 1.0 / ((1.0 + x) * (1.0 + y))
    likelier = (1.0 + y) * over
    p, p_rest = tl.where(a > 0.0, likelier, x * likelier), tl.where(a > 0.0, x * likelier, likelier)
    q_rest = (1.0 + x) * over
    q = y * q_rest
    close = d * d < 0.49
    w = tl.where(close, d, 0.0)
    beyond = w * w * bregman_series_to_0_7(w)
    grown = w + beyond
    slope = tl.where(close, q * p_rest * grown, p - q)
    of_u = y * grown
    r = tl.where(close, of_u, x - y) / ((1.0 + y) + tl.where(close, (1.0 + y) + of_u, 1.0 + x))
    tail = 2.0 * r * (r * r) * atanh_tail_to_third(r * r)
    of_teacher, of_both = tl.where(q > 0.0, q * b, 0.0), tl.where(q > 0.0, q * d, 0.0)  # never 0 * inf
    far = tl.where(a > 0.0, a * q_rest + of_teacher, -of_both) + (2.0 * r + tail)
    loss = tl.where(close, q * beyond - q * grown * r + tail, far)
    slope = tl.where(exchanged, -slope, slope)
    q_one, p_rest = tl.where(exchanged, q_rest, q), tl.where(exchanged, p, p_rest)
    r = x / (x + 2.0)
    minus_log = against + 2.0 * (r + r * (r * r) * atanh_tail_to_third(r * r))
    return loss, slope, minus_log, q_one, p_rest


# By number: each takes p, q, w [ROWS, BLOCK] and the rows' parameter [ROWS or 1, 1] in float64, which may be an end of
# its range where it is one OF_ROWS. What a class adds to its row's loss, and d loss / d log p up to a multiple of p. w
# is +-inf where one of p and q is 0, NaN where both are; what p = q = 0 adds is 0.
FUNCTIONS = [globals()[name] for name in NUMBERS]
