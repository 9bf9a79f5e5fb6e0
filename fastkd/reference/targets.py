"""The losses of logits with a target in plain PyTorch: cross-entropy, and those that part it from the other classes."""

import functools

import torch

from ._shared import _number
from .divergences import _coin, _divergence, _kl_div


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
    endless = torch.full_like(rows, torch.inf)
    if decoupled:  # of which both parts may be left out
        endless = _weighted(first, endless) + _weighted(second, endless)
    rows = torch.where(no_q, 0.0, torch.where(no_p, endless, rows))
    rows = rows + torch.where(loud, torch.nan, 0.0) * torch.where(loud[..., None], s, 0.0).sum(-1)
    return rows * torch.where(known, rows.new_ones(()), torch.nan)
