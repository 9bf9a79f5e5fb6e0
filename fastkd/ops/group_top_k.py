"""A teacher of whom the best classes are known, beside a student whose classes are split over ranks: see ops/top_k.py.

Each class is some rank's. Each rank reads its logits of those of the K classes that it has, and sums its others; all of
that is exchanged, K + 1 numbers a row, or K where the others do not count. Then every rank has what one process has,
and computes the same loss. Its gradient goes back to the classes that a rank has: those of the K, and its part of the
others, which are summed over all ranks.
"""

from typing import Any

import torch

from .._calls import FormRows, RowsCall, RowsForward
from .._divergences import NUMBERS
from .group import How, loss_of_rows, with_mean
from .teachers import hard_call
from .top_k import FewClasses


def hard_of_ranks(
    namespace: str, ranks: Any, part: RowsCall, out: RowsForward, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The hard loss of a call alone, and its gradient where one is wanted."""
    hard = hard_call(part, dtype)
    grad = hard.student if out.grad is not None else None
    hard = hard._replace(
        teacher=part.student,  # of which statistics are made
        divergence=NUMBERS["kl_div"],
        parameter=0.0,
        parameter_rows=None,
        second_parameter=0.0,
        second_parameter_rows=None,
    )
    how = How(out.loss.dim() > 0, False, tuple(hard.target_numbers.tolist()))
    loss = loss_of_rows(namespace, how, ranks, hard, grad)
    return loss.view(out.loss.shape).to(out.loss.dtype), grad


class _OverNone:
    """The student where this rank has no class at all."""

    def __init__(self, like, width):
        self.u = like.new_full((*like.shape[:-1], width), -torch.inf, dtype=torch.float64)
        self.sums = self.u.new_zeros(self.u[..., 0].numel(), 2)

    def logits(self):
        return self.u

    def gradient(self, g, hard, out):
        """There is none."""


class FewOfRanks(FewClasses):
    """A teacher who has K classes of each row, numbered as those of all ranks."""

    def __init__(
        self,
        namespace: str,
        call: FormRows,
        scale: float,
        log_prob_min: float,
        dtype: torch.dtype,
        ranks: Any,
        mean: bool,
        widths: torch.Tensor,
    ) -> None:
        """widths: how many classes all ranks have, and how many there are before this rank's. mean: whether the divisor
        is to be multiplied by the former."""
        super().__init__(namespace, call, scale, log_prob_min, dtype)
        self.ranks: Any = ranks
        self.mean: bool = mean
        self.widths: torch.Tensor = widths

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        super().loss(with_mean(part, self.widths) if self.mean else part, slab, out)

    def _classes(self, z):
        return self.widths[0]

    def _over(self, part, index):
        if part.student.shape[-1] == 0:
            return _OverNone(part.student, index.shape[-1] + (self.tail != "renormalize"))
        here = index - self.widths[1].long()
        here = torch.where((index >= 0) & (here >= 0) & (here < part.student.shape[-1]), here, -1)
        return super()._over(part, here)

    def _logits(self, student, part, index):
        own = student.logits()
        parts, K = self.ranks.gathered(own), index.shape[-1]
        u = parts.amax(0)  # of a class that is not here there is -inf
        u[..., :K].masked_fill_(index >= self.widths[0], torch.nan)
        if own.shape[-1] > K:
            T = part.temperature if part.temperature_rows is None else part.temperature_rows.double()
            others = parts[..., K].reshape(self.ranks.size, -1)
            whole = T * torch.logsumexp(others / T, 0)
            u[..., K] = whole.view(index.shape[:-1])
            # of e^((z - max) / T), where the maximum stays the rank's own, the sum over all ranks
            largest, total = student.sums.unbind(1)
            total.copy_(torch.where(total == 0, 0.0, torch.exp((whole - largest) / T)))
        return u

    def _hard(self, part, out):
        return hard_of_ranks(self.namespace, self.ranks, part, out, self.dtype)
