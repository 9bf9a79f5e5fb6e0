"""The relational losses once more, by hand: values and gradients in float64, by differences, without
a Gram matrix where one cancels. Independent of fastkd.reference, like the published code below."""

import torch
import torch.nn.functional as F


def _double(x):
    return x.detach().double().contiguous()


def _huber(e, delta):
    """Values and derivatives."""
    slope = e.clamp(-delta, delta)
    return slope * (e - slope / 2), slope


def _lengths(x):
    """|x_i - x_j| [N, N], at least 1e-6 off the diagonal; and where they have a derivative."""
    squares = x.new_zeros(len(x), len(x))
    for i, row in enumerate(x):
        squares[i] = (x - row).square().sum(1)
    lengths = squares.clamp(min=1e-12).sqrt()
    return lengths.fill_diagonal_(0.0), squares >= 1e-12


def rkd_distance(student, teacher, normalize="mean", delta=1.0):
    x, y = _double(student), _double(teacher)
    N, pairs = len(x), len(x) * (len(x) - 1)
    if N < 2:
        return x.new_zeros(()), torch.zeros_like(x)
    (d, free), (v, _) = _lengths(x), _lengths(y)
    mean = d.sum() / pairs if normalize else x.new_ones(())
    u, v = d / mean, v / (v.sum() / pairs if normalize else 1)
    values, slopes = _huber(u - v, delta)
    slopes = slopes / N**2 / mean  # of the loss with respect to d, the mean held
    if normalize:
        slopes = slopes - (slopes * u).sum() / pairs
    weights = torch.where(free & (d > 0), 2 * slopes / torch.where(d > 0, d, 1.0), 0.0)
    grad = torch.stack([w @ (row - x) for w, row in zip(weights, x, strict=True)])
    return values.sum() / N**2, grad


def _units(x, a):
    """Unit vectors from row a to all rows, 0 where they equal it; and one over their lengths."""
    difference = x - x[a]
    length = difference.norm(dim=1, keepdim=True)
    inverse = torch.where(length == 0, 0.0, 1 / length)
    return difference * inverse, inverse


def rkd_angle(student, teacher, delta=1.0):
    x, y = _double(student), _double(teacher)
    N = len(x)
    total, grad = x.new_zeros(()), torch.zeros_like(x)
    for a in range(N):
        u, inverse = _units(x, a)
        v, _ = _units(y, a)
        e = u @ u.T - v @ v.T
        slopes = e.clamp(-delta, delta)
        total += (slopes * (e - slopes / 2)).sum()
        to_units = 2 * slopes @ u
        to_rows = (to_units - (to_units * u).sum(1, keepdim=True) * u) * inverse
        grad += to_rows
        grad[a] -= to_rows.sum(0)
    return (total / N**3, grad / N**3) if N else (total, grad)


def rkd_loss(student, teacher, distance_weight=25.0, angle_weight=50.0, distance_delta=1.0, angle_delta=1.0):
    by_distance = rkd_distance(student, teacher, delta=distance_delta)
    by_angle = rkd_angle(student, teacher, delta=angle_delta)
    return tuple(distance_weight * d + angle_weight * a for d, a in zip(by_distance, by_angle, strict=True))


def similarity_preserving(student, teacher):
    x, y = _double(student), _double(teacher)
    N = len(x)
    if not N:
        return x.new_zeros(()), torch.zeros_like(x)
    G, H = x @ x.T, y @ y.T
    inverse, teacher_inverse = (torch.where(z == 0, 0.0, 1 / z) for z in (G.norm(dim=1), H.norm(dim=1)))
    s, t = G * inverse[:, None], H * teacher_inverse[:, None]
    difference = s - t
    to_G = (difference - (difference * s).sum(1, keepdim=True) * s) * inverse[:, None] * 2 / N**2
    return difference.square().sum() / N**2, (to_G + to_G.T) @ x


