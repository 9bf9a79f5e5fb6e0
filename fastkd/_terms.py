"""The terms of divergences whose sides need not sum to 1, class by class: of a teacher's probabilities as they are
given, and of some classes alone.

With p and q of a class f(p, q) is what it adds to its row, and p df/dp its slope: the gradient of a row's sum with
respect to the logits z of p = softmax(z / T) is (slope - p sum slope) / T. What divergences of two distributions may
add, as their sums are known, is not in here, nor is the care that keeps digits where terms cancel.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """Of each class."""

    f: Tensor
    slope: Tensor


def _times(p, log):
    """0 times what is not finite is 0, its gradient too."""
    return p * torch.where(p == 0, 0.0, log)


def _log(m):
    return torch.where(m == 0, 0.0, torch.where(m == 0, 1.0, m).log())


def _kl_div(p, q, log_p, log_q, _):
    return Terms(_times(q, log_q - log_p), -q)


def _soft_cross_entropy(p, q, log_p, log_q, _):
    return Terms(-_times(q, log_p), -q)


def _reverse_kl_div(p, q, log_p, log_q, _):
    """Where it is +inf it has no gradient; see of_classes."""
    endless = (q == 0) & (p > 0)
    f = _times(p, log_p - torch.where(endless, 0.0, log_q))
    return Terms(torch.where(endless, torch.inf, f), torch.where(endless, 0.0, f + p))


def _in_range(share, terms):
    """NaN where a share is out of its range, and nobody could look at it before."""
    inside = (share >= 0) & (share <= 1)
    return Terms(*(torch.where(inside, x, torch.nan) for x in terms))


def _mixed(share, inside, at_0=None, at_1=None):
    """At the ends of its range a share stands for another divergence, by convention."""
    f, slope = _in_range(share, inside)
    for end, other in ((0, at_0), (1, at_1)):
        if other is not None:
            f, slope = torch.where(share == end, other.f, f), torch.where(share == end, other.slope, slope)
    return Terms(f, slope)


def _js_div(p, q, log_p, log_q, beta):
    log_m = _log(beta * q + (1 - beta) * p)
    of_p = (1 - beta) * _times(p, log_p - log_m)
    inside = Terms(beta * _times(q, log_q - log_m) + of_p, of_p)
    ends = (x(p, q, log_p, log_q, None) for x in (_kl_div, _reverse_kl_div))
    return _mixed(beta, inside, *ends)


def _symmetric_kl_div(p, q, log_p, log_q, student_weight):
    forward, reverse = (x(p, q, log_p, log_q, None) for x in (_kl_div, _reverse_kl_div))
    both = (torch.where(w == 0, 0.0, w) for w in (1 - student_weight, student_weight))
    first, second = (
        [torch.where(w == 0, 0.0, w * x) for x in of] for w, of in zip(both, (forward, reverse), strict=True)
    )
    return _in_range(student_weight, Terms(first[0] + second[0], first[1] + second[1]))


def _over(x, m):
    return torch.where(m == 0, 0.0, x / torch.where(m == 0, 1.0, m))


def _skew_kl_div(p, q, log_p, log_q, alpha):
    m = alpha * q + (1 - alpha) * p
    inside = Terms(_times(q, log_q - _log(m)), -(1 - alpha) * p * _over(q, m))
    return _mixed(alpha, inside, _kl_div(p, q, log_p, log_q, None))


def _skew_reverse_kl_div(p, q, log_p, log_q, alpha):
    m = alpha * p + (1 - alpha) * q
    f = _times(p, log_p - _log(m))
    inside = Terms(f, f + (1 - alpha) * p * _over(q, m))
    return _mixed(alpha, inside, _reverse_kl_div(p, q, log_p, log_q, None))


def difference(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p - q = q (e^w - 1)"""
    w = torch.where((p == 0) | (q == 0), torch.inf, log_p - log_q)
    return torch.where(w.abs() < 1, q * torch.expm1(w.clamp(-1, 1)), p - q)


