"""Relational distillation by distances and angles, as modules: see :mod:`fastkd.functional.rkd`."""

from typing import Literal

from torch import Tensor

from .. import _check, functional
from .._types import ProcessGroup
from ._loss import _Loss


class RKDDistanceLoss(_Loss):
    r"""Distance-wise relational distillation: the student's samples keep the teacher's relative distances.

    The formula and what the loss does are those of :func:`fastkd.functional.rkd_distance`.

    Args:
        normalize: ``"mean"``, where distances are divided by their mean, or None. Default: ``"mean"``.
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

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

    _options = ("normalize", "delta", "group")

    def __init__(
        self, *, normalize: Literal["mean"] | None = "mean", delta: float = 1.0, group: ProcessGroup | None = None
    ) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
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
            student,
            teacher,
            normalize=self.normalize,
            delta=self.delta,
            mask=mask,
            weight=weight,
            group=self.group,
        )


class RKDAngleLoss(_Loss):
    r"""Angle-wise relational distillation: the student's triplets keep the teacher's angles.

    The formula and what the loss does are those of :func:`fastkd.functional.rkd_angle`.

    Args:
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

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

    _options = ("delta", "group")

    def __init__(self, *, delta: float = 1.0, group: ProcessGroup | None = None) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
        _check.number("delta", delta)
        self.delta = delta

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        """
        return functional.rkd_angle(student, teacher, delta=self.delta, mask=mask, group=self.group)


class RKDLoss(_Loss):
    r"""Relational distillation by distances and angles together, which share their work.

    The formula and what the loss does are those of :func:`fastkd.functional.rkd_loss`.

    Args:
        distance_weight: the weight of the distances, a finite number of at least 0. Default 25.
        angle_weight: the weight of the angles, a finite number of at least 0. Default 50.
        distance_delta: where Huber's loss of distances turns from quadratic to linear, a positive number. Default 1.
        angle_delta: where Huber's loss of angles turns from quadratic to linear, a positive number. Default 1.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

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

    _options = ("distance_weight", "angle_weight", "distance_delta", "angle_delta", "group")

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        distance_delta: float = 1.0,
        angle_delta: float = 1.0,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
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
            group=self.group,
        )
