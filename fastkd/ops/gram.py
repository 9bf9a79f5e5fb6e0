"""gram_mse by matrix products alone, on every device, of embeddings [B, N, D] in float32 or float64.

    G = X X^T of the student, H = Y Y^T of the teacher, of rows as they are or of length 1
    loss = 1/N^2 |G - H|^2, dL/dX = 4/N^2 (G - H) X
    with weights w of rows 1/N^2 sum_ij v_ij (G - H)_ij^2, v_ij = (w_i + w_j) / 2

Two ways, the cheaper is taken:

Samples: blocks of rows of G - H, [block, N] at a time, from the diagonal on: what is beyond it counts twice.
2 N^2 (D_s + D_t) / 2 flops, and as many as 2 N^2 D_s for the gradient.

Features: with S = X^T X, T = Y^T Y and C = X^T Y
    |G - H|^2 = |S|^2 + |T|^2 - 2 |C|^2, (G - H) X = X S - Y C^T
linear in N. Near convergence the digits cancel: with r = |G - H| / |G| the error is a rounding over r^2, that of
samples one over r. In float64 it is small enough for embeddings in float32. On the CPU, where the host may look, the
embeddings' own dtype is tried first and serves where r^2 is large; elsewhere those in float64 are multiplied by
samples. Clamped or weighted similarities have no such form.

Saved for backward: the gradient. Beside it rows of length 1, a few blocks of rows and D x D matrices are held.
"""

import functools

import torch

from .. import _library
from .._dtypes import compute_dtype, without_autocast
from .._relation_calls import GramCall
from ..reference import gradient_dtype
from .products import blocks_of, check_embeddings, unit, unit_backward
from .samples import GRAM, are_few, few_samples

BLOCK = {"cpu": 2**19, "cuda": 2**23}  # elements of a block of rows: in cache; enough for a GPU
BATCH_BLOCK = {
    "cpu": 2**20,
    "cuda": 2**23,
}  # of a batch's samples: together they are faster
MIN_SHARE = 0.1  # of the terms, which |G - H|^2 must keep: then the result has lost one digit
CLAMPS: dict[str | None, int] = {None: 0, "teacher": 1, "both": 2}


def _by_features(N, Ds, Dt, cost=1):
    """Whether the products of features are cheaper than those of samples; cost: how much one takes longer."""
    features, samples = N * (4 * Ds * (Ds + Dt) + 1.25 * Dt * Dt), 1.25 * N * N * (3 * Ds + Dt)
    return cost * features < samples


def _blocks(n, width, device):
    return blocks_of(BLOCK, n, width, device)


def _scales(x, mask):
    """What the squares of each are multiplied by, [B] in float64: by its rows that count, and how many have any."""
    B, N = x.shape[:2]
    if mask is None:
        return x.new_full((B,), 1 / (B * N**2), dtype=torch.float64)
    rows = mask.sum(1, dtype=torch.float64)
    return torch.where(rows == 0, 0.0, 1 / (rows * rows)) / (rows > 0).sum().clamp(min=1)


def _difference(G, H, clamp):
    """G - H, and the part of it that has a gradient; in the memory of both."""
    if clamp:
        H.clamp_(min=0)
    if clamp < CLAMPS["both"]:
        G -= H
        return G, G
    H = torch.relu(G) - H
    return H, torch.where(G > 0, H, 0.0)


def _weighed(e, sloped, half, rows, columns):
    """Both times the pairs' weights; half: of all rows, halved, or None; rows, columns: which of them e has."""
    if half is None:
        return e, sloped
    weight = half[rows][..., None] + half[columns][..., None, :]
    return e * weight, sloped * weight


def _samples(x, y, clamp, half, grad):
    N = x.shape[1]
    squares = x.new_zeros(len(x), dtype=torch.float64)
    if BLOCK.get(x.device.type, BLOCK["cuda"]) >= N * N:
        for some in _blocks(len(x), N * N, x.device):
            e, sloped = _difference(x[some] @ x[some].mT, y[some] @ y[some].mT, clamp)
            weighed, sloped = _weighed(e, sloped, half, some, some)
            squares[some] = (e * weighed).sum((1, 2), dtype=torch.float64)
            if grad is not None:
                torch.bmm(sloped, x[some], out=grad[some])
        return squares
    if grad is not None:
        grad.zero_()
    for b in range(len(x)):
        for rows in _blocks(N, N, x.device):
            u, n = x[b, rows], rows.stop - rows.start
            e, sloped = _difference(u @ x[b, rows.start :].T, y[b, rows] @ y[b, rows.start :].T, clamp)
            weighed, sloped = _weighed(e, sloped, half, (b, rows), (b, slice(rows.start, None)))
            squares[b] += 2 * (e * weighed).sum(dtype=torch.float64)
            squares[b] -= (e[:, :n] * weighed[:, :n]).sum(dtype=torch.float64)
            if grad is not None:
                grad[b, rows].addmm_(sloped, x[b, rows.start :])
                grad[b, rows.stop :].addmm_(sloped[:, n:].T, u)
    return squares


def _squares(x, y, clamp, half, grad):
    """Of G - H, [B] in float64; its product with X is written to grad where there is a place for it."""
    if not clamp and half is None:
        for dtype, cost, may_cancel in _ways_by_features(x):
            if _by_features(*x.shape[1:], y.shape[2], cost):
                squares, terms = _features(dtype, x, y, grad)
                if may_cancel or (squares > MIN_SHARE * terms).all():  # false of NaN
                    return squares.clamp(min=0)
    return _samples(x, y, clamp, half, grad)


