"""A teacher whose probabilities are given, and need not sum to 1: what a divergence from them is, of distributions.

With q = S q', where q' sums to 1, most divergences D(q, p) are

    factor D'(q', p) + constant

where D' is the same divergence with another parameter. A mixture a q + b p, for instance, is M = a S + b times one of
q' and p, with shares a S / M and b / M; what log M then adds to a logarithm is in the constant.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of which there is no such form.
WITHOUT = ("total_variation", "negative_log_acceptance", "alpha_beta_div")


class OfMass(NamedTuple):
    """Of each row."""

    parameter: Any  # None: the divergence has none
    factor: Any
    constant: Any


def _over(x, M):
    return x / torch.where(M == 0, 1.0, M)


def _js_div(S, beta):
    rest = 1 - beta
    M = beta * S + rest
    of_teacher = torch.where(beta == 0, torch.xlogy(S, S), torch.xlogy(beta * S, _over(S, M)))
    inside = of_teacher - torch.xlogy(rest, M)
    is_reverse = beta == 1  # by convention
    return OfMass(
        # 1, where rounding makes that of it, would be the other divergence
        torch.where(is_reverse, 1.0, _over(beta * S, M).clamp(max=1 - torch.finfo(S.dtype).eps / 2)),
        torch.where(is_reverse, 1.0, M * torch.where(beta == 0, S, 1.0)),
        torch.where(is_reverse, -torch.log(S), inside),
    )


def _symmetric_kl_div(S, w):
    M = (1 - w) * S + w
    return OfMass(_over(w, M), M, (1 - w) * torch.xlogy(S, S) - torch.xlogy(w, S))


def _skew_kl_div(S, alpha):
    M = alpha * S + 1 - alpha
    return OfMass(_over(alpha * S, M), S, torch.xlogy(S, _over(S, M)))


def _skew_reverse_kl_div(S, alpha):
    M = alpha + (1 - alpha) * S
    return OfMass(_over(alpha, M), torch.ones_like(S), -torch.log(M))


_OF = {
    "kl_div": lambda S, _: OfMass(None, S, torch.xlogy(S, S)),
    "soft_cross_entropy": lambda S, _: OfMass(None, S, torch.zeros_like(S)),
    "reverse_kl_div": lambda S, _: OfMass(None, torch.ones_like(S), -torch.log(S)),
    "js_div": _js_div,
    "symmetric_kl_div": _symmetric_kl_div,
    "skew_kl_div": _skew_kl_div,
    "skew_reverse_kl_div": _skew_reverse_kl_div,
}


def of_mass(divergence: str, mass: Tensor, parameter: Tensor | None) -> OfMass:
    """Of rows with these sums S, [*]; parameter: the divergence's own, [*] or []. A row of 0 knows nothing: its
    constant is 0."""
    found = _OF[divergence](mass, parameter)
    return found._replace(constant=torch.where(mass == 0, 0.0, found.constant))
