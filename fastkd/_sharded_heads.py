"""Heads whose weight lies sharded over ranks.

Those that share a batch, as FSDP2 has it, gather the weight where it is used. Each rank has rows of its own, and the
loss of these. The gradients of all ranks are averaged and scattered to the shards, as FSDP2 does with those of a head
that the model itself has called.

Those of a tensor-parallel group keep what they have: its classes. Such a weight looks the same; what tells them apart
is that the loss has a group, or that the hidden states are a DTensor, replicated on the weight's mesh.

Nothing imports ``torch.distributed.tensor`` here: where nobody has, there is no DTensor.
"""

from typing import Any

import torch

from . import _dtensor, _layouts
from .forms import LinearLogits, TopKLogProbs


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


def _is_split(side, mesh):
    """Whether each rank of a mesh of one dimension has its classes of a head, and all hidden states."""
    kinds = _layouts._dtensor()

    def lies(x, placement):
        return isinstance(x, kinds.DTensor) and x.device_mesh == mesh and x.placements == (placement,)

    replicated = not _dtensor.given(side.hidden) or lies(side.hidden, kinds.Replicate())
    return replicated and all(x is None or lies(x, kinds.Shard(0)) for x in (side.weight, side.bias))


def _mesh_of(side: Any) -> Any:
    """That over which the classes of a head are split, as its own tensors say; None where they say nothing of it."""
    if not (isinstance(side, LinearLogits) and _dtensor.given(side.hidden)):
        return None
    return side.hidden.device_mesh if _is_split(side, side.hidden.device_mesh) else None


def _are_ranks_of(mesh, group):
    """Whether a mesh of one dimension has the ranks of a group, or there is none beside it."""
    ranks_of = torch.distributed.get_process_group_ranks
    return group is None or ranks_of(mesh.get_group()) == ranks_of(group)


def _own(name, side, mesh, group):
    """A side as plain tensors, which are what a rank has of it; beside a group plain tensors are that already."""
    if not isinstance(side, LinearLogits):
        kinds = _layouts._dtensor()
        split = isinstance(side, kinds.DTensor) and side.placements == (kinds.Shard(side.dim() - 1),)
        if split and side.device_mesh == mesh and _are_ranks_of(mesh, group):
            return _dtensor._Overwritable.apply(side)
        if group is not None or isinstance(side, TopKLogProbs):  # which every rank has whole
            return side
        raise ValueError(
            f"{name}: beside a head whose classes are split over ranks LinearLogits, or logits that are split "
            f"likewise, wanted, got {type(side).__name__}; beside group= each rank gives its own"
        )
    tensors = side.hidden, side.weight, side.bias
    if group is not None and not _dtensor.given(*tensors):
        return side
    found = mesh or side.weight.device_mesh if _dtensor.given(side.weight) else None
    if found is None or not _is_split(side, found) or not _are_ranks_of(found, group):
        places = [getattr(x, "placements", None) for x in tensors]
        raise ValueError(
            f"{name}: a head whose classes are split over the group, Shard(0) of a mesh of its ranks, and hidden "
            f"states that are whole on each of them wanted, got {places} on {found}; what is sharded over other "
            "ranks, as by FSDP2, is gathered first"
        )
    hidden = side.hidden
    if _dtensor.given(hidden):
        hidden = hidden.to_local(grad_placements=[_layouts._dtensor().Replicate()])
    weight, bias = (x if x is None else x.to_local() for x in (side.weight, side.bias))
    options = {"scale": side.scale, "softcap": side.softcap, "slab_bytes": side.slab_bytes}
    return LinearLogits(hidden, weight, bias, **options)


def of_ranks(student: Any, teacher: Any, group: Any) -> tuple[Any, Any, Any, Any]:
    """Both sides as what a rank has of them, the group over which their classes are split, and the mesh that says so
    where it is not the caller who does. Sides without such a head are returned as they are."""
    heads = [x for x in (student, teacher) if isinstance(x, LinearLogits) and _dtensor.given(*vars(x).values())]
    mesh = next(filter(None, map(_mesh_of, heads)), None)
    if not heads or (mesh is None and group is None):
        return student, teacher, group, None
    student, teacher = _own("student", student, mesh, group), _own("teacher", teacher, mesh, group)
    return student, teacher, group or mesh.get_group(), None if group else mesh


def replicated(loss: torch.Tensor, mesh: Any) -> Any:
    """The loss, which every rank has, as a DTensor."""
    kinds = _layouts._dtensor()
    return kinds.DTensor.from_local(loss, mesh, [kinds.Replicate()], run_check=False)


def gathered(side: LinearLogits) -> LinearLogits:
    """The same with a whole head, on every rank that has a part of it; a side whose hidden states are no DTensor."""
    if _dtensor.given(side.hidden) or not _dtensor.given(side.weight, side.bias):
        return side
    options = {"scale": side.scale, "softcap": side.softcap, "slab_bytes": side.slab_bytes}
    return LinearLogits(side.hidden, *(_whole(x, side.hidden.dtype) for x in (side.weight, side.bias)), **options)
