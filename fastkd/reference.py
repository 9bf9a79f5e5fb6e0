"""The losses in plain PyTorch, to be read: the truth for tests and benches, and the fallback.

In float64 these are what every kernel is measured against. Of half and single precision they make no float64, which
some devices do not have.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _masses, _reference_forms, _terms, _transforms
from ._check import LogitsOptions
from ._divergences import BY_NAME, DERIVED, REGISTRY
from ._dtypes import compute_dtype
from ._inplace import overwritten
from .forms import Probabilities, TopKLogProbs


def log_softmax(logits: torch.Tensor, temperature: Any) -> torch.Tensor:
    """Of a row without any possible class: -inf."""
    nothing = (logits == -torch.inf).all(-1, keepdim=True)  # a row without any possible class
    log_p = torch.log_softmax(logits.masked_fill(nothing, 0.0) / temperature, -1)
    return log_p.masked_fill(nothing, -torch.inf)


STANDARDIZE_EPS = 1e-7


def _standardized_logits(logits):
    """(x - mean) / (std + 1e-7) of each row, std unbiased, of the classes that are possible. What is taken from the
    largest of them first is 0 where all are equal: such a row becomes 0, and has no gradient."""
    counts = logits != -torch.inf
    largest = logits.detach().amax(-1, keepdim=True)
    from_largest = torch.where(counts, logits - torch.where(largest == -torch.inf, 0.0, largest), 0.0)
    number = counts.sum(-1, keepdim=True)
    mean = from_largest.sum(-1, keepdim=True) / number.clamp(min=1)
    centred = torch.where(counts, from_largest - mean, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)
    constant = variance == 0
    std = torch.where(constant, 1.0, variance).sqrt()  # what is not chosen must stay finite, or its gradient is NaN
    rows = torch.where(constant, 0.0, centred / (std + STANDARDIZE_EPS))
    return torch.where(counts, rows, -torch.inf)


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


def _weighted(weight, rows):
    """A weight of 0 leaves out what may be infinite."""
    weight = _number(weight, rows)
    if isinstance(weight, torch.Tensor):
        return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, rows))
    return torch.zeros_like(rows) if weight == 0 else weight * rows


def _cross_entropy(logits, options):
    """That of the student's softmax at temperature 1 with the target, smoothed. Of a row without any possible class it
    is +inf, and has no gradient. Targets of rows that do not count may be anything; of others one out of range gives
    NaN, where nobody could look at it before."""
    target = options.target
    if options.mask is not None:
        target = torch.where(options.mask, target, 0)
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    log_p = torch.log_softmax(torch.where(nothing, 0.0, logits), -1)
    known = (target >= 0) & (target < logits.shape[-1])
    of_target = -log_p.gather(-1, torch.where(known, target, 0)[..., None]).squeeze(-1)
    smoothing = _number(options.label_smoothing, logits)
    rows = _weighted(1 - smoothing, of_target) + _weighted(smoothing, -log_p.mean(-1))
    return torch.where(nothing.squeeze(-1), torch.inf, rows) * torch.where(known, rows.new_ones(()), torch.nan)


def _log_odds(logits, target, temperature):
    """Of the target against the other classes, and the log-probabilities of these among themselves."""
    z = logits / temperature
    others = z.scatter(-1, target[..., None], -torch.inf)
    nothing = (others == -torch.inf).all(-1, keepdim=True)
    log_sum = torch.where(nothing, 0.0, others).logsumexp(-1, keepdim=True)
    log_others = torch.where(nothing, -torch.inf, others - log_sum)
    log_sum = torch.where(nothing, -torch.inf, log_sum)
    return (z.gather(-1, target[..., None]) - log_sum).squeeze(-1), log_others


def _coin(log_odds):
    """log p and log (1 - p), [*, 2]."""
    return torch.nn.functional.logsigmoid(torch.stack((log_odds, -log_odds), -1))


def _parted_target(s, t, temperature, teacher_temperature, options, mass):
    """dkd_loss and nkd_loss; see csrc/common/rows_params.h. Targets are as those of _cross_entropy. mass: the sum of a
    q that was given; None: 1."""
    target, decoupled = options.target, options.target_loss == "dkd_loss"
    if options.mask is not None:
        target = torch.where(options.mask, target, 0)
    known = (target >= 0) & (target < s.shape[-1])
    target = torch.where(known, target, 0)
    no_p, no_q = ((x == -torch.inf).all(-1) for x in (s, t))  # rows without any possible class
    s, t = (torch.where((no_p | no_q)[..., None], 0.0, x) for x in (s, t))
    loud = functools.reduce(torch.logical_or, ((x.isnan() | (x == torch.inf)).any(-1) for x in (s, t)))
    a, log_p = _log_odds(s, target, temperature)
    b, log_q = _log_odds(t, target, teacher_temperature)
    soft = _divergence("kl_div" if decoupled else "soft_cross_entropy", log_p, log_q, None)
    if decoupled:
        sure = (a == torch.inf) | (b == torch.inf)  # without other classes: no gradient, and what is left is simple
        hard = _kl_div(_coin(torch.where(sure, 0.0, a)), _coin(torch.where(sure, 0.0, b)))
        of_sure = torch.where(b == torch.inf, -torch.nn.functional.logsigmoid(a), torch.inf)
        hard = torch.where(sure, torch.where((a == torch.inf) & (b == torch.inf), 0.0, of_sure), hard)
    else:
        a, b = _log_odds(s, target, 1.0)[0], _log_odds(t, target, 1.0)[0]
        q = torch.sigmoid(b)
        hard = torch.where(q == 0, 0.0, q * -torch.nn.functional.logsigmoid(a))
    if mass is not None:  # of two classes, whose sum it is
        hard = mass * hard + (torch.xlogy(mass, mass) if decoupled else 0.0)
    squared = temperature.squeeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    squared = squared**2 if options.t_squared else 1.0
    first, second = (x.to(s.dtype) if isinstance(x, torch.Tensor) else x for x in (options.parameter, options.second))
    rows = _weighted(first, soft) * squared
    rows = rows + (_weighted(second, hard) * squared if decoupled else hard)
    rows = torch.where(no_q, 0.0, torch.where(no_p, torch.inf, rows))
    rows = rows + torch.where(loud, torch.nan, 0.0) * torch.where(loud[..., None], s, 0.0).sum(-1)
    return rows * torch.where(known, rows.new_ones(()), torch.nan)


def _reduce(rows, classes, mask, reduction, normalizer):
    if reduction == "none":
        return rows
    valid = rows.numel() if mask is None else mask.sum()
    total = rows.sum()
    if normalizer is not None:
        if isinstance(normalizer, torch.Tensor):
            normalizer = normalizer.to(total.dtype).reshape(())
        return torch.where(torch.as_tensor(valid, device=total.device) > 0, total / normalizer, 0.0)
    if reduction == "sum":
        return total
    rows_that_count = max(valid, 1) if mask is None else valid.clamp(min=1)
    return total / rows_that_count / (classes if reduction == "mean" else 1)


def ordinary(x: Any) -> Any:
    """Autograd refuses to watch over tensors that were made in inference mode."""
    if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and x.is_inference():
        return x.clone()
    return x


class _Sides(NamedTuple):
    """What a loss compares, of the classes that count."""

    s: torch.Tensor
    t: torch.Tensor
    raw: torch.Tensor  # the student's logits, as a hard loss sees them
    best: torch.Tensor  # what says which classes are the teacher's best
    mass: torch.Tensor | None  # the sum of a q that was given, None: 1
    few: TopKLogProbs | None
    coins: bool  # whether logits are log odds
    temperature: Any
    of_teacher: Any  # its temperature

    @property
    def ignores(self) -> bool:
        """Whether the terms of some classes alone count."""
        return self.few is not None and self.few.tail == "ignore"


def _sides(divergence, student, teacher, options):
    few, given = (teacher if isinstance(teacher, form) else None for form in (TopKLogProbs, Probabilities))
    teacher = few.log_probs if few else given.probabilities[..., : options.num_classes] if given else teacher
    dtype = compute_dtype(student, teacher)
    s, t = student.to(dtype), ordinary(teacher).detach().to(dtype)
    if options.inplace and student.requires_grad and torch.is_grad_enabled():
        s = s.clone() if s is student else s
        overwritten(student)
    s = s[..., : options.num_classes if few else t.shape[-1]]
    temperature, of_teacher = (_per_row(x, s) for x in (options.temperature, options.teacher_temperature))
    if options.mask is not None:  # before anything is computed: a masked row may hold NaN
        s, t = (torch.where(options.mask[..., None], x, 0.0) for x in (s, t))
    raw, best, mass = s, t, None
    coins = divergence in REGISTRY and REGISTRY[divergence].given == "LogOdds"
    if given:
        own = _number(given.temperature, s)
        same = _number(options.teacher_temperature, s) == own  # as the user gave both
        if isinstance(same, torch.Tensor):
            own = torch.where(same.expand(s.shape[:-1])[..., None], _number(of_teacher, s), own)
        if not options.standardize and not coins:
            same = _number(given.temperature, s) == 1 if options.target_loss == "nkd_loss" else same
            mass = _reference_forms.mass(t, same)
        t = _reference_forms.logits(t, own, coins)
    if options.standardize:
        s, t = _standardized_logits(s), _standardized_logits(t)
    if few and few.tail != "ignore":
        s, t = _reference_forms.few_classes(s, t, few, temperature)
    return _Sides(s, t, raw, best, mass, few, coins, temperature, of_teacher)


def _per_row(x, s):
    """[*, 1] beside the classes of s."""
    return x.to(s.dtype).expand(s.shape[:-1])[..., None] if isinstance(x, torch.Tensor) else x


def _soft_rows(divergence, sides, options):
    """The divergence of each row, and of both sides the logarithms of probabilities, or log odds."""
    s, t, mass, there = sides.s, sides.t, sides.mass, None
    log_p, log_q = log_softmax(s, sides.temperature), t
    if sides.ignores:
        least = _number(-torch.inf if sides.few.log_prob_min is None else sides.few.log_prob_min, s)
        log_p, log_q, there = _reference_forms.known_terms(log_p, t, sides.few, least)
    else:
        log_q = log_softmax(t, sides.of_teacher)
    given_q = log_q if mass is None else log_q + mass.log()[..., None]

    def number(x):
        x = _number(x, log_p)
        if not isinstance(x, torch.Tensor):
            return x
        # not rounded to what is computed in: of an x near 1, 1 - x keeps its digits
        return ordinary(x).to(torch.promote_types(x.dtype, s.dtype)).expand(s.shape[:-1])[..., None]

    entry, parameter = BY_NAME[divergence], options.parameter
    if entry.parameter is not None:
        parameter = number(parameter)
    if entry.second is not None:
        parameter = parameter, number(options.second)
    if divergence in DERIVED:
        whole = None if mass is None else 1.0
        parameter = OF_DERIVED[divergence](log_p.detach(), given_q, parameter, t, whole)
        divergence = DERIVED[divergence].divergence
    if sides.coins:
        log_odds = s / sides.temperature, t / sides.of_teacher
        return DIVERGENCES[divergence](*log_odds), log_odds
    if sides.ignores:
        no_p = (s == -torch.inf).all(-1) & there.any(-1)  # no possible class: +inf, and no gradient
        safe = torch.where(no_p[..., None], 0.0, log_p)
        rows = torch.where(no_p, torch.inf, _terms.of_classes(divergence, safe, log_q, parameter, there)[0])
        return rows, (log_p, log_q)
    return _divergence(divergence, log_p, log_q, parameter, mass), (log_p, given_q)


def logits_loss(
    divergence: str, student: torch.Tensor, teacher: Any, options: LogitsOptions
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there. And, where they are asked for, the
    means over rows of its parts. teacher: logits, TopKLogProbs or Probabilities."""
    options = options._replace(**{name: ordinary(x) for name, x in options._asdict().items()})
    sides = _sides(divergence, student, teacher, options)
    mask, raw, T = options.mask, sides.raw, sides.temperature
    if options.target_loss is not None:
        rows = _parted_target(sides.s, sides.t, T, sides.of_teacher, options, sides.mass)
        return _finished(rows, raw, mask, options)
    rows, logs = _soft_rows(divergence, sides, options)
    if options.t_squared:
        rows = rows * (T.squeeze(-1) if isinstance(T, torch.Tensor) else T) ** 2
    if options.target is None:
        return _finished(rows, raw, mask, options)
    hard, soft = _cross_entropy(raw, options), rows
    loss = _finished(_both_losses(soft, hard, raw, options), raw, mask, options)
    if not options.return_parts:
        return loss
    if sides.ignores:
        entropies = [_terms.entropy(x, sides.few.indices >= 0) for x in logs]
    else:
        entropies = [_entropy(x, sides.coins) for x in logs]
    best = _reference_forms.best_class(sides.best, sides.few.indices) if sides.few else sides.best.argmax(-1)
    parts = torch.stack([hard, soft, *entropies, (raw.argmax(-1) == best).to(raw.dtype)], -1)
    return loss, _means(parts.detach(), mask)


