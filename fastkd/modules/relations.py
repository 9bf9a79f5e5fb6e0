"""Losses of relations as modules."""

from torch import Tensor

from .. import _check, _divergences, functional
from .._types import Divergence, LossOrMore, ProcessGroup
from ._loss import _Loss
from .rkd import RKDAngleLoss, RKDDistanceLoss, RKDLoss
from .similarity import GramMSELoss, PKTLoss, SimilarityPreservingLoss

__all__ = [
    "GramMSELoss",
    "PKTLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "RelationKLLoss",
    "RelationalTripletLoss",
    "SimilarityPreservingLoss",
]


class RelationalTripletLoss(_Loss):
    r"""Contrastive relations: similar samples are nearer than all others, by a margin.

    The formula and what the loss does are those of :func:`fastkd.functional.relational_triplet`.

    Args:
        margin: a positive number. Default 1.
        positives: how many of the teacher's nearest neighbours are positives. Default: 5, or N - 2 in batches of fewer
            than 7.
        return_active: whether the share of active triplets is returned as well. Default False.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Shape:
        student ``[N, D_s]``, with a teacher ``[N, D_t]`` or labels ``[N]``; the loss has no dimensions. With
        ``return_active`` it is the pair (loss, share).

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> loss = fastkd.RelationalTripletLoss()(student, labels=torch.tensor([0, 0, 1]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.9428
    """

    _options = ("margin", "positives", "return_active", "group")

    def __init__(
        self,
        *,
        margin: float = 1.0,
        positives: int | None = None,
        return_active: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
        _check.number("margin", margin)
        if positives is not None:
            _check.count_of_positives(positives)
        _check.flag("return_active", return_active)
        self.margin = margin
        self.positives = positives
        self.return_active = return_active

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> LossOrMore:
        """The loss.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant. Default: none.
            labels: integers ``[N]``, the class of each row. Default: none. One of teacher and labels is wanted.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[N]``, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.relational_triplet(
            student,
            teacher,
            labels,
            margin=self.margin,
            positives=self.positives,
            mask=mask,
            weight=weight,
            return_active=self.return_active,
            group=self.group,
        )


class RelationKLLoss(_Loss):
    r"""Divergence of student's and teacher's relations: a softmax over similarities for each sample.

    The formula and what the loss does are those of :func:`fastkd.functional.relation_kl`.

    Args:
        temperature: T, a positive number. Default 1.
        teacher_temperature: the teacher's own temperature, a positive number. Default: ``temperature``.
        divergence: ``"kl_div"``, ``"reverse_kl_div"``, ``"js_div"``, ``"total_variation"`` or
            ``"soft_cross_entropy"``. Default: ``"kl_div"``.
        beta: of ``"js_div"``, a number from 0 to 1. Default 0.5.
        normalize: whether similarities are cosines over T. Default False.
        group: a process group over which samples ``[N, D]`` are split, each rank giving its own. Default: none.

    Shape:
        student ``[*, N, D_s]`` and teacher ``[*, N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.RelationKLLoss(temperature=0.5)(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.2528
    """

    _options = ("temperature", "teacher_temperature", "divergence", "beta", "normalize", "group")

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        divergence: Divergence = "kl_div",
        beta: float = 0.5,
        normalize: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
        _check.number("temperature", temperature)
        if teacher_temperature is not None:
            _check.number("teacher_temperature", teacher_temperature)
        _check.divergence(divergence, _divergences.OF_RELATIONS)
        _check.parameter(_divergences.REGISTRY["js_div"].parameter, beta)
        _check.flag("normalize", normalize)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.divergence: Divergence = divergence
        self.beta = beta
        self.normalize = normalize

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        student_keys: Tensor | None = None,
        teacher_keys: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[*, N, D_s]``.
            teacher: embeddings ``[*, N, D_t]``, a constant.
            student_keys: ``[*, M, D_s]``, what the student's rows are compared with. Default: the other rows.
            teacher_keys: ``[*, M, D_t]``, what the teacher's rows are compared with. Default: the other rows.
            mask: bool, broadcastable to ``[*, N]``, True where the row counts. Default: every row counts.
            key_mask: bool, broadcastable to ``[*, M]``, True where rows are compared with the key. Default: as in the
                function.
            weight: float, broadcastable to ``[*, N]``, multiplies the row's loss. Default: 1 for every row.
        """
        return functional.relation_kl(
            student,
            teacher,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            divergence=self.divergence,
            beta=self.beta,
            normalize=self.normalize,
            student_keys=student_keys,
            teacher_keys=teacher_keys,
            mask=mask,
            key_mask=key_mask,
            weight=weight,
            group=self.group,
        )
