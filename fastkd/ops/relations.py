"""Relations between the samples of a batch of embeddings: the pairs and the angles schedules, and
those that need matrix products and, between them, little else."""

from typing import Any, NamedTuple

import torch

from .._dtypes import compute_dtype
from .._relation_calls import (
    AnglesCall,
    GramCall,
    PairsCall,
    PktCall,
    PktStripCall,
    SamplesCall,
    SimilarityCall,
    TripletStripCall,
)
from ..reference import gradient_dtype, ordinary
from . import gram, similarity
from . import pkt as _pkt
from .gradient import forbid_double_backward, is_wanted, scaled
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


def _fake_of(kind):
    """Of an op that returns the loss and the gradient."""

    def fake(*arguments):
        call = kind(*arguments)
        shape = call.student.shape if call.save else (0,)
        loss = call.student.new_empty((), dtype=compute_dtype(call.student, call.teacher))
        return loss, call.student.new_empty(shape, dtype=gradient_dtype(call.student))

    return fake


def _fake_pkt_strip_(*arguments):
    return PktStripCall(*arguments).student.new_empty((), dtype=torch.float64)


def _fake_triplet_strip_(*arguments):
    return TripletStripCall(*arguments).strip.new_empty((3,), dtype=torch.float64)


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    fakes = (_fake_of(PairsCall), _fake_of(AnglesCall), _fake_pkt_strip_, _fake_triplet_strip_)
    for name, fake in zip(NAMES, fakes, strict=True):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    ops = getattr(torch.ops, namespace)
    pairs, angles, scale_ = (getattr(ops, name).default for name in ("pairs_fwd", "angles_fwd", "scale_"))
    OPS[namespace] = Ops(pairs, angles, similarity.FWD, gram.FWD, _pkt.FWD, scale_)


torch.library.register_fake("fastkd::similarity_fwd", _fake_of(SimilarityCall))
torch.library.register_fake("fastkd::gram_fwd", _fake_of(GramCall))
torch.library.register_fake("fastkd::pkt_fwd", _fake_of(PktCall))
torch.library.register_fake("fastkd::samples_fwd", _fake_of(SamplesCall))
use_namespace("fastkd")


# Of the ops that autograd calls: where the student is among the fields of their calls.
_KINDS = {
    "pairs_fwd": PairsCall,
    "angles_fwd": AnglesCall,
    "similarity_fwd": SimilarityCall,
    "gram_fwd": GramCall,
    "pkt_fwd": PktCall,
}
_STUDENT = {name: kind._fields.index("student") for name, kind in _KINDS.items()}


class _Relation(torch.autograd.Function):
    """The loss of a student that wants a gradient, which is computed in forward and saved."""

    @staticmethod
    def forward(ctx, namespace, name, *fields):
        ops, student = OPS[namespace], _STUDENT[name]
        ctx.scale_, ctx.student, ctx.dtype = ops.scale_, 2 + student, fields[student].dtype
        loss, grad = getattr(ops, name)(*fields)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grads = [None] * len(ctx.needs_input_grad)
        grads[ctx.student] = forbid_double_backward(_gradient, ctx, upstream)
        return tuple(grads)


def _gradient(ctx, upstream):
    return scaled(ctx.scale_, *ctx.saved_tensors, upstream).to(ctx.dtype)


def _loss(namespace, name, call):
    if call.save:
        return _Relation.apply(namespace, name, *call)
    return getattr(OPS[namespace], name)(*call)[0]


def _those_that_count(mask, student, teacher, weight=None):
    """What a schedule is given that is told how many rows there are: that number, student, teacher and weight.

    Those that count come first, in their order, and how many they are the device knows: nothing waits for it. In
    place of the others stands the first."""
    teacher = teacher.detach()
    if mask is None:
        return None, student, teacher, weight
    mask = ordinary(mask)
    count = mask.sum()
    order = torch.argsort(~mask, stable=True)
    there = torch.arange(len(mask), device=mask.device) < count
    source = torch.where(there, order, order[:1])
    # a row that does not count may hold anything, and where none does it is the first
    return count, *(
        x if x is None else torch.where(mask.view(-1, *(1,) * (x.dim() - 1)), x, 0.0)[source]
        for x in (student, teacher, weight)
    )


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
    weight = weight if weight is None else weight.to(compute_dtype(student, teacher))
    count, student, teacher, weight = _those_that_count(mask, student, teacher, weight)
    call = PairsCall(
        student=student, teacher=teacher, count=count, weight=weight, relation=RKD_DISTANCE, delta=as_tensor(delta),
        normalize=normalize, save=is_wanted(student),
    )  # fmt: skip
    return _loss(namespace, "pairs_fwd", call)


def _angles(namespace, student, teacher, mask, *numbers):
    count, student, teacher, _ = _those_that_count(mask, student, teacher)
    call = AnglesCall(
        student=student, teacher=teacher, count=count, numbers=as_tensor(*numbers), save=is_wanted(student)
    )
    return _loss(namespace, "angles_fwd", call)


def rkd_angle(
    namespace: str, student: torch.Tensor, teacher: torch.Tensor, delta: float, mask: torch.Tensor | None
) -> torch.Tensor:
    return _angles(namespace, student, teacher, mask, 1.0, delta, 0.0, 1.0)


def rkd_loss(namespace: str, student: torch.Tensor, teacher: torch.Tensor, *options: Any) -> torch.Tensor:
    *numbers, mask = options
    return _angles(namespace, student, teacher, mask, *numbers)


def similarity_preserving(
    namespace: str, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    call = SimilarityCall(student=student, teacher=teacher.detach(), mask=mask, weight=weight, save=is_wanted(student))
    return _loss(namespace, "similarity_fwd", call)


def pkt(
    namespace: str,
    student: torch.Tensor,
    teacher: torch.Tensor,
    eps: float,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    call = PktCall(
        student=student, teacher=teacher.detach(), eps=as_tensor(eps), mask=mask, weight=weight, strips=namespace,
        save=is_wanted(student),
    )  # fmt: skip
    return _loss(namespace, "pkt_fwd", call)


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
    call = GramCall(
        student=student, teacher=teacher.detach(), normalize=normalize, clamp=gram.CLAMPS[clamp], mask=mask,
        weight=weight, save=is_wanted(student),
    )  # fmt: skip
    return _loss(namespace, "gram_fwd", call)