def _both_losses(soft, hard, logits, options):
    """Of rows that have a target."""
    rows = _weighted(options.soft_weight, soft) + _weighted(options.hard_weight, hard)
    rows = torch.where(hard.isnan(), hard, rows)  # of a target out of range, whatever its weight
    if not rows.requires_grad:  # both weights are 0: a gradient of 0 is one
        rows = rows + 0.0 * torch.where(logits.isfinite(), logits, 0.0).sum(-1)
    return rows


def _entropy(x, coins):
    """From logarithms of probabilities; or of coins from their log odds."""
    if not coins:
        return -torch.where(x == -torch.inf, 0.0, x.exp() * x).sum(-1)
    a = torch.where(x.isinf(), torch.inf, x.abs())
    return (torch.log1p(torch.exp(-a)) + torch.where(a.isinf(), 0.0, a * torch.sigmoid(-a))).sum(-1)


def _means(parts, mask):
    """Over the rows that count; 0 where none does."""
    rows = parts.reshape(-1, parts.shape[-1])
    if mask is None:
        return rows.sum(0) / max(rows.shape[0], 1)
    counts = mask.reshape(-1)
    return torch.where(counts[:, None], rows, 0.0).sum(0) / counts.sum().clamp(min=1)


def _finished(rows, logits, mask, options):
    """The loss of rows, weighted and reduced."""
    if options.weight is not None:
        rows = rows * options.weight.to(rows.dtype)
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    return _reduce(rows, logits.shape[-1], mask, options.reduction, options.normalizer)


