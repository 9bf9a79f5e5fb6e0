"""Losses of relations as modules."""

from typing import Literal

from torch import Tensor

from .. import _check, _divergences, functional
from .._types import Divergence, LossOrMore
from ._loss import _Loss


class RKDDistanceLoss(_Loss):
    r"""Distance-wise relational distillation: the student's samples keep the teacher's relative distances.

    The formula and what the loss does are those of :func:`fastkd.functional.rkd_distance`.

    Args:
        normalize: ``"mean"``, where distances are divided by their mean, or None. Default: ``"mean"``.
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.RKDDistanceLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0166
    """

    _options = ("normalize", "delta")

    def __init__(self, *, normalize: Literal["mean"] | None = "mean", delta: float = 1.0) -> None:
        super().__init__()
        _check.normalize(normalize)
        _check.number("delta", delta)
        self.normalize: Literal["mean"] | None = normalize
        self.delta = delta

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[N]``, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.rkd_distance(
            student, teacher, normalize=self.normalize, delta=self.delta, mask=mask, weight=weight
        )


class RKDAngleLoss(_Loss):
    r"""Angle-wise relational distillation: the student's triplets keep the teacher's angles.

    The formula and what the loss does are those of :func:`fastkd.functional.rkd_angle`.

    Args:
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.RKDAngleLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0183
    """

    _options = ("delta",)

    def __init__(self, *, delta: float = 1.0) -> None:
        super().__init__()
        _check.number("delta", delta)
        self.delta = delta

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        """
        return functional.rkd_angle(student, teacher, delta=self.delta, mask=mask)


class RKDLoss(_Loss):
    r"""Relational distillation by distances and angles together, which share their work.

    The formula and what the loss does are those of :func:`fastkd.functional.rkd_loss`.

    Args:
        distance_weight: the weight of the distances, a finite number of at least 0. Default 25.
        angle_weight: the weight of the angles, a finite number of at least 0. Default 50.
        distance_delta: where Huber's loss of distances turns from quadratic to linear, a positive number. Default 1.
        angle_delta: where Huber's loss of angles turns from quadratic to linear, a positive number. Default 1.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.RKDLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 3)
        1.332
    """

    _options = ("distance_weight", "angle_weight", "distance_delta", "angle_delta")

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        distance_delta: float = 1.0,
        angle_delta: float = 1.0,
    ) -> None:
        super().__init__()
        _check.at_least_zero("distance_weight", distance_weight)
        _check.at_least_zero("angle_weight", angle_weight)
        _check.number("distance_delta", distance_delta)
        _check.number("angle_delta", angle_delta)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight
        self.distance_delta = distance_delta
        self.angle_delta = angle_delta

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        """
        return functional.rkd_loss(
            student,
            teacher,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            distance_delta=self.distance_delta,
            angle_delta=self.angle_delta,
            mask=mask,
        )


class SimilarityPreservingLoss(_Loss):
    r"""Similarity-preserving distillation: samples that excite the teacher alike do so in the student.

    The formula and what the loss does are those of :func:`fastkd.functional.similarity_preserving`.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.SimilarityPreservingLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0377
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[N]``, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.similarity_preserving(student, teacher, mask=mask, weight=weight)


class GramMSELoss(_Loss):
    r"""Gram matrix distillation: similarities between samples, or between the patches of an image, are kept.

    The formula and what the loss does are those of :func:`fastkd.functional.gram_mse`.

    Args:
        normalize: whether rows are divided by their length. Default True.
        clamp: ``"both"``, where negative similarities count as 0; ``"teacher"``, where the teacher's do; or None.
            Default None.

    Shape:
        student ``[N, D_s]`` or ``[B, N, D_s]``, the teacher likewise; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.GramMSELoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0574
    """

    _options = ("normalize", "clamp")

    def __init__(self, *, normalize: bool = True, clamp: Literal["both", "teacher"] | None = None) -> None:
        super().__init__()
        _check.flag("normalize", normalize)
        _check.clamp(clamp)
        self.normalize = normalize
        self.clamp: Literal["both", "teacher"] | None = clamp

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]`` or ``[B, N, D_s]``.
            teacher: embeddings ``[N, D_t]`` or ``[B, N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]`` or ``[B, N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable likewise, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.gram_mse(
            student, teacher, normalize=self.normalize, clamp=self.clamp, mask=mask, weight=weight
        )


class PKTLoss(_Loss):
    r"""Probabilistic knowledge transfer: the student keeps the probabilities with which samples are alike.

    The formula and what the loss does are those of :func:`fastkd.functional.pkt`.

    Args:
        eps: what is added to probabilities and to the lengths of rows, at least 1e-37. Default 1e-7.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.PKTLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0028
    """

    _options = ("eps",)

    def __init__(self, *, eps: float = 1e-7) -> None:
        super().__init__()
        _check.eps(eps)
        self.eps = eps

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[N]``, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.pkt(student, teacher, eps=self.eps, mask=mask, weight=weight)


class RelationalTripletLoss(_Loss):
    r"""Contrastive relations: similar samples are nearer than all others, by a margin.

    The formula and what the loss does are those of :func:`fastkd.functional.relational_triplet`.

    Args:
        margin: a positive number. Default 1.
        positives: how many of the teacher's nearest neighbours are positives. Default: 5, or N - 2 in batches of fewer
            than 7.
        return_active: whether the share of active triplets is returned as well. Default False.

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

    _options = ("margin", "positives", "return_active")

    def __init__(self, *, margin: float = 1.0, positives: int | None = None, return_active: bool = False) -> None:
        super().__init__()
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

    _options = ("temperature", "teacher_temperature", "divergence", "beta", "normalize")

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        divergence: Divergence = "kl_div",
        beta: float = 0.5,
        normalize: bool = False,
    ) -> None:
        super().__init__()
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
        )
