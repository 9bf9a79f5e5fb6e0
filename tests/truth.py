"""The losses once more, by hand: values and gradients from their formulas in extended precision.

Independent of fastkd.reference, and good enough to measure float64 results.
"""

import numpy as np
import torch


def _extended(x):
    return x.detach().double().numpy().astype(np.longdouble)


def _softmax(logits, temperature):
    """Probabilities and their logarithms; a row of -inf alone has no probabilities: all 0."""
    z = logits / temperature
    top = z.max(-1, keepdims=True, initial=-np.inf)
    z = z - np.where(np.isneginf(top), 0, top)
    total = np.exp(z).sum(-1, keepdims=True)
    log_p = np.where(total == 0, -np.inf, z - np.log(np.where(total == 0, 1, total)))
    return np.exp(log_p), log_p


def _x_log(x, ratio):
    """x log(ratio), 0 where x is."""
    return np.where(x == 0, 0, x * np.log(np.where(x == 0, 1, ratio)))


def _forward(p, q, log_p, log_q):
    return np.where(q == 0, 0, q * (log_q - log_p)), -q


def _cross_entropy(p, q, log_p, log_q):
    return np.where(q == 0, 0, -q * log_p), -q


def _reverse(p, q, log_p, log_q):
    terms = np.where(p == 0, 0, p * (log_p - log_q))
    return terms, terms + p


def _jensen_shannon(p, q, log_p, log_q, beta=0.5):
    if beta in (0, 1):
        return (_reverse if beta else _forward)(p, q, log_p, log_q)
    beta = np.longdouble(beta)
    m = beta * q + (1 - beta) * p
    student = _x_log(p, p / m)
    return beta * _x_log(q, q / m) + (1 - beta) * student, (1 - beta) * student


def _symmetric(p, q, log_p, log_q, student_weight=0.5):
    s = np.longdouble(student_weight)
    if s in (0, 1):
        return (_reverse if s else _forward)(p, q, log_p, log_q)
    (a, x), (b, y) = _forward(p, q, log_p, log_q), _reverse(p, q, log_p, log_q)
    return (1 - s) * a + s * b, (1 - s) * x + s * y


def _skew(p, q, log_p, log_q, alpha=0.1):
    if alpha == 0:
        return _forward(p, q, log_p, log_q)
    alpha = np.longdouble(alpha)
    m = alpha * q + (1 - alpha) * p
    return _x_log(q, q / m), np.where(m == 0, 0, (1 - alpha) * p * (m - q) / m)  # with a multiple of p


def _skew_reverse(p, q, log_p, log_q, alpha=0.1):
    if alpha == 0:
        return _reverse(p, q, log_p, log_q)
    alpha = np.longdouble(alpha)
    m = alpha * p + (1 - alpha) * q
    terms = _x_log(p, p / m)
    return terms, np.where(m == 0, 0, terms + p - alpha * p * p / m)


def _total_variation(p, q, log_p, log_q):
    return np.abs(p - q) / 2, np.where((p == 0) & (q == 0), 0, p * np.sign(log_p - log_q) / 2)


def _head(q, mu):
    """The classes of a row that are at least as probable as the last of those that sum to at most mu; the best ones."""
    values, which, count = np.unique(-q, return_inverse=True, return_counts=True)
    mass = np.cumsum(-values * count)
    return ((mass <= mu * mass[-1]) | (np.arange(len(values)) == 0))[which]


def _adaptive(p, q, log_p, log_q, mu=0.5):
    difference = np.abs(p - q)
    head = np.array([_head(row, np.longdouble(mu)) for row in q]).reshape(q.shape)
    total = difference.sum(-1, keepdims=True)
    w = np.where(total > 0, np.where(head, 0, difference).sum(-1, keepdims=True) / np.where(total > 0, total, 1), 0.5)
    (a, x), (b, y) = _forward(p, q, log_p, log_q), _reverse(p, q, log_p, log_q)

    def weighted(forward, reverse):
        return np.where(w == 1, 0, (1 - w) * forward) + np.where(w == 0, 0, w * reverse)

    return weighted(a, b), weighted(x, y)


# Each class's share of the divergence, and the derivative of the whole with respect to log p.
DIVERGENCES = {
    "kl_div": _forward,
    "soft_cross_entropy": _cross_entropy,
    "reverse_kl_div": _reverse,
    "js_div": _jensen_shannon,
    "symmetric_kl_div": _symmetric,
    "skew_kl_div": _skew,
    "skew_reverse_kl_div": _skew_reverse,
    "total_variation": _total_variation,
    "adaptive_kl_div": _adaptive,
}