def _number(number: Any, like: torch.Tensor) -> Any:
    """Under torch.compile as a tensor: a graph has its numbers built in, and this one may change."""
    if isinstance(number, torch.Tensor) or not torch.compiler.is_compiling():
        return number
    return like.new_ones(()) * number


def gradient_dtype(student: torch.Tensor) -> torch.dtype:
    """A gradient in float16 would underflow, or leave the range, before a loss scaler multiplies it."""
    return torch.float32 if student.dtype is torch.float16 else student.dtype


def _embeddings(student, teacher):
    dtype = compute_dtype(student, teacher)
    return student.to(dtype), ordinary(teacher).detach().to(dtype)


def _rows_there(student, teacher, mask, weight):
    """Without those that are masked: how many are left has to be known here."""
    weight = None if weight is None else ordinary(weight).to(student.dtype)
    if mask is None:
        return student, teacher, weight
    mask = ordinary(mask)
    return student[mask], teacher[mask], None if weight is None else weight[mask]


def _distances(x, normalize):
    """[N, N], by differences. Off the diagonal at least 1e-6, where there is no gradient."""
    _transforms.refuse_forward_mode("student", x)
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6)
    d = d.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    pairs = len(x) * (len(x) - 1)
    return d / (d.sum() / pairs) if normalize and pairs else d


