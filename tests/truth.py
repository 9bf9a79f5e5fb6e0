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


def _negative_log_acceptance(p, q, log_p, log_q):
    accepted = np.minimum(p, q).sum(-1, keepdims=True)
    terms = np.where(np.arange(p.shape[-1]) == 0, -np.log(accepted), 0)  # no sum over classes: the first has it all
    return terms, np.where((p == 0) & (q == 0), 0, np.where(accepted == 0, np.inf, -p * (log_p < log_q) / accepted))


def _alpha_beta(p, q, log_p, log_q, alpha=0.2, beta=0.7):
    a, b = np.longdouble(alpha), np.longdouble(beta)
    s = a + b
    none = (p == 0) & (q == 0)
    w = np.where(none, 0, log_p - log_q)
    of_p, of_q = (np.exp(s * np.maximum(x, -1e300)) for x in (log_p, log_q))
    both = np.exp(a * np.maximum(log_q, -1e300) + b * np.maximum(log_p, -1e300))
    if a > 0 and b > 0:
        terms, slope = -(both - a / s * of_q - b / s * of_p) / (a * b), (of_p - both) / a
    elif a > 0:
        terms, slope = (of_p - of_q - a * of_q * np.where(q == 0, 0, w)) / a**2, (of_p - both) / a
    elif b > 0:
        slope = np.where(p == 0, 0, of_p * w)
        terms = (of_q - of_p + b * slope) / b**2
    else:
        terms, slope = w**2 / 2, np.where(np.isinf(w), np.inf, w)
    return np.where(none, 0, terms), np.where(none, 0, slope)


@np.errstate(all="ignore")
def _coins(a, b):
    """KL(q || p) of coins with log odds b and a, summed over classes, and the gradient by a."""
    p, q, q_not = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(-b)), 1 / (1 + np.exp(b))
    terms = np.where(q == 0, 0, q * (np.logaddexp(0, -a) - np.logaddexp(0, -b)))
    terms = terms + np.where(q_not == 0, 0, q_not * (np.logaddexp(0, a) - np.logaddexp(0, b)))
    return terms.sum(-1), np.where(p < 0.5, p - q, q_not - 1 / (1 + np.exp(a))), p + q


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
    "negative_log_acceptance": _negative_log_acceptance,
    "alpha_beta_div": _alpha_beta,
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


# The weight of the divergence between the other classes, and that of the coins.
PARTED = {"dkd_loss": (("beta", 8.0), ("alpha", 1.0)), "nkd_loss": (("gamma", 1.5), ("-", 1.0))}


@np.errstate(all="ignore")
def _parted(name, logits, temperatures, target, first, second, t_squared):
    """dkd_loss and nkd_loss, and the gradient; and the size of the terms whose sum that is."""
    rows, T = np.arange(len(target)), temperatures[0]
    of_target, others, log_others = [], [], []

    def log_odds(z, at, temperature):
        with_others = z / temperature
        of = with_others[rows, at].copy()
        with_others[rows, at] = -np.inf
        return of - np.logaddexp.reduce(with_others, -1)

    for z, temperature in zip(logits, temperatures, strict=True):
        of_target.append(log_odds(z, target, np.reshape(temperature if name == "dkd_loss" else 1, (-1, 1))))
        alone = z.copy()
        alone[rows, target] = -np.inf
        p, log_p = _softmax(alone, np.reshape(temperature, (-1, 1)))
        others.append(p)
        log_others.append(log_p)
    (p, q), (log_p, log_q), (a, b) = others, log_others, of_target
    soft, _slope = (_forward if name == "dkd_loss" else _cross_entropy)(p, q, log_p, log_q)
    no_p, no_q = (~x.any(-1) for x in (p, q))
    soft = np.where(no_q, 0, np.where(no_p, np.inf, soft.sum(-1)))
    squared = T**2 if t_squared else np.longdouble(1)
    p_y, q_y, p_rest, q_rest = (1 / (1 + np.exp(-x)) for x in (a, b, -a, -b))
    if name == "dkd_loss":
        hard = np.where(q_y == 0, 0, q_y * (np.logaddexp(0, -a) - np.logaddexp(0, -b)))
        hard = hard + np.where(q_rest == 0, 0, q_rest * (np.logaddexp(0, a) - np.logaddexp(0, b)))
        step, p_of_step, scale = np.where(p_y < p_rest, p_y - q_y, q_rest - p_rest) * squared / T * second, p, squared
        weights = second
    else:
        hard, step, scale, weights = np.where(q_y == 0, 0, q_y * np.logaddexp(0, -a)), -q_y * p_rest, 1, 1
        z = logits[0].copy()
        z[rows, target] = -np.inf
        p_of_step = _softmax(z, np.longdouble(1))[0]
    loss = np.where(first == 0, 0, first * soft) * squared + np.where(weights == 0, 0, weights * hard) * scale
    of_soft = np.where((no_p | no_q)[:, None], 0, p - q) * np.reshape(first * squared / T, (-1, 1))
    of_hard = -p_of_step * np.where(no_p, 0, step)[:, None]
    of_hard[rows, target] += np.where(no_p, 0, step)
    nothing = [np.isneginf(z).all(-1) for z in logits]
    loss = np.where(nothing[1], 0, np.where(nothing[0], np.inf, loss))
    left = ~(nothing[0] | nothing[1])[:, None]
    size = (p + q) * np.reshape(first * squared / T, (-1, 1)) + np.abs(of_hard)
    return loss, np.where(left, of_soft + of_hard, 0), np.where(left, size, 0)


