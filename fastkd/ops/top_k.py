"""A teacher of which only the best classes of each row are known: student and teacher over these, and one more class.

With K classes and a bucket for all others, both sides are distributions over K + 1 classes. In logits, that of the
bucket is u = T log sum exp(z / T), of the classes beside the K: softmax(u / T) is what the student gives them together.
It is summed from their own logits, never as 1 less the K others, so that a bucket of any size keeps its digits. The
rows schedule computes every loss of these logits [N, K + 1], and its gradient g, which goes back as

    dL/dz_v = g_v of the K classes, g_u exp(z_v / T) / sum exp(z / T) of all others.

Of the student's logits there is one copy, a slab of rows at a time, in which exponentials take the place of logits and
the gradient that of exponentials: one exponential a class. Where the tail is ignored the loss is of the K terms alone,
and the student's probabilities in it are still among K + 1 classes.
"""

from typing import Any

import torch

from .. import _reference_forms, _terms, reference
from .._calls import FormRows, RowsCall, RowsForward
from .._divergences import NUMBERS
from .teachers import Apart, Weights, of_rows, parameters, tell, with_parts

# By number, in FormRows.
TAILS = ("bucket", "renormalize", "ignore")


def teacher_logits(
    log_probs: torch.Tensor, pad: torch.Tensor, log_tail: Any, scale: float, renormalize: bool, classes: int
) -> torch.Tensor:
    """Of the K classes and the bucket, in float64; scale: the temperature that log_probs [*, K], in float64, were taken
    at. What pads has no probability. log_tail [*]: that of the bucket; None: what is left of 1. Nothing is,
    whatever rounding says, where all classes are known."""
    known = log_probs.masked_fill(pad, -torch.inf)
    if renormalize:
        return known * scale
    if log_tail is None:
        log_tail = torch.log1p(-known.exp().sum(-1).clamp(max=1))
        log_tail = log_tail.masked_fill((~pad).sum(-1) >= classes, -torch.inf)
    log_tail = log_tail.to(known.dtype).masked_fill(pad.all(-1), 0)
    return torch.cat([known, log_tail[..., None]], -1) * scale


class StudentOfTopK:
    """The student's logits of a slab over the classes that the teacher has.

    z: its logits [*, V]; index [*, K], pad: where that stands for no class; T: its temperature, [] or [*, 1]; room
    [*, V] in the dtype that is computed in, which may be z itself, or None where there is no bucket.
    """

    def __init__(self, z: torch.Tensor, index: torch.Tensor, pad: torch.Tensor, T: Any, room: Any) -> None:
        self.at: torch.Tensor = index.clamp(0, z.shape[-1] - 1)
        self.known: torch.Tensor = z.gather(-1, self.at)
        self.beyond: torch.Tensor = index >= z.shape[-1]  # where no check could look
        self.pad: torch.Tensor = pad
        self.T: Any = T
        self.room: Any = room
        self.sum: Any = None  # of the exponentials, once they are made

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """Of the K classes and the bucket, in float64: what is rounded is seen near convergence."""
        known = self.known.double().masked_fill(self.pad, -torch.inf).masked_fill(self.beyond, torch.nan)
        if self.room is None:
            return known
        others = self.room if self.room is z else self.room.copy_(z)
        # added, not written: what pads changes nothing, wherever it points
        others.scatter_add_(-1, self.at, torch.where(self.pad, 0.0, -torch.inf).to(others.dtype))
        top = others.amax(-1, keepdim=True)
        top = torch.where(top == -torch.inf, 0.0, top)
        others.sub_(top)
        if isinstance(self.T, torch.Tensor) or self.T != 1:
            others.div_(self.T)
        others.exp_()
        self.sum = others.sum(-1, keepdim=True).double()  # in float64 it would be summed from a copy
        return torch.cat([known, top + self.T * self.sum.log()], -1)

    def gradient(self, g: torch.Tensor, mask: Any, hard: Any, out: torch.Tensor) -> None:
        """That of z into out [*, V], from that of ``logits``, and rounded once; mask [*]: which rows count; hard
        [*, V]: what is added, or None. It is lost."""
        known = g[..., : self.at.shape[-1]].masked_fill(self.pad, 0)
        if self.room is None:
            grad = out.zero_() if hard is None else hard
        else:
            share = torch.where(self.sum == 0, 0.0, g[..., -1:] / self.sum)
            grad = self.room.mul_(share.to(self.room.dtype))
            if mask is not None:  # which may hold anything
                grad.masked_fill_(~mask[..., None], 0)
            if hard is not None:
                grad += hard
        grad.scatter_add_(-1, self.at, known.to(grad.dtype))
        if out is not grad:
            out.copy_(grad)


