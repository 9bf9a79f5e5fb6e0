"""Standardized logits whose classes are split over ranks: ops/standardize.py, a slab of rows at a time.

Each rank's number of classes, their mean and the squares beyond it are gathered, three numbers a row of either side,
and merged; of the gradient two sums are, which bring it back.
"""

from typing import Any, NamedTuple

import torch

from .. import reference
from .._calls import RowsCall
from .probabilities import sum_in_double


class Standardized(NamedTuple):
    """A slab of logits, and what is known of its rows: of the classes of all ranks that are not -inf."""

    x: torch.Tensor  # [*, V], in what is computed in
    counts: torch.Tensor  # which are not -inf
    number: torch.Tensor  # [*, 1] in float64, as those below
    mean: torch.Tensor
    std: torch.Tensor

    def values(self) -> torch.Tensor:
        """(x - mean) / (std + 1e-7)"""
        return torch.where(self.counts, self._centred() * self._inverse(), self.x)

    def gradient(self, g: torch.Tensor, ranks: Any) -> torch.Tensor:
        """That of the logits, from g of what was standardized."""
        g, c = (torch.where(self.counts, y, 0.0) for y in (g, self._centred()))
        sums = torch.stack([sum_in_double(g), sum_in_double(g * c)], -1)
        sums = ranks.gathered(sums.view(-1, 2)).sum(0).view(sums.shape)
        total, along = sums[..., :1], sums[..., 1:]
        constant, inverse = self.std == 0, self._inverse()
        average = total / torch.where(constant, 1.0, self.number)
        slope = along * inverse / torch.where(constant, 1.0, (self.number - 1) * self.std)
        found = ((g - average.to(g.dtype)) - c * slope.to(g.dtype)) * inverse
        return torch.where(self.counts & ~constant, found, 0.0)

    def _centred(self):
        rounded = self.mean.to(self.x.dtype)
        return (self.x - rounded) - (self.mean - rounded).to(self.x.dtype)

    def _inverse(self):
        return (1 / (self.std + reference.STANDARDIZE_EPS)).to(self.x.dtype)


def standardized(part: RowsCall, ranks: Any, dtype: torch.dtype) -> list[Standardized]:
    """Student and teacher."""
    own, sides = [], []
    for given in (part.student, part.teacher):
        x = given.to(dtype)
        if part.mask is not None:  # a masked row may hold NaN
            x = torch.where(part.mask.view(*x.shape[:-1], 1), x, 0.0)
        counts = x != -torch.inf
        own += _moments(x, counts)
        sides.append((x, counts))
    sent = torch.stack(own, -1)
    each = ranks.gathered(sent.view(-1, 6)).view(ranks.size, *sent.shape).unbind(-1)
    return [Standardized(*side, *_merged(*each[3 * i : 3 * i + 3])) for i, side in enumerate(sides)]


def _moments(x, counts):
    """How many classes of a row count, their mean and the squares beyond it, [*] in float64."""
    n = counts.sum(-1).double()
    some = n.clamp(min=1)
    top = x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    top = torch.where(top == -torch.inf, 0.0, top)
    beyond = sum_in_double(torch.where(counts, x - top, 0.0))  # of equal classes it is 0
    mean = (top.squeeze(-1).double() + beyond / some).to(x.dtype)
    d = torch.where(counts, x - mean[..., None], 0.0)
    left, squares = sum_in_double(d), sum_in_double(d * d)
    squares = squares - left * left / some
    return n, mean.double() + left / some, torch.where(squares < 0, 0.0, squares)  # rounding may leave less; NaN stays


def _merged(n, mean, squares):
    """Of those of all ranks: number, mean and standard deviation [*, 1]."""
    some = n > 0
    largest = torch.where(some, mean, -torch.inf).amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    number = n.sum(0)
    # from the largest: of equal means it is that
    whole = largest + (n * torch.where(some, mean - largest, 0.0)).sum(0) / number.clamp(min=1)
    beyond = squares.sum(0) + (n * torch.where(some, mean - whole, 0.0).square()).sum(0)
    std = torch.where(number > 1, (beyond / (number - 1).clamp(min=1)).sqrt(), beyond * 0.0)
    return number[..., None], whole[..., None], std[..., None]
