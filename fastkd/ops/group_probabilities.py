"""A teacher of probabilities whose classes are split over ranks, as the student's are: see ops/probabilities.py.

What a row sums to is a sum over ranks, one number a row that is exchanged before all else. With it the schedule of
ops/group.py computes the same distributions as in one process, with the same parameter, factor and constant.
"""

from typing import Any

import torch

from .._calls import RowsCall, RowsForward
from . import rows
from .group import How, loss_of_rows, with_mean
from .group_logits import LogitsOfRanks
from .group_top_k import hard_of_ranks
from .probabilities import OfProbabilities


class ProbabilitiesOfRanks(OfProbabilities):
    """A teacher of whose probabilities each rank has those of its classes."""

    def __init__(
        self,
        namespace: str,
        as_given: torch.Tensor | None,
        own: float,
        dtype: torch.dtype,
        ranks: Any,
        mean: bool,
        widths: torch.Tensor,
    ) -> None:
        """namespace: that of standardized rows, where they are to be. mean, widths: as of FewOfRanks."""
        plain = namespace.removeprefix(rows.standardized(""))
        super().__init__(plain, False, as_given, own, dtype, namespace != plain)
        # of their logarithms
        self.logits: LogitsOfRanks = LogitsOfRanks(namespace, False, dtype, ranks, False, widths)
        self.ranks: Any = ranks
        self.mean: bool = mean
        self.widths: torch.Tensor = widths

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        """The whole slab, whose rows are the same on all ranks."""
        part = with_mean(part, self.widths) if self.mean else part
        self.of_few(part, slab, out, slab.of_rows(self.as_given))

    def sums_of(self, q: torch.Tensor) -> torch.Tensor:
        return self.ranks.gathered(super().sums_of(q).reshape(-1)).sum(0).view(q.shape[:-1])

    def of_logits(self, part: RowsCall, out: RowsForward) -> None:
        if self.standardizes or part.target_loss:
            self.logits.loss(part, None, out)
        else:
            super().of_logits(part, out)

    def of_distributions(self, part: RowsCall, out: RowsForward) -> None:
        hard = None if part.target is None else tuple(part.target_numbers.tolist())
        how = How(out.loss.dim() > 0, False, hard)
        loss = loss_of_rows(self.namespace, how, self.ranks, part, out.grad)
        out.loss.copy_(loss.view(out.loss.shape))

    def _hard(self, part, out):
        return hard_of_ranks(self.namespace, self.ranks, part, out, self.dtype)
