"""relational_triplet on every device: strips of the student's distances, and of each row all triplets at once.

    d_ij = sqrt(max(|x_i - x_j|^2, 1e-12)), loss = 1/N sum_i w_i/|neg(i)| sum_{j in pos(i), k in neg(i)}
    max(0, margin + d_ij - d_ik)
    c_ij = dL/dd_ij: of a positive how many negatives are nearer than margin + d_ij, of a negative minus how many
    positives have it so, times w_i / (N |neg(i)|)
    W_ij = c_ij / d_ij, dL/dX = diag(W 1 + W^T 1) X - (W + W^T) X

Distances do not change when the mean of all rows is subtracted, and far fewer of their digits cancel. Those of near
pairs, and what they have of the gradient, are taken from the rows as they were given.

Who is similar to whom is a list of samples, and of each row the part of it that has its positives: with labels the
samples in the order of their labels, one list for all; with a teacher each row's nearest neighbours, which strips of
its distances tell. 2 N^2 D_s flops for the loss, 4 N^2 D_s for the gradient, 2 N^2 D_t for the neighbours; and
for ranks among P positives O(N^2 log P) on the CPU and on CUDA, O(N^2 P) in Triton, which does not sort.

Saved for backward: the gradient. Beside it the rows, what is said of them, and a strip; in Triton two.
"""

from typing import Any

import torch

from .. import _library
from .._dtypes import compute_dtype, without_autocast
from .._relation_calls import TripletCall, TripletStripCall
from ..reference import gradient_dtype, positives_of
from .gradient import forbid_double_backward, is_wanted, scaled
from .numbers import as_tensor, read
from .products import blocks_of, check_embeddings

BLOCK = {"cpu": 2**21, "cuda": 2**23}  # elements of a strip [rows, N]
NEIGHBOURS = {"cpu": 2**19, "cuda": 2**22}  # the same of the teacher's distances, in float64, with what topk takes


def _centred(x, valid, count):
    """Rows less the mean of those that are valid, and their squared norms."""
    mean = (x * valid[:, None]).sum(0, dtype=torch.float64) / count.clamp(min=1)
    x = x - mean.to(x.dtype)
    return x, (x * x).sum(1)


def _of_labels(labels, valid):
    """The samples in the order of their labels, and where each row's class begins and ends."""
    last = torch.iinfo(torch.int64).max
    # Masked rows sort last. A real label of this value shares their place: the kernels ask `valid` as well.
    labels = torch.where(valid, labels.long(), last)
    ordered, samples = torch.sort(labels, stable=True)
    return samples, torch.searchsorted(ordered, labels), torch.searchsorted(ordered, labels, right=True)


def _nearest(teacher, positives, valid, count):
    """Indices of each row's `positives` nearest other rows. Missing ones are its own index, which kernels ignore."""
    # in float64: in tight clusters float32's distances from products have no order
    y, norms = _centred(torch.where(valid[:, None], teacher.double(), 0.0), valid, count)
    N = len(y)
    rows = torch.arange(N, device=y.device)
    norms = torch.where(valid, norms, torch.inf)  # infinitely far
    found = torch.empty(N, positives, dtype=torch.int64, device=y.device)
    blocks = blocks_of(NEIGHBOURS, N, N, y.device)
    memory = y.new_empty(blocks[0].stop * N)  # one strip's, for all: else the next is made beside the last
    for some in blocks:
        distances = memory[: (some.stop - some.start) * N].view(-1, N)
        torch.addmm(norms, y[some], y.T, alpha=-2, out=distances)  # less the row's own norm
        distances.diagonal(some.start).fill_(torch.inf)
        nearest = distances.topk(positives, largest=False)
        torch.where(nearest.values == torch.inf, rows[some, None], nearest.indices, out=found[some])
    first = rows * positives
    return found.view(-1), first, first + positives