# What a call has in the dtype that is computed in.
_OF_COMPUTE_DTYPE = ("temperature_rows", "teacher_temperature_rows", "weight")


def _double(x):
    return None if x is None else x.double()


class FewClasses(Apart):
    """A teacher who has K classes of each row."""

    def __init__(
        self,
        namespace: str,
        call: FormRows,
        scale: float,
        log_prob_min: float,
        dtype: torch.dtype,
        stays: bool,
    ) -> None:
        """scale: the temperature of the log-probabilities; stays: whether the student's logits must."""
        super().__init__(namespace, call.adaptive, dtype)
        self.call: FormRows = call
        self.scale: float = scale
        self.log_prob_min: float = log_prob_min
        self.stays: bool = stays
        self.tail: str = TAILS[call.tail]
        self.kept: Any = None

    def _room(self, z):
        """For exponentials: where the logits lie, if nobody needs these after them."""
        if self.tail == "renormalize":
            return None
        if not self.stays and z.dtype is self.dtype:
            return z
        if self.kept is None or self.kept.numel() < z.numel():
            self.kept = z.new_empty(z.numel(), dtype=self.dtype)
        return self.kept[: z.numel()].view(z.shape)

    def soft(self, part: RowsCall, slab: Any, out: RowsForward, hard_grad: torch.Tensor | None) -> None:
        z, leading = part.student, part.student.shape[:-1]
        index = self.call.indices[slab.index]
        agrees = None if out.parts is None else z.argmax(-1) == _reference_forms.best_class(part.teacher, index)
        T = part.temperature if part.temperature_rows is None else of_rows(part.temperature_rows, leading)
        student = StudentOfTopK(z, index, index < 0, T, self._room(z))
        u = student.logits(z)
        part = part._replace(
            student=u,
            teacher=part.teacher.double(),
            **{name: _double(getattr(part, name)) for name in _OF_COMPUTE_DTYPE},
        )
        found = RowsForward(
            torch.zeros_like(out.loss, dtype=torch.float64), u if out.grad is not None else None, None,
            None if out.parts is None else torch.empty_like(out.parts),
        )  # fmt: skip
        of = self._of_terms if self.tail == "ignore" else self._of_classes
        of(part, slab, index, z.shape[-1], found)
        out.loss.copy_(found.loss)
        mask = None if part.mask is None else part.mask.view(leading)
        if out.parts is not None:
            tell(out.parts, mask, found.parts[..., 1], found.parts[..., 2:4].unbind(-1), agrees)
        if out.grad is not None:
            student.gradient(u, mask, hard_grad, out.grad)

    def _of_classes(self, part, slab, index, V, out):
        """Of distributions over the classes that there are."""
        log_tail = self.call.log_tail
        if log_tail is not None:
            log_tail = slab.of_rows(log_tail).view(index.shape[:-1])
        t = teacher_logits(part.teacher, index < 0, log_tail, self.scale, self.tail == "renormalize", V)
        part = part._replace(teacher=t)
        self.of_logits(part if out.parts is None else with_parts(part), out)

    def _of_terms(self, part, _slab, index, _V, out):
        """Of the K terms that there are, of distributions over all classes."""
        K, there, weights = index.shape[-1], index >= 0, Weights(part)
        log_p = reference.log_softmax(part.student, weights.T)
        known, log_q, low = _terms.of_those(log_p[..., :K], part.teacher, there, self.log_prob_min)
        name = list(NUMBERS)[part.divergence]
        sums, slope = _terms.of_classes(name, known, log_q, parameters(part, name), there)
        weights.add_loss(sums, out.loss)
        if out.parts is not None:
            out.parts[..., 1:4] = torch.stack(
                [(sums[..., None] * weights.squared).squeeze(-1), *(_terms.entropy(x, there) for x in (known, log_q))],
                -1,
            )
        if out.grad is not None:
            slope = torch.nn.functional.pad(slope.masked_fill(low, 0), (0, 1))
            out.grad.copy_(weights.gradient(log_p, slope))