def gram_mse(student, teacher, normalize=True, clamp=None):
    x, y = _double(student), _double(teacher)
    N = len(x)
    if not N:
        return x.new_zeros(()), torch.zeros_like(x)
    lengths = x.norm(dim=1, keepdim=True) if normalize else x.new_ones(N, 1)
    inverse = torch.where(lengths == 0, 0.0, 1 / lengths.clamp(min=1e-12))
    s, t = x * inverse, F.normalize(y, dim=1) if normalize else y
    G, H = s @ s.T, t @ t.T
    free = G > 0 if clamp == "both" else torch.ones_like(G, dtype=torch.bool)
    difference = torch.where(free, G, 0.0) - (H.clamp(min=0) if clamp else H)
    grad = 4 / N**2 * torch.where(free, difference, 0.0) @ s
    if normalize:
        grad = (grad - torch.where(lengths >= 1e-12, (grad * s).sum(1, keepdim=True), 0.0) * s) * inverse
    return difference.square().sum() / N**2, grad


def relation_kl(student, teacher, temperature=1.0, normalize=False):
    x, y = _double(student), _double(teacher)
    N = len(x)
    if N < 2:
        return x.new_zeros(()), torch.zeros_like(x)
    lengths = x.norm(dim=1, keepdim=True) if normalize else x.new_ones(N, 1)
    inverse = torch.where(lengths == 0, 0.0, 1 / lengths.clamp(min=1e-12))
    s, t = x * inverse, F.normalize(y, dim=1) if normalize else y
    scale, teacher_scale = (temperature * (1 if normalize else z.shape[1] ** 0.5) for z in (x, y))
    # relative to their own mean rows keep their digits, and the softmax does not see it
    total, weights = x.new_zeros(()), x.new_zeros(N, N)
    for i in range(N):
        others = [j for j in range(N) if j != i]
        log_p = torch.log_softmax((s - s.mean(0))[others] @ s[i] / scale, 0)
        log_q = torch.log_softmax((t - t.mean(0))[others] @ t[i] / teacher_scale, 0)
        p, q, w = log_p.exp(), log_q.exp(), log_p - log_q
        # differences first where they are small; e^w alone may be beyond float64
        total += torch.where(w < 1, q * (torch.expm1(w.clamp(max=1)) - w), p - q - q * w).sum()
        weights[i, others] = (p - q) / scale / N
    grad = (weights + weights.T) @ s
    if normalize:
        grad = (grad - (grad * s).sum(1, keepdim=True) * s) * inverse
    return total / N, grad


def pkt(student, teacher, weight=None, eps=1e-7):
    x, y = _double(student), _double(teacher)
    N = len(x)
    if not N:
        return x.new_zeros(()), torch.zeros_like(x)
    lengths, teacher_lengths = (z.norm(dim=1, keepdim=True) for z in (x, y))
    shortened = x / (lengths + eps)
    k, h = ((z @ z.T + 1) / 2 for z in (shortened, y / (teacher_lengths + eps)))
    r = k.sum(1, keepdim=True)
    s, t = k / r, h / h.sum(1, keepdim=True)
    rows = x.new_ones(N, 1) if weight is None else weight.double()[:, None]
    # differences first: the loss is of second order in them
    d = s - t
    loss = (rows * (d - t * torch.log1p(d / (t + eps)))).sum() / N**2
    a = (d + eps) / (s + eps)
    to_k = rows / N**2 * (a - (s * a).sum(1, keepdim=True)) / r
    grad = (to_k + to_k.T) / 2 @ shortened
    along = x / lengths.clamp(min=1e-300)
    grad = (grad - (grad * shortened).sum(1, keepdim=True) * along) / (lengths + eps)
    return loss, torch.where(lengths == 0, 0.0, grad)


def nearest(teacher, positives):
    """[N, N]: whether j is among the nearest others of i."""
    y = _double(teacher)
    d = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    return torch.zeros(d.shape, dtype=torch.bool).scatter_(1, d.argsort(1)[:, :positives], True)


