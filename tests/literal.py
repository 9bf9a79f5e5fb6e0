"""Divergences as they are defined, term by term in float64: nothing is assumed of what p and q sum to."""

import torch


def times(x, log):
    """0 log 0 is 0."""
    return torch.where(x == 0, 0.0, x * torch.where(x == 0, 0.0, log))


def alpha_beta(p, q, lp, lq, a=0.2, b=0.7):
    return -(times(q**a, p**b) - a / (a + b) * q ** (a + b) - b / (a + b) * p ** (a + b)) / (a * b)


def js(p, q, lp, lq, beta=0.5):
    m = beta * q + (1 - beta) * p
    lm = torch.where(m == 0, 1.0, m).log()
    return beta * times(q, lq - lm) + (1 - beta) * times(p, lp - lm)


def skew(own, other, l_own, alpha):
    m = alpha * own + (1 - alpha) * other
    return times(own, l_own - torch.where(m == 0, 1.0, m).log())


TERMS = {
    "kl_div": lambda p, q, lp, lq: times(q, lq - lp),
    "soft_cross_entropy": lambda p, q, lp, lq: -times(q, lp),
    "reverse_kl_div": lambda p, q, lp, lq: times(p, lp - lq),
    "js_div": js,
    "symmetric_kl_div": lambda p, q, lp, lq, student_weight=0.5: (
        (1 - student_weight) * times(q, lq - lp) + student_weight * times(p, lp - lq)
    ),
    "skew_kl_div": lambda p, q, lp, lq, alpha=0.1: skew(q, p, lq, alpha),
    "skew_reverse_kl_div": lambda p, q, lp, lq, alpha=0.1: skew(p, q, lp, alpha),
    "total_variation": lambda p, q, lp, lq: (p - q).abs() / 2,
    "alpha_beta_div": lambda p, q, lp, lq, alpha=0.2, beta=0.7: alpha_beta(p, q, lp, lq, alpha, beta),
}


def acceptance(p, q, lp, lq):
    return -torch.minimum(p, q).sum(-1).log()


def adaptive(p, q, lp, lq, mu=0.5):
    """The head: all classes above the threshold, which is the smallest that keeps their sum at most mu."""
    weights = []
    for a, b in zip(p.detach().flatten(0, -2), q.flatten(0, -2), strict=True):
        head = b == b.max()
        for threshold in b.unique():
            if b[b >= threshold].sum() <= mu:
                head |= b >= threshold
                break
        gaps = (a - b).abs()
        weights.append(gaps[head].sum() / gaps.sum() if gaps.sum() > 0 else torch.tensor(0.5))
    g = torch.stack(weights).to(p.dtype).view(p.shape[:-1])
    return g * TERMS["kl_div"](p, q, lp, lq).sum(-1) + (1 - g) * TERMS["reverse_kl_div"](p, q, lp, lq).sum(-1)


ROWS = {name: lambda *of, name=name, **own: TERMS[name](*of, **own).sum(-1) for name in TERMS}
ROWS |= {"negative_log_acceptance": acceptance, "adaptive_kl_div": adaptive}
