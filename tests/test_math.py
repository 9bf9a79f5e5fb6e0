"""The scalar mathematics of csrc/math, compiled for the host, element by element."""

import numpy as np
import pytest
import torch

from fastkd import _divergences

_testing = pytest.importorskip("fastkd.lib._testing", reason="built with FASTKD_TESTING=1")


def test_half_to_float_is_exact_for_every_pattern():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(_testing.half_to_float(bits), expected)


def test_bfloat16_to_float_is_exact_for_every_pattern():
    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(_testing.bfloat16_to_float(bits), expected)


def floats():
    """Every exponent, both signs, all roundings: random bits, the halves' own values and the midpoints."""
    bits = np.random.default_rng(0).integers(0, 2**32, 2_000_000, dtype=np.uint32).view(np.float32)
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middles = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    around = np.concatenate([np.nextafter(middles.astype(np.float32), s * np.float32(np.inf)) for s in (1, -1)])
    edges = np.array([65504, 65519.99, 65520, 65536, 2**-24, 2**-25, 2**-26, 0.0, -0.0, np.inf, -np.inf], np.float32)
    return np.concatenate([bits, halves, middles.astype(np.float32), around, edges])


@pytest.mark.parametrize("kind", ["half", "bfloat16"])
def test_float_to_half_rounds_to_nearest_even(kind):
    x = floats()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16}[kind]
    out = getattr(_testing, f"float_to_{kind}")(x)
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x)
    np.testing.assert_array_equal(out[~nan], expected[~nan])
    exponent = {"half": 0x7C00, "bfloat16": 0x7F80}[kind]
    assert ((out[nan] & exponent) == exponent).all()
    mantissa = {"half": 0x3FF, "bfloat16": 0x7F}[kind]
    assert ((out[nan] & mantissa) != 0).all()


@pytest.mark.parametrize(("kind", "ulp"), [("float", 2.0**-23), ("double", 2.0**-52)])
@pytest.mark.parametrize("scale", [1.0, 0.36067376, 7.2134752])
def test_exp2_is_as_right_as_its_argument(kind, ulp, scale):
    dtype = {"float": np.float32, "double": np.float64}[kind]
    lowest = {"float": -126, "double": -1022}[kind] / scale
    x = np.linspace(lowest * 0.999, 0, 400_001).astype(dtype)
    k = dtype(scale)
    out = getattr(_testing, f"exp2_{kind}")(x, k)
    exact = np.exp2(x.astype(np.longdouble) * np.longdouble(k))
    # this module is compiled without fused multiply-add: x k is rounded once, by half an ulp of itself
    rounding = 1.5 + np.abs(x * scale) / 2 * np.log(2)
    assert np.max(np.abs(out - exact) / exact / rounding) <= ulp


@pytest.mark.parametrize("kind", ["float", "double"])
def test_exp2_at_the_ends(kind):
    exp2 = getattr(_testing, f"exp2_{kind}")
    dtype = {"float": np.float32, "double": np.float64}[kind]
    assert exp2(dtype(0), dtype(1)) == 1
    assert exp2(dtype(-np.inf), dtype(1)) == 0
    assert exp2(dtype(-1e30), dtype(1)) == 0
    # every NaN stays one, whatever its payload
    payloads = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFC00001, 0x7F800001], np.uint32).view(np.float32).astype(dtype)
    assert np.isnan(exp2(payloads, dtype(1))).all()


@pytest.mark.parametrize(("kind", "ulp"), [("float", 2.0**-23), ("double", 2.0**-52)])
def test_log_ratio_is_right_to_its_last_digits(kind, ulp):
    dtype = {"float": np.float32, "double": np.float64}[kind]
    x = -np.concatenate([np.geomspace(1e-30, 0.3, 100_000), np.linspace(0.3, 1 - 4 * ulp, 100_000)])
    for a in (1.0, 0.7, 3e-5, 1.9e-20):
        scaled = (a * x).astype(dtype)
        scaled = scaled[(scaled > -dtype(a)) & (scaled < 0)]
        out = getattr(_testing, f"log_ratio_{kind}")(dtype(a), scaled)
        exact = np.log1p(scaled.astype(np.longdouble) / np.longdouble(dtype(a)))
        # a sum that is not exact is off by half an ulp of a, which counts where it is small
        rounding = 4 + np.exp(-exact) / np.abs(exact) / 2 * (exact < -0.3)
        assert np.max(np.abs((out - exact) / exact) / rounding) <= ulp


FORWARD, _, REVERSE, JENSEN_SHANNON, SYMMETRIC, SKEW, SKEW_REVERSE, TOTAL_VARIATION = range(8)
COINS = _divergences.NUMBERS["bernoulli_kl_div"]


