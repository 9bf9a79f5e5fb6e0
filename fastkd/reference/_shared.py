"""What losses of several families are made of, in plain PyTorch: numbers, the reduction, and rows over their length."""

from typing import Any

import torch


def ordinary(x: Any) -> Any:
    """Autograd refuses to watch over tensors that were made in inference mode."""
    if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and x.is_inference():
        return x.clone()
    return x


def _number(number: Any, like: torch.Tensor) -> Any:
    """Under torch.compile as a tensor: a graph has its numbers built in, and this one may change."""
    if isinstance(number, torch.Tensor) or not torch.compiler.is_compiling():
        return number
    return like.new_ones(()) * number


def gradient_dtype(student: torch.Tensor) -> torch.dtype:
    """A gradient in float16 would underflow, or leave the range, before a loss scaler multiplies it."""
    return torch.float32 if student.dtype is torch.float16 else student.dtype


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


def _divided(x, by):
    """Rows over what by makes of their length; a row of zeros has no gradient."""
    squares = x.square().sum(-1, keepdim=True)  # which loses fewer digits of long rows than vector_norm
    nothing = squares == 0
    length = torch.where(nothing, 1.0, squares).sqrt()  # what is not chosen below must stay differentiable
    return torch.where(nothing, 0.0, x / by(length))


def _largest(x, dim):
    """The largest elements, 1 in place of 0. What is divided by them has squares in float32's range."""
    largest = x.detach().abs().amax(dim, keepdim=True)
    return torch.where(largest == 0, 1.0, largest)


def _of_length_one(x):
    """Rows over their length, of at least 1e-12; a row of zeros has no gradient."""
    largest = _largest(x, -1)
    return _divided(x / largest, lambda length: torch.maximum(length, 1e-12 / largest))
