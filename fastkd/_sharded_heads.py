"""Heads whose weight lies sharded over the ranks that share a batch, as FSDP2 has it: gathered where they are used.

Each rank has rows of its own, and the loss of these. The gradients of all ranks are averaged and scattered to the
shards, as FSDP2 does with those of a head that the model itself has called.

Nothing imports ``torch.distributed.tensor`` here: where nobody has, there is no DTensor.
"""

from typing import Any

import torch

from . import _dtensor, _layouts
from .forms import LinearLogits


class _Mean(torch.autograd.Function):
    """x; the gradient, which is a sum over ranks, becomes their mean."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.ranks, None


def _whole(x: Any, dtype: torch.dtype) -> Any:
    """In the dtype of the hidden states: FSDP2 may compute in another than it keeps."""
    if not _dtensor.given(x):
        return x
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.to(dtype).full_tensor()
    mesh, kinds = x.device_mesh, _layouts._dtensor()
    return _Mean.apply(x, mesh.size()).to(dtype).full_tensor(grad_placements=[kinds.Partial()] * mesh.ndim)


def gathered(side: LinearLogits) -> LinearLogits:
    """The same with a whole head, on every rank that has a part of it; a side whose hidden states are no DTensor."""
    if _dtensor.given(side.hidden) or not _dtensor.given(side.weight, side.bias):
        return side
    options = {"scale": side.scale, "softcap": side.softcap, "slab_bytes": side.slab_bytes}
    return LinearLogits(side.hidden, *(_whole(x, side.hidden.dtype) for x in (side.weight, side.bias)), **options)
