"""The divergences of two rows of log-probabilities in plain PyTorch."""

import functools
from collections.abc import Callable

import torch

from .. import _masses, _terms
from .._divergences import DERIVED, REGISTRY


def _kl_div(log_p, log_q, _=None):
    """sum q (log q - log p) = sum q (e^w - 1 - w) with w = log p - log q: nothing cancels."""
    p, q = log_p.exp(), log_q.exp()
    w = torch.where(q == 0, 0.0, log_p - log_q)
    near = w.clamp(-1, 1)  # what is not chosen below must stay finite, or its gradient is NaN
    terms = torch.where(w.abs() < 1, q * (torch.expm1(near) - near), p - q - q * w)
    return torch.where(q == 0, p, terms).sum(-1)  # the p of classes without q complete the sum to 1


def _soft_cross_entropy(log_p, log_q, _=None):
    """-sum q log p = KL(q || p) - sum q log q: both of terms >= 0."""
    return _kl_div(log_p, log_q) - (log_q.exp() * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(-1)


def _reverse_kl_div(log_p, log_q, _=None):
    """sum p (log p - log q). Where q = 0 and p > 0 it is +inf and has no gradient: 0 stands for it."""
    impossible = ((log_q == -torch.inf) & (log_p > -torch.inf)).any(-1, keepdim=True)
    return torch.where(
        impossible.squeeze(-1), torch.inf, _kl_div(torch.where(impossible, log_p.detach(), log_q), log_p)
    )


def _js_div(log_p, log_q, beta):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; u = log(m / q) and
    v = log(m / p) from w = log p - log q: the smaller one is log(1 + share (e^-|w| - 1)), the
    other lies |w| above it. Then sum beta q (e^u - 1 - u) + (1 - beta) p (e^v - 1 - v)."""
    p, q = log_p.exp(), log_q.exp()
    w = torch.where((p == 0) & (q == 0), 0.0, log_p - log_q)
    distance = torch.where(w > 0, w, -w)  # abs has no slope at 0, where this has one
    least = torch.finfo(w.dtype).tiny  # m is not 0 where p or q is not
    if isinstance(beta, torch.Tensor):
        teacher, student = ((x.to(w.dtype)).clamp(min=least) for x in (beta, 1 - beta))
    else:
        teacher, student = w.new_tensor(max(beta, least)), w.new_tensor(max(1 - beta, least))
    share, rest = torch.where(w > 0, teacher, student), torch.where(w > 0, student, teacher)
    near_lower = torch.log1p(share * torch.expm1(-distance.clamp(max=1)))
    lower = torch.where(distance < 1, near_lower, torch.log(rest + share * torch.exp(-distance)))
    upper = lower + distance
    u, v = torch.where(w > 0, upper, lower), torch.where(w > 0, lower, upper)
    u, v = torch.where(q == 0, 0.0, u), torch.where(p == 0, 0.0, v)
    near_u, near_v = u.clamp(-1, 1), v.clamp(-1, 1)
    near = teacher * q * (torch.expm1(near_u) - near_u) + student * p * (torch.expm1(near_v) - near_v)
    rows = torch.where(w.abs() < 1, near, -(teacher * q * u + student * p * v)).sum(-1)
    return _between(log_p, log_q, beta, rows, _kl_div, _reverse_kl_div)


def _between(log_p, log_q, share, rows, first, second=None):
    """Rows of a divergence whose parameter is one per row; at the ends of its range they are others, by convention."""
    if not isinstance(share, torch.Tensor):
        return rows
    share = share.squeeze(-1)
    rows = torch.where((share >= 0) & (share <= 1), rows, torch.nan)
    rows = torch.where(share == 0, first(log_p, log_q), rows)
    return rows if second is None else torch.where(share == 1, second(log_p, log_q), rows)


def _symmetric_kl_div(log_p, log_q, student_weight):
    """(1 - s) KL(q || p) + s KL(p || q). Where the second is +inf, it has no gradient, nor has the sum."""
    impossible = ((log_q == -torch.inf) & (log_p > -torch.inf)).any(-1, keepdim=True)
    s = student_weight
    if isinstance(s, torch.Tensor):  # 0 times +inf is not wanted, nor looked at
        s = torch.where((s == 0) | (s == 1), 0.5, s).squeeze(-1).to(log_p.dtype)
    forward = _kl_div(torch.where(impossible, log_p.detach(), log_p), log_q)
    rows = (1 - s) * forward + s * _reverse_kl_div(log_p, log_q)
    return _between(log_p, log_q, student_weight, rows, _kl_div, _reverse_kl_div)


def _skewed(log_own, log_other, share):
    """KL(own || m), m = (1 - share) other + share own; u = log(m / own) from w = log other - log own: near w = 0
    log(1 + (1 - share) (e^w - 1)), below it log(share + (1 - share) e^w), above it w + log((1 - share) + share e^-w).
    Then sum own (e^u - 1 - u): all classes' own (e^u - 1) = m - own add up to 0. Where own = 0 it is m."""
    own, other = log_own.exp(), log_other.exp()
    none = own == 0
    w = torch.where(none, 0.0, log_other - log_own)
    if isinstance(share, torch.Tensor):  # one of 0 is another divergence, which has no gradient here
        share, rest = (torch.where(share == 0, 0.5, x).to(w.dtype) for x in (share, 1 - share))
    else:
        rest = 1 - share
    middle = torch.log1p(rest * torch.expm1(w.clamp(-1, 1)))
    lower = torch.log(share + rest * torch.exp(w.clamp(max=-1)))
    upper = w + torch.log(rest + share * torch.exp(-w.clamp(min=1)))
    u = torch.where(w < -1, lower, torch.where(w < 1, middle, upper))
    near = u.clamp(-1, 1)
    terms = torch.where(u.abs() < 1, own * (torch.expm1(near) - near), rest * (other - own) - own * u)
    return torch.where(none, rest * other, terms).sum(-1)


def _skew_kl_div(log_p, log_q, alpha):
    """KL(q || alpha q + (1 - alpha) p)"""
    return _between(log_p, log_q, alpha, _skewed(log_q, log_p, alpha), _kl_div)


def _skew_reverse_kl_div(log_p, log_q, alpha):
    """KL(p || alpha p + (1 - alpha) q)"""
    return _between(log_p, log_q, alpha, _skewed(log_p, log_q, alpha), _reverse_kl_div)


def _total_variation(log_p, log_q, _=None):
    """1/2 sum |p - q|"""
    return _terms.of_classes("total_variation", log_p, log_q, None)[0]


def _alpha_beta_div(log_p, log_q, parameters):
    return _terms.alpha_beta_div(log_p, log_q, parameters)


def _negative_log_acceptance(log_p, log_q, _=None):
    """-log sum min(p, q), of 1 - total variation where that is the more exact. Where it is +inf it has no gradient."""
    p, q = log_p.exp(), log_q.exp()
    variation = _total_variation(log_p, log_q)  # of both sides: what all classes are off by alike cancels
    accepted, near = torch.where(log_p < log_q, p, q).sum(-1), variation < 0.5
    none = accepted == 0
    of_variation = -torch.log1p(-torch.where(near, variation, 0.0))
    of_accepted = -torch.log(torch.where(near | none, 1.0, accepted))
    rows = torch.where(none, torch.inf, torch.where(near, of_variation, of_accepted))
    return _loud(rows, p, q)


def _loud(rows, *of):
    """NaN, the gradient too, where one of a row's numbers is."""
    loud = functools.reduce(torch.logical_or, (x.isnan().any(-1) for x in of))
    return rows + torch.where(loud, torch.nan, 0.0) * torch.where(loud[..., None], of[0], 0.0).sum(-1)


def _coin(log_odds):
    """log p and log (1 - p), [*, 2]."""
    return torch.nn.functional.logsigmoid(torch.stack((log_odds, -log_odds), -1))


def _bernoulli_kl_div(a, b, _=None):
    """Of log odds: the sum over classes of KL(coin of b || coin of a)."""
    return _kl_div(_coin(a), _coin(b)).sum(-1)


def _adaptive_kl_div(log_p, log_q, mu, teacher, whole=None):
    """The student's weight [*, 1] that makes it symmetric_kl_div: the share of sum |p - q| outside of the teacher's
    head. Classes of equal logits are in it or are not together, so the mass that counts is that of the last of them.
    whole: what mu is a share of. Default: the sum of the teacher's probabilities, which is 1 but for rounding."""
    logits, order = teacher.sort(-1, descending=True)
    mass = log_q.exp().gather(-1, order).cumsum(-1)
    is_last = torch.cat([logits[..., 1:] != logits[..., :-1], torch.ones_like(logits[..., :1], dtype=torch.bool)], -1)
    mass_of_equals = torch.where(is_last, mass, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    in_head = (mass_of_equals <= mu * (mass[..., -1:] if whole is None else whole)) | (logits == logits[..., :1])
    difference = _terms.difference(log_p.exp(), log_q.exp(), log_p, log_q).abs().gather(-1, order)
    tail, total = (x.sum(-1, keepdim=True) for x in (torch.where(in_head, 0.0, difference), difference))
    return torch.where((total > 0) & (total < torch.inf), tail / total, 0.5)  # a NaN shows in the divergence itself


# Each takes log p and log q [*, V], or log odds, and its parameter, where it has one: a number, or a tensor [*, 1].
DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {name: globals()[f"_{name}"] for name in REGISTRY}
# Of losses that are another divergence with a parameter of each row: that parameter.
OF_DERIVED: dict[str, Callable[..., torch.Tensor]] = {name: globals()[f"_{name}"] for name in DERIVED}


def _divergence(name, log_p, log_q, parameter, mass=None):
    """Of a row without any possible class: 0 where it is the teacher's, else +inf. Neither has a gradient. mass: the
    sum of a q that was given, of which log_q is normalized; None: 1."""
    no_p, no_q = ((x == -torch.inf).all(-1, keepdim=True) for x in (log_p, log_q))
    safe_p, safe_q = (torch.where(no_p | no_q, 0.0, x) for x in (log_p, log_q))
    if mass is None:
        rows = DIVERGENCES[name](safe_p, safe_q, parameter)
    else:
        rows = _of_mass(name, safe_p, safe_q, parameter, torch.where(no_q.squeeze(-1), 1.0, mass))
    return torch.where(no_q.squeeze(-1), 0.0, torch.where(no_p.squeeze(-1), torch.inf, rows))


def _of_mass(name, log_p, log_q, parameter, mass):
    if name in _masses.WITHOUT:
        log_q = log_q + mass.log()[..., None]
        if name == "negative_log_acceptance":
            return _terms.acceptance(log_p, log_q, mass - 1)[0]
        return DIVERGENCES[name](log_p, log_q, parameter)
    if parameter is not None:
        parameter = parameter.squeeze(-1) if isinstance(parameter, torch.Tensor) else mass.new_tensor(parameter)
    of = _masses.of_mass(name, mass, parameter)
    rows = DIVERGENCES[name](log_p, log_q, None if of.parameter is None else of.parameter.expand(mass.shape)[..., None])
    return (rows * of.factor + of.constant).to(rows.dtype)
