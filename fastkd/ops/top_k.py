"""A teacher of which only the best classes of each row are known: student and teacher over these, and one more class.

With K classes and a bucket for all others, both sides are distributions over K + 1 classes. In logits, that of the
bucket is u = T log sum exp(z / T), of the classes beside the K: softmax(u / T) is what the student gives them together.
It is summed from their own logits, never as 1 less the K others, so that a bucket of any size keeps its digits. The
rows schedule computes every loss of these logits [N, K + 1], and its gradient g, which goes back as

    dL/dz_v = g_v of the K classes, g_u exp(z_v / T) / sum exp(z / T) of all others.

Of the student's logits there is one copy, a slab of rows at a time, in which exponentials take the place of logits and
the gradient that of exponentials: one exponential a class.
"""

from typing import Any

import torch


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
