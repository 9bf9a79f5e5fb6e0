"""Relations between the samples of a batch of embeddings: the pairs and the angles schedules, and
those that need matrix products and, between them, little else."""

from typing import Any, NamedTuple

import torch

from .._dtypes import compute_dtype
from ..reference import gradient_dtype, ordinary
from . import gram, similarity
from . import pkt as _pkt
from .gradient import forbid_double_backward, scaled
from .numbers import as_tensor
from .relation_kl import relation_kl as _relation_kl
from .triplet import relational_triplet as _relational_triplet

RKD_DISTANCE = 0  # the relations of csrc/common/embeddings_params.h


class Ops(NamedTuple):
    """One implementation of the ops."""

    pairs_fwd: Any
    angles_fwd: Any
    similarity_fwd: Any
    gram_fwd: Any
    pkt_fwd: Any
    scale_: Any


NAMES = ("pairs_fwd", "angles_fwd", "pkt_strip_", "triplet_strip_")
OPS: dict[str, Ops] = {}  # by namespace


def _fake_fwd(student, teacher, *options):
    """The gradient is in float32 where the student is in float16, whose range it would leave."""
    grad = student.new_empty(student.shape if options[-1] else (0,), dtype=gradient_dtype(student))
    return student.new_empty((), dtype=compute_dtype(student, teacher)), grad


def _fake_pkt_strip_(student, *_):
    return student.new_empty((), dtype=torch.float64)


def _fake_triplet_strip_(strip, *_):
    return strip.new_empty((3,), dtype=torch.float64)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    for name, fake in zip(NAMES, (_fake_fwd, _fake_fwd, _fake_pkt_strip_, _fake_triplet_strip_), strict=True):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    ops = getattr(torch.ops, namespace)
    pairs, angles, scale_ = (getattr(ops, name).default for name in ("pairs_fwd", "angles_fwd", "scale_"))
    OPS[namespace] = Ops(pairs, angles, similarity.FWD, gram.FWD, _pkt.FWD, scale_)


for _name in ("similarity_fwd", "gram_fwd", "pkt_fwd", "samples_fwd"):
    torch.library.register_fake(f"fastkd::{_name}", _fake_fwd)
use_namespace("fastkd")


class _Relation(torch.autograd.Function):
    """The loss of a student that wants a gradient, which is computed in forward and saved."""

    @staticmethod
    def forward(ctx, namespace, name, student, teacher, *options):
        ops = OPS[namespace]
        ctx.scale_, ctx.dtype = ops.scale_, student.dtype
        loss, grad = getattr(ops, name)(student, teacher, *options, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grad = forbid_double_backward(_gradient, ctx, upstream)
        return None, None, grad, *(None for _ in ctx.needs_input_grad[3:])


def _gradient(ctx, upstream):
    return scaled(ctx.scale_, *ctx.saved_tensors, upstream).to(ctx.dtype)


def _loss(namespace, name, student, teacher, *options):
    teacher = teacher.detach()
    if student.requires_grad and torch.is_grad_enabled():
        return _Relation.apply(namespace, name, student, teacher, *options)
    return getattr(OPS[namespace], name)(student, teacher, *options, False)[0]


def _loss_of_rows(namespace, name, mask, tensors, *options):
    """The same of a schedule that is told how many rows there are. tensors: student, teacher, and what else is said
    of rows.

    Those that count come first, in their order, and how many they are the device knows: nothing waits for it. In
    place of the others stands the first."""
    count = None
    if mask is not None:
        mask = ordinary(mask)
        count = mask.sum()
        order = torch.argsort(~mask, stable=True)
        there = torch.arange(len(mask), device=mask.device) < count
        source = torch.where(there, order, order[:1])
        # a row that does not count may hold anything, and where none does it is the first
        tensors = [torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), x, 0.0)[source] for x in tensors]
    student, teacher, *rows = tensors
    return _loss(namespace, name, student, teacher, count, *rows, *options)


# The losses of fastkd.functional, where their arguments have been checked.


def rkd_distance(
    namespace: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool,
    delta: float,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    options = (RKD_DISTANCE, as_tensor(delta), normalize)
    if weight is None:
        return _loss_of_rows(namespace, "pairs_fwd", mask, (student, teacher), None, *options)
    weight = weight.to(compute_dtype(student, teacher))
    return _loss_of_rows(namespace, "pairs_fwd", mask, (student, teacher, weight), *options)


def rkd_angle(
    namespace: str, student: torch.Tensor, teacher: torch.Tensor, delta: float, mask: torch.Tensor | None
) -> torch.Tensor:
    return _loss_of_rows(namespace, "angles_fwd", mask, (student, teacher), as_tensor(1.0, delta, 0.0, 1.0))


def rkd_loss(namespace: str, student: torch.Tensor, teacher: torch.Tensor, *options: Any) -> torch.Tensor:
    *numbers, mask = options
    return _loss_of_rows(namespace, "angles_fwd", mask, (student, teacher), as_tensor(*numbers))


def similarity_preserving(
    namespace: str, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    return _loss(namespace, "similarity_fwd", student, teacher, mask, weight)


def pkt(
    namespace: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    eps: float,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    return _loss(namespace, "pkt_fwd", student, teacher, as_tensor(eps), mask, weight, namespace)


def relational_triplet(namespace: str, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _relational_triplet(namespace, OPS[namespace].scale_, *arguments)


def relation_kl(namespace: str, *arguments: Any) -> torch.Tensor:
    return _relation_kl(namespace, OPS[namespace].scale_, *arguments)


def gram_mse(
    namespace: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    normalize: bool,
    clamp: str | None,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    return _loss(namespace, "gram_fwd", student, teacher, normalize, gram.CLAMPS[clamp], mask, weight)
