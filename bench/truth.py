"""How far a provider's loss and gradient are from the reference in float64, at the size that is timed."""

import contextlib
import functools

import torch

import fastkd
from fastkd import functional

ELEMENTS = 2**23  # held in float64 at a time, and of the gradient compared
# ||out - ref|| / ||ref||: float32 sums for the loss, one rounding of the stored type for the gradient
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


def function_of(name):
    """A loss by its name, perhaps of standardized logits, or with its parts."""
    name, _, how = name.partition(" ")
    function = getattr(functional, name)
    if how == "parts":
        return lambda *given, **options: function(*given, return_parts=True, **options).loss
    return functools.partial(function, standardize=True) if how else function


class Truth:
    """The loss over all rows, and the gradient of as many first rows as fit in ELEMENTS."""

    def __init__(self, name, student, teacher, temperature, target=None):
        N, V = student.shape
        step, total = max(ELEMENTS // V, 1), 0.0
        for start in range(0, N, step):
            s, t = (x[start : start + step].detach().double() for x in (student, teacher))
            of_rows = () if target is None else (target[start : start + step],)
            with fastkd.backend("torch"):
                loss = function_of(name)(
                    s.requires_grad_(start == 0), t, *of_rows, temperature=temperature, reduction="sum"
                )
            if start == 0:
                loss.backward()
                self.grad = s.grad / N
            total += loss.item()
        self.loss = total / N

    def errors(self, loss, grad):
        found = {"loss_error": abs(loss.item() - self.loss) / abs(self.loss), "gradient_error": None}
        if grad is not None:
            difference = grad[: len(self.grad)].double() - self.grad
            found["gradient_error"] = (difference.norm() / self.grad.norm()).item()
        return found


class DistTruth(Truth):
    """The same of dist_loss, which is of all rows at once. What plain PyTorch would hold too much for in float64 is
    computed by the kernels in float64, which the tests compare with the formula."""

    def __init__(self, student, teacher, temperature, _target=None):
        s, t = (x.detach().double() for x in (student, teacher))
        few = s.numel() <= ELEMENTS
        with fastkd.backend("torch") if few else contextlib.nullcontext():
            loss = functional.dist_loss(s.requires_grad_(), t, temperature=temperature)
            loss.backward()
        self.grad, self.loss = s.grad[: max(ELEMENTS // s.shape[1], 1)], loss.item()


def wrong(errors, dtype):
    """Whether errors are beyond what a kernel may have."""
    gradient = errors["gradient_error"] or 0.0
    return not (errors["loss_error"] <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE[dtype])