def _standardized(x):
    """(x - mean) / (std + 1e-7) of each row, and what brings a gradient back through that; absolute: the size of its
    terms."""
    counts = ~np.isneginf(x)
    n = counts.sum(-1, keepdims=True)
    c = np.where(counts, x - np.where(counts, x, 0).sum(-1, keepdims=True) / np.maximum(n, 1), 0)
    constant = np.where(counts, x, -np.inf).max(-1, keepdims=True) == np.where(counts, x, np.inf).min(-1, keepdims=True)
    constant = constant | (n < 2)
    c = np.where(constant, 0, c)
    std = np.sqrt((c * c).sum(-1, keepdims=True) / np.maximum(n - 1, 1))
    scale, slope = 1 / (std + np.longdouble("1e-7")), 1 / (np.maximum(n - 1, 1) * np.where(constant, 1, std))

    def back(g, absolute):
        g, along, less = np.where(counts, g, 0), c, -1
        if absolute:
            g, along, less = np.abs(g), np.abs(c), 1
        means, products = g.sum(-1, keepdims=True) / np.maximum(n, 1), (g * along).sum(-1, keepdims=True)
        grad = scale * (g + less * means + less * along * slope * scale * products)
        return np.where(counts & ~constant, grad, 0)

    return np.where(counts, c * scale, -np.inf), back


def truth(
    name, student, teacher, temperature=1.0, teacher_temperature=None, t_squared=True, mask=None, weight=None,
    reduction="batchmean", normalizer=None, terms_of_gradient=False, target=None, hard_weight=0.5, soft_weight=0.5,
    label_smoothing=0.0, ignore_index=-100, standardize=False, **parameter,
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
    x, y = s, t
    if standardize:
        (x, back), (y, _) = _standardized(s), _standardized(t)
    with np.errstate(all="ignore"):
        p, log_p = _softmax(x, np.reshape(T, (-1, 1)))
        q, log_q = _softmax(y, np.reshape(teacher_T, (-1, 1)))
        of = parameter if name in DIVERGENCES else {}
        terms, slope = DIVERGENCES.get(name, _cross_entropy)(p, q, log_p, log_q, **of)
        loss = terms.sum(-1)
        shift = p * slope.sum(-1, keepdims=True)
        grad = np.abs(slope) + np.abs(shift) if terms_of_gradient else slope - shift
    no_p, no_q = (~x.any(-1) for x in (p, q))  # a row of -inf alone
    loss = np.where(no_q, 0, np.where(no_p, np.inf, loss))
    endless = slope.sum(-1) == np.inf  # no finite gradient: 0 stands for it
    grad = np.where((no_p | no_q | endless)[:, None], 0, grad)
    if name == "bernoulli_kl_div":
        loss, *grad = _coins(x / np.reshape(T, (-1, 1)), y / np.reshape(teacher_T, (-1, 1)))
        grad = grad[terms_of_gradient]
    scale = counts * (T**2 if t_squared else 1) * (1 if weight is None else rows(weight))
    loss = np.where(counts, loss * scale, 0)
    grad = grad * (scale / T)[:, None]
    if name in PARTED:
        numbers = [rows(parameter.get(k, default)) for k, default in PARTED[name]]
        at = np.where(counts, target.reshape(-1).numpy(), 0)
        loss, *grad = _parted(name, (x, y), (T, teacher_T), at, *numbers, t_squared)
        scale = counts * (np.longdouble(1) if weight is None else rows(weight))
        loss, grad = np.where(counts, loss * scale, 0), grad[terms_of_gradient] * scale[:, None]
    grad = back(grad, terms_of_gradient) if standardize else grad
    if target is not None and name not in PARTED:
        hard, hard_grad = _hard(s, np.where(counts, target.reshape(-1).numpy(), 0), np.longdouble(label_smoothing))
        scale = counts * (1 if weight is None else rows(weight)) * np.longdouble(hard_weight)
        of_both = [(soft_weight, loss, 1), (hard_weight, hard, scale)]
        loss = sum(np.where(counts, x * (scale if x is hard else soft_weight), 0) for w, x, scale in of_both if w)
        size = np.abs if terms_of_gradient else lambda x: x
        grad = soft_weight * grad + size(hard_grad) * scale[:, None]
    return _reduced(loss, grad, shape, counts, reduction, normalizer)


def _reduced(loss, grad, shape, counts, reduction, normalizer):
    V = shape[-1]
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
