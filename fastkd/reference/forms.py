"""What stands in place of a teacher's logits, in plain PyTorch."""

from typing import Any

import torch

from .. import _terms
from ..forms import TopKLogProbs


def few_classes(
    logits: torch.Tensor, log_probs: torch.Tensor, few: TopKLogProbs, temperature: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of both sides the logits of the classes that the teacher knows; and of the bucket of all others, in which the
    student has T log sum exp(z / T) and the teacher what is left of 1."""
    pad, classes = few.indices < 0, few.indices.to(torch.int64).clamp(0, logits.shape[-1] - 1)
    known, log_q = logits.gather(-1, classes).masked_fill(pad, -torch.inf), log_probs.masked_fill(pad, -torch.inf)
    known = known.masked_fill(few.indices >= logits.shape[-1], torch.nan)  # where no check could look
    if few.tail == "renormalize":
        return known, few.temperature * log_q
    among = torch.zeros_like(logits, dtype=torch.int64).scatter_add_(-1, classes, (~pad).long()) > 0
    others = logits.masked_fill(among, -torch.inf) / temperature
    nothing = (others == -torch.inf).all(-1, keepdim=True)
    tail = torch.logsumexp(others.masked_fill(nothing, 0.0), -1, keepdim=True).masked_fill(nothing, -torch.inf)
    left = few.log_tail
    if left is None:  # nothing, whatever rounding says, where all classes are known
        left = torch.log1p(-log_q.double().exp().sum(-1).clamp(max=1))
        left = left.masked_fill(among.all(-1), -torch.inf)
    left = left.masked_fill(pad.all(-1), 0.0)
    log_q = torch.cat([log_q, left[..., None].to(log_q.dtype)], -1)
    return torch.cat([known, temperature * tail], -1), few.temperature * log_q


def known_terms(
    log_p: torch.Tensor, log_q: torch.Tensor, few: TopKLogProbs, least: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of both sides of the classes that the teacher knows, and which of them are no padding.
    least: what log-probabilities are raised to."""
    there, V = few.indices >= 0, log_p.shape[-1]
    known = log_p.gather(-1, few.indices.to(torch.int64).clamp(0, V - 1)).masked_fill(few.indices >= V, torch.nan)
    return *_terms.of_those(known, log_q, there, least)[:2], there


def best_class(log_probs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The first of the best that are known; of padding alone none, a number beyond all classes."""
    log_probs = log_probs.masked_fill(indices < 0, -torch.inf)
    best = (log_probs == log_probs.amax(-1, keepdim=True)) & (indices >= 0)
    return torch.where(best, indices.to(torch.int64), torch.iinfo(torch.int64).max).amin(-1)


def logits(probabilities: torch.Tensor, temperature: Any, coins: bool) -> torch.Tensor:
    """Of probabilities that were taken at a temperature."""
    log = torch.log(probabilities)
    return temperature * (log - torch.log1p(-probabilities) if coins else log)


def mass(probabilities: torch.Tensor, same: Any) -> torch.Tensor:
    """The sum of each row, where they are used at their own temperature; else they are softened, and it is 1."""
    total = probabilities.sum(-1)
    if isinstance(same, torch.Tensor):
        return torch.where(same, total, 1.0)
    return total if same else torch.ones_like(total)
