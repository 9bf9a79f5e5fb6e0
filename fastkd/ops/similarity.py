"""similarity_preserving by matrix products alone, on every device.

    G = X X^T of the student, H = Y Y^T of the teacher, a_i = |G_i|^2, b_i = |H_i|^2, c_i = G_i.H_i
    loss = 1/N^2 sum_i w_i |G_i / |G_i| - H_i / |H_i||^2

Two ways, the cheaper is taken:

Samples: blocks of rows of G and H, [block, N] at a time, as the formula says: 2 N^2 (3 D_s + D_t) flops.

Features: |x_i^T X^T|^2 = x_i^T (X^T X) x_i, and likewise the others, with S = X^T X, T = Y^T Y and C = X^T Y:
    a_i = x_i^T S x_i, b_i = y_i^T T y_i, c_i = x_i^T C y_i,
    loss = 2/N^2 sum_i w_i (1 - cos_i), cos_i = c_i / sqrt(a_i b_i)
    alpha_i = dL/da_i = w_i cos_i / (N^2 a_i), gamma_i = dL/dc_i = -2 w_i / (N^2 sqrt(a_i b_i))
    dL/dX = 2 diag(alpha) X S + diag(gamma) Y C^T + 2 X (X^T diag(alpha) X) + Y (Y^T diag(gamma) X)
linear in N. 1 - cos loses its digits near convergence: its error is a rounding over 1 - cos, that of samples one over
the root of it. In float64 that is small enough for embeddings in float32. On the CPU, where the host may look, the
embeddings' own dtype is tried first and serves while 1 - cos is large (in float32 1.5 times faster); elsewhere those
in float64 are multiplied by samples.

A row that is masked is one of zeros, whose similarities are 0; N is the number of the others. Fewer than two have
loss and gradient 0, whatever they are.

Saved for backward: the gradient. Beside it a few blocks of rows and D x D matrices are held.
"""

import torch

from .. import _library
from .._dtypes import compute_dtype, without_autocast
from .._relation_calls import SimilarityCall
from ..reference import gradient_dtype
from .products import blocks_of, check_embeddings, row_factors
from .samples import SIMILARITY, are_few, few_samples

SAMPLES_BLOCK = {"cpu": 2**19, "cuda": 2**23}  # elements of a block [rows, N]: in cache; enough for a GPU
FAR_MEAN = 0.1  # the mean of 1 - cos from which on its own rounding does not count
FEATURES_BLOCK = {"cpu": 2**19, "cuda": 2**23}  # of a block [rows, D]


def _by_features(N, Ds, Dt):
    """Whether the products of features are cheaper than those of samples; float64 counts twice."""
    return N * (3 * Ds + Dt) > 4 * (Ds * Ds + Dt * Dt + Ds * Dt) + 2 * Ds * (Ds + Dt)


def _unit(rows):
    """Rows to length 1; a row of zeros stays. With the lengths' inverses."""
    squared = (rows * rows).sum(1, keepdim=True)
    inverse = torch.where(squared == 0, 0.0, squared.rsqrt())
    return rows * inverse, inverse


def _samples(x, y, rows, grad):
    loss = x.new_zeros((), dtype=torch.float64)
    if grad is not None:
        grad.zero_()
    for block in blocks_of(SAMPLES_BLOCK, len(x), len(x), x.device):
        (s, inverse), (t, _) = _unit(x[block] @ x.T), _unit(y[block] @ y.T)
        difference = s - t
        loss += ((difference * difference).sum(1) * rows[block]).sum(dtype=torch.float64)
        if grad is not None:  # the part of the difference that is not along s, to both sides of G
            difference -= s * (difference * s).sum(1, keepdim=True)
            difference *= inverse * rows[block, None].to(inverse.dtype)
            grad[block].addmm_(difference, x)
            grad.addmm_(difference.T, x[block])
    if grad is not None:
        grad *= 2
    return loss