def classes(dtype):
    """w on both sides of 0, near and far, with p = q e^w."""
    w = np.concatenate([np.linspace(-5, 5, 10_001), np.geomspace(1e-7, 0.3, 1000), -np.geomspace(1e-7, 0.3, 1000)])
    w = w[w != 0].astype(dtype)
    q = np.full_like(w, 0.01)
    p = (q.astype(np.longdouble) * np.exp(w.astype(np.longdouble))).astype(dtype)
    return p, q, w


def bregman(w):
    """e^w - 1 - w in extended precision: by its series, where it would cancel."""
    series = sum(w**n / np.longdouble(np.prod(np.arange(1.0, n + 1))) for n in range(2, 40))
    return np.where(np.abs(w) < 6, series, np.exp(w) - 1 - w)


@pytest.mark.parametrize(("kind", "ulp"), [("float", 2.0**-23), ("double", 2.0**-52)])
@pytest.mark.parametrize(
    ("divergence", "beta"), [(FORWARD, 0), (REVERSE, 0), (JENSEN_SHANNON, 0.5), (JENSEN_SHANNON, 0.01)]
)
def test_divergences_of_a_class(divergence, beta, kind, ulp):
    """Near and far, against extended precision."""
    p, q, w = classes({"float": np.float32, "double": np.float64}[kind])
    loss = getattr(_testing, f"loss_{kind}")(divergence, beta, p, q, w)
    slope = getattr(_testing, f"slope_{kind}")(divergence, beta, p, q, w)
    w, q = w.astype(np.longdouble), q.astype(np.longdouble)
    p, b = q * np.exp(w), np.longdouble(beta)
    if divergence == FORWARD:
        exact_loss, exact_slope = q * bregman(w), q * np.expm1(w)
    elif divergence == REVERSE:
        exact_loss, exact_slope = p * bregman(-w), p * w
    else:
        u = np.log1p((1 - b) * np.expm1(w))
        v = np.log1p(b * np.expm1(-w))
        exact_loss = b * q * bregman(u) + (1 - b) * p * bregman(v)
        exact_slope = -(1 - b) * p * v
    # just above |w| = 0.3 the far form subtracts numbers 20 times its size, and 1 / beta times that
    assert np.max(np.abs(loss - exact_loss) / exact_loss) <= 40 * ulp / (1 if beta in (0, 0.5) else beta)
    near = np.abs(w) < 0.3
    assert np.max((np.abs(loss - exact_loss) / exact_loss)[near]) <= 8 * ulp
    assert np.max((np.abs(slope - exact_slope) / np.abs(exact_slope))[near]) <= 8 * ulp
    assert np.max(np.abs(slope - exact_slope) / np.abs(exact_slope)) <= 8 * ulp / (1 if beta in (0, 0.5) else beta)


@pytest.mark.parametrize(("kind", "ulp"), [("float", 2.0**-23), ("double", 2.0**-52)])
@pytest.mark.parametrize(
    ("divergence", "parameter"),
    [
        (SYMMETRIC, 0.3),
        *((skew, alpha) for skew in (SKEW, SKEW_REVERSE) for alpha in (0.1, 0.5, 0.999)),
        (TOTAL_VARIATION, 0),
    ],
)
def test_other_divergences_of_a_class(divergence, parameter, kind, ulp):
    """Near and far, against extended precision; the mixture's too, whatever its shares are."""
    p, q, w = classes({"float": np.float32, "double": np.float64}[kind])
    loss = getattr(_testing, f"loss_{kind}")(divergence, parameter, p, q, w)
    slope = getattr(_testing, f"slope_{kind}")(divergence, parameter, p, q, w)
    w, q, a = w.astype(np.longdouble), q.astype(np.longdouble), np.longdouble(parameter)
    p = q * np.exp(w)
    if divergence == SYMMETRIC:
        exact_loss = (1 - a) * q * bregman(w) + a * p * bregman(-w)
        exact_slope = (1 - a) * q * np.expm1(w) + a * p * w
    elif divergence == SKEW:
        u = np.log1p((1 - a) * np.expm1(w))
        exact_loss, exact_slope = q * bregman(u), -(1 - a) * p * np.expm1(-u)
    elif divergence == SKEW_REVERSE:
        v = np.log1p((1 - a) * np.expm1(-w))
        exact_loss, exact_slope = p * bregman(v), -p * v - a * p * np.expm1(-v)
    else:
        exact_loss, exact_slope = q * np.abs(np.expm1(w)) / 2, np.sign(w) * p / 2
    # a share of 0.001 is known to 1000 ulp of itself in the type that is computed in
    share = 1 / (1 - parameter) if divergence in (SKEW, SKEW_REVERSE) else 1
    assert np.max(np.abs(loss - exact_loss) / exact_loss) <= 40 * ulp * share
    assert np.max(np.abs(slope - exact_slope) / np.abs(exact_slope)) <= 16 * ulp * share


