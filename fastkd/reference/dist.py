"""The DIST loss in plain PyTorch."""

from typing import Any

import torch

from .. import _terms
from .._check import DistOptions
from .._dtypes import compute_dtype
from .._inplace import overwritten
from . import forms
from ._shared import _number, ordinary
from .logits import _standardized_logits, log_softmax


def _apart(centred, means, count, eps, dim):
    """1 - ab / (|a| |b| + eps) along a dimension, of centred a and b and of D = a - b, each given.

    Where D is small, |a| |b| - ab = (|D|^2 - (|a| - |b|)^2) / 2 with |a| - |b| = D (a + b) / (|a| + |b|). means: of
    what was centred; what differs from them by rounding errors is constant.
    """
    a, b, D = centred
    aa, bb, ab, aD, DD = ((x * y).sum(dim) for x, y in ((a, a), (b, b), (a, b), (a, D), (D, D)))
    finfo = torch.finfo(a.dtype)
    constant = torch.zeros_like(aa, dtype=torch.bool)
    for squares, mean in zip((aa, bb), means, strict=True):
        rounding = (4 * finfo.eps) ** 2 * (squares + count * mean.square())
        constant = constant | (squares <= rounding.clamp(min=finfo.tiny)).detach()
    aa, bb = (torch.where(constant, 1.0, x) for x in (aa, bb))
    length, other = aa.sqrt(), bb.sqrt()
    apart, product = (2 * aD - DD) / (length + other), length * other
    near = (DD - apart.square()).clamp(min=0) / 2
    loss = (torch.where(product / 2 > DD, near, product - ab) + eps) / (product + eps)
    return torch.where(constant, 1.0, loss)


def dist_loss(student: torch.Tensor, teacher: Any, options: DistOptions) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there. teacher: logits or Probabilities."""
    given = None if isinstance(teacher, torch.Tensor) else teacher
    teacher = given.probabilities[..., : options.num_classes] if given else teacher
    dtype, V = compute_dtype(student, teacher), teacher.shape[-1]
    s, t = student.to(dtype), ordinary(teacher).detach().to(dtype)
    if options.inplace and student.requires_grad and torch.is_grad_enabled():
        s = s.clone() if s is student else s
        overwritten(student)
    s, t = s[..., :V].reshape(-1, V), t.reshape(-1, V)  # the classes that count
    counts = s.new_ones(s.shape[0], dtype=torch.bool)
    if options.mask is not None:
        counts = ordinary(options.mask).reshape(-1)
    s, t = (torch.where(counts[:, None], x, 0.0) for x in (s, t))  # a masked row may hold NaN
    mass = None
    if given:
        mass = None if options.standardize else forms.mass(t, options.temperature == given.temperature)
        t = forms.logits(t, given.temperature, False)
    if options.standardize:
        s, t = _standardized_logits(s), _standardized_logits(t)
    temperature, eps = _number(options.temperature, s), _number(options.eps, s)
    log_p, log_q = log_softmax(s, temperature), log_softmax(t, temperature)
    log_q = log_q if mass is None else log_q + mass.log()[:, None]
    p, q = log_p.exp(), log_q.exp()
    D = _terms.difference(p, q, log_p, log_q)
    possible = (p.sum(-1) > 0) & (q.sum(-1) > 0) | p.sum(-1).isnan() | q.sum(-1).isnan()
    valid = counts.sum()
    rows = valid.clamp(min=1)

    mean = s.new_full((), 1 / V)
    of_teacher, apart = (mean, 0.0) if mass is None else (mass[:, None] / V, (1 - mass[:, None]) / V)
    of_rows = _apart((p - mean, q - of_teacher, D - apart), (mean, of_teacher.reshape(-1)), V, eps, -1)
    of_rows = torch.where(possible, of_rows, 1.0)
    inter = torch.where(counts, of_rows, 0.0).sum() / rows

    p, q, D = (torch.where(counts[:, None], x, 0.0) for x in (p, q, D))
    means = [x.sum(0) / rows for x in (p, q, D)]
    centred = [torch.where(counts[:, None], x - mean, 0.0) for x, mean in zip((p, q, D), means, strict=True)]
    intra = _apart(centred, means[:2], rows, eps, 0).mean()

    # of one dimension: a float times a tensor without any has a forward derivative in float64
    inter, intra = inter.reshape(1), intra.reshape(1)
    loss = _number(options.inter_weight, s) * inter + _number(options.intra_weight, s) * intra
    return torch.where(valid > 0, temperature**2 * loss, 0.0).reshape(())
