"""Losses that part a row's target from its other classes (``dkd_loss``, ``nkd_loss``), whose classes are split over
ranks: see reference/targets.py.

The other classes are rows of their own, in which the target is impossible, and ops/group.py compares them. What it
exchanges of them says what there is beside the target, in log odds; the target's logits, which one rank has, are two
more numbers a row. Then the part of the two classes is known on every rank, and its gradient goes to the target, and to
the others by what the student gives each of them.
"""

import math
from typing import Any

import torch

from .. import reference
from .._calls import RowsCall, RowsForward
from .._divergences import NUMBERS, TARGET_LOSSES
from .._dtypes import compute_dtype
from .._split_classes import wrong_targets
from . import rows
from .group import How, loss_of_rows, whole
from .teachers import Weights
from .teachers import of_rows as beside_classes


def in_range(entry: Any, value: Any) -> Any:
    """A loss's own number. It was not checked where torch.compile had made it a symbol: an error where the host can
    look, else NaN."""
    if not isinstance(value, torch.Tensor):
        return value
    inside = (value >= entry.low) & (value <= entry.high)
    if not value.is_cuda and not bool(inside.all()):
        raise RuntimeError(f"{entry.name}: a number {entry.range} wanted, got {value[~inside].flatten()[0].item()}")
    return torch.where(inside, value, torch.nan)


def parted_loss(namespace: str, ranks: Any, widths: torch.Tensor, part: RowsCall, out: RowsForward) -> None:
    """Fills out, of a slab; the gradient may be its student. widths: as of FewOfRanks."""
    leading, dtype = part.student.shape[:-1], compute_dtype(part.student, part.teacher)
    name = "dkd_loss" if part.target_loss == TARGET_LOSSES["dkd_loss"].number else "nkd_loss"
    entry, decoupled = TARGET_LOSSES[name], name == "dkd_loss"
    soft_weight = in_range(entry.parameter, part.parameter if part.parameter_rows is None else part.parameter_rows)
    wrong = wrong_targets(part.target, widths[0], part.mask)
    here, at, sides, of_target = _parted(part, widths, wrong, dtype)
    of_target = ranks.gathered(of_target).sum(0)
    others = part._replace(
        student=sides[0], teacher=sides[1], target=None, target_loss=0,
        divergence=NUMBERS["kl_div" if decoupled else "soft_cross_entropy"],
        parameter=0.0, parameter_rows=None, second_parameter=0.0, second_parameter_rows=None,
    )  # fmt: skip
    found = whole(rows.OPS[namespace], others, ranks)
    if decoupled:
        two, weights = _TwoClasses(of_target, found.stats, part, wrong), Weights(part)
        alpha = part.second_parameter if part.second_parameter_rows is None else part.second_parameter_rows
        hard, slope = two.divergence(in_range(entry.second, alpha), soft_weight)
    else:  # temperature 1, and no square of one
        at_1 = others._replace(
            temperature=1.0, temperature_rows=None, teacher_temperature=1.0, teacher_temperature_rows=None
        )
        stats = whole(rows.OPS[namespace], at_1, ranks).stats
        two, weights = _TwoClasses(of_target, stats, at_1, wrong), Weights(at_1._replace(t_squared=False))
        hard, slope = two.normalized()
    soft_weight = torch.as_tensor(soft_weight, dtype=dtype, device=here.device).expand(here.shape)
    weight = soft_weight.contiguous() if part.weight is None else part.weight * soft_weight
    counts = ~two.nothing & (weight != 0)  # what has no weight may be infinite
    others = others._replace(mask=counts if part.mask is None else counts & part.mask, weight=weight)
    grad = None if out.grad is None else torch.empty_like(sides[0])
    loss = loss_of_rows(namespace, How(out.loss.dim() > 0, False, None), ranks, others, grad, found)
    out.loss.copy_(loss.view(out.loss.shape))
    weights.add_loss(hard.view(leading), out.loss)
    if grad is not None:
        slope = slope.view(*leading, 1) * weights.all / weights.T
        if weights.mask is not None:
            slope = torch.where(weights.mask[..., None], slope, 0.0)
        slope = slope.to(dtype)
        grad.sub_(slope * two.among_others(sides[0]))
        if grad.shape[-1]:
            grad.scatter_add_(-1, at, torch.where(here.view(*leading, 1), slope, 0.0))
        out.grad.copy_(grad)


