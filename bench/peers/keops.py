"""KeOps: symbolic matrices of pairs, which are reduced without being held; a compiled kernel for each formula.

The losses are written with its LazyTensor as its documentation writes such sums. What two reductions need,
such as a mean distance or the sum of a row, is a reduction of its own.
"""

import torch
import torch.nn.functional as F

NAME, PACKAGE = "KeOps", "pykeops"
DEVICES, ELSEWHERE = ("cpu", "cuda"), ""
HOLDS, MOST_WORK = 0.0, 3e8
OTHERWISE = "reduces over pairs of samples only"


def _lazy():
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)  # of kernels that it compiles
    return LazyTensor


def _products(LazyTensor, x):
    return (LazyTensor(x[:, None]) * LazyTensor(x[None])).sum(-1)


def _total(lazy):
    return lazy.sum(1).sum()


def _rkd_distance():
    LazyTensor = _lazy()

    def scaled(x):
        d = ((LazyTensor(x[:, None]) - LazyTensor(x[None])) ** 2).sum(-1).sqrt()
        mean = _total(d) / (len(x) * (len(x) - 1))
        return d * LazyTensor((1 / mean).view(1))

    def loss(student, teacher):
        e = (scaled(student) - scaled(teacher)).abs()
        return _total((1 - e).ifelse(0.5 * e * e, e - 0.5)) / len(student) ** 2

    return loss


def _gram_mse():
    LazyTensor = _lazy()

    def loss(student, teacher):
        s, t = (_products(LazyTensor, F.normalize(x, dim=1)) for x in (student, teacher))
        return _total((s - t) ** 2) / len(student) ** 2

    return loss


def _similarity_preserving():
    LazyTensor = _lazy()

    def rows(x):
        G = _products(LazyTensor, x)
        return G * LazyTensor((G**2).sum(1).rsqrt()[:, None])

    return lambda student, teacher: _total((rows(student) - rows(teacher)) ** 2) / len(student) ** 2


def _pkt(eps=1e-7):
    LazyTensor = _lazy()

    def probabilities(x):
        x = x / (x.norm(dim=1, keepdim=True) + eps)
        k = (_products(LazyTensor, x) + 1) * 0.5
        return k * LazyTensor((1 / k.sum(1))[:, None])

    def loss(student, teacher):
        s, t = probabilities(student), probabilities(teacher)
        return _total(t * ((t + eps) / (s + eps)).log()) / len(student) ** 2

    return loss


def _relation_kl():
    LazyTensor = _lazy()

    def loss(student, teacher):
        number = torch.arange(len(student), dtype=student.dtype, device=student.device)[:, None]
        # far below all others, and not so far that a difference of two were not finite
        itself = 0.5 - ((LazyTensor(number[:, None]) - LazyTensor(number[None])) ** 2).sum(-1)

        def similarities(x):
            s = _products(LazyTensor, x) / x.shape[1] ** 0.5
            return itself.ifelse(s * 0 - 1e4, s)

        s, t = similarities(student), similarities(teacher)
        lse_s, lse_t = s.logsumexp(1), t.logsumexp(1)
        q = (t - LazyTensor(lse_t[:, None])).exp()
        return (_total(q * (t - s)) + (lse_s - lse_t).sum()) / len(student)

    return loss


LOSSES = {
    "rkd_distance": _rkd_distance,
    "gram_mse": _gram_mse,
    "similarity_preserving": _similarity_preserving,
    "pkt": _pkt,
    "relation_kl": _relation_kl,
}