def _loss(x, y, rows, grad):
    """The loss in float64, by the cheaper way that is good enough; its gradient goes to grad, where there is one."""
    if _by_features(len(x), x.shape[1], y.shape[1]):
        if x.device.type == "cpu":
            loss = _features_in(x.dtype, x, y, rows, grad)
            if loss > 2 * FAR_MEAN * rows.sum(dtype=torch.float64):  # false of NaN
                return loss
        if x.dtype is torch.float32:
            return _features_in(torch.float64, x, y, rows, grad)
    return _samples(x, y, rows, grad)


def _features_in(dtype, x, y, rows, grad):
    N, wide = len(x), {"dtype": dtype, "device": x.device}
    S, T, C = (torch.zeros(a.shape[1], b.shape[1], **wide) for a, b in ((x, x), (y, y), (x, y)))
    blocks = blocks_of(FEATURES_BLOCK, N, max(x.shape[1], y.shape[1]), x.device)
    for block in blocks:
        u, v = x[block].to(dtype), y[block].to(dtype)
        S.addmm_(u.T, u)
        T.addmm_(v.T, v)
        C.addmm_(u.T, v)
    loss = x.new_zeros((), dtype=torch.float64)
    if grad is not None:
        grad.zero_()
        P, Q = S.new_zeros(S.shape), S.new_zeros(C.T.shape)
    for block in blocks:
        u, v = x[block].to(dtype), y[block].to(dtype)
        uS, vC = u @ S, v @ C.T
        a, b, c = (uS * u).sum(1), ((v @ T) * v).sum(1), (vC * u).sum(1)
        root = torch.where((a == 0) | (b == 0), 0.0, a.rsqrt() * b.rsqrt())  # a * b would leave float32's range
        cos = c * root
        of_rows = (a != 0).double() + (b != 0).double() - 2 * cos.double()
        loss += (of_rows.clamp(min=0) * rows[block]).sum()  # a rounding may take a cosine beyond 1
        if grad is not None:
            of_row = rows[block].to(dtype)
            alpha, gamma = (torch.where(a == 0, 0.0, cos / a) * of_row)[:, None], (-2 * root * of_row)[:, None]
            grad[block] = 2 * alpha * uS + gamma * vC
            P.addmm_(u.T, alpha * u)
            Q.addmm_(v.T, gamma * u)
    if grad is not None:
        for block in blocks:
            grad[block] += (2 * x[block].to(dtype) @ P).addmm_(y[block].to(dtype), Q)
    return loss


@torch.no_grad()
def _similarity_fwd(*arguments):
    call = SimilarityCall(*arguments)
    student, teacher = call.student, call.teacher
    check_embeddings(student, teacher)
    if are_few(student, SAMPLES_BLOCK, _by_features(*student.shape, teacher.shape[1])):
        return few_samples(student, teacher, SIMILARITY, call.mask, call.weight, call.save)
    with without_autocast(student.device):
        return _loss_and_gradient(call)


def _loss_and_gradient(call):
    student, teacher, mask = call.student, call.teacher, call.mask
    dtype = compute_dtype(student, teacher)
    x, y = student.to(dtype), teacher.to(dtype)
    if mask is not None:
        x, y = (torch.where(mask[:, None], z, 0.0) for z in (x, y))
    rows = row_factors(mask, call.weight, x)
    grad = torch.zeros_like(x, memory_format=torch.contiguous_format) if call.save else None
    loss = x.new_zeros(()) if len(x) < 2 else _loss(x, y, rows, grad).to(dtype)
    if not call.save:
        return loss, student.new_empty((0,), dtype=gradient_dtype(student))
    return loss, grad.to(gradient_dtype(student))


_library.fastkd.impl("similarity_fwd", _similarity_fwd, "CompositeExplicitAutograd")
FWD = torch.ops.fastkd.similarity_fwd.default
