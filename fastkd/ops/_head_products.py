"""The products of hidden states with a head, and those that bring the gradient of its logits back.

Sums over slabs, which the gradients of weight and bias are, are in float32 at least, and rounded once. On the CPU,
whose BLAS is rarely fast in another type, a head in half precision is widened a tile at a time; on a GPU g is
rounded to the head's type once, and products are summed and left in float32.
"""

import math

import torch

from .._dtypes import compute_dtype
from ..forms import LinearLogits
from .slabs import Gathered

# Bytes that the logits of a slab take, of each side, and how many rows there are at least where the user says nothing:
# enough for the BLAS's rate.
ROWS = 64
SLAB_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
TILE = 2**20  # elements of a head that are widened at a time
CAPPED = 2**18  # logits that are capped at a time on the CPU, where its caches hold them between two passes


def rows_of_slab(side: LinearLogits) -> int:
    """At most."""
    row = len(side.weight) * compute_dtype(side.weight).itemsize
    if side.slab_bytes is not None:
        return max(side.slab_bytes // row, 1)
    return max(SLAB_BYTES.get(side.weight.device.type, SLAB_BYTES["cpu"]) // row, ROWS)


class Head:
    """One side's head: products with it, in float32 or float64."""

    def __init__(self, weight, bias, scale, softcap):
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap
        self.dtype = compute_dtype(weight)
        self.capped = softcap < math.inf
        self.wide = weight.dtype is self.dtype
        self.widened = not self.wide and not weight.is_cuda

    def tiles(self):
        """Pairs of a slice of the classes and its part of the head, widened."""
        step = max(TILE // max(self.weight.shape[1], 1), 16)
        for first in range(0, len(self.weight), step):
            part = slice(first, min(first + step, len(self.weight)))
            yield part, self.weight[part].to(self.dtype)

    def logits(self, hidden, out):
        """scale (hidden W^T + b); where there is a softcap a softcap-th of that."""
        scale = self.scale / self.softcap if self.capped else self.scale
        if self.wide:
            _product(hidden, self.weight.T, scale, out)
        elif self.widened:
            x = hidden.to(self.dtype)
            for part, W in self.tiles():
                _product(x, W.T, scale, out[:, part])
        else:
            torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=out)
            if scale != 1:
                out *= scale
        if self.bias is not None:
            out.add_(self.bias, alpha=scale)

    def cap(self, logits, out):
        """out = softcap tanh(logits), which are a softcap-th of what they were; it may be these, and else has left
        the tanh in their place."""
        step = len(logits) if logits.is_cuda else max(CAPPED // max(logits.shape[-1], 1), 1)
        for first in range(0, len(logits), max(step, 1)):
            tanh = logits[first : first + step].tanh_()
            torch.mul(tanh, self.softcap, out=out[first : first + step])

    def uncap(self, grad, tanh):
        """From the gradient of capped logits to that of logits as they were, in its place."""
        torch.ops.aten.tanh_backward.grad_input(grad, tanh, grad_input=grad)

    def rounded(self, grad):
        """As the products back take it."""
        return grad if self.wide or self.widened else grad.to(self.weight.dtype)

    def to_hidden(self, grad, out):
        """out = scale g W."""
        if self.widened:
            total = torch.zeros_like(out, dtype=self.dtype)
            for part, W in self.tiles():
                total.addmm_(grad[:, part], W, alpha=self.scale)
            out.copy_(total)
        elif grad.dtype is out.dtype:
            _product(grad, self.weight, self.scale, out)
        else:
            torch.mm(grad, self.weight, out_dtype=out.dtype, out=out)
            out *= self.scale

    def to_weight(self, grad, hidden, total, more):
        """total += scale g^T hidden, or = where there was nothing before."""
        beta = 1 if more else 0
        if self.wide or self.widened:
            torch.addmm(total, grad.T, hidden.to(self.dtype), beta=beta, alpha=self.scale, out=total)
        else:
            torch.addmm(total, grad.T, hidden, out_dtype=self.dtype, beta=beta, alpha=self.scale, out=total)


def _product(x, y, scale, out):
    torch.addmm(out, x, y, beta=0, alpha=scale, out=out)


class Side:
    """The logits of a side, slab by slab."""

    def __init__(self, x, weight, bias, scale, softcap, slab_rows):
        self.x = x
        self.head = None if weight is None else Head(weight, bias, scale, softcap)
        self.room = None if weight is None else x.new_empty(slab_rows, len(weight), dtype=self.head.dtype)
        self.capped = None  # where capped logits go, if what they were made of is needed after them
        self.hidden = None  # of the slab, [n, H]

    def logits(self, slab, mask):
        x = self.x[slab.index]
        if self.head is None:
            return x
        leading = x.shape[:-1]
        self.hidden = x.reshape(-1, x.shape[-1])
        if mask is not None:
            self.hidden = self.hidden.masked_fill(~mask[:, None], 0)
        z = self.room[: len(self.hidden)]
        self.head.logits(self.hidden, z)
        if self.head.capped:
            before, z = z, z if self.capped is None else self.capped[: len(z)]
            self.head.cap(before, z)
        return z.view(*leading, -1)

    def tanh(self):
        """Of the slab's logits over the softcap, where there is room for capped ones."""
        return self.room[: len(self.hidden)]


class Gradients:
    """What the student's head and hidden states have summed up."""

    def __init__(self, student, outputs):
        self.student, self.outputs, self.head = student, outputs, student.head
        self.totals = [self._total(x) for x in (outputs.head_grad, outputs.bias_grad)]
        self.slabs = 0
        if self.head.capped and self.wanted:
            student.capped = torch.empty_like(student.room)

    def _total(self, out):
        """Room for a sum over slabs: that of the gradient, where it has the type."""
        return out if out is None or out.dtype is self.head.dtype else torch.empty_like(out, dtype=self.head.dtype)

    @property
    def wanted(self):
        return any(x is not None for x in (self.outputs.grad, self.outputs.head_grad, self.outputs.bias_grad))

    def of(self, z):
        """Where a slab's gradient goes, if it is wanted: over its logits."""
        return z if self.wanted else None

    def add(self, slab, grad):
        """Takes the gradient of a slab's logits back through the head."""
        head, hidden = self.head, self.student.hidden
        g = grad.view(len(hidden), -1)
        if head.capped:
            head.uncap(g, self.student.tanh())
        of_weight, of_bias = self.totals
        self.slabs += 1
        if of_bias is not None:
            torch.add(of_bias if self.slabs > 1 else 0, g.sum(0), alpha=head.scale, out=of_bias)
        if self.outputs.grad is None and of_weight is None:
            return
        g = head.rounded(g)
        if self.outputs.grad is not None:
            into = self.outputs.grad[slab.index]
            copy = isinstance(slab, Gathered) or not into.is_contiguous()
            out = torch.empty_like(hidden, dtype=into.dtype) if copy else into.view_as(hidden)
            head.to_hidden(g, out)
            if copy:
                self.outputs.grad[slab.index] = out.view_as(into)
        if of_weight is not None:
            head.to_weight(g, hidden, of_weight, self.slabs > 1)

    def finish(self):
        """Rounds the sums."""
        for out, total in zip((self.outputs.head_grad, self.outputs.bias_grad), self.totals, strict=True):
            if out is None:
                continue
            if self.slabs == 0:  # no row counts
                out.zero_()
            elif total is not out:
                out.copy_(total)