def _hard(logits, target, smoothing):
    """Cross-entropy with a class of each row, and its gradient. Of -inf alone: +inf, and none."""
    p, log_p = _softmax(logits, np.longdouble(1))
    rows, nothing = np.arange(len(target)), ~p.any(-1)
    loss = np.zeros(len(target), np.longdouble)
    if smoothing < 1:
        loss = loss - (1 - smoothing) * log_p[rows, target]
    if smoothing > 0:
        loss = loss - smoothing * log_p.mean(-1)
    grad = p - smoothing / p.shape[-1]
    grad[rows, target] -= 1 - smoothing
    return np.where(nothing, np.inf, loss), np.where(nothing[:, None], 0, grad)


def truth(
    name, student, teacher, temperature=1.0, teacher_temperature=None, t_squared=True, mask=None, weight=None,
    reduction="batchmean", normalizer=None, terms_of_gradient=False, target=None, hard_weight=0.5, soft_weight=0.5,
    label_smoothing=0.0, ignore_index=-100, **parameter,
):  # fmt: skip
    """Loss, and its gradient for the upstream gradient of ``upstream_like``, as float64 tensors.

    ``terms_of_gradient``: instead of the gradient, the size of the two terms whose difference it is.
    """
    shape, V = student.shape, student.shape[-1]

    def rows(x):
        return _extended(x.expand(shape[:-1]).reshape(-1)) if isinstance(x, torch.Tensor) else np.longdouble(x)

    T = rows(temperature)
    teacher_T = T if teacher_temperature is None else rows(teacher_temperature)
    counts = np.ones(student.numel() // V, bool) if mask is None else mask.reshape(-1).numpy()
    if target is not None:
        counts = counts & (target.reshape(-1).numpy() != ignore_index)
    s, t = (np.where(counts[:, None], _extended(x.reshape(-1, V)), 0) for x in (student, teacher))
    with np.errstate(all="ignore"):
        p, log_p = _softmax(s, np.reshape(T, (-1, 1)))
        q, log_q = _softmax(t, np.reshape(teacher_T, (-1, 1)))
        terms, slope = DIVERGENCES[name](p, q, log_p, log_q, **parameter)
        loss = terms.sum(-1)
        shift = p * slope.sum(-1, keepdims=True)
        grad = np.abs(slope) + np.abs(shift) if terms_of_gradient else slope - shift
    no_p, no_q = (~x.any(-1) for x in (p, q))  # a row of -inf alone
    loss = np.where(no_q, 0, np.where(no_p, np.inf, loss))
    endless = slope.sum(-1) == np.inf  # no finite gradient: 0 stands for it
    grad = np.where((no_p | no_q | endless)[:, None], 0, grad)
    scale = counts * (T**2 if t_squared else 1) * (1 if weight is None else rows(weight))
    loss = np.where(counts, loss * scale, 0)
    grad = grad * (scale / T)[:, None]
    if target is not None:
        hard, hard_grad = _hard(s, np.where(counts, target.reshape(-1).numpy(), 0), np.longdouble(label_smoothing))
        scale = counts * (1 if weight is None else rows(weight)) * np.longdouble(hard_weight)
        of_both = [(soft_weight, loss, 1), (hard_weight, hard, scale)]
        loss = sum(np.where(counts, x * (scale if x is hard else soft_weight), 0) for w, x, scale in of_both if w)
        size = np.abs if terms_of_gradient else lambda x: x
        grad = soft_weight * grad + size(hard_grad) * scale[:, None]
    if reduction == "none":
        loss, upstream = loss.reshape(shape[:-1]), _extended(upstream_like(torch.empty(shape[:-1])))
        grad = grad * upstream.reshape(-1, 1)
    else:
        valid = counts.sum()
        divisor = {"sum": 1, "batchmean": valid, "mean": valid * V}[reduction]
        divisor = divisor if normalizer is None else np.longdouble(float(normalizer))
        loss, grad = (x / divisor if valid else 0 * x for x in (loss.sum(), grad))
    return torch.tensor(np.float64(loss)), torch.tensor(grad.astype(np.float64)).reshape(shape)


def kl_div(student, teacher, **options):
    return truth("kl_div", student, teacher, **options)


def upstream_like(loss):
    """An upstream gradient that differs from row to row; for a scalar 1, as most callers have it."""
    if not loss.dim():
        return torch.ones_like(loss)
    return torch.arange(1, loss.numel() + 1).remainder(7).add(1).div(4).to(loss.dtype).reshape(loss.shape)
