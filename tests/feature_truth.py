"""The feature losses in float64, from their definitions, apart from the reference."""

import torch


def rows_of(name, s, t):
    """The losses of rows whose features are last."""
    function, *options = name.split("-")
    if "standardize" in options:
        s, t = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() for x in (s, t))
    if "l2" in options or function == "feature_cosine":
        s, t = (unit(x) for x in (s, t))
    if function == "feature_smooth_l1":
        beta = float(options[-1]) if options else 1.0
        return torch.nn.functional.smooth_l1_loss(s, t, beta=beta, reduction="none").sum(-1)
    return (s - t).square().sum(-1) / (2 if function == "feature_cosine" else 1)


def unit(x):
    squares = x.square().sum(-1, keepdim=True)
    length = torch.where(squares == 0, 1.0, squares).sqrt()
    return torch.where(squares == 0, 0.0, x / length.clamp(min=1e-12))


def truth(name, student, teacher, upstream=None, reduction="mean", mask=None, weight=None):
    """Loss and gradient."""
    dim = 1 if student.dim() == 4 else -1
    x = student.detach().double().requires_grad_()
    s, t = (y.movedim(dim, -1) for y in (x, teacher.double()))
    if mask is not None:
        s, t = (torch.where(mask[..., None], y, 0.0) for y in (s, t))
    rows = rows_of(name, s, t)
    if weight is not None:
        rows = rows * weight.double()
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    valid = max(rows.numel() if mask is None else int(mask.sum()), 1)
    D = 1 if name == "feature_cosine" else s.shape[-1]
    loss = {"none": rows, "sum": rows.sum(), "batchmean": rows.sum() / valid, "mean": rows.sum() / valid / D}[reduction]
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream.double())
    return loss.detach(), grad