def rkd_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool,
    delta: float,
    mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t, weight = _rows_there(*_embeddings(student, teacher), mask, weight)
    if len(s) < 2:
        return (s * 0).sum()
    d, e = _distances(s, normalize), _distances(t, normalize)
    losses = _huber(d, e, delta)
    return (losses if weight is None else losses * weight[:, None]).mean()


def _huber(x, y, delta):
    delta, distance = _number(delta, x), (x - y).abs()
    return torch.where(distance < delta, distance * distance / 2, delta * (distance - delta / 2))


def _cosines(x):
    """[N, N, N]: of the angle at a between i and k, 0 where a is i or k, or equals them."""
    difference = x[:, None] - x[None]
    squares = difference.square().sum(-1, keepdim=True)
    length = torch.where(squares == 0, 1.0, squares).sqrt()  # what is not differentiated must stay finite
    unit = torch.where(squares == 0, 0.0, difference / length)
    return unit @ unit.transpose(1, 2)


def rkd_angle(
    student: torch.Tensor, teacher: torch.Tensor, delta: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Holds [N, N, D] and [N, N, N]."""
    s, t, _ = _rows_there(*_embeddings(student, teacher), mask, None)
    if len(s) < 2:
        return (s * 0).sum()
    return _huber(_cosines(s), _cosines(t), delta).mean()


def rkd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    angle_weight: float,
    angle_delta: float,
    distance_weight: float,
    distance_delta: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    # here, or gradients would be added up in half precision
    s, t, _ = _rows_there(*_embeddings(student, teacher), mask, None)
    loss = (s * 0).sum()
    if angle_weight:
        loss = loss + _number(angle_weight, loss) * rkd_angle(s, t, angle_delta)
    if distance_weight:
        loss = loss + _number(distance_weight, loss) * rkd_distance(s, t, True, distance_delta)
    return loss


def _unit(x):
    """Rows to length 1; a row of zeros stays, and has no gradient."""
    squares = x.square().sum(1, keepdim=True)
    return torch.where(squares == 0, 0.0, x / torch.where(squares == 0, 1.0, squares).sqrt())


def similarity_preserving(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t, weight = _rows_there(*_embeddings(student, teacher), mask, weight)
    rows = (_unit(s @ s.T) - _unit(t @ t.T)).square().sum(1)
    return (rows if weight is None else rows * weight).sum() / max(len(s), 1) ** 2


def gram_mse(
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool,
    clamp: str | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t = _embeddings(student, teacher)
    shape = student.shape[:-1] if student.dim() == 3 else (1, len(student))
    mask = torch.ones(shape, dtype=torch.bool, device=s.device) if mask is None else ordinary(mask).view(shape)
    s, t = (torch.where(mask[..., None], x.reshape(*shape, x.shape[-1]), 0.0) for x in (s, t))  # it may hold NaN
    if normalize:
        s, t = _of_length_one(s), _of_length_one(t)
    G, H = s @ s.mT, t @ t.mT
    G = G.clamp(min=0) if clamp == "both" else G
    H = H.clamp(min=0) if clamp else H
    rows = mask.sum(1)
    squares = (G - H).square().sum(2)
    if weight is not None:
        squares = squares * torch.where(mask, ordinary(weight).view(shape).to(s.dtype), 0.0)
    squares = squares.sum(1) / rows.clamp(min=1).to(s.dtype) ** 2
    return squares.sum() / (rows > 0).sum().clamp(min=1)


def pkt(
    student: torch.Tensor, teacher: torch.Tensor, eps: float, mask: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t = _embeddings(student, teacher)
    valid = s.new_ones(len(s)) if mask is None else ordinary(mask).to(s.dtype)
    if mask is not None:  # a masked row may hold anything
        s, t = (torch.where(valid[:, None] > 0, x, 0.0) for x in (s, t))
    if len(s) < 2:
        return (s * 0).sum()

    def probabilities(x):
        largest = _largest(x, -1)
        x = _divided(x / largest, lambda length: length + eps / largest)
        k = (x @ x.T + valid[:, None] * valid) / 2
        k = k + (k.clamp(min=0) - k).detach()  # of opposite directions rounding may leave less
        return k / torch.where(valid[:, None] > 0, k.sum(1, keepdim=True), 1.0)

    s, t = probabilities(s), probabilities(t)
    # the first-order term adds up to 0; with it small differences of s and t keep their digits
    grown = (s - t) / (t + eps)
    near = torch.log1p(grown.clamp(min=-0.5))
    terms = (s - t) - t * torch.where(grown > -0.5, near, torch.log((s + eps) / (t + eps)))
    rows = terms.sum(1) if weight is None else terms.sum(1) * torch.where(valid > 0, ordinary(weight).to(s.dtype), 0.0)
    return rows.sum() / valid.sum().clamp(min=1) ** 2


def positives_of(positives: int, N: int) -> int:
    """How many neighbours are positives; 0: the default of batches of N."""
    return positives or max(0, min(5, N - 2))


def relational_triplet(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    positives: int,
    margin: float,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds [N, N, N]."""
    s = student.to(compute_dtype(*(x for x in (student, teacher) if x is not None)))
    N, device = len(s), s.device
    valid = torch.ones(N, dtype=torch.bool, device=device) if mask is None else ordinary(mask)
    s = torch.where(valid[:, None], s, 0.0)
    others = valid[:, None] & valid & ~torch.eye(N, dtype=torch.bool, device=device)
    if labels is not None:
        similar = others & (ordinary(labels)[:, None] == ordinary(labels))
    else:
        t = torch.where(valid[:, None], ordinary(teacher).detach().to(compute_dtype(teacher)), 0.0)
        if N:  # a power of two brings squares into range and changes no digit
            t = t * torch.exp2(-_largest(t, (0, 1)).nan_to_num(1.0, 1.0).log2().floor().clamp(min=-126))
        between = torch.cdist(t, t, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~others, torch.inf)
        nearest = between.topk(min(positives_of(positives, N), N), largest=False).indices
        similar = torch.zeros_like(others).scatter_(1, nearest, torch.ones_like(nearest, dtype=torch.bool)) & others
        s = s + (0 * t.sum()).to(s.dtype)  # a NaN has no neighbours
    different = others & ~similar
    d = _distances(s, False)
    triplets = similar[:, :, None] & different[:, None, :]
    e = torch.where(triplets, margin + d[:, :, None] - d[:, None, :], 0.0).relu()
    rows = e.sum((1, 2)) / different.sum(1).clamp(min=1)
    if weight is not None:
        rows = rows * torch.where(valid, ordinary(weight).to(s.dtype), 0.0)
    share = (e > 0).sum() / triplets.sum().clamp(min=1)
    return rows.sum() / valid.sum().clamp(min=1), share.float().detach()


def relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    exclude_self: bool,
    normalize: bool,
    divergence: str,
    parameter: torch.Tensor | float,
    temperature: torch.Tensor | float,
    teacher_temperature: torch.Tensor | float,
    mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """Holds [*, N, M]."""
    dtype = compute_dtype(student, teacher, student_keys, teacher_keys)
    rows = student.shape[:-1]
    mask, weight = (None if x is None else ordinary(x).expand(rows) for x in (mask, weight))
    if key_mask is None and student_keys is None:
        key_mask = mask
    elif key_mask is not None:
        key_mask = ordinary(key_mask).expand(rows if student_keys is None else student_keys.shape[:-1])

    def similarities(x, keys):
        keys = x if keys is None else keys
        x, keys = (
            z if here is None else torch.where(here[..., None], z, 0.0)  # it may hold NaN
            for z, here in ((x.to(dtype), mask), (keys.to(dtype), key_mask))
        )
        if normalize:
            x, keys = _of_length_one(x), _of_length_one(keys)
        # what is added to a row does not count; digits of what is far from the origin do
        found = keys.new_ones(keys.shape[:-1]) if key_mask is None else key_mask.to(dtype)
        mean = (keys * found[..., None]).sum(-2, keepdim=True) / found.sum(-1).clamp(min=1)[..., None, None]
        s = x @ (keys - mean).mT * (1.0 if normalize else x.shape[-1] ** -0.5)
        if exclude_self:
            s = s.masked_fill(torch.eye(s.shape[-1], dtype=torch.bool, device=s.device), -torch.inf)
        return s if key_mask is None else s.masked_fill(~key_mask[..., None, :], -torch.inf)

    if rows.numel() == 0 or (student_keys is not None and student_keys.shape[-2] == 0):
        return (student.to(dtype) * 0).sum() + (0 if student_keys is None else (student_keys.to(dtype) * 0).sum())
    s = similarities(student, student_keys)
    t = similarities(*(x if x is None else ordinary(x).detach() for x in (teacher, teacher_keys)))
    options = LogitsOptions(
        temperature, teacher_temperature, False, mask, weight, "batchmean", None, False, parameter
    )  # fmt: skip
    return logits_loss(divergence, s, t, options)


def _divided(x, by):
    """Rows over what by makes of their length; a row of zeros has no gradient."""
    squares = x.square().sum(-1, keepdim=True)  # which loses fewer digits of long rows than vector_norm
    nothing = squares == 0
    length = torch.where(nothing, 1.0, squares).sqrt()  # what is not chosen below must stay differentiable
    return torch.where(nothing, 0.0, x / by(length))


def _largest(x, dim):
    """The largest elements, 1 in place of 0. What is divided by them has squares in float32's range."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)


def _of_length_one(x):
    """Rows over their length, of at least 1e-12; a row of zeros has no gradient."""
    largest = _largest(x, -1)
    return _divided(x / largest, lambda length: torch.maximum(length, 1e-12 / largest))


def _standardized(x):
    """Rows less their mean, over sqrt(variance + 1e-6)."""
    centred = x - x[..., :1].detach()  # of equal values the mean is exact
    unit = _largest(centred, -1).clamp(min=1)
    centred = centred / unit
    centred = centred - centred.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + (1e-3 / unit).square()).sqrt()


_FEATURES = {"plain": lambda x: x, "l2": _of_length_one, "standardize": _standardized, "cosine": _of_length_one}


def _smooth_l1(e, beta):
    """As F.smooth_l1_loss, elementwise, but for numbers that torch.compile would build into the graph."""
    whole = e.new_ones(()) * beta  # inf, where it is beyond the range
    whole = torch.where(whole >= 0, whole, torch.nan)  # compiled, it was not checked
    beta = whole.clamp(max=torch.finfo(e.dtype).max)
    sign = torch.where(e.isnan(), e, e.sign()).detach()  # of NaN, torch's is 0
    inside = e.abs() < beta
    near = torch.where(inside, e, 0.0)  # what is not chosen below must stay differentiable
    return torch.where(inside, near * (near / torch.where(whole == 0, 1.0, whole)) / 2, e * sign - beta / 2)


def _feature_layer(feature, student, teacher, dim, mask, weight, dtype, beta):
    """The losses of a layer's rows [*]."""
    s, t = (x.movedim(dim, -1).to(dtype) for x in (student, ordinary(teacher).detach()))
    if mask is not None:  # before anything is computed: a masked row may hold NaN
        s, t = (torch.where(ordinary(mask)[..., None], x, 0.0) for x in (s, t))
    difference = _FEATURES[feature](s) - _FEATURES[feature](t)
    rows = (difference.square() if beta is None else _smooth_l1(difference, beta)).sum(-1)
    if feature == "cosine":
        rows = rows / 2
    return rows if weight is None else rows * ordinary(weight).to(dtype)


def feature_loss(
    feature: str,
    students: list[torch.Tensor],
    teachers: list[torch.Tensor],
    dims: list[int],
    masks: list[torch.Tensor],
    weights: list[torch.Tensor],
    reduction: str,
    layer_weights: list[float],
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and layers; the arguments have been checked."""
    dtype = compute_dtype(*students, *teachers)
    losses = []
    for layer, (student, teacher, dim) in enumerate(zip(students, teachers, dims, strict=True)):
        mask, weight = (x[layer] if x else None for x in (masks, weights))
        rows = _feature_layer(feature, student, teacher, dim, mask, weight, dtype, beta)
        D = 1 if feature == "cosine" else student.shape[dim]
        losses.append(rows if reduction == "none" else _reduce(rows, D, mask, reduction, None))
    # tensors: a number times a tensor without dimensions has a forward derivative in float64
    numbers = [losses[0].new_ones(()) * weight for weight in layer_weights]
    if reduction == "none":
        weighted = [number * rows.reshape(-1) for number, rows in zip(numbers, losses, strict=True)]
        return torch.cat(weighted), torch.stack([rows.detach().sum() for rows in losses])
    layers = torch.stack(losses)
    return (layers * torch.stack(numbers)).sum(), layers.detach()


def attention_transfer(student: torch.Tensor, teacher: torch.Tensor, p: float) -> torch.Tensor:
    dtype = compute_dtype(student, teacher)
    s, t = (x.to(dtype) for x in (student, ordinary(teacher).detach()))
    if not s.shape[0] * s.shape[2] * s.shape[3]:
        return (s * 0).sum()
    p = _number(p, s)

    def attention(x):
        largest = _largest(x, (1, 2, 3))
        x = (x / largest).abs().pow(p).mean(1).flatten(1)
        shortest = (1e-12 ** (1 / p) / largest).pow(p).flatten(1)
        return _divided(x, lambda length: torch.maximum(length, shortest))

    return (attention(s) - attention(t)).square().mean()


def linear_feature_loss(
    feature: str,
    student: torch.Tensor,
    projector_weight: torch.Tensor,
    projector_bias: torch.Tensor | None,
    teacher: torch.Tensor,
    dim: int,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    projector_weight, projector_bias = ordinary(projector_weight), ordinary(projector_bias)
    projected = torch.nn.functional.linear(student.movedim(dim, -1), projector_weight, projector_bias)
    masks, weights = ([] if x is None else [x] for x in (mask, weight))
    teacher, dims = teacher.movedim(dim, -1), [student.dim() - 1]
    return feature_loss(feature, [projected], [teacher], dims, masks, weights, reduction, [1.0])[0]
