"""A teacher of which only the best classes of each row are known: student and teacher over these, and one more class.

With K classes and a bucket for all others, both sides are distributions over K + 1 classes. In logits, that of the
bucket is u = T log sum exp(z / T), of the classes beside the K: softmax(u / T) is what the student gives them together.
It is summed from their own logits, never as 1 less the K others, so that a bucket of any size keeps its digits. The
rows schedule computes every loss of these logits [N, K + 1], and its gradient g, which goes back as

    dL/dz_v = g_v of the K classes, g_u exp(z_v / T) / sum exp(z / T) of all others.

The ops of the complement do both ways, a slab of rows at a time: one read of the logits forward, one backward, and one
exponential a class in each. Where the tail is ignored the loss is of the K terms alone, and the student's probabilities
in it are still among K + 1 classes.
"""

from typing import Any

import torch

from .. import _terms, reference
from .._calls import Complement, ComplementBackward, FormRows, RowsCall, RowsForward
from .._divergences import NUMBERS
from .._dtypes import compute_dtype
from .complement import OPS
from .teachers import Apart, Weights, parameters, tell, with_parts

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


class _OverAll:
    """The student's logits of a slab over the K classes and the bucket."""

    def __init__(self, namespace, part, index):
        self.ops, self.index = OPS[namespace], index.reshape(-1, index.shape[-1]).contiguous()
        self.dtype = compute_dtype(part.student)  # whatever the teacher has
        T = part.temperature_rows
        self.part = part._replace(temperature_rows=None if T is None else T.to(self.dtype))
        self.sums = part.student.new_empty((len(self.index), 2), dtype=torch.float64)

    def _call(self):
        part = self.part
        return part.student, self.index, part.temperature, part.temperature_rows, part.mask

    def logits(self):
        """[*, K + 1], in float64: what is rounded is seen near convergence."""
        leading, K = self.part.student.shape[:-1], self.index.shape[-1]
        u = self.sums.new_empty((*leading, K + 1))
        self.ops.fwd(*Complement(*self._call(), u, self.sums))
        return u

    def gradient(self, g, hard, out):
        """From that of ``logits`` to that of the student's into out [*, V], rounded once. hard [*, V]: what is added,
        or None."""
        hard = None if hard is None else hard.to(self.dtype)
        self.ops.bwd(*ComplementBackward(*self._call(), self.sums, g, hard, out))


class _OverThose:
    """The student's logits of a slab over the K classes alone."""

    def __init__(self, _namespace, part, index):
        z = part.student
        self.z, self.pad, self.beyond = z, index < 0, index >= z.shape[-1]  # where no check could look
        self.at = index.clamp(0, z.shape[-1] - 1)

    def logits(self):
        known = self.z.gather(-1, self.at).double().masked_fill(self.pad, -torch.inf)
        return known.masked_fill(self.beyond, torch.nan)

    def gradient(self, g, hard, out):
        if hard is None:  # what pads writes the same as the first class that does not
            first = (~self.pad).int().argmax(-1, keepdim=True)
            at, g = (torch.where(self.pad, x.gather(-1, first), x) for x in (self.at, g.masked_fill(self.pad, 0)))
            out.zero_().scatter_(-1, at, g.to(out.dtype))
            return
        # added: what pads changes nothing, wherever it points
        hard.scatter_add_(-1, self.at, g.masked_fill(self.pad, 0).to(hard.dtype))
        out.copy_(hard)


# Of what is K + 1 wide, a slab has so many numbers. Of whole logits nothing is held, and small slabs, which the caches
# would keep from forward to backward, cost more calls than that saves.
_SLAB = 2**22


def rows_of_slab(K: int) -> int:
    """At most."""
    return max(_SLAB // (K + 1), 1)


# What a call has in the dtype that is computed in.
_OF_COMPUTE_DTYPE = ("temperature_rows", "teacher_temperature_rows", "weight")


def _double(x):
    return None if x is None else x.double()


class FewClasses(Apart):
    """A teacher who has K classes of each row."""

    def __init__(self, namespace: str, call: FormRows, scale: float, log_prob_min: float, dtype: torch.dtype) -> None:
        """scale: the temperature of the log-probabilities."""
        super().__init__(namespace, call.adaptive, dtype)
        self.call: FormRows = call
        self.scale: float = scale
        self.log_prob_min: float = log_prob_min
        self.tail: str = TAILS[call.tail]

    def _classes(self, z):
        """How many there are."""
        return z.shape[-1]

    def _over(self, part, index):
        """The student over these classes."""
        over = _OverThose if self.tail == "renormalize" else _OverAll
        return over(self.namespace, part, index)

    def _logits(self, student, part, index):
        """Its logits."""
        return student.logits()

    def soft(self, part: RowsCall, slab: Any, out: RowsForward, hard_grad: torch.Tensor | None) -> None:
        z, index = part.student, self.call.indices[slab.index]
        leading, wanted = z.shape[:-1], out.grad is not None
        agrees = None if out.parts is None else z.argmax(-1) == reference.forms.best_class(part.teacher, index)
        student = self._over(part, index)
        u = self._logits(student, part, index)
        part = part._replace(
            student=u,
            teacher=part.teacher.double(),
            **{name: _double(getattr(part, name)) for name in _OF_COMPUTE_DTYPE},
        )
        found = RowsForward(
            torch.zeros_like(out.loss, dtype=torch.float64), u if wanted else None, None,
            None if out.parts is None else torch.empty_like(out.parts),
        )  # fmt: skip
        of = self._of_terms if self.tail == "ignore" else self._of_classes
        of(part, slab, index, self._classes(z), found)
        out.loss.copy_(found.loss)
        mask = None if part.mask is None else part.mask.view(leading)
        if out.parts is not None:
            tell(out.parts, mask, found.parts[..., 1], found.parts[..., 2:4].unbind(-1), agrees)
        if wanted:
            student.gradient(u, hard_grad, out.grad)

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
        no_p = (log_p == -torch.inf).all(-1, keepdim=True) & there.any(-1, keepdim=True)
        sums, slope = torch.where(no_p.squeeze(-1), torch.inf, sums), torch.where(no_p, 0.0, slope)
        weights.add_loss(sums, out.loss)
        if out.parts is not None:
            out.parts[..., 1:4] = torch.stack(
                [(sums[..., None] * weights.squared).squeeze(-1), *(_terms.entropy(x, there) for x in (known, log_q))],
                -1,
            )
        if out.grad is not None:
            slope = torch.nn.functional.pad(slope.masked_fill(low, 0), (0, 1))
            out.grad.copy_(weights.gradient(log_p, slope))
