"""Divergences class by class: the twins of csrc/math/divergence.h, which has their derivation.

With w = log p - log q all are written so that nothing cancels when student and teacher agree.
"""

import triton
import triton.language as tl

# The numbers are those of csrc/common/params.h.
KL_DIV, SOFT_CROSS_ENTROPY, REVERSE_KL_DIV, JS_DIV = (tl.constexpr(number) for number in range(4))
CENTRED = (KL_DIV, SOFT_CROSS_ENTROPY)  # the slopes add up to 0: their sum need not be known


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
def atanh_series(x2):
    """atanh(x) / x as a function of x^2, for |x| < 0.21."""
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
    series = series * x2 + 1.0 / 3.0
    return series * x2 + 1.0


@triton.jit
def log_of(total, x):
    """log(total), total = 1 + x > 0, right to a few ulp of itself however small x or the total is,
    each given as exactly as it is known. Of a NaN: anything."""
    # total = 2^exponent * fraction, with the fraction in [2/3, 4/3)
    if x.dtype == tl.float64:
        bits = total.to(tl.int64, bitcast=True) - 0x3FE5555555555555
        exponent = bits >> 52
        fraction = ((bits & 0x000FFFFFFFFFFFFF) + 0x3FE5555555555555).to(tl.float64, bitcast=True)
    else:
        bits = total.to(tl.int32, bitcast=True) - 0x3F2AAAAB
        exponent = bits >> 23
        fraction = ((bits & 0x007FFFFF) + 0x3F2AAAAB).to(tl.float32, bitcast=True)
    above = tl.where(exponent == 0, x, fraction - 1.0)  # x itself, not what is left of it in 1 + x
    ratio = above / (2.0 + above)
    return exponent.to(x.dtype) * 0.69314718055994530942 + 2.0 * ratio * atanh_series(ratio * ratio)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, right to a few ulp of itself however small x is."""
    return log_of(1.0 + x, x)


@triton.jit
def loss_and_slope(p, q, w, beta, rest, DIVERGENCE: tl.constexpr):
    """What a class adds to its row's loss, and d loss / d log p up to a multiple of p.

    w is +-inf where one of p and q is 0, NaN where both are; what p = q = 0 adds is 0. rest = 1 - beta.
    """
    near = w * w < 0.09  # where e^w - 1 - w would cancel and its series does not
    if DIVERGENCE == REVERSE_KL_DIV:
        endless = w == float("inf")  # q = 0, also for a p so small that it became 0
        slope = tl.where(p == 0.0, tl.where(endless, w, 0.0), p * w)
        loss = tl.where(near, p * (w * w * bregman_series(-w)), (q - p) + p * w)
        loss = tl.where(p == 0.0, tl.where(endless, w, q), loss)
    elif DIVERGENCE == JS_DIV:
        # Of u = log(m / q) and v = log(m / p) the one <= 0 is log(m / the larger of p and q),
        # the other lies |w| above it.
        student_larger = w > 0.0
        distance = tl.abs(w)
        larger = tl.where(student_larger, p, q)
        m = (beta * q + rest * p) / larger
        less = distance * (distance * bregman_series(-distance) - 1.0)
        share = tl.where(student_larger, beta, rest)
        lower = log_of(tl.where(near, 1.0 + share * less, m), tl.where(near, share * less, m - 1.0))
        upper = lower + distance
        u = tl.where(student_larger, upper, lower)
        v = tl.where(student_larger, lower, upper)
        qu = tl.where(q == 0.0, 0.0, q * u)
        slope = -rest * tl.where(p == 0.0, 0.0, p * v)
        loss = beta * q * (u * u * bregman_series(u)) + rest * p * (v * v * bregman_series(v))
        loss = tl.where(near, loss, slope - beta * qu)
    else:
        bregman = w * w * bregman_series(w)
        loss = tl.where(near, q * bregman, (p - q) - q * w)
        loss = tl.where(q == 0.0, p, loss)  # never 0 * inf
        slope = tl.where(near, q * (w + bregman), p - q)
    return loss, slope
