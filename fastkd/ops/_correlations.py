"""Correlations of student's and teacher's probabilities, in plain PyTorch: sums of products of a slab of rows, and what
they come to, as csrc/math/correlation.h has it."""

import functools
from typing import Any, NamedTuple

import torch


class Moments(NamedTuple):
    """Of n values of p, of D = p - q and of q: their means, and sums of products of what they are beyond these."""

    n: Any
    p: Any
    D: Any
    q: Any
    sums: torch.Tensor  # [5, *]: of a a, b b, a b, a D and D D, where a is of p and b of q

    def merged(self, x: Any) -> Any:
        """With those of other values."""
        total = self.n + x.n
        share = x.n / torch.clamp(total, min=1)
        p, D, q = (y - z for y, z in zip(x[1:4], self[1:4], strict=True))
        beyond = torch.stack([p * p, q * q, p * q, p * D, D * D]) * (self.n * share)
        means = (z + y * share for y, z in zip((p, D, q), self[1:4], strict=True))
        return Moments(total, *means, self.sums + x.sums + beyond)


def moments(p: torch.Tensor, D: torch.Tensor, q: torch.Tensor, dim: int, counts: Any = None) -> Moments:
    """Along a dimension; counts: which of the values do. In float64, from sums of what is computed in."""
    given = [x if counts is None else torch.where(counts, x, 0.0) for x in (p, D, q)]
    n = p.shape[dim] if counts is None else counts.sum()
    n = torch.as_tensor(n, dtype=torch.float64, device=p.device)
    at_least_one = n.clamp(min=1)
    means = [(x.sum(dim, keepdim=True).double() / at_least_one).to(x.dtype) for x in given]
    a, D_, b = (x - mean for x, mean in zip(given, means, strict=True))
    if counts is not None:
        a, D_, b = (torch.where(counts, x, 0.0) for x in (a, D_, b))
    # the mean was rounded: what is left of it is taken away from the sums of products
    left = [x.sum(dim).double() / at_least_one for x in (a, D_, b)]
    pairs = (a, a, 0, 0), (b, b, 2, 2), (a, b, 0, 2), (a, D_, 0, 1), (D_, D_, 1, 1)
    sums = torch.stack([(x * y).sum(dim).double() - left[i] * left[j] * n for x, y, i, j in pairs])
    sums[[0, 1, 4]] = torch.where(sums[[0, 1, 4]] < 0, 0.0, sums[[0, 1, 4]])  # rounding may leave less; NaN stays
    means = (mean.squeeze(dim).double() + rest for mean, rest in zip(means, left, strict=True))
    return Moments(n, *means, sums)


def correlations(m: Moments, eps: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See csrc/math/correlation.h: of each row or column its loss, its slope and its own."""
    aa, bb, ab, aD, DD = m.sums.unbind(0)
    finfo = torch.finfo(dtype)
    constant = torch.zeros_like(aa, dtype=torch.bool)
    for squares, mean in ((aa, m.p), (bb, m.q)):
        rounding = (4 * finfo.eps) ** 2 * (squares + m.n * mean * mean)
        constant = constant | (squares <= finfo.tiny) | (squares <= rounding)
    a, b = (torch.where(constant, 1.0, x).sqrt() for x in (aa, bb))
    inverse = 1 / (a * b + eps)
    far = ~(a * b / 2 > DD)
    apart = (2 * aD - DD) / (a + b)
    rest = DD - apart * apart
    rest = torch.where(rest < 0, 0.0, rest) / 2
    loss = (torch.where(far, a * b - ab, rest) + eps) * inverse
    slope = torch.where(far, -inverse, inverse)
    own = torch.where(far, ab * b / a, -(b / a * aD + eps)) * inverse * inverse
    return torch.where(constant, 1.0, loss), *(torch.where(constant, 0.0, x) for x in (slope, own))


class Compared(NamedTuple):
    """A slab of student and teacher."""

    p: torch.Tensor  # [n, V]
    D: torch.Tensor
    q: torch.Tensor
    stats: list[torch.Tensor]  # [n, 1] in float64: maximum and sum of the student, those of the teacher


def _exponentials(z, T):
    """e^((z - maximum) / T), with the maximum and the sum in float64."""
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((len(z), 1), -torch.inf)
    top = torch.where(top == -torch.inf, 0.0, top)
    e = ((z - top) / T).exp()
    return e, top.double(), e.sum(-1, keepdim=True).double()


def _of_ranks(sides, T, ranks):
    """The same, of the classes of all ranks."""
    each, found = ranks.gathered(torch.cat([x for _, *stats in sides for x in stats], -1)), []
    for i, (e, *_) in enumerate(sides):
        top, total = each[..., 2 * i : 2 * i + 1], each[..., 2 * i + 1 : 2 * i + 2]
        top = torch.where(total == 0, -torch.inf, top)
        largest = top.amax(0)
        largest = torch.where(largest == -torch.inf, 0.0, largest)
        factors = torch.where(total == 0, 0.0, torch.exp((top - largest) / T))
        found.append((e * factors[ranks.rank].to(e.dtype), largest, (total * factors).sum(0)))
    return found


def compared(s: torch.Tensor, t: torch.Tensor, T: float, as_given: bool, ranks: Any) -> Compared:
    """Of logits [n, V]. as_given: whether t / T are logarithms of probabilities that are not to be normalized. ranks:
    those over which the classes are split, or None."""
    sides = [_exponentials(z, T) for z in (s, t)]
    (e, top, total), (of_teacher, teacher_top, teacher_total) = sides if ranks is None else _of_ranks(sides, T, ranks)
    if as_given:
        teacher_total = torch.where(teacher_total == 0, 0.0, torch.exp(-teacher_top / T))
    return _compared(s, t, T, (e, of_teacher), [top, total, teacher_top, teacher_total])


def compared_again(s: torch.Tensor, t: torch.Tensor, T: float, stats: list[torch.Tensor]) -> Compared:
    """The same, of which the statistics are known."""
    e = [((z - top.to(z.dtype)) / T).exp() for z, top in ((s, stats[0]), (t, stats[2]))]
    return _compared(s, t, T, e, stats)


def _compared(s, t, T, exponentials, stats):
    top, total, teacher_top, teacher_total = stats
    inverses = (torch.where(x == 0, 0.0, 1 / x) for x in (total, teacher_total))
    p, q = (e * x.to(e.dtype) for e, x in zip(exponentials, inverses, strict=True))
    offset = (top - teacher_top) / T + torch.log(total / teacher_total)
    w = (s - t) / T - offset.to(s.dtype)
    w = torch.where((p == 0) | (q == 0), torch.inf, w)
    D = torch.where(w.abs() < 1, q * torch.expm1(w.clamp(-1, 1)), p - q)
    return Compared(p, D, q, stats)


def of_all_ranks(own: Moments, ranks: Any) -> Moments:
    """Of the classes of all ranks, from those of each."""
    each = ranks.gathered(torch.stack([own.n.expand_as(own.p), *own[1:4], *own.sums]))
    found = [Moments(*x[:4].unbind(0), x[4:]) for x in each.unbind(0)]
    return functools.reduce(Moments.merged, found)
