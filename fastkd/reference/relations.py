"""The losses of relations in plain PyTorch, which hold matrices of all pairs."""

import torch

from .. import _transforms
from .._check import LogitsOptions
from .._dtypes import compute_dtype
from ._shared import _divided, _largest, _number, _of_length_one, ordinary
from .logits import logits_loss


def _embeddings(student, teacher):
    dtype = compute_dtype(student, teacher)
    return student.to(dtype), ordinary(teacher).detach().to(dtype)


def _rows_there(student, teacher, mask, weight):
    """Without those that are masked: how many are left has to be known here."""
    weight = None if weight is None else ordinary(weight).to(student.dtype)
    if mask is None:
        return student, teacher, weight
    mask = ordinary(mask)
    return student[mask], teacher[mask], None if weight is None else weight[mask]


def _distances(x, normalize):
    """[N, N], by differences. Off the diagonal at least 1e-6, where there is no gradient."""
    _transforms.refuse_forward_mode("student", x)
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").clamp(min=1e-6)
    d = d.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    pairs = len(x) * (len(x) - 1)
    return d / (d.sum() / pairs) if normalize and pairs else d


def rkd_distance(
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool,
    delta: float,
    mask: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t, weight = _rows_there(*_embeddings(student, teacher), mask, weight)
    if len(s) < 2:
        return (s * 0).sum()
    d, e = _distances(s, normalize), _distances(t, normalize)
    losses = _huber(d, e, delta)
    return (losses if weight is None else losses * weight[:, None]).mean()


def _huber(x, y, delta):
    delta, distance = _number(delta, x), (x - y).abs()
    return torch.where(distance < delta, distance * distance / 2, delta * (distance - delta / 2))


def _cosines(x):
    """[N, N, N]: of the angle at a between i and k, 0 where a is i or k, or equals them."""
    difference = x[:, None] - x[None]
    squares = difference.square().sum(-1, keepdim=True)
    length = torch.where(squares == 0, 1.0, squares).sqrt()  # what is not differentiated must stay finite
    unit = torch.where(squares == 0, 0.0, difference / length)
    return unit @ unit.transpose(1, 2)


def rkd_angle(
    student: torch.Tensor, teacher: torch.Tensor, delta: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Holds [N, N, D] and [N, N, N]."""
    s, t, _ = _rows_there(*_embeddings(student, teacher), mask, None)
    if len(s) < 2:
        return (s * 0).sum()
    return _huber(_cosines(s), _cosines(t), delta).mean()


def rkd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    angle_weight: float,
    angle_delta: float,
    distance_weight: float,
    distance_delta: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    # here, or gradients would be added up in half precision
    s, t, _ = _rows_there(*_embeddings(student, teacher), mask, None)
    loss = (s * 0).sum()
    if angle_weight:
        loss = loss + _number(angle_weight, loss) * rkd_angle(s, t, angle_delta)
    if distance_weight:
        loss = loss + _number(distance_weight, loss) * rkd_distance(s, t, True, distance_delta)
    return loss


def _unit(x):
    """Rows to length 1; a row of zeros stays, and has no gradient."""
    squares = x.square().sum(1, keepdim=True)
    return torch.where(squares == 0, 0.0, x / torch.where(squares == 0, 1.0, squares).sqrt())


def similarity_preserving(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t, weight = _rows_there(*_embeddings(student, teacher), mask, weight)
    rows = (_unit(s @ s.T) - _unit(t @ t.T)).square().sum(1)
    return (rows if weight is None else rows * weight).sum() / max(len(s), 1) ** 2


def gram_mse(
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool,
    clamp: str | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t = _embeddings(student, teacher)
    shape = student.shape[:-1] if student.dim() == 3 else (1, len(student))
    mask = torch.ones(shape, dtype=torch.bool, device=s.device) if mask is None else ordinary(mask).view(shape)
    s, t = (torch.where(mask[..., None], x.reshape(*shape, x.shape[-1]), 0.0) for x in (s, t))  # it may hold NaN
    if normalize:
        s, t = _of_length_one(s), _of_length_one(t)
    G, H = s @ s.mT, t @ t.mT
    G = G.clamp(min=0) if clamp == "both" else G
    H = H.clamp(min=0) if clamp else H
    rows = mask.sum(1)
    squares = (G - H).square().sum(2)
    if weight is not None:
        squares = squares * torch.where(mask, ordinary(weight).view(shape).to(s.dtype), 0.0)
    squares = squares.sum(1) / rows.clamp(min=1).to(s.dtype) ** 2
    return squares.sum() / (rows > 0).sum().clamp(min=1)


def pkt(
    student: torch.Tensor, teacher: torch.Tensor, eps: float, mask: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    """Holds matrices [N, N]."""
    s, t = _embeddings(student, teacher)
    valid = s.new_ones(len(s)) if mask is None else ordinary(mask).to(s.dtype)
    if mask is not None:  # a masked row may hold anything
        s, t = (torch.where(valid[:, None] > 0, x, 0.0) for x in (s, t))
    if len(s) < 2:
        return (s * 0).sum()

    def probabilities(x):
        largest = _largest(x, -1)
        x = _divided(x / largest, lambda length: length + eps / largest)
        k = (x @ x.T + valid[:, None] * valid) / 2
        k = k + (k.clamp(min=0) - k).detach()  # of opposite directions rounding may leave less
        return k / torch.where(valid[:, None] > 0, k.sum(1, keepdim=True), 1.0)

    s, t = probabilities(s), probabilities(t)
    # the first-order term adds up to 0; with it small differences of s and t keep their digits
    grown = (s - t) / (t + eps)
    near = torch.log1p(grown.clamp(min=-0.5))
    terms = (s - t) - t * torch.where(grown > -0.5, near, torch.log((s + eps) / (t + eps)))
    rows = terms.sum(1) if weight is None else terms.sum(1) * torch.where(valid > 0, ordinary(weight).to(s.dtype), 0.0)
    return rows.sum() / valid.sum().clamp(min=1) ** 2


def positives_of(positives: int, N: int) -> int:
    """How many neighbours are positives; 0: the default of batches of N."""
    return positives or max(0, min(5, N - 2))


def relational_triplet(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None,
    positives: int,
    margin: float,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds [N, N, N]."""
    s = student.to(compute_dtype(*(x for x in (student, teacher) if x is not None)))
    N, device = len(s), s.device
    valid = torch.ones(N, dtype=torch.bool, device=device) if mask is None else ordinary(mask)
    s = torch.where(valid[:, None], s, 0.0)
    others = valid[:, None] & valid & ~torch.eye(N, dtype=torch.bool, device=device)
    if labels is not None:
        similar = others & (ordinary(labels)[:, None] == ordinary(labels))
    else:
        t = torch.where(valid[:, None], ordinary(teacher).detach().to(compute_dtype(teacher)), 0.0)
        if N:  # a power of two brings squares into range and changes no digit
            t = t * torch.exp2(-_largest(t, (0, 1)).nan_to_num(1.0, 1.0).log2().floor().clamp(min=-126))
        between = torch.cdist(t, t, compute_mode="donot_use_mm_for_euclid_dist").masked_fill(~others, torch.inf)
        nearest = between.topk(min(positives_of(positives, N), N), largest=False).indices
        similar = torch.zeros_like(others).scatter_(1, nearest, torch.ones_like(nearest, dtype=torch.bool)) & others
        s = s + (0 * t.sum()).to(s.dtype)  # a NaN has no neighbours
    different = others & ~similar
    d = _distances(s, False)
    triplets = similar[:, :, None] & different[:, None, :]
    e = torch.where(triplets, margin + d[:, :, None] - d[:, None, :], 0.0).relu()
    rows = e.sum((1, 2)) / different.sum(1).clamp(min=1)
    if weight is not None:
        rows = rows * torch.where(valid, ordinary(weight).to(s.dtype), 0.0)
    share = (e > 0).sum() / triplets.sum().clamp(min=1)
    return rows.sum() / valid.sum().clamp(min=1), share.float().detach()


def relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    exclude_self: bool,
    normalize: bool,
    divergence: str,
    parameter: torch.Tensor | float,
    temperature: torch.Tensor | float,
    teacher_temperature: torch.Tensor | float,
    mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """Holds [*, N, M]."""
    dtype = compute_dtype(student, teacher, student_keys, teacher_keys)
    rows = student.shape[:-1]
    mask, weight = (None if x is None else ordinary(x).expand(rows) for x in (mask, weight))
    if key_mask is None and student_keys is None:
        key_mask = mask
    elif key_mask is not None:
        key_mask = ordinary(key_mask).expand(rows if student_keys is None else student_keys.shape[:-1])

    def similarities(x, keys):
        keys = x if keys is None else keys
        x, keys = (
            z if here is None else torch.where(here[..., None], z, 0.0)  # it may hold NaN
            for z, here in ((x.to(dtype), mask), (keys.to(dtype), key_mask))
        )
        if normalize:
            x, keys = _of_length_one(x), _of_length_one(keys)
        # what is added to a row does not count; digits of what is far from the origin do
        found = keys.new_ones(keys.shape[:-1]) if key_mask is None else key_mask.to(dtype)
        mean = (keys * found[..., None]).sum(-2, keepdim=True) / found.sum(-1).clamp(min=1)[..., None, None]
        s = x @ (keys - mean).mT * (1.0 if normalize else x.shape[-1] ** -0.5)
        if exclude_self:
            s = s.masked_fill(torch.eye(s.shape[-1], dtype=torch.bool, device=s.device), -torch.inf)
        return s if key_mask is None else s.masked_fill(~key_mask[..., None, :], -torch.inf)

    if rows.numel() == 0 or (student_keys is not None and student_keys.shape[-2] == 0):
        return (student.to(dtype) * 0).sum() + (0 if student_keys is None else (student_keys.to(dtype) * 0).sum())
    s = similarities(student, student_keys)
    t = similarities(*(x if x is None else ordinary(x).detach() for x in (teacher, teacher_keys)))
    options = LogitsOptions(
        temperature, teacher_temperature, False, mask, weight, "batchmean", None, False, parameter
    )  # fmt: skip
    return logits_loss(divergence, s, t, options)
