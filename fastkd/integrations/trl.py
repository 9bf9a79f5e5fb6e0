"""TRL: the losses of its GKD and distillation trainers, with their arguments and their numbers, computed by fastkd.
They are patched into TRL's own trainers, in this process:

.. code-block:: python

    import fastkd.integrations.trl

    fastkd.integrations.trl.patch()  # from here on GKDTrainer and DistillationTrainer compute them so

or taken with a subclass, which patches nothing else: ``from fastkd.integrations.trl import DistillationTrainer``, or
``GKDTrainer``.

What differs: of logits nothing is held but the gradient, of a head nothing but a slab of rows at a time; the divergence
is computed in float32 at least, also of logits in half precision; ``reduction="none"`` of ``generalized_jsd_loss``,
which gives an element a class there, and heads that DeepSpeed's ZeRO-3 has sharded are errors.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..forms import LinearLogits


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    r"""The generalized Jensen-Shannon divergence, as ``GKDTrainer.generalized_jsd_loss`` has it.

    With p and q the softmax of the student's and the teacher's logits / T, :math:`M = \beta q + (1 - \beta) p`, of each
    row :math:`\beta KL(q, M) + (1 - \beta) KL(p, M)`; KL(q, p) where beta is 0, KL(p, q) where it is 1. It is not
    multiplied by T squared.

    Args:
        student_logits: ``[B, L, V]``.
        teacher_logits: the same, a constant.
        labels: ``[B, L]``; rows whose label is -100 do not count. Default: all do.
        beta: from 0 to 1. Default: 0.5.
        temperature: T. Default: 1.
        reduction: what the sum over rows is divided by: ``"batchmean"``, by the rows that count, and without labels by
            B; ``"mean"``, by the rows that count times V; ``"sum"``, by nothing. Default: ``"batchmean"``.
        num_items_in_batch: by what it is divided in place of that.

    Source: TRL 1.16.0; equation 1 of https://arxiv.org/abs/2306.13649.

    >>> generalized_jsd_loss(torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [0, 4, 3]])) > 0
    tensor(True)
    """
    if reduction not in ("batchmean", "mean", "sum"):
        raise ValueError(f"reduction: 'batchmean', 'mean' or 'sum' wanted, got {reduction!r}")
    mask = None if labels is None else labels != -100
    if num_items_in_batch is None and reduction == "batchmean" and mask is None:
        num_items_in_batch = max(len(student_logits), 1)
    if num_items_in_batch is not None:
        reduction, num_items_in_batch = "batchmean", _divisor(num_items_in_batch, student_logits)
    return functional.js_div(
        student_logits, teacher_logits.detach(), beta=beta, temperature=temperature, t_squared=False, mask=mask,
        reduction=reduction, normalizer=num_items_in_batch,
    )  # fmt: skip


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`generalized_jsd_loss` of two heads, as the loss of ``DistillationTrainer`` has it.

    Args:
        student_hidden_states: ``[B, L, H]``.
        teacher_hidden_states: ``[B, L, H_t]``, a constant.
        student_lm_head_weight: ``[V, H]``; one that FSDP2 has sharded is gathered.
        teacher_lm_head_weight: ``[V, H_t]``, a constant.
        completion_mask: ``[B, L]``; rows of 0 do not count.
        beta: from 0 to 1.
        num_items_in_batch: by what the sum over rows is divided. Default: by the rows that count.
        student_lm_head_bias: ``[V]``.
        teacher_lm_head_bias: ``[V]``.
        student_logit_scale: what the student's logits are multiplied by. Default: 1.
        teacher_logit_scale: the same of the teacher.
        student_final_logit_softcapping: what they stay below in size after that. Default: none.
        teacher_final_logit_softcapping: the same of the teacher.
        temperature: T. Default: 1.

    Returns:
        the loss; the sum over rows of the student's entropy at T, in nats, a constant; and how many rows count.

    Source: TRL 1.16.0, ``trl.trainer.distillation_trainer``.

    >>> x, w = torch.randn(2, 3, 4), torch.randn(7, 4)
    >>> loss, entropy, count = chunked_divergence_loss(x, x + 1, w, w, torch.tensor([[1, 1, 0], [1, 0, 0]]), beta=0.5)
    >>> count
    tensor(3)
    """
    student = LinearLogits(
        student_hidden_states, *_whole(student_hidden_states, student_lm_head_weight, student_lm_head_bias),
        scale=student_logit_scale, softcap=student_final_logit_softcapping,
    )  # fmt: skip
    with torch.no_grad():
        head = _whole(teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias)
    teacher = LinearLogits(
        teacher_hidden_states.detach(), *(x if x is None else x.detach() for x in head),
        scale=teacher_logit_scale, softcap=teacher_final_logit_softcapping,
    )  # fmt: skip
    mask = completion_mask != 0
    if num_items_in_batch is not None:
        num_items_in_batch = _divisor(num_items_in_batch, student_hidden_states)
    parts = functional.kd_loss(  # the soft part alone, and what is told beside it
        student, teacher, torch.zeros_like(mask, dtype=torch.int64), hard_weight=0.0, soft_weight=1.0,
        divergence="js_div", beta=beta, temperature=temperature, t_squared=False, mask=mask,
        normalizer=num_items_in_batch, return_parts=True,
    )  # fmt: skip
    count = mask.sum()
    return parts.loss, parts.student_entropy * count, count


