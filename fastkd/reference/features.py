"""The losses of features in plain PyTorch."""

import torch

from .._dtypes import compute_dtype
from ._shared import _divided, _largest, _number, _of_length_one, _reduce, ordinary


def _standardized(x):
    """Rows less their mean, over sqrt(variance + 1e-6)."""
    centred = x - x[..., :1].detach()  # of equal values the mean is exact
    unit = _largest(centred, -1).clamp(min=1)
    centred = centred / unit
    centred = centred - centred.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + (1e-3 / unit).square()).sqrt()


_FEATURES = {"plain": lambda x: x, "l2": _of_length_one, "standardize": _standardized, "cosine": _of_length_one}


def _smooth_l1(e, beta):
    """As F.smooth_l1_loss, elementwise, but for numbers that torch.compile would build into the graph."""
    whole = e.new_ones(()) * beta  # inf, where it is beyond the range
    whole = torch.where(whole >= 0, whole, torch.nan)  # compiled, it was not checked
    beta = whole.clamp(max=torch.finfo(e.dtype).max)
    sign = torch.where(e.isnan(), e, e.sign()).detach()  # of NaN, torch's is 0
    inside = e.abs() < beta
    near = torch.where(inside, e, 0.0)  # what is not chosen below must stay differentiable
    return torch.where(inside, near * (near / torch.where(whole == 0, 1.0, whole)) / 2, e * sign - beta / 2)


def _feature_layer(feature, student, teacher, dim, mask, weight, dtype, beta):
    """The losses of a layer's rows [*]."""
    s, t = (x.movedim(dim, -1).to(dtype) for x in (student, ordinary(teacher).detach()))
    if mask is not None:  # before anything is computed: a masked row may hold NaN
        s, t = (torch.where(ordinary(mask)[..., None], x, 0.0) for x in (s, t))
    difference = _FEATURES[feature](s) - _FEATURES[feature](t)
    rows = (difference.square() if beta is None else _smooth_l1(difference, beta)).sum(-1)
    if feature == "cosine":
        rows = rows / 2
    return rows if weight is None else rows * ordinary(weight).to(dtype)


def feature_loss(
    feature: str,
    students: list[torch.Tensor],
    teachers: list[torch.Tensor],
    dims: list[int],
    masks: list[torch.Tensor],
    weights: list[torch.Tensor],
    reduction: str,
    layer_weights: list[float],
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and layers; the arguments have been checked."""
    dtype = compute_dtype(*students, *teachers)
    losses = []
    for layer, (student, teacher, dim) in enumerate(zip(students, teachers, dims, strict=True)):
        mask, weight = (x[layer] if x else None for x in (masks, weights))
        rows = _feature_layer(feature, student, teacher, dim, mask, weight, dtype, beta)
        D = 1 if feature == "cosine" else student.shape[dim]
        losses.append(rows if reduction == "none" else _reduce(rows, D, mask, reduction, None))
    # tensors: a number times a tensor without dimensions has a forward derivative in float64
    numbers = [losses[0].new_ones(()) * weight for weight in layer_weights]
    if reduction == "none":
        weighted = [number * rows.reshape(-1) for number, rows in zip(numbers, losses, strict=True)]
        return torch.cat(weighted), torch.stack([rows.detach().sum() for rows in losses])
    layers = torch.stack(losses)
    return (layers * torch.stack(numbers)).sum(), layers.detach()


def attention_transfer(student: torch.Tensor, teacher: torch.Tensor, p: float) -> torch.Tensor:
    dtype = compute_dtype(student, teacher)
    s, t = (x.to(dtype) for x in (student, ordinary(teacher).detach()))
    if not s.shape[0] * s.shape[2] * s.shape[3]:
        return (s * 0).sum()
    p = _number(p, s)

    def attention(x):
        largest = _largest(x, (1, 2, 3))
        x = (x / largest).abs().pow(p).mean(1).flatten(1)
        shortest = (1e-12 ** (1 / p) / largest).pow(p).flatten(1)
        return _divided(x, lambda length: torch.maximum(length, shortest))

    return (attention(s) - attention(t)).square().mean()


def linear_feature_loss(
    feature: str,
    student: torch.Tensor,
    projector_weight: torch.Tensor,
    projector_bias: torch.Tensor | None,
    teacher: torch.Tensor,
    dim: int,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    projector_weight, projector_bias = ordinary(projector_weight), ordinary(projector_bias)
    projected = torch.nn.functional.linear(student.movedim(dim, -1), projector_weight, projector_bias)
    masks, weights = ([] if x is None else [x] for x in (mask, weight))
    teacher, dims = teacher.movedim(dim, -1), [student.dim() - 1]
    return feature_loss(feature, [projected], [teacher], dims, masks, weights, reduction, [1.0])[0]
