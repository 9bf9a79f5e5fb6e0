"""gram_mse by matrix products alone, on every device, of embeddings [B, N, D] in float32 or float64.

    G = X X^T of the student, H = Y Y^T of the teacher, of rows as they are or of length 1
    loss = 1/N^2 |G - H|^2, dL/dX = 4/N^2 (G - H) X

Two ways, the cheaper is taken:

Samples: blocks of rows of G - H, [block, N] at a time, from the diagonal on: what is beyond it counts twice.
2 N^2 (D_s + D_t) / 2 flops, and as many as 2 N^2 D_s for the gradient.

Features: with S = X^T X, T = Y^T Y and C = X^T Y
    |G - H|^2 = |S|^2 + |T|^2 - 2 |C|^2, (G - H) X = X S - Y C^T
linear in N. Near convergence the digits cancel, so both are in float64; on the CPU, where the host may look,
float32 is tried first and serves where they do not. Clamped similarities have no such form.

Saved for backward: the gradient. Beside it rows of length 1, a few blocks of rows and D x D matrices are held.
"""

import torch

from .. import _library
from .._check import DTYPES
from ..reference import compute_dtype, without_autocast

BLOCK = {"cpu": 2**19, "cuda": 2**23}  # elements of a block of rows: in cache; enough for a GPU
FAR = 0.1  # of the terms' sum what is left of it: their errors are of 1e-7
CLAMPS = {None: 0, "teacher": 1, "both": 2}


def _by_features(N, Ds, Dt):
    """Whether the products of features are cheaper than those of samples; float64 counts twice."""
    return N * (3 * Ds + Dt) > 2 * (4 * Ds * Ds + 2 * Dt * Dt + 4 * Ds * Dt)


def _blocks(n, width, device):
    rows = max(1, BLOCK.get(device.type, BLOCK["cuda"]) // max(1, width))
    return [slice(i, min(i + rows, n)) for i in range(0, n, rows)]


def _unit(x):
    """Rows to length 1; one of zeros stays, of one below 1e-12 that is the length. With what their gradient is
    multiplied by, and which have the length of their own. Nothing leaves the range: a row is divided by its
    largest element first."""
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    short = largest * length < 1e-12
    own = torch.where(length == 0, 0.0, 1 / length)
    factor = torch.where(short, largest * 1e12, own)
    return x * factor, factor / torch.where(largest == 0, 1.0, largest), ~short


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


def _samples(x, y, clamp, scales, grad):
    N = x.shape[1]
    squares = torch.zeros_like(scales)
    if BLOCK.get(x.device.type, BLOCK["cuda"]) >= N * N:
        for some in _blocks(len(x), N * N, x.device):
            e, sloped = _difference(x[some] @ x[some].mT, y[some] @ y[some].mT, clamp)
            squares[some] = (e * e).sum((1, 2), dtype=torch.float64)
            if grad is not None:
                torch.bmm(sloped, x[some], out=grad[some])
        return squares
    for b in range(len(x)):
        for rows in _blocks(N, N, x.device):
            u, n = x[b, rows], rows.stop - rows.start
            e, sloped = _difference(u @ x[b, rows.start :].T, y[b, rows] @ y[b, rows.start :].T, clamp)
            squares[b] += 2 * (e * e).sum(dtype=torch.float64) - (e[:, :n] * e[:, :n]).sum(dtype=torch.float64)
            if grad is not None:
                grad[b, rows].addmm_(sloped, x[b, rows.start :])
                grad[b, rows.stop :].addmm_(sloped[:, n:].T, u)
    return squares


def _features(x, y, grad):
    if x.dtype is torch.float32 and x.device.type == "cpu":
        squares, terms = _features_in(torch.float32, x, y, grad)
        if (squares > FAR * terms).all():
            return squares
    return _features_in(torch.float64, x, y, grad)[0].clamp(min=0)


def _features_in(dtype, x, y, grad):
    """The squares [B], and the terms that they are the difference of."""
    B, N, Ds, Dt = *x.shape, y.shape[2]
    wide = {"dtype": dtype, "device": x.device}
    squares, terms = (torch.zeros(B, dtype=torch.float64, device=x.device) for _ in range(2))
    width = max(Ds, Dt)
    for some in _blocks(B, width * max(width, min(N, 4096)), x.device):
        b = some.stop - some.start
        S, T, C = (torch.zeros(b, *shape, **wide) for shape in ((Ds, Ds), (Dt, Dt), (Ds, Dt)))
        blocks = _blocks(N, b * width, x.device)
        for rows in blocks:
            u, v = x[some, rows].to(dtype), y[some, rows].to(dtype)
            S.baddbmm_(u.mT, u)
            T.baddbmm_(v.mT, v)
            C.baddbmm_(u.mT, v)
        s, t, c = ((z * z).sum((1, 2), dtype=torch.float64) for z in (S, T, C))
        squares[some], terms[some] = s + t - 2 * c, s + t
        for rows in blocks if grad is not None else ():
            u, v = x[some, rows].to(dtype), y[some, rows].to(dtype)
            grad[some, rows] = (u @ S).baddbmm_(v, C.mT, alpha=-1)
    return squares, terms


def _through_unit(grad, x, inverse, own):
    """dL/dX from that of the rows of length 1, in its memory."""
    grad -= x * torch.where(own, (grad * x).sum(-1, keepdim=True), 0.0)
    grad *= inverse


def _check_embeddings(student, teacher):
    """What the functions have checked already; an op may be called past them."""
    if student.dim() not in (2, 3) or student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise RuntimeError(f"student and teacher: embeddings [N, D] or [B, N, D] of as many rows wanted, got {shapes}")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dtype not in DTYPES:
            raise RuntimeError(f"{name}: float16, bfloat16, float32 or float64 wanted, got {x.dtype}")


def _loss_and_gradient(x, y, normalize, clamp, mask, grad):
    """In float64; the gradient is written to grad, [B, N, D_s], where there is one."""
    scales = _scales(x, mask)
    inverse = own = None
    if normalize:
        (x, inverse, own), (y, _, _) = _unit(x), _unit(y)
    if not clamp and _by_features(x.shape[1], x.shape[2], y.shape[2]):
        squares = _features(x, y, grad)
    else:
        squares = _samples(x, y, clamp, scales, grad)
    if grad is not None:
        grad *= (4 * scales)[:, None, None].to(grad.dtype)
        if normalize:
            _through_unit(grad, x, inverse, own)
    return torch.where(scales == 0, 0.0, squares * scales).sum()


@torch.no_grad()
def _gram_fwd(student, teacher, normalize, clamp, mask, save):
    _check_embeddings(student, teacher)
    dtype = compute_dtype(student, teacher)
    with without_autocast(student.device):
        x, y = (z.to(dtype)[None] if z.dim() == 2 else z.to(dtype) for z in (student, teacher))
        if mask is not None:
            mask = mask.view(x.shape[:2])
            x, y = (torch.where(mask[..., None], z, 0.0) for z in (x, y))
        grad = torch.zeros(x.shape, dtype=dtype, device=x.device) if save else None
        if x.shape[0] * x.shape[1]:
            loss = _loss_and_gradient(x, y, normalize, clamp, mask, grad).to(dtype)
        else:
            loss = x.new_zeros(())
    grad_dtype = torch.float32 if student.dtype is torch.float16 else student.dtype
    if not save:
        return loss, student.new_empty((0,), dtype=grad_dtype)
    return loss, grad.view(student.shape).to(grad_dtype)


_library.fastkd.impl("gram_fwd", _gram_fwd, "CompositeExplicitAutograd")
FWD = torch.ops.fastkd.gram_fwd.default