def _divisor(count: Tensor | int, like: Tensor) -> Tensor | int:
    return count.to(like.device) if isinstance(count, Tensor) else count


def _whole(hidden: Tensor, *head: Tensor | None) -> list[Tensor | None]:
    """Weight and bias. Those that FSDP2 has sharded are gathered, as by TRL, in the dtype of the hidden states."""
    if any(hasattr(x, "ds_id") for x in head):  # of which a rank has nothing outside a context of DeepSpeed's
        raise RuntimeError(
            "lm_head: DeepSpeed's ZeRO-3 has sharded it, which fastkd does not gather; unpatch() leaves the loss to TRL"
        )
    return [x.full_tensor().to(hidden.dtype) if hasattr(x, "full_tensor") else x for x in head]  # a DTensor has that


def _places() -> list[tuple[Any, str, Any]]:
    """Where TRL has them, and what comes there."""
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer import distillation_trainer

    return [
        (GKDTrainer, "generalized_jsd_loss", staticmethod(generalized_jsd_loss)),
        (distillation_trainer, "_chunked_divergence_loss", chunked_divergence_loss),
    ]


_theirs: dict[str, Any] = {}  # what was patched, by name


def patch() -> None:
    """TRL's trainers compute their losses by fastkd, in this process; a second time it changes nothing.

    Raises:
        AttributeError: this version of TRL has them elsewhere; nothing is patched then.
    """
    places = _places()
    found = {name: vars(owner)[name] for owner, name, _ in places if name in vars(owner)}
    missing = [f"{owner.__name__}.{name}" for owner, name, _ in places if name not in found]
    if missing:
        raise AttributeError(f"this version of TRL has no {missing[0]}; fastkd's patch is for TRL 1.16")
    for owner, name, ours in places:
        if name not in _theirs:
            _theirs[name] = found[name]
            setattr(owner, name, ours)


def unpatch() -> None:
    """TRL's own losses are in their places again."""
    for owner, name, _ in _places():
        if name in _theirs:
            setattr(owner, name, _theirs.pop(name))


@contextlib.contextmanager
def _with(owner: Any, name: str, ours: Any) -> Iterator[None]:
    theirs = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        setattr(owner, name, theirs)


@functools.cache
def _subclass(name: str) -> Any:
    if name == "GKDTrainer":
        from trl.experimental.gkd import GKDTrainer

        return type(name, (GKDTrainer,), {"generalized_jsd_loss": staticmethod(generalized_jsd_loss)})
    from trl.trainer import distillation_trainer

    class DistillationTrainer(distillation_trainer.DistillationTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with _with(distillation_trainer, "_chunked_divergence_loss", chunked_divergence_loss):
                return super().compute_loss(*args, **kwargs)

    return DistillationTrainer


def __getattr__(name: str) -> Any:
    """The trainers, which are made when they are asked for: TRL is not imported before."""
    if name in ("DistillationTrainer", "GKDTrainer"):
        return _subclass(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
