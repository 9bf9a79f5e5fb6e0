"""How far a provider's loss and gradient are from the formulas in float64, at the size that is timed.

Whatever the size: rows (of angles: vertices) are taken in blocks, which hold BLOCK numbers at a time.
"""

import torch
import torch.nn.functional as F

BLOCK = 2**24
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def _others(x, rows):
    """False where a row meets itself, ``[rows, N]``."""
    N = x.shape[-2]
    return torch.arange(N, device=x.device)[rows, None] != torch.arange(N, device=x.device)


def _distances(x, rows):
    squares = x.square().sum(1)
    d = (squares[rows, None] + squares - 2 * x[rows] @ x.T).clamp(min=1e-12).sqrt()
    return d * _others(x, rows)


def _similarity_preserving(x, y, rows):
    s, t = (F.normalize(v[rows] @ v.T, dim=1) for v in (x, y))
    return (s - t).square().sum() / len(x) ** 2


def _gram_mse(x, y, rows):
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    return (x[..., rows, :] @ x.mT - y[..., rows, :] @ y.mT).square().sum() / (x[..., 0].numel() * x.shape[-2])


def _relation_kl(x, y, rows):
    def logarithms(v):
        s = v[..., rows, :] @ v.mT / v.shape[-1] ** 0.5
        return F.log_softmax(s.masked_fill(~_others(v, rows), -1e300), -1)

    log_p, log_q = logarithms(x), logarithms(y)
    return (log_q.exp() * (log_q - log_p)).sum() / x[..., 0].numel()


def _pkt(x, y, rows, eps=1e-7):
    def probabilities(v):
        v = v / (v.norm(dim=1, keepdim=True) + eps)
        k = (v[rows] @ v.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    t = probabilities(y)
    return (t * torch.log((t + eps) / (probabilities(x) + eps))).sum() / len(x) ** 2


def _relational_triplet(x, rows, labels):
    """By ranks: a positive at d has a loss with every negative nearer than d + 1. Classes are equally large."""
    d, alike, other = _distances(x, rows), labels[rows, None] == labels, _others(x, rows)
    hinge = d[alike & other].view(len(d), -1) + 1
    negatives = d[~alike].view(len(d), -1).sort(1).values
    nearer = torch.searchsorted(negatives.detach(), hinge.detach())
    sums = F.pad(negatives.cumsum(1), (1, 0))  # of the nearest ones
    return (hinge * nearer - sums.gather(1, nearer)).sum() / (negatives.shape[1] * len(x))


def _rkd_angle(x, y, vertices):
    def cosines(v):  # [vertices, N, N]
        unit = F.normalize(v[None] - v[vertices, None], dim=2)
        return unit @ unit.mT

    with torch.no_grad():
        t = cosines(y)
    return F.smooth_l1_loss(cosines(x), t, reduction="sum") / len(x) ** 3


ROWS = {
    "similarity_preserving": _similarity_preserving,
    "gram_mse": _gram_mse,
    "relation_kl": _relation_kl,
    "pkt": _pkt,
}


def _added(parts, weight):
    """The sum of losses that are made one by one, each with its gradient."""
    total = 0.0
    for part in parts:
        loss = weight * part
        loss.backward()
        total += loss.item()
    return total


def _rkd_distance(x, y, blocks, weight):
    """The mean distance depends on all rows: its gradient comes last, by rows again."""
    pairs = len(x) * (len(x) - 1)
    with torch.no_grad():
        mean, teachers = (sum(_distances(v, rows).sum() for rows in blocks) / pairs for v in (x, y))
    mean.requires_grad_()

    def part(rows):
        s, t = _distances(x, rows) / mean, _distances(y, rows) / teachers
        return F.smooth_l1_loss(s, t, reduction="sum") / len(x) ** 2

    loss = _added(map(part, blocks), weight)
    _added((_distances(x, rows).sum() / pairs * mean.grad for rows in blocks), 1.0)
    return loss


class Truth:
    """The loss and the gradient of a relational loss, from embeddings ``[*, N, D]``."""

    def __init__(self, name, student, teacher, labels=None, dtype=torch.float64):
        x, y = student.detach().to(dtype).requires_grad_(), teacher.to(dtype)
        self.loss = sum(
            self._of(term, weight, x, y, labels)
            for term, weight in {"rkd_loss": {"rkd_distance": 25, "rkd_angle": 50}}.get(name, {name: 1}).items()
        )
        self.grad = x.grad

    @staticmethod
    def _of(name, weight, x, y, labels):
        N = x.shape[-2]
        held = max(N, x.shape[-1]) * N if name == "rkd_angle" else x[..., 0].numel()
        step = max(BLOCK // held, 1)
        blocks = [slice(start, start + step) for start in range(0, N, step)]
        if name == "rkd_distance":
            return _rkd_distance(x, y, blocks, weight)
        if name == "rkd_angle":
            return _added((_rkd_angle(x, y, rows) for rows in blocks), weight)
        if name == "relational_triplet":
            return _added((_relational_triplet(x, rows, labels) for rows in blocks), weight)
        return _added((ROWS[name](x, y, rows) for rows in blocks), weight)

    def errors(self, loss, grad):
        difference = grad.double() - self.grad
        return {
            "loss_error": abs(float(loss) - self.loss) / abs(self.loss),
            "gradient_error": (difference.norm() / self.grad.norm()).item(),
        }


def wrong(errors, dtype, plain=0.0):
    """Whether errors are beyond what a kernel may have: of a loss that has a kink, twice what the error of the
    gradient is in plain PyTorch of float32."""
    tolerance = max(GRADIENT_TOLERANCE[dtype], 2 * plain)
    loss_tolerance = LOSS_TOLERANCE if dtype is torch.float32 else tolerance
    return not (errors["loss_error"] <= loss_tolerance and errors["gradient_error"] <= tolerance)
