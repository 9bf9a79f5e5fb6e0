"""The losses of logits in plain PyTorch: both sides' distributions, the divergence of each row, and its reduction."""

from typing import Any, NamedTuple

import torch

from .. import _terms
from .._check import LogitsOptions
from .._divergences import BY_NAME, DERIVED, REGISTRY
from .._dtypes import compute_dtype
from .._inplace import overwritten
from ..forms import Probabilities, TopKLogProbs
from . import forms
from ._shared import _number, _reduce, ordinary
from .divergences import DIVERGENCES, OF_DERIVED, _divergence
from .targets import _cross_entropy, _parted_target, _weighted


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
            mass = forms.mass(t, same)
        t = forms.logits(t, own, coins)
    if options.standardize:
        s, t = _standardized_logits(s), _standardized_logits(t)
    if few and few.tail != "ignore":
        s, t = forms.few_classes(s, t, few, temperature)
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
        log_p, log_q, there = forms.known_terms(log_p, t, sides.few, least)
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
    best = forms.best_class(sides.best, sides.few.indices) if sides.few else sides.best.argmax(-1)
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
