"""The loss of a slab of rows, whatever there is of the teacher."""

import math
from typing import Any

import torch

from .._calls import HeadWeight, RowsCall, RowsForward
from .._divergences import parameters_of
from . import head, rows


class Teacher:
    """One of logits."""

    def __init__(self, namespace: str, adaptive: bool) -> None:
        """adaptive: whether the call's parameter is mu of ``adaptive_kl_div``."""
        self.namespace: str = namespace
        self.adaptive: bool = adaptive

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        """Fills out, of which the gradient may be the student's logits."""
        self.of_logits(part, out)

    def of_logits(self, part: RowsCall, out: RowsForward) -> None:
        """The rows schedule."""
        if self.adaptive:
            part = part._replace(parameter_rows=self._student_weight(part))
        self.of_distributions(part, out)

    def of_distributions(self, part: RowsCall, out: RowsForward) -> None:
        """The rows schedule, with the divergence's own parameter."""
        rows.OPS[self.namespace].fwd(*part, *out)

    def _student_weight(self, part):
        """Of each row, as ``adaptive_kl_div`` has it."""
        weight = part.student.new_empty(part.student.shape[:-1], dtype=torch.float64)
        temperatures = (
            part.temperature, part.temperature_rows, part.teacher_temperature, part.teacher_temperature_rows,
        )  # fmt: skip
        mu = part.parameter, part.parameter_rows
        head.OPS[self.namespace](*HeadWeight(part.student, part.teacher, *temperatures, part.mask, *mu, weight))
        return weight.view(-1)


class Apart(Teacher):
    """One beside which a hard loss, of all classes, is computed apart: ``soft`` sees other logits than it does, or has
    weights of its own."""

    def __init__(self, namespace: str, adaptive: bool, dtype: torch.dtype) -> None:
        """dtype: that is computed in."""
        super().__init__(namespace, adaptive)
        self.dtype: torch.dtype = dtype

    def soft(self, part: RowsCall, slab: Any, out: RowsForward, hard_grad: torch.Tensor | None) -> None:
        """Fills out, but for the part that is the hard loss. hard_grad: what the gradient has beside its own; it may be
        lost. The call has no target."""
        raise NotImplementedError

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        if part.target is None or part.target_loss:
            self.soft(part, slab, out, None)
            return
        hard_loss, hard_grad = self._hard(part, out)
        soft_weight = part.target_numbers[1].item()
        if soft_weight == 0:
            out.loss.copy_(hard_loss)
            if out.grad is not None:
                out.grad.copy_(hard_grad)
            return
        ones = part.student.new_ones(math.prod(part.student.shape[:-1]), dtype=self.dtype)
        weight = (ones if part.weight is None else part.weight) * soft_weight
        self.soft(part._replace(target=None, target_numbers=None, weight=weight), slab, out, hard_grad)
        out.loss.add_(hard_loss)

    def _hard(self, part, out):
        """The hard loss, and its gradient where one is wanted."""
        call = hard_call(part, self.dtype)
        grad = call.student if out.grad is not None else None
        hard = RowsForward(torch.empty_like(out.loss), grad, None, out.parts)
        rows.OPS[self.namespace].fwd(*call, *hard)
        return hard.loss, hard.grad


def hard_call(part: RowsCall, dtype: torch.dtype) -> RowsCall:
    """The hard loss of a call alone, whose gradient may be written over its student: a copy."""
    x = part.student.to(dtype, copy=True)
    numbers = part.target_numbers * part.target_numbers.new_tensor([1, 0, 1])
    # the soft loss is left out: the teacher is one that is read anyway
    return part._replace(student=x, teacher=x, target_numbers=numbers)


def with_parts(part: RowsCall) -> RowsCall:
    """A call that fills parts, as calls with a target do: each row gets one, without weight."""
    count = math.prod(part.student.shape[:-1])
    numbers = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    return part._replace(target=part.student.new_zeros(count, dtype=torch.int64), target_numbers=numbers)


def of_rows(x: Any, leading: torch.Size) -> Any:
    """What a call says of each row, beside its classes: [*, 1]."""
    return x.view(*leading, 1) if isinstance(x, torch.Tensor) and x.dim() else x


def parameters(part: RowsCall, divergence: str) -> Any:
    """The divergence's own numbers, or tensors beside its classes: none, one, or a tuple of two."""
    leading = part.student.shape[:-1]
    first = part.parameter if part.parameter_rows is None else of_rows(part.parameter_rows, leading)
    second = (
        part.second_parameter if part.second_parameter_rows is None else of_rows(part.second_parameter_rows, leading)
    )
    number = len(parameters_of(divergence))
    return None if number == 0 else first if number == 1 else (first, second)


class Weights:
    """What a slab's rows are multiplied by, in their loss and in their gradient."""

    def __init__(self, part: RowsCall) -> None:
        self.leading: torch.Size = part.student.shape[:-1]
        self.mask: torch.Tensor | None = None if part.mask is None else part.mask.view(self.leading)
        T = part.temperature if part.temperature_rows is None else part.temperature_rows.to(torch.float64)
        self.T: Any = of_rows(T, self.leading)
        self.squared: Any = self.T * self.T if part.t_squared else 1.0
        scale = part.scale if part.scale_tensor is None else part.scale_tensor
        weight = 1.0 if part.weight is None else of_rows(part.weight.to(torch.float64), self.leading)
        self.all: Any = weight * scale * self.squared

    def add_loss(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """out += that of rows [*], in float64, each or their sum. What has no weight may be infinite."""
        found = rows[..., None] * self.all
        if isinstance(self.all, torch.Tensor):
            found = torch.where(self.all == 0, 0.0, found)
        found = found.expand(*self.leading, 1).squeeze(-1)
        if self.mask is not None:
            found = torch.where(self.mask, found, 0.0)
        out.add_(found if out.dim() or not self.leading else found.sum())

    def gradient(self, log_p: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """From slopes [*, V] to the gradient of the logits."""
        grad = slope - log_p.exp() * slope.sum(-1, keepdim=True)
        by = self.all / self.T
        grad = grad * (by.to(grad.dtype) if isinstance(by, torch.Tensor) else by)
        return grad if self.mask is None else torch.where(self.mask[..., None], grad, 0.0)


def tell(
    out: torch.Tensor, mask: torch.Tensor | None, soft: torch.Tensor, entropies: Any, agreement: torch.Tensor
) -> None:
    """Fills what is told of rows [*] beside their hard loss; 0 where they do not count."""
    found = torch.stack([soft, *entropies, agreement.to(soft.dtype)], -1)
    out[..., 1:] = found if mask is None else torch.where(mask[..., None], found, 0.0)
