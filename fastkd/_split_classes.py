"""Losses of logits whose classes are split over the ranks of a process group, on every backend."""

from typing import Any

import torch

from . import _backend, _transforms, reference
from ._check import LogitsOptions
from ._check.arguments import values_known
from ._inplace import overwritten


class Ranks:
    """A process group, as it is needed here."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks, ...], of tensors of one shape [n, ...]."""
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        dist = torch.distributed
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        gather(out, x.contiguous(), group=self.group)
        return out.view(self.size, *x.shape)


def wrong_targets(target: torch.Tensor, classes: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Which rows that count have a target that is none of all ranks' classes: an error where the host can look."""
    wrong = (target < 0) | (target >= classes)
    wrong = wrong if mask is None else wrong & mask
    if values_known(target) and bool(wrong.any()):
        raise ValueError(
            f"target: classes from 0 to {int(classes) - 1} wanted, those of all ranks, got {target[wrong][0].item()}"
        )
    return wrong


class _Own(torch.autograd.Function):
    """This rank's classes. What others have is a constant here, so that a second derivative would lack their part."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        _transforms.refuse_all("grad_outputs", grad, _OF_SPLIT)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"create_graph=True: fastkd has no second derivatives {_OF_SPLIT}")
        return grad


_OF_SPLIT = "of losses whose classes are split over ranks; gather the classes of a row on each of them first"


def _whole(x, widths, ranks):
    """[*, V] of all ranks' classes, of which this rank's are differentiated."""
    padded = x.new_zeros(max(widths), *x.shape[:-1])
    padded[: x.shape[-1]] = x.detach().movedim(-1, 0)
    parts = ranks.gathered(padded)
    parts = [part[:width].movedim(0, -1) for part, width in zip(parts, widths, strict=True)]
    parts[ranks.rank] = _Own.apply(x) if x.requires_grad else x
    return torch.cat(parts, -1)


def logits_loss(backend: str, divergence: str, student: Any, teacher: Any, options: LogitsOptions) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`, of what each rank has; the arguments have been checked there. Plain PyTorch
    gathers the logits."""
    if backend == "torch":
        ranks = Ranks(options.group)
        for name, x in (("student", student), ("teacher", teacher)):
            _transforms.refuse_all(name, x, _OF_SPLIT)
        widths = ranks.gathered(torch.tensor([student.shape[-1]], device=student.device))[:, 0].tolist()
        if options.target is not None:
            wrong_targets(options.target, sum(widths), options.mask)
        sides = _whole(student, widths, ranks), _whole(teacher, widths, ranks)
        loss = reference.logits_loss(divergence, *sides, options._replace(group=None, inplace=False))
        if options.inplace and student.requires_grad and torch.is_grad_enabled():
            overwritten(student)
        return loss
    from .ops import group

    return group.logits_loss(_backend.namespace(backend), divergence, student, teacher, options)
