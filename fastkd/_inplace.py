"""Tells autograd that a loss took its student's logits as room for the gradient."""

import torch


class _Overwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "a fastkd loss with inplace=True wrote its gradient over these logits; they were used again "
            "afterwards. Use them before, or leave inplace out"
        )


def overwritten(logits):
    """From here on ``logits`` differentiate to an error; what was computed before does not change.

    To be called inside the forward of the function that overwrites them: its own edge to their
    history is drawn by then.
    """
    try:
        with torch.enable_grad():
            _Overwritten.apply(logits)
    except RuntimeError as problem:  # a view that came with others, from chunk or unbind
        raise ValueError(f"inplace: the student's logits cannot be overwritten: {problem}") from problem
