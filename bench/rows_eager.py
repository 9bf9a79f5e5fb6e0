"""The logit losses as people write them in PyTorch, beside which fastkd's are measured."""

import functools
import math

import torch
import torch.nn.functional as F

TEMPERATURE = 2.0
PARTS = "kd_loss parts"
STANDARDIZED = "kl_div standardized"


def logarithms(student, teacher):
    return F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)


def eager(student, teacher):
    """As most training scripts have it."""
    log_p, q = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2


def eager_log_target(student, teacher):
    """The same with the teacher's logarithms, which is often faster."""
    log_p, log_q = logarithms(student, teacher)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_soft_cross_entropy(student, teacher):
    return F.cross_entropy(student / TEMPERATURE, F.softmax(teacher / TEMPERATURE, -1)) * TEMPERATURE**2


def eager_reverse(student, teacher):
    log_p, log_q = logarithms(student, teacher)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_jensen_shannon(student, teacher):
    log_p, log_q = logarithms(student, teacher)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = (F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_q, log_p))
    return sum(divergences) / 2 * TEMPERATURE**2


def eager_symmetric(student, teacher):
    log_p, log_q = logarithms(student, teacher)
    both = ((log_p, log_q), (log_q, log_p))
    return sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in both) / 2 * TEMPERATURE**2


def eager_adaptive(student, teacher, mu=0.5):
    log_p, log_q = logarithms(student, teacher)
    with torch.no_grad():
        difference, (q, order) = (log_p.exp() - log_q.exp()).abs(), log_q.exp().sort(-1, descending=True)
        in_head = q.cumsum(-1) <= mu
        in_head[:, 0] = True
        head = torch.where(in_head, difference.gather(-1, order), 0.0).sum(-1) / difference.sum(-1)
    forward, reverse = (
        F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b in ((log_p, log_q), (log_q, log_p))
    )
    return (head * forward + (1 - head) * reverse).mean() * TEMPERATURE**2


def eager_skew(student, teacher, own=1):
    sides = logarithms(student, teacher)
    log_m = torch.logaddexp(sides[own] + math.log(0.1), sides[1 - own] + math.log(0.9))
    return F.kl_div(log_m, sides[own], reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_skew_reverse(student, teacher):
    return eager_skew(student, teacher, own=0)


def eager_total_variation(student, teacher):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return (p - q).abs().sum(-1).mean() / 2 * TEMPERATURE**2


def eager_acceptance(student, teacher):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return -torch.minimum(p, q).sum(-1).log().mean() * TEMPERATURE**2


def eager_alpha_beta(student, teacher, alpha=0.2, beta=0.7):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    both, total = q**alpha * p**beta, alpha + beta
    rows = (both - alpha / total * q**total - beta / total * p**total).sum(-1)
    return -rows.mean() / (alpha * beta) * TEMPERATURE**2


def eager_bernoulli(student, teacher):
    """Cross-entropy less the teacher's entropy."""
    q = torch.sigmoid(teacher / TEMPERATURE)
    both, own = (F.binary_cross_entropy_with_logits(x / TEMPERATURE, q, reduction="sum") for x in (student, teacher))
    return (both - own) / len(student) * TEMPERATURE**2


@functools.cache
def targets(N, V, device):
    """A class for each row, always the same."""
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(V)).to(device)


def eager_with_targets(student, teacher, labels=None):
    hard = F.cross_entropy(student, targets(*student.shape, student.device) if labels is None else labels)
    return 0.5 * hard + 0.5 * eager_log_target(student, teacher)


def eager_with_parts(student, teacher):
    """What people log beside it: both entropies, and how often the best class is the same."""
    with torch.no_grad():
        for logits in (student, teacher):
            log_p = F.log_softmax(logits / TEMPERATURE, -1)
            (log_p.exp() * log_p).sum(-1).mean()
        (student.argmax(-1) == teacher.argmax(-1)).float().mean()
    return eager_with_targets(student, teacher)


def eager_decoupled(student, teacher):
    """As published code has it: two masks, two classes of their sums, and 1000 less for the target."""
    index = targets(*student.shape, student.device)[:, None]
    of_target = torch.zeros_like(student).scatter_(1, index, 1).bool()
    p, q = (
        torch.cat([(x * of_target).sum(1, keepdim=True), (x * ~of_target).sum(1, keepdim=True)], 1)
        for x in (F.softmax(logits / TEMPERATURE, 1) for logits in (student, teacher))
    )
    log_others, others = (x / TEMPERATURE - 1000.0 * of_target for x in (student, teacher))
    log_others, others = F.log_softmax(log_others, 1), F.softmax(others, 1)
    target_class = F.kl_div(p.log(), q, reduction="batchmean")
    other_classes = F.kl_div(log_others, others, reduction="batchmean")
    return (1.0 * target_class + 8.0 * other_classes) * TEMPERATURE**2


def eager_normalized(student, teacher):
    """As published code has it: the other classes are copied out of the logits."""
    index = targets(*student.shape, student.device)[:, None]
    log_p, q = F.log_softmax(student, 1).gather(1, index), F.softmax(teacher, 1).gather(1, index)
    others = torch.ones_like(student).scatter_(1, index, 0).bool()
    s, t = (x[others].reshape(len(x), -1) / TEMPERATURE for x in (student, teacher))
    other_classes = (F.softmax(t, 1) * F.log_softmax(s, 1)).sum(1).mean()
    return -(q * log_p).mean() - 1.5 * TEMPERATURE**2 * other_classes


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)


def eager_standardized(student, teacher):
    return eager_log_target(standardized(student), standardized(teacher))


def correlation(x, y, eps=1e-8):
    """As published: cosines of rows less their means."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + eps)


def eager_dist(student, teacher):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    inter, intra = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
    return TEMPERATURE**2 * (inter + intra)


EAGER = {  # the last one is compiled
    "kd_loss": {"eager": eager_with_targets},
    PARTS: {"eager": eager_with_parts},
    "dkd_loss": {"eager": eager_decoupled},
    "nkd_loss": {"eager": eager_normalized},
    "dist_loss": {"eager": eager_dist},
    "kl_div": {"eager": eager, "eager log_target": eager_log_target},
    "soft_cross_entropy": {"eager": eager_soft_cross_entropy},
    "reverse_kl_div": {"eager": eager_reverse},
    "js_div": {"eager": eager_jensen_shannon},
    "symmetric_kl_div": {"eager": eager_symmetric},
    "skew_kl_div": {"eager": eager_skew},
    "skew_reverse_kl_div": {"eager": eager_skew_reverse},
    "total_variation": {"eager": eager_total_variation},
    "negative_log_acceptance": {"eager": eager_acceptance},
    "alpha_beta_div": {"eager": eager_alpha_beta},
    "bernoulli_kl_div": {"eager": eager_bernoulli},
    STANDARDIZED: {"eager": eager_standardized},
    "adaptive_kl_div": {"eager": eager_adaptive},
}
