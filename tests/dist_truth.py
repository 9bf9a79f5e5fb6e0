"""The DIST loss once more, by hand: value and gradient from its formula in extended precision."""

import numpy as np
import torch
from truth import _extended, _softmax, _standardized


def _correlation(p, q, eps, constant):
    """1 - ab / (|a| |b| + eps) along the last dimension, and its gradient with respect to p; constant: a spread of the
    values beside their mean below which there is none."""
    with np.errstate(all="ignore"):
        a, b = (x - x.mean(-1, keepdims=True) for x in (p, q))
        lengths = [np.sqrt((x * x).sum(-1, keepdims=True)) for x in (a, b)]
        whole = [np.sqrt((x * x).sum(-1, keepdims=True)) for x in (p, q)]
        none = np.zeros_like(lengths[0], bool)
        for length, of in zip(lengths, whole, strict=True):
            none |= length <= constant * of
        A, B = (np.where(none, 1, x) for x in lengths)
        ab, size = (a * b).sum(-1, keepdims=True), A * B + eps
        loss = np.where(none, 1, 1 - ab / size)
        grad = np.where(none, 0, -(b / size - ab * B / A * a / size**2))
    return loss[..., 0], grad


def dist_truth(
    student, teacher, *, inter_weight=1.0, intra_weight=1.0, temperature=1.0, eps=1e-8, standardize=False, dim=-1,
    mask=None, constant=1e-15,
):  # fmt: skip
    """Loss and gradient as float64 tensors."""
    s, t = (x.detach().movedim(dim, -1) for x in (student, teacher))
    shape, V = s.shape, s.shape[-1]
    s, t = (_extended(x.reshape(-1, V)) for x in (s, t))
    counts = np.ones(len(s), bool)
    if mask is not None:
        counts = mask.expand(shape[:-1]).reshape(-1).numpy()
    grad, N = np.zeros(s.shape, np.longdouble), counts.sum()
    loss = np.longdouble(0)
    if N:
        T, eps = np.longdouble(temperature), np.longdouble(eps)
        s, t = s[counts], t[counts]
        if standardize:
            (s, back), (t, _) = _standardized(s), _standardized(t)
        p, q = (_softmax(x, T)[0] for x in (s, t))
        rows, slope = _correlation(p, q, eps, constant)
        possible = p.any(-1) & q.any(-1)
        rows, slope = np.where(possible, rows, 1), np.where(possible[:, None], slope, 0)
        columns, of_columns = _correlation(p.T, q.T, eps, constant)
        loss = T**2 * (inter_weight * rows.mean() + intra_weight * columns.mean())
        slope = T**2 * (inter_weight * slope / N + intra_weight * of_columns.T / V)
        of_logits = p * (slope - (p * slope).sum(-1, keepdims=True)) / T
        grad[counts] = back(of_logits, False) if standardize else of_logits
    grad = torch.tensor(grad.astype(np.float64)).reshape(shape).movedim(-1, dim)
    return torch.tensor(np.float64(loss)), grad