def _ways_by_features(x):
    """In which dtypes the products of features may be tried, what they cost, and whether the result serves
    whatever cancels."""
    if x.device.type == "cpu":
        yield x.dtype, 1, False
    if x.dtype is torch.float32:
        yield torch.float64, 2, True


def _features(dtype, x, y, grad):
    """The squares [B], and the terms that they are the difference of."""
    B, N, Ds, Dt = *x.shape, y.shape[2]
    squares, terms = (torch.zeros(B, dtype=torch.float64, device=x.device) for _ in range(2))
    width = max(Ds, Dt)
    # in the dtype of x nothing is copied
    some_of_batch = [slice(0, B)] if x.dtype is dtype else _blocks(B, width * max(width, min(N, 4096)), x.device)
    for some in some_of_batch:
        b = some.stop - some.start
        blocks = [slice(0, N)] if x.dtype is dtype else _blocks(N, b * width, x.device)
        S, C = (x.new_empty(b, Ds, D, dtype=dtype) for D in (Ds, Dt))
        T = [x.new_empty(b, strip.stop - strip.start, Dt - strip.start, dtype=dtype) for strip in _strips(Dt)]
        for rows in blocks:
            u, v = x[some, rows].to(dtype), y[some, rows].to(dtype)
            # the first overwrites what lies there, NaN too
            add = functools.partial(torch.Tensor.baddbmm_, beta=float(rows.start > 0))
            add(S, u.mT, u)
            add(C, u.mT, v)
            for strip, product in zip(_strips(Dt), T, strict=True):
                add(product, v[:, :, strip].mT, v[:, :, strip.start :])
        t = sum(2 * _sum_of_squares(z) - _sum_of_squares(z[:, :, : z.shape[1]]) for z in T)
        both, c = _sum_of_squares(S) + t, _sum_of_squares(C)
        squares[some], terms[some] = both - 2 * c, both
        for rows in blocks if grad is not None else ():
            if x.dtype is dtype:
                torch.bmm(x, S, out=grad).baddbmm_(y, C.mT, alpha=-1)
            else:
                u, v = x[some, rows].to(dtype), y[some, rows].to(dtype)
                grad[some, rows] = (u @ S).baddbmm_(v, C.mT, alpha=-1)
    return squares, terms


def _strips(D):
    """Of T = Y^T Y, from the diagonal on: four, where the products of each are still large."""
    width = max(64, (D + 3) // 4)
    return [slice(i, min(i + width, D)) for i in range(0, D, width)]


def _sum_of_squares(x):
    """[B] of [B, *, *], in float64; of float32 row by row, which costs no digit of these and copies nothing."""
    if x.dtype is torch.float64:
        return (x * x).sum((1, 2))
    return torch.linalg.vector_norm(x, dim=2).double().square().sum(1)


def _squares_and_gradient(x, y, normalize, clamp, half, scales, grad):
    """The squares [B] and, where there is a place for it, the gradient; of rows [B, N, D_s] that are there."""
    if normalize:
        (x, factor, own), (y, _, _) = unit(x), unit(y)
    squares = _squares(x, y, clamp, half, grad)
    if grad is not None:
        by = (4 * scales)[:, None, None].to(grad.dtype)
        if normalize:
            unit_backward(grad, x, factor * by, own)
        else:
            grad *= by
    return squares


@torch.no_grad()
def _gram_fwd(*arguments):
    call = GramCall(*arguments)
    student, teacher, clamp, mask, weight = call.student, call.teacher, call.clamp, call.mask, call.weight
    check_embeddings(student, teacher, (2, 3))
    by_features = not clamp and weight is None and _by_features(*student.shape[-2:], teacher.shape[-1])
    if student.dim() == 2 and are_few(student, BLOCK, by_features):
        return few_samples(student, teacher, GRAM, mask, weight, call.save, call.normalize, clamp)
    dtype = compute_dtype(student, teacher)
    grad_dtype = gradient_dtype(student)
    grad = torch.empty(student.shape if call.save else (0,), dtype=grad_dtype, device=student.device)
    x, y, g = (z[None] if z.dim() < 3 else z for z in (student, teacher, grad))
    mask = mask if mask is None else mask.reshape(x.shape[:2])
    half = weight if weight is None else weight.to(dtype).reshape(x.shape[:2]) / 2
    loss = x.new_zeros((), dtype=torch.float64)
    if x.shape[0] * x.shape[1] == 0:
        return loss.to(dtype), grad
    scales = _scales(x, mask)
    with without_autocast(student.device):
        # a few samples at a time: what is made of them stays in the caches
        for some in blocks_of(BATCH_BLOCK, len(x), x.shape[1] * max(x.shape[2], y.shape[2]), x.device):
            u, v = x[some].to(dtype), y[some].to(dtype)
            of_rows = half if half is None else half[some]
            if mask is not None:
                u, v = (torch.where(mask[some, :, None], z, 0.0) for z in (u, v))
                of_rows = of_rows if half is None else torch.where(mask[some], of_rows, 0.0)
            to = None
            if call.save:
                direct = grad_dtype is dtype
                to = g[some] if direct else torch.empty_like(u, memory_format=torch.contiguous_format)
            squares = _squares_and_gradient(u, v, call.normalize, clamp, of_rows, scales[some], to)
            loss += torch.where(scales[some] == 0, 0.0, squares * scales[some]).sum()
            if call.save and not direct:
                g[some] = to
    return loss.to(dtype), grad


_library.fastkd.impl("gram_fwd", _gram_fwd, "CompositeExplicitAutograd")
FWD = torch.ops.fastkd.gram_fwd.default
