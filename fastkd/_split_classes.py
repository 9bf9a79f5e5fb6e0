"""Losses of logits whose classes are split over the ranks of a process group, on every backend."""

from typing import Any

import torch

from . import _backend, _check, _transforms, reference
from ._check import LogitsOptions
from ._check.arguments import values_known
from ._divergences import DERIVED
from ._dtypes import compute_dtype
from ._inplace import overwritten
from .forms import LinearLogits, Probabilities, TopKLogProbs, in_dtype, logits_of_rows, with_hidden


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

    def sum_(self, x: torch.Tensor) -> None:
        """x becomes the sum of what each rank has."""
        torch.distributed.all_reduce(x, group=self.group)


def name_of(group: Any) -> str:
    """What an op is told, which takes no process group."""
    return group.group_name


def group_named(name: str) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def wrong_targets(target: torch.Tensor, classes: Any, mask: torch.Tensor | None) -> torch.Tensor:
    """Which rows that count have a target that is none of all ranks' classes: an error where the host can look."""
    wrong = (target < 0) | (target >= classes)
    wrong = wrong if mask is None else wrong & mask
    if values_known(target) and bool(wrong.any()):
        raise ValueError(
            f"target: classes from 0 to {int(classes) - 1} wanted, those of all ranks, got {target[wrong][0].item()}"
        )
    return wrong


class Own(torch.autograd.Function):
    """What this rank has. What others have is a constant here, so that a second derivative would lack their part."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, of_split: str) -> torch.Tensor:
        ctx.of_split = of_split
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        _transforms.refuse_all("grad_outputs", grad, ctx.of_split)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(f"create_graph=True: fastkd has no second derivatives {ctx.of_split}")
        return grad, None


_OF_SPLIT = "of losses whose classes are split over ranks; gather the classes of a row on each of them first"


class _Summed(torch.autograd.Function):
    """What each rank has whole, and differentiates for its own classes: the gradient is the sum over ranks."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        ctx.ranks.sum_(grad)
        return grad, None


def _shard(side, mask, ranks):
    """A side's logits of this rank's classes."""
    if not isinstance(side, LinearLogits):
        return side
    side = in_dtype(side, compute_dtype(side.weight))  # the sum over ranks is rounded once
    if side.hidden.requires_grad and torch.is_grad_enabled():
        side = with_hidden(side, _Summed.apply(side.hidden, ranks))
    return logits_of_rows(side, mask)


def _whole(x, widths, ranks):
    """[*, V] of all ranks' classes, of which this rank's are differentiated."""
    padded = x.new_zeros(max(widths), *x.shape[:-1])
    padded[: x.shape[-1]] = x.detach().movedim(-1, 0)
    parts = ranks.gathered(padded)
    parts = [part[:width].movedim(0, -1) for part, width in zip(parts, widths, strict=True)]
    parts[ranks.rank] = Own.apply(x, _OF_SPLIT) if x.requires_grad else x
    return torch.cat(parts, -1)


def _whole_sides(student, teacher, options):
    """Student and teacher of all ranks' classes, and how many these are."""
    ranks = Ranks(options.group)
    for name, side in (("student", student), ("teacher", teacher)):
        for x in (side,) if isinstance(side, torch.Tensor) else vars(side).values():
            if isinstance(x, torch.Tensor):
                _transforms.refuse_all(name, x, _OF_SPLIT)
    student, teacher = (_shard(x, options.mask, ranks) for x in (student, teacher))
    widths = ranks.gathered(torch.tensor([student.shape[-1]], device=student.device))[:, 0].tolist()
    if isinstance(teacher, Probabilities):
        whole = _whole(teacher.probabilities, widths, ranks)
        teacher = Probabilities(whole, temperature=teacher.temperature)
    elif not isinstance(teacher, TopKLogProbs):
        teacher = _whole(teacher, widths, ranks)
    return _whole(student, widths, ranks), teacher, sum(widths)


def _after(loss, student, options):
    if options.inplace and student.requires_grad and torch.is_grad_enabled():
        overwritten(student)
    return loss


def logits_loss(backend: str, divergence: str, student: Any, teacher: Any, options: LogitsOptions) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`, of what each rank has; the arguments have been checked there. Plain PyTorch
    gathers the logits."""
    if backend == "torch":
        *sides, classes = _whole_sides(student, teacher, options)
        if options.target is not None:
            wrong_targets(options.target, classes, options.mask)
        if isinstance(teacher, TopKLogProbs):
            _check.top_k_values(teacher, classes, options.mask)
        loss = reference.logits_loss(divergence, *sides, options._replace(group=None, inplace=False))
        return _after(loss, student, options)
    from .ops import group, group_forms

    logits = isinstance(student, torch.Tensor) and isinstance(teacher, torch.Tensor)
    more = options.standardize or options.target_loss is not None or divergence in DERIVED
    loss = group.logits_loss if logits and not more else group_forms.logits_loss
    return loss(_backend.namespace(backend), divergence, student, teacher, options)


def dist_loss(backend: str, student: Any, teacher: Any, options: Any) -> torch.Tensor:
    """The same of ``dist_loss``."""
    if backend == "torch":
        *sides, _ = _whole_sides(student, teacher, options)
        return _after(reference.dist_loss(*sides, options._replace(group=None, inplace=False)), student, options)
    from .ops import dist_forms

    return dist_forms.dist_loss(_backend.namespace(backend), student, teacher, options)