def _parted(part, widths, wrong, dtype):
    """Which rows have their target here; its number here, [*, 1]; copies of both sides without it; and both sides'
    logits of it, [N, 2] in float64, 0 where another rank has them."""
    leading, V = part.student.shape[:-1], part.student.shape[-1]
    at = part.target - widths[1].long()
    here = (at >= 0) & (at < V) & ~wrong
    at, of_row = torch.where(here, at, 0).view(*leading, 1), here.view(*leading, 1)
    sides = [x.to(dtype, copy=True) for x in (part.student, part.teacher)]
    of_target = part.student.new_zeros((math.prod(leading), 2), dtype=torch.float64)
    for i, x in enumerate(sides if V else ()):
        if part.mask is not None:  # a masked row may hold NaN
            x.masked_fill_(~part.mask.view(*leading, 1), 0.0)
        own = x.gather(-1, at)
        of_target[:, i] = torch.where(of_row, own, 0.0).view(-1)
        x.scatter_(-1, at, torch.where(of_row, -torch.inf, own))
    return here, at, sides, of_target


class _TwoClasses:
    """The target and all others together, in float64: a loss and its slope, its derivative by the student's log odds,
    of each row."""

    def __init__(self, of_target, stats, part, wrong):
        """of_target: logits of both sides. stats: of the other classes, at the temperatures of part. wrong: rows whose
        target is no class."""
        T, of_teacher = part.temperature, part.teacher_temperature
        T = T if part.temperature_rows is None else part.temperature_rows.double()
        if part.teacher_temperature_rows is not None:
            of_teacher = part.teacher_temperature_rows.double()
        own = of_target[:, 0] / T, of_target[:, 1] / of_teacher
        others = [
            torch.where(total == 0, -torch.inf, top / t + torch.log(total))
            for top, total, t in ((stats[:, 0], stats[:, 1], T), (stats[:, 2], stats[:, 3], of_teacher))
        ]
        self.stats, self.T = stats, T
        no_student, no_teacher = ((x == -torch.inf) & (y == -torch.inf) for x, y in zip(own, others, strict=True))
        self.nothing, self.endless = no_student | no_teacher, no_student & ~no_teacher
        loud = wrong | (sum(own) + sum(others)).isnan() & ~self.nothing | (of_target == torch.inf).any(1)
        self.loud = torch.where(loud, torch.nan, 0.0)
        self.a, self.b = (torch.where(self.nothing, 0.0, x - y) for x, y in zip(own, others, strict=True))

    def divergence(self, alpha, beta):
        """alpha KL(q || p); beta: the weight of what there is beside it, which rows of no class at all may have."""
        a, b = self.a, self.b
        sure = (a == torch.inf) | (b == torch.inf)  # without other classes
        x, y = (torch.where(sure, 0.0, z)[:, None] for z in (a, b))
        of_student = torch.where(a == torch.inf, torch.where(b == torch.inf, 0.0, torch.inf), _minus_log(a))
        loss = torch.where(sure, of_student, reference.DIVERGENCES["bernoulli_kl_div"](x, y))
        loss = torch.where(sure & (b != torch.inf), torch.inf, loss)
        d = a - b
        near = torch.sigmoid(b) * torch.sigmoid(-a) * torch.expm1(d.clamp(-1, 1))
        slope = torch.where(d.abs() < 1, near, torch.sigmoid(a) - torch.sigmoid(b))
        slope = torch.where(a == torch.inf, 0.0, slope)
        alpha, beta = (torch.as_tensor(x, dtype=torch.float64, device=a.device) for x in (alpha, beta))
        self.endless = self.endless & ((alpha != 0) | (beta != 0))
        return self._rows(*(torch.where(alpha == 0, 0.0, alpha * x) for x in (loss, slope)))

    def normalized(self):
        """-q log p"""
        q = torch.sigmoid(self.b)
        return self._rows(torch.where(q == 0, 0.0, q * _minus_log(self.a)), -q * torch.sigmoid(-self.a))

    def among_others(self, z):
        """Of a slab [*, V] of the other classes what the student gives each of them, among themselves."""
        leading = z.shape[:-1]
        top, total = (self.stats[:, i].view(*leading, 1) for i in range(2))
        T = beside_classes(self.T, leading)
        T = T.to(z.dtype) if isinstance(T, torch.Tensor) else T
        return ((z - top.to(z.dtype)) / T).exp() * torch.where(total == 0, 0.0, 1 / total).to(z.dtype)

    def _rows(self, loss, slope):
        loss = torch.where(self.nothing, torch.where(self.endless, torch.inf, 0.0), loss)
        return loss + self.loud, torch.where(self.nothing, 0.0, slope) + self.loud


def _minus_log(log_odds):
    return -torch.nn.functional.logsigmoid(log_odds)
