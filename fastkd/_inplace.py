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


_NOTE = "fastkd.inplace"  # of the node that overwrote a tensor last


def overwritten(logits):
    """From here on ``logits`` differentiate to an error; what was computed before does not change.

    To be called inside the forward of the function that overwrites them: its own edge to their
    history is drawn by then.
    """
    try:
        with torch.enable_grad():
            _Overwritten.apply(logits)
    except RuntimeError as problem:
        raise ValueError(
            "inplace: the student's logits are one of several views that chunk, split or unbind returned together, and "
            "autograd lets nobody overwrite these. Compute the logits of each chunk by themselves, or leave inplace out"
        ) from problem
    _whole(logits).grad_fn.metadata[_NOTE] = True


def was_overwritten(logits):
    """Whether the last thing that happened to these logits, or to the tensor that they are a part of, is a loss that
    overwrote some of it. A second one would differentiate through the first, to an error."""
    node = _whole(logits).grad_fn
    return node is not None and _NOTE in node.metadata


def _whole(x):
    return x if x._base is None else x._base