@torch.no_grad()
def _triplet_fwd(*arguments):
    call = TripletCall(*arguments)
    student, teacher, mask, save = call.student, call.teacher, call.mask, call.save
    check_embeddings(student, student if teacher is None else teacher)
    margin = read("margin", call.margin)
    dtype, device = compute_dtype(*(x for x in (student, teacher) if x is not None)), student.device
    N = len(student)
    grad = student.new_empty(student.shape if save else (0,), dtype=gradient_dtype(student))
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    if N < 2:
        return sums[0].to(dtype), sums[1].float(), grad.zero_()
    with without_autocast(device):
        valid = torch.ones(N, dtype=torch.bool, device=device) if mask is None else mask.contiguous()
        count = valid.sum()
        of_rows = valid.to(dtype) / count.clamp(min=1)
        if call.weight is not None:
            of_rows = torch.where(valid, of_rows * call.weight.to(dtype), 0.0)
        x = student.to(dtype).contiguous()
        if mask is not None:  # a row that does not count may hold anything
            x = torch.where(mask[:, None], x, 0.0)
        weights = x.new_zeros(N)  # W 1 + W^T 1
        if call.labels is not None:
            positives, first, last = _of_labels(call.labels, valid)
        else:
            positives, first, last = _nearest(teacher, positives_of(call.positives, N), valid, count)
            # a NaN has no neighbours, and neither loss nor gradient must hide it
            nothing = 0.0 * torch.where(valid, teacher.sum(1, dtype=torch.float64), 0.0).sum()
            sums[0] += nothing
            weights += nothing.to(dtype)
        centred, norms = _centred(x, valid, count)
        to = torch.zeros_like(x) if save else None
        ones = x.new_ones(N)
        blocks = blocks_of(BLOCK, N, N, device)
        memory = x.new_empty(blocks[0].stop * N)
        strip_ = getattr(torch.ops, call.strips).triplet_strip_.default
        of_samples = {
            "x": x, "norms": norms, "positives": positives, "first": first, "last": last, "valid": valid,
            "count": count, "weight": of_rows, "margin": margin, "grad": to,
        }  # fmt: skip
        for some in blocks:
            n = some.stop - some.start
            W = torch.mm(centred[some], centred.T, out=memory[: n * N].view(n, N))
            sums += strip_(*TripletStripCall(strip=W, row=some.start, **of_samples))
            if save:
                weights[some] += W.mv(ones)
                weights += W.T.mv(ones[some])
                to[some].addmm_(W, centred, alpha=-1)
                to.addmm_(W.T, centred[some], alpha=-1)
        if save:
            to.addcmul_(centred, weights[:, None])
            if mask is not None:
                to.masked_fill_(~mask[:, None], 0.0)
            grad.copy_(to)
    return sums[0].to(dtype), (sums[1] / sums[2].clamp(min=1)).float(), grad


def _fake_fwd(*arguments):
    call = TripletCall(*arguments)
    student, teacher = call.student, call.teacher
    grad = student.new_empty(student.shape if call.save else (0,), dtype=gradient_dtype(student))
    loss = student.new_empty((), dtype=compute_dtype(*(x for x in (student, teacher) if x is not None)))
    return loss, student.new_empty((), dtype=torch.float32), grad


_library.fastkd.impl("triplet_fwd", _triplet_fwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::triplet_fwd", _fake_fwd)
FWD = torch.ops.fastkd.triplet_fwd.default


_NONE = TripletCall(*[None] * len(TripletCall._fields))  # gradients


class _Triplet(torch.autograd.Function):
    """The loss of a student that wants a gradient, which is computed in forward and saved; and the active share."""

    @staticmethod
    def forward(ctx, scale_, *fields):
        call = TripletCall(*fields)
        loss, active, grad = FWD(*call)
        ctx.scale_, ctx.dtype = scale_, call.student.dtype
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(active)
        return loss, active

    @staticmethod
    def backward(ctx, upstream, _):
        grad = forbid_double_backward(scaled, ctx.scale_, *ctx.saved_tensors, upstream).to(ctx.dtype)
        return None, *_NONE._replace(student=grad)


def relational_triplet(
    namespace: str,
    scale_: Any,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    positives: int,
    margin: float,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of :mod:`fastkd.functional`, and the share of active triplets; the arguments have been checked there."""
    call = TripletCall(
        student=student, teacher=teacher if teacher is None else teacher.detach(), labels=labels, positives=positives,
        margin=as_tensor(margin), mask=mask, weight=weight, strips=namespace, save=is_wanted(student),
    )  # fmt: skip
    return _Triplet.apply(scale_, *call) if call.save else FWD(*call)[:2]