def triplets(student, similar, margin=1.0):
    """Loss, gradient and the share of active triplets, row by row; similar: [N, N]."""
    x = _double(student)
    N = len(x)
    total, weights, active, count = x.new_zeros(()), x.new_zeros(N, N), 0, 0
    squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    d = squared.clamp(min=1e-12).sqrt()
    for i in range(N):
        positive = similar[i].nonzero()[:, 0]
        negative = (~similar[i]).nonzero()[:, 0]
        negative = negative[negative != i]
        e = margin + d[i, positive][:, None] - d[i, negative]
        count += e.numel()
        if not e.numel():
            continue
        total += e.clamp(min=0).sum() / len(negative) / N
        active += int((e > 0).sum())
        weights[i, positive] = (e > 0).sum(1).double() / len(negative) / N
        weights[i, negative] = -(e > 0).sum(0).double() / len(negative) / N
    weights = torch.where(d <= 1e-6, 0.0, weights / d)
    weights = weights + weights.T
    grad = torch.stack([w @ (row - x) for w, row in zip(weights, x, strict=True)]) if N else torch.zeros_like(x)
    return total, grad, active / max(count, 1)


def relational_triplet(student, teacher, margin=1.0):
    return triplets(student, nearest(teacher, min(5, max(0, len(teacher) - 2))), margin)[:2]


LOSSES = (rkd_distance, rkd_angle, rkd_loss, similarity_preserving, gram_mse, relation_kl, pkt, relational_triplet)
TRUTH = {f.__name__: f for f in LOSSES}


# As published, in the order of the published code.


def _pdist(e, eps=1e-12):
    squares = e.square().sum(1)
    d = (squares[:, None] + squares[None] - 2 * e @ e.T).clamp(min=eps).sqrt()
    return d * (1 - torch.eye(len(e), dtype=e.dtype))


def _published_distance(student, teacher):
    with torch.no_grad():
        t = _pdist(teacher)
        t = t / t[t > 0].mean()
    d = _pdist(student)
    return F.smooth_l1_loss(d / d[d > 0].mean(), t)


def _published_angles(e):
    unit = F.normalize(e[None] - e[:, None], p=2, dim=2)
    return torch.bmm(unit, unit.transpose(1, 2))


def _published_angle(student, teacher):
    return F.smooth_l1_loss(_published_angles(student), _published_angles(teacher))


def _published_similarity(student, teacher):
    s, t = (F.normalize(e @ e.T, p=2, dim=1) for e in (student, teacher))
    return (s - t).square().sum() / len(s) ** 2


def _published_gram(student, teacher):
    s, t = (F.normalize(e, dim=-1) for e in (student, teacher))
    return F.mse_loss(s @ s.T, t @ t.T)


def _published_relation_kl(student, teacher):
    off = ~torch.eye(len(student), dtype=torch.bool)
    s, t = ((e @ e.T / e.shape[1] ** 0.5)[off].view(len(e), -1) for e in (student, teacher))
    return F.kl_div(F.log_softmax(s, 1), F.softmax(t, 1), reduction="batchmean")


def _published_pkt(student, teacher, eps=1e-7):
    def probabilities(e):
        e = e / (e.square().sum(1, keepdim=True).sqrt() + eps)
        k = (e @ e.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    s, t = probabilities(student), probabilities(teacher)
    return (t * torch.log((t + eps) / (s + eps))).mean()


def _published_triplet(student, teacher):
    """All triplets, in the order of their distances."""
    d, similar = _pdist(student), nearest(teacher, min(5, len(student) - 2))
    rows = []
    for i in range(len(student)):
        negatives = [k for k in range(len(student)) if k != i and not similar[i, k]]
        terms = [F.relu(1 + d[i, j] - d[i, k]) for j in similar[i].nonzero()[:, 0] for k in negatives]
        rows.append(torch.stack(terms).sum() / len(negatives))
    return torch.stack(rows).mean()


PUBLISHED = {
    "rkd_distance": _published_distance,
    "rkd_angle": _published_angle,
    "rkd_loss": lambda s, t: 25 * _published_distance(s, t) + 50 * _published_angle(s, t),
    "similarity_preserving": _published_similarity,
    "gram_mse": _published_gram,
    "relation_kl": _published_relation_kl,
    "pkt": _published_pkt,
    "relational_triplet": _published_triplet,
}


def published(name, student, teacher, **options):
    """Loss and gradient of the published code, in float64."""
    x, y = _double(student).requires_grad_(), _double(teacher)
    loss = PUBLISHED[name](x, y, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]
