"""Where DTensors lie: how they are split over a mesh of ranks, and what a rank has of them.

Nothing imports ``torch.distributed.tensor`` here: what is asked of it has been found among the imported modules.
"""

import sys
from typing import Any, NamedTuple

import torch

_GATHER = "redistribute(placements=[Replicate()]) or full_tensor() gathers them"


def _dtensor():
    return sys.modules["torch.distributed.tensor"]


def _first(kind, arguments):
    for x in arguments:
        if isinstance(x, kind):
            return x
        if isinstance(x, (list, tuple)) and (found := _first(kind, x)) is not None:
            return found
    return None


def _is_plain(x):
    return isinstance(x, torch.Tensor) and not isinstance(x, _dtensor().DTensor)


def _list(x):
    return x if isinstance(x, (list, tuple)) else [x]


def _is_split(placement):
    """By a dimension; _StridedShard, which flattened dimensions have, is no Shard."""
    return not placement.is_replicate() and not placement.is_partial()


class _Layout(NamedTuple):
    """Where something is: how it is split over a mesh, if at all."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def split(self):
        """Of each dimension of the mesh, whether it splits."""
        return tuple(_is_split(x) for x in self.placements)

    def replicated(self):
        return self._replace(placements=(_dtensor().Replicate(),) * len(self.placements))

    def whole_over(self, at):
        """The same, but for a dimension of the mesh, on all of whose ranks it is whole."""
        return self._replace(placements=(*self.placements[:at], _dtensor().Replicate(), *self.placements[at + 1 :]))

    def pending(self):
        """Of what is a sum over the ranks that split this."""
        kinds = _dtensor()
        return tuple(kinds.Partial() if split else kinds.Replicate() for split in self.split)

    def without(self, dim):
        """The layout of the rows of a tensor whose features are at dim."""
        moved = [x for x in self.placements if _is_split(x) and x.dim > dim]
        shard = _dtensor().Shard
        if any(type(x) is not shard for x in moved):  # of flattened dimensions
            raise ValueError(f"student: {shard.__name__} wanted after the features, got {self.placements}. {_GATHER}")
        return self._replace(placements=tuple(shard(x.dim - 1) if x in moved else x for x in self.placements))


def _layout(mesh, x):
    """Of a student: as it is, with sums that are pending made; a plain tensor is whole."""
    replicate = _dtensor().Replicate()
    found = getattr(x, "placements", [replicate] * mesh.ndim)
    return _Layout(mesh, tuple(replicate if p.is_partial() else p for p in found))


def _mesh(**arguments):
    """That of all DTensors among named arguments and lists of these."""
    kind = _dtensor().DTensor
    mesh = _first(kind, arguments.values()).device_mesh
    for name, x in arguments.items():
        for one in _list(x):
            if isinstance(one, kind) and one.device_mesh != mesh:
                raise ValueError(f"{name}: all DTensors on one mesh wanted, got {mesh} and {one.device_mesh}")
    return mesh


def _whole(mesh, x):
    """As a DTensor: a plain tensor is the same on every rank. Its gradient is as whole as it."""
    kinds = _dtensor()
    if isinstance(x, kinds.DTensor):
        return x
    return kinds.DTensor.from_local(x, mesh, [kinds.Replicate()] * mesh.ndim, run_check=False)


def _local(x, layout, grad_placements=None):
    """What this rank has of a tensor that is laid out so."""
    x = _whole(layout.mesh, x)
    # backward goes through a redistribution from a placement to itself: it sums gradients that are pending
    if tuple(x.placements) != layout.placements or grad_placements is not None:
        x = x.redistribute(placements=layout.placements)
    return x.to_local(grad_placements=grad_placements or layout.placements)
