"""A teacher whose probabilities are given, of which the rows schedule sees the logarithms, a slab of rows at a time.

The schedule compares distributions, which sum to 1. Probabilities that are given at the temperature of the loss are
taken as they are, whatever they sum to, and then the loss is that of distributions with another parameter, times a
factor of the row, plus a constant: fastkd/_masses.py. Divergences of which that does not hold are computed by plain
PyTorch, from their terms: fastkd/_terms.py.
"""

from typing import Any

import torch

from .. import _masses, _terms, reference
from .._calls import RowsCall, RowsForward
from .._divergences import NUMBERS, TARGET_LOSSES
from .slabs import Room, slabs
from .standardize import rows_of_slab
from .teachers import Apart, Weights, of_rows, parameters, tell, with_parts

COLUMNS = 4096  # of probabilities that are summed in float64 at a time


def sum_in_double(x: torch.Tensor) -> torch.Tensor:
    """Of each row: what is 1 but for rounding is not rounded once more."""
    if x.is_cuda:
        return x.sum(-1, dtype=torch.float64)
    parts = (part.double().sum(-1) for part in x.split(COLUMNS, -1))  # else a copy of all in float64 is summed
    return sum(parts, start=x.new_zeros((), dtype=torch.float64))


class OfProbabilities(Apart):
    """A teacher of probabilities."""

    def __init__(
        self,
        namespace: str,
        adaptive: bool,
        as_given: torch.Tensor | None,
        own: float,
        dtype: torch.dtype,
        standardizes: bool,
    ) -> None:
        """own: the temperature that they were taken at; as_given: see FormRows."""
        super().__init__(namespace, adaptive, dtype)
        self.as_given: torch.Tensor | None = as_given
        self.own: float = own
        self.standardizes: bool = standardizes
        self.mass: Any = None  # of the slab: what its rows sum to, [*] in float64
        self.room: Room = Room(dtype)

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        """A few rows at a time: what is made of them is of their size, several times."""
        as_given = slab.of_rows(self.as_given)
        leading, total = part.student.shape[:-1], torch.zeros_like(out.loss)
        for few in slabs(leading, rows_of_slab(part.student)):
            per_row = out.loss.dim() > 0
            grad, parts = (x if x is None else x[few.index] for x in (out.grad, out.parts))
            of_few = RowsForward(out.loss[few.index] if per_row else torch.zeros_like(out.loss), grad, None, parts)
            self.of_few(few.call(part), few, of_few, few.of_rows(as_given))
            if not per_row:
                total += of_few.loss
        if out.loss.dim() == 0:
            out.loss.copy_(total)

    def sums_of(self, q: torch.Tensor) -> torch.Tensor:
        """Of each row, in float64."""
        return sum_in_double(q)

    def of_few(self, part: RowsCall, slab: Any, out: RowsForward, as_given: torch.Tensor | None) -> None:
        """Fills out, of some rows; as_given: of these."""
        q, name = part.teacher.to(self.dtype), list(NUMBERS)[part.divergence]
        coins, leading = name == "bernoulli_kl_div", part.student.shape[:-1]
        T = part.teacher_temperature
        if part.teacher_temperature_rows is not None:
            T = of_rows(part.teacher_temperature_rows, leading)
        same: Any = self.own == T  # whether they are as given
        if as_given is not None:  # the user's numbers have been rounded since
            same = of_rows(as_given, leading)
        own = torch.where(same, T, self.own) if isinstance(same, torch.Tensor) else self.own
        part = part._replace(teacher=self._logarithms(q, own, coins))
        if coins or self.standardizes:
            self.of_logits(part, out)
            return
        if part.target_loss == TARGET_LOSSES["nkd_loss"].number:
            same = self.own == 1  # where its hard part is
        if isinstance(same, torch.Tensor):
            self.mass = torch.where(same.squeeze(-1) if same.dim() else same, self.sums_of(q), 1.0)
        else:
            self.mass = self.sums_of(q) if same else q.new_ones(leading, dtype=torch.float64)
        if part.mask is not None:  # of rows that do not count it may be anything, and is looked at
            self.mass = torch.where(part.mask.view(leading), self.mass, 1.0)
        if part.target_loss:
            self._with_target(part, out)
        else:
            super().loss(part, slab, out)

    def _logarithms(self, q, own, coins):
        """As reference.forms.logits, in memory that the caches hold already: own times log q, or their log odds."""
        out = torch.log(q, out=self.room.of("teacher", q))
        if coins:
            out.sub_(torch.log1p(-q))
        return out.mul_(own) if isinstance(own, torch.Tensor) or own != 1 else out

    def _with_target(self, part, out):
        """Losses that part the target from the other classes: the hard part is of the two, which sum to the mass."""
        mass = self.mass.reshape(-1)
        if part.target_loss == TARGET_LOSSES["nkd_loss"].number:
            gamma = part.parameter if part.parameter_rows is None else part.parameter_rows
            safe = torch.where(mass == 0, 1.0, mass)
            self.of_logits(part._replace(parameter_rows=gamma / safe, weight=self._weighted(part, mass)), out)
            return
        alpha = part.second_parameter if part.second_parameter_rows is None else part.second_parameter_rows
        self.of_logits(part._replace(second_parameter_rows=alpha * mass), out)
        Weights(part).add_loss((alpha * torch.xlogy(mass, mass)).view(self.mass.shape), out.loss)

    def _weighted(self, part, factor):
        """The weight of rows times a factor, [N]."""
        return (factor if part.weight is None else part.weight * factor).to(self.dtype)

    def soft(self, part: RowsCall, slab: Any, out: RowsForward, hard_grad: torch.Tensor | None) -> None:
        name = list(NUMBERS)[part.divergence]
        if name in _masses.WITHOUT:
            self._of_terms(name, part, out, hard_grad)
            return
        weights, parameter = Weights(part), parameters(part, name)
        if self.adaptive:
            parameter = self._share_of_tail(part, weights)
        if parameter is not None:
            parameter = torch.as_tensor(parameter, dtype=torch.float64, device=self.mass.device)
            parameter = parameter.squeeze(-1) if parameter.dim() else parameter
        of = _masses.of_mass(name, self.mass, parameter)
        rows = None if of.parameter is None else of.parameter.expand(self.mass.shape).reshape(-1)
        z, parts = part.student, None if out.parts is None else torch.empty_like(out.parts)
        if hard_grad is not None:  # both are rounded together
            z = z.to(self.dtype, copy=True)
        grad = z if hard_grad is not None else out.grad
        part = part._replace(student=z, parameter_rows=rows, weight=self._weighted(part, of.factor.reshape(-1)))
        self.of_distributions(part if parts is None else with_parts(part), RowsForward(out.loss, grad, None, parts))
        weights.add_loss(of.constant, out.loss)
        if hard_grad is not None:
            out.grad.copy_(hard_grad.add_(grad))
        if parts is not None:
            soft, student_entropy, entropy, agreement = parts[..., 1:].unbind(-1)
            soft = soft * of.factor + (of.constant[..., None] * weights.squared).squeeze(-1)
            entropy = self.mass * entropy - torch.xlogy(self.mass, self.mass)
            tell(out.parts, weights.mask, soft, (student_entropy, entropy), agreement)

    def _logs(self, part, weights):
        """Of p and of q as it is given."""
        T = part.teacher_temperature
        if part.teacher_temperature_rows is not None:
            T = of_rows(part.teacher_temperature_rows, weights.leading)
        of_student = weights.T.to(self.dtype) if isinstance(weights.T, torch.Tensor) else weights.T
        log_p = reference.log_softmax(part.student.to(self.dtype), of_student)
        return log_p, reference.log_softmax(part.teacher, T) + self.mass.log()[..., None].to(self.dtype)

    def _share_of_tail(self, part, weights):
        """The student's weight that makes ``symmetric_kl_div`` the ``adaptive_kl_div``."""
        mu = part.parameter if part.parameter_rows is None else part.parameter_rows
        share = reference.OF_DERIVED["adaptive_kl_div"](*self._logs(part, weights), mu, part.teacher, 1.0)
        return share if weights.mask is None else torch.where(weights.mask[..., None], share, 0.5)

    def _of_terms(self, name, part, out, hard_grad):
        """By plain PyTorch, from the terms of the sum."""
        weights = Weights(part)
        log_p, log_q = self._logs(part, weights)
        no_p, no_q = ((x == -torch.inf).all(-1, keepdim=True) for x in (log_p, log_q))
        safe_p, safe_q = (torch.where(no_p | no_q, 0.0, x) for x in (log_p, log_q))
        if name == "negative_log_acceptance":
            sums, slope = _terms.acceptance(safe_p, safe_q, (self.mass - 1).to(self.dtype))
        else:
            own = parameters(part, name)
            own = tuple(x.to(self.dtype) if isinstance(x, torch.Tensor) else x for x in own) if own else None
            sums, slope = _terms.of_classes(name, safe_p, safe_q, own)
        sums = torch.where(no_q.squeeze(-1), 0.0, torch.where(no_p.squeeze(-1), torch.inf, sums)).double()
        out.loss.zero_()
        weights.add_loss(sums, out.loss)
        if out.parts is not None:
            entropies = (_terms.entropy(x, x > -torch.inf) for x in (log_p, log_q))
            agreement = part.student.argmax(-1) == part.teacher.argmax(-1)
            soft = (sums[..., None] * weights.squared).squeeze(-1)
            tell(out.parts, weights.mask, soft, entropies, agreement)
        if out.grad is not None:
            grad = weights.gradient(log_p, torch.where(no_p | no_q, 0.0, slope))
            out.grad.copy_(grad if hard_grad is None else hard_grad.add_(grad))