def _total_variation(p, q, log_p, log_q, _):
    d = difference(p, q, log_p, log_q)
    sign = torch.where(d.isnan(), d, d.sign()).detach()  # not abs(), whose gradient is 0 of NaN
    return Terms(d * sign / 2, p * sign / 2)


def _alpha_beta_div(p, q, log_p, log_q, parameters):
    a, b = (p.new_ones(()) * x for x in parameters)
    of_class = [x[..., None] if x.dim() else x for x in (a, b)]
    f = alpha_beta_div(log_p[..., None], log_q[..., None], of_class)
    w = torch.where((p == 0) | (q == 0), torch.inf, log_p - log_q)
    both, x = _power(p, log_p, b) * _power(q, log_q, a), torch.where(a == 0, 0.0, a * w)
    small = x.abs() < 1
    steps = torch.where(x == 0, 1.0, torch.expm1(x.clamp(-1, 1)) / torch.where(x == 0, 1.0, x))
    far = (_power(p, log_p, a + b) - both) / torch.where(a == 0, 1.0, a)
    slope = torch.where(small, both * torch.where(small & w.isfinite(), w, 0.0) * steps, far)
    return Terms(f, torch.where(f == torch.inf, 0.0, slope))


def _power(p, log, exponent):
    return torch.where(
        exponent == 0, 1.0, torch.where(p == 0, 0.0, torch.exp(exponent * torch.where(p == 0, 0.0, log)))
    )


def alpha_beta_div(log_p: Tensor, log_q: Tensor, parameters: Any) -> Tensor:
    """Of rows. With s = alpha + beta and phi(x) = e^x - 1 - x a class adds
    q^s / (alpha beta) (beta / s phi(s w) - phi(beta w)), or its limits where alpha, beta or both are 0. Where the
    reverse divergence is +inf, it has no gradient."""
    a, b = (x.to(log_p.dtype) if isinstance(x, torch.Tensor) else log_p.new_tensor(x) for x in parameters)
    s = a + b
    endless = ((log_q == -torch.inf) & (log_p > -torch.inf) & (a == 0)) | (
        (log_p == -torch.inf) & (log_q > -torch.inf) & (s == 0)
    )
    endless = endless.any(-1, keepdim=True)
    log_p, log_q = (torch.where(endless, 0.0, x) for x in (log_p, log_q))
    none, no_q = log_p == -torch.inf, log_q == -torch.inf
    w = torch.where(no_q, 0.0, log_p - log_q)  # where it counts: of q = 0 other terms do
    to_a, to_b, to_s = (torch.where(x == 0, 1.0, x) for x in (a, b, s))

    def power(log, exponent):
        return torch.exp(torch.where(exponent == 0, 1.0, exponent) * log).masked_fill(exponent == 0, 1.0)

    of_p, of_q, of_both = power(log_p, s), power(log_q, s), power(log_p, b) * power(log_q, a)
    near = ((s * w).abs() < 1) & ~none & ~no_q
    close = torch.where(near, w, 0.0)
    series, products, of_b, factorial = 0.0, 1.0, 1.0, 2.0  # of the products s^i b^(k - i): an a of 0 may be
    for k in range(20):
        series = series + products / factorial * close**k
        of_b = of_b * b
        products, factorial = products * s + of_b, factorial * (k + 3)

    def growth(exponent, other, w):
        """(other^s - q^a p^b) / exponent, with w the logarithm of what the other is more."""
        small = (exponent * w).abs() < 1
        x = torch.where(small & (w != 0) & (exponent > 0), exponent * w, 1.0)
        steps = torch.where(exponent * w == 0, w, torch.expm1(x) / torch.where(exponent == 0, 1.0, exponent))
        return torch.where(small, of_both * steps, (other - of_both) / torch.where(exponent == 0, 1.0, exponent))

    of_sums = (of_p - of_q) / to_s
    wide = torch.where(no_q, 1e30, torch.where(none, -1e30, w))  # of one side alone: finite, so that 0 times it is 0

    def far_where(chosen, x):  # before the division: 0 times what is not finite has no gradient
        return torch.where(chosen & ~near, x, 0.0)

    by_b = far_where((b != 0) & (b >= a), growth(a, of_p, wide) - of_sums) / to_b
    by_a = far_where((b != 0) & (b < a), growth(b, of_q, -wide) + of_sums) / to_a
    # with a power of 0 of what there is not, the other limit's first term would be 0 times an infinite w
    without_b = far_where(b == 0, of_p - of_q - a * of_q * w) / to_a / to_a
    far = torch.where(b == 0, without_b, torch.where(b < a, by_a, by_b))
    rows = torch.where(near, of_q * close**2 * series, far)
    rows = torch.where(none & no_q, 0.0, rows).sum(-1)
    rows = torch.where(((a >= 0) & (b >= 0)).expand(endless.shape).squeeze(-1), rows, torch.nan)
    return torch.where(endless.squeeze(-1), torch.inf, rows)


