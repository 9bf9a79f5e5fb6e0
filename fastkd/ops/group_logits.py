"""Losses of logits whose classes are split over ranks and of whose rows more is asked for than ops/group.py exchanges,
a slab of rows at a time: standardized logits (ops/group_standardize.py), a target that is parted from the other classes
(ops/group_targets.py), and ``adaptive_kl_div``.

A class is in the teacher's head where the probabilities of this class, of its equals and of all that are likelier sum
to at most mu. The logit at which they sum to more is found eight bits at a time: the classes that begin with the bits
known so far are counted by their next eight, as probabilities in whole numbers, and all ranks' counts are added up.
Four such rounds find it, eight in float64, of 2 KiB a row each. The differences in head and tail are one more, of two
numbers.
"""

import math
from typing import Any

import torch

from .. import _terms
from .._calls import RowsCall, RowsForward
from .._divergences import DERIVED
from . import rows
from .group import How, Whole, loss_of_rows, whole, with_mean
from .group_standardize import standardized
from .group_targets import in_range, parted_loss
from .group_top_k import hard_of_ranks
from .probabilities import sum_in_double
from .teachers import Apart, of_rows


class LogitsOfRanks(Apart):
    """A teacher of logits whose classes are split over ranks, as the student's are."""

    def __init__(
        self, namespace: str, adaptive: bool, dtype: torch.dtype, ranks: Any, mean: bool, widths: torch.Tensor
    ) -> None:
        """namespace: that of standardized rows, where they are to be. mean, widths: as of FewOfRanks."""
        plain = namespace.removeprefix(rows.standardized(""))
        super().__init__(plain, adaptive, dtype)
        self.standardizes: bool = namespace != plain
        self.ranks: Any = ranks
        self.mean: bool = mean
        self.widths: torch.Tensor = widths
        self.found: Whole | None = None  # of the slab, where it has been exchanged before the loss

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        super().loss(with_mean(part, self.widths) if self.mean else part, slab, out)

    def _hard(self, part, out):
        return hard_of_ranks(self.namespace, self.ranks, part, out, self.dtype)

    def soft(self, part: RowsCall, slab: Any, out: RowsForward, hard_grad: torch.Tensor | None) -> None:
        x, back = part.student, None
        if self.standardizes:
            back, teacher = standardized(part, self.ranks, self.dtype)
            part = part._replace(student=back.values(), teacher=teacher.values())
        elif hard_grad is not None:
            part = part._replace(student=x.to(self.dtype, copy=True))  # both are rounded together
        grad = part.student if out.grad is not None and part.student is not x else out.grad
        if part.target_loss:
            parted_loss(self.namespace, self.ranks, self.widths, part, RowsForward(out.loss, grad, None, None))
        else:
            self.of_logits(part, RowsForward(out.loss, grad, None, None))
        if out.grad is None:
            return
        if back is not None:
            grad = back.gradient(grad, self.ranks)
        if grad is not out.grad:
            out.grad.copy_(grad if hard_grad is None else hard_grad.add_(grad))

    def of_distributions(self, part: RowsCall, out: RowsForward) -> None:
        found, self.found = self.found, None
        how = How(out.loss.dim() > 0, False, None)
        loss = loss_of_rows(self.namespace, how, self.ranks, part, out.grad, found)
        out.loss.copy_(loss.view(out.loss.shape))

    def _student_weight(self, part):
        mu = part.parameter if part.parameter_rows is None else part.parameter_rows
        mu = in_range(DERIVED["adaptive_kl_div"].parameter, mu)
        self.found = whole(rows.OPS[self.namespace], part, self.ranks)
        return share_of_tail(part, mu, self.found.stats, self.ranks, self.dtype)


def share_of_tail(part: RowsCall, mu: Any, stats: torch.Tensor, ranks: Any, dtype: torch.dtype) -> torch.Tensor:
    """The share [N] of the sum of absolute differences of p and q that does not lie in the teacher's head; 1/2 where
    there are none. stats: of all ranks' classes."""
    leading = part.student.shape[:-1]
    s, t = part.student.to(dtype), part.teacher.to(dtype)
    T, of_teacher = part.temperature, part.teacher_temperature
    T = T if part.temperature_rows is None else of_rows(part.temperature_rows.to(dtype), leading)
    if part.teacher_temperature_rows is not None:
        of_teacher = of_rows(part.teacher_temperature_rows.to(dtype), leading)
    student_top, student_sum, top, total = (stats[:, i].to(dtype).view(*leading, 1) for i in range(4))
    whole_numbers = 2.0 ** (40 if dtype is torch.float64 else 30)
    mass = (((t - top) / of_teacher).exp() * whole_numbers).round().nan_to_num(0.0).long()
    in_head = _above_bound(t + 0.0, mass, mu, ranks).view(t.shape) | (t == top)  # -0 + 0 is 0
    log_p, log_q = (s - student_top) / T - student_sum.log(), (t - top) / of_teacher - total.log()
    apart = _terms.difference(log_p.exp(), log_q.exp(), log_p, log_q).abs()
    own = torch.stack([sum_in_double(torch.where(in_head, 0.0, apart)), sum_in_double(apart)], -1)
    tail, all_ = ranks.gathered(own.view(-1, 2)).sum(0).unbind(1)
    share = torch.where((all_ > 0) & (all_ < torch.inf), tail / all_, 0.5)  # a NaN shows in the divergence itself
    return torch.where(mu.isnan(), torch.nan, share) if isinstance(mu, torch.Tensor) else share


def _above_bound(t, mass, mu, ranks):
    """Which logits [*, V], as [N, V], are above the one whose equals, and all that are above, have more of the mass
    than mu."""
    bits, shape = 8 * t.element_size(), (math.prod(t.shape[:-1]), t.shape[-1])
    key = t.reshape(shape).contiguous().view(torch.int64 if bits == 64 else torch.int32)
    key = torch.where(key < 0, key ^ torch.iinfo(key.dtype).max, key).long()  # in the order of the logits
    mass = mass.reshape(shape)
    above = bound = limit = everything = torch.zeros(())
    for shift in range(bits - 8, -1, -8):
        first = shift == bits - 8
        digit = (key >> shift) + 128 if first else (key >> shift) & 255
        counted = mass if first else torch.where((key >> (shift + 8)) == bound, mass, 0)
        bins = mass.new_zeros(len(mass), 256).scatter_add_(1, digit, counted)
        bins = ranks.gathered(bins).sum(0).flip(1)  # the likeliest come first
        if first:
            of_head = mu * bins.sum(1).double()
            limit = torch.where(of_head >= 0, of_head, 0.0).long()[:, None]
            above = torch.zeros_like(limit)
        down = bins.cumsum(1) + above
        exceeds = down > limit
        at = exceeds.int().argmax(1, keepdim=True)
        above = torch.where(at > 0, down.gather(1, (at - 1).clamp(min=0)), above)
        if first:
            everything, bound = ~exceeds.any(1, keepdim=True), 127 - at
        else:
            bound = bound * 256 + (255 - at)
    return everything | (key > bound)