@pytest.mark.parametrize(("kind", "ulp"), [("float", 2.0**-23), ("double", 2.0**-52)])
def test_coins_of_a_class(kind, ulp):
    """Near and far, whichever side is the likelier, against extended precision."""
    dtype = {"float": np.float32, "double": np.float64}[kind]
    small = np.geomspace(1e-5, 0.69, 200)
    d = np.concatenate([small, -small, np.linspace(0.71, 9, 100), -np.linspace(0.71, 9, 100)])
    b, d = (x.ravel().astype(dtype) for x in np.meshgrid(np.linspace(-8, 8, 321), d))
    a = b + d
    wide, of_teacher = d.astype(np.longdouble), b.astype(np.longdouble)
    near = np.abs(d) < 0.7  # there d says more than a - b
    wide = np.where(near, wide, a.astype(np.longdouble) - of_teacher)
    loss = getattr(_testing, f"loss_{kind}")(COINS, 0, a, b, wide.astype(dtype))
    slope = getattr(_testing, f"slope_{kind}")(COINS, 0, a, b, wide.astype(dtype))

    exact = np.zeros_like(wide)
    for sign in (1, -1):  # the class and the rest: sum q (e^w - 1 - w), of which nothing cancels
        q, of_rest = (1 / (1 + np.exp(-s * sign * of_teacher)) for s in (1, -1))
        exact += q * bregman(-np.log1p(of_rest * np.expm1(-sign * wide)))
    q, of_rest = 1 / (1 + np.exp(-of_teacher)), 1 / (1 + np.exp(of_teacher))
    exact_slope = q * of_rest * np.expm1(wide) / (1 + q * np.expm1(wide))
    off = np.abs(loss - exact) / exact
    assert np.max(off[near]) <= 16 * ulp
    assert np.max(off) <= 40 * ulp  # just above |d| = 0.7 the far form subtracts numbers 20 times its size
    assert np.max(np.abs(slope - exact_slope) / np.abs(exact_slope)) <= 16 * ulp


def test_impossible_classes():
    loss, slope = _testing.loss_float, _testing.slope_float
    for divergence in (FORWARD, REVERSE, JENSEN_SHANNON, SYMMETRIC, SKEW, SKEW_REVERSE, TOTAL_VARIATION):
        assert loss(divergence, 0.5, 0.0, 0.0, np.nan) == 0
        assert slope(divergence, 0.5, 0.0, 0.0, np.nan) == 0
    assert loss(FORWARD, 0, 0.25, 0.0, np.inf) == 0.25  # the p of a class without q completes the sum to 1
    assert slope(FORWARD, 0, 0.25, 0.0, np.inf) == 0.25
    assert loss(FORWARD, 0, 0.0, 0.25, -np.inf) == np.inf
    assert slope(FORWARD, 0, 0.0, 0.25, -np.inf) == -0.25
    assert loss(REVERSE, 0, 0.0, 0.25, -np.inf) == 0.25
    assert slope(REVERSE, 0, 0.0, 0.25, -np.inf) == 0
    assert loss(REVERSE, 0, 0.25, 0.0, np.inf) == np.inf
    assert loss(REVERSE, 0, 0.0, 0.0, np.inf) == np.inf  # a p that is too small for a number
    assert loss(SYMMETRIC, 0.5, 0.25, 0.0, np.inf) == slope(SYMMETRIC, 0.5, 0.25, 0.0, np.inf) == np.inf
    assert loss(SYMMETRIC, 0.5, 0.0, 0.25, -np.inf) == np.inf
    assert loss(SKEW, 0.5, 0.25, 0.0, np.inf) == slope(SKEW, 0.5, 0.25, 0.0, np.inf) == 0.125  # m - q
    assert loss(SKEW, 0.5, 0.0, 0.25, -np.inf) == pytest.approx(-0.125 + 0.25 * np.log(2), rel=1e-6)
    assert slope(SKEW, 0.5, 0.0, 0.25, -np.inf) == 0
    assert loss(SKEW_REVERSE, 0.5, 0.0, 0.25, -np.inf) == 0.125
    assert slope(SKEW_REVERSE, 0.5, 0.0, 0.25, -np.inf) == 0
    assert loss(TOTAL_VARIATION, 0, 0.25, 0.0, np.inf) == loss(TOTAL_VARIATION, 0, 0.0, 0.25, -np.inf) == 0.125
    assert loss(JENSEN_SHANNON, 0.5, 0.25, 0.0, np.inf) == pytest.approx(0.125 * np.log(2), rel=1e-6)
    assert loss(JENSEN_SHANNON, 0.5, 0.0, 0.25, -np.inf) == pytest.approx(0.125 * np.log(2), rel=1e-6)
    assert slope(JENSEN_SHANNON, 0.5, 0.25, 0.0, np.inf) == pytest.approx(0.125 * np.log(2), rel=1e-6)