_TERMS = {
    name[1:]: x
    for name, x in globals().items()
    if name.startswith("_") and name.endswith(("_div", "_entropy", "_variation"))
}


def of_those(log_p: Tensor, log_q: Tensor, there: Tensor, least: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides where they are, raised to the least where they are below it; and where p is."""
    log_p, log_q = (torch.where(there, x, 0.0) for x in (log_p, log_q))
    low = log_p < least
    return torch.where(low, least, log_p), torch.where(log_q < least, least, log_q), low


def entropy(log_p: Tensor, there: Tensor) -> Tensor:
    """Of some terms."""
    return -torch.where(there, _times(log_p.exp(), log_p), 0.0).sum(-1)


def of_classes(
    divergence: str, log_p: Tensor, log_q: Tensor, parameter: Any, there: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum of a row, [*], and its slopes, [*, V]. parameter: a number, or a tensor [*, 1]; two of them where the
    divergence has two. there: which classes count. A row whose sum is +inf as q is 0 where p is not has no slopes."""
    p, q = log_p.exp(), log_q.exp()
    if not isinstance(parameter, tuple):
        parameter = p.new_ones(()) * parameter if parameter is not None else None
    # a parameter may be in float64, so that 1 less it keeps its digits
    f, slope = (x.to(p.dtype) for x in _TERMS[divergence](p, q, log_p, log_q, parameter))
    if there is not None:
        f, slope = torch.where(there, f, 0.0), torch.where(there, slope, 0.0)
    endless = ((f == torch.inf) & (q == 0)).any(-1, keepdim=True)
    rows = torch.where(endless, 0.0, f).sum(-1)
    return torch.where(endless.squeeze(-1), torch.inf, rows), torch.where(endless, 0.0, slope)


def acceptance(log_p: Tensor, log_q: Tensor, excess: Tensor) -> tuple[Tensor, Tensor]:
    """``negative_log_acceptance``, which is no sum of terms, and its slopes; excess: the sum of q less 1, [*]. Where it
    is +inf it has no slopes."""
    p, q = log_p.exp(), log_q.exp()
    d = difference(p, q, log_p, log_q)
    below = d < 0
    short = excess - torch.where(below, -d, 0.0).sum(-1)  # of 1
    # of a sum far from 1 the first is a difference of large numbers
    accepted, near = torch.where(below, p, q).sum(-1), (short.abs() < 0.5) & (excess.abs() < 1)
    none = accepted == 0
    rows = torch.where(near, -torch.log1p(torch.where(near, short, 0.0)), -_log(accepted))
    of_row = torch.where(none, 0.0, 1 / torch.where(near, 1 + short, torch.where(none, 1.0, accepted)))
    slope = torch.where(below, -p * of_row[..., None], 0.0)
    loud = d.isnan().any(-1)
    rows = torch.where(loud, torch.nan, torch.where(none, torch.inf, rows))
    return rows, torch.where(loud[..., None], torch.nan, slope)
