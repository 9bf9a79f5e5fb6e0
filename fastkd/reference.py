"""The losses in plain PyTorch, to be read: the truth for tests and benches, and the fallback.

In float64 these are what every kernel is measured against.
"""

import torch

from ._inplace import overwritten


def compute_dtype(student, teacher):
    """float64 where an input is float64, else float32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _log_softmax(logits, temperature):
    nothing = (logits == -torch.inf).all(-1, keepdim=True)  # a row without any possible class
    log_p = torch.log_softmax(logits.masked_fill(nothing, 0.0) / temperature, -1)
    return log_p.masked_fill(nothing, -torch.inf)


def _kl_div(log_p, log_q):
    """sum q (log q - log p) = sum q (e^w - 1 - w) with w = log p - log q: nothing cancels."""
    p, q = log_p.exp(), log_q.exp()
    w = torch.where(q == 0, 0.0, log_p - log_q)
    near = w.clamp(-1, 1)  # what is not chosen below must stay finite, or its gradient is NaN
    terms = torch.where(w.abs() < 1, q * (torch.expm1(near) - near), p - q - q * w)
    terms = torch.where(q == 0, p, terms)  # the p of classes without q complete the sum to 1
    return torch.where((q == 0).all(-1), 0.0, terms.sum(-1))


DIVERGENCES = {"kl_div": _kl_div}


def _reduce(rows, classes, mask, reduction, normalizer):
    if reduction == "none":
        return rows
    valid = rows.numel() if mask is None else mask.sum()
    total = rows.sum()
    if normalizer is not None:
        if isinstance(normalizer, torch.Tensor):
            normalizer = normalizer.to(total.dtype).reshape(())
        return torch.where(torch.as_tensor(valid, device=total.device) > 0, total / normalizer, 0.0)
    if reduction == "sum":
        return total
    rows_that_count = max(valid, 1) if mask is None else valid.clamp(min=1)
    return total / rows_that_count / (classes if reduction == "mean" else 1)


def _ordinary(x):
    """Autograd refuses to watch over tensors that were made in inference mode."""
    if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and x.is_inference():
        return x.clone()
    return x


def logits_loss(divergence, student, teacher, options):
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    dtype = compute_dtype(student, teacher)
    options = options._replace(**{name: _ordinary(x) for name, x in options._asdict().items()})
    s, t = student.to(dtype), _ordinary(teacher).detach().to(dtype)
    if options.inplace and student.requires_grad and torch.is_grad_enabled():
        s = s.clone() if s is student else s
        overwritten(student)

    def per_row(x):  # [*, 1] beside the classes
        return x.to(dtype).expand(student.shape[:-1])[..., None] if isinstance(x, torch.Tensor) else x

    mask, temperature = options.mask, per_row(options.temperature)
    if mask is not None:  # before anything is computed: a masked row may hold NaN
        s = torch.where(mask[..., None], s, 0.0)
        t = torch.where(mask[..., None], t, 0.0)
    log_p, log_q = _log_softmax(s, temperature), _log_softmax(t, per_row(options.teacher_temperature))
    rows = DIVERGENCES[divergence](log_p, log_q)
    if options.t_squared:
        rows = rows * (temperature.squeeze(-1) if isinstance(temperature, torch.Tensor) else temperature) ** 2
    if options.weight is not None:
        rows = rows * options.weight.to(dtype)
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    return _reduce(rows, student.shape[-1], mask, options.reduction, options.normalizer)
