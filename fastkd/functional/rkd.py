"""Relational distillation by distances and angles. What it shares with the other losses of relations stands in
:mod:`fastkd.functional.relations`."""

from typing import Literal

from torch import Tensor

from .. import _check, _split_samples
from .._types import ProcessGroup
from ._relational_loss import _for_rows, _relational_loss


def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: Literal["mean"] | None = "mean",
    delta: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Distance-wise relational distillation: the student's samples keep the teacher's relative distances.

    .. math:: \frac{1}{N^2} \sum_{ij} \mathrm{Huber}_\delta
        \left(\frac{d^s_{ij}}{\mu^s} - \frac{d^t_{ij}}{\mu^t}\right),\quad
        d_{ij} = \sqrt{\max(\|x_i - x_j\|^2, 10^{-12})},\ d_{ii} = 0

    Here :math:`\mu` is the mean distance of different samples; the gradient flows through the student's mean. Equal
    samples have no gradient from each other. Of fewer than two samples the loss is 0.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]``.
        teacher: embeddings ``[N, D_t]``, a constant.
        normalize: ``"mean"``, where distances are divided by their mean, or None, where they are not. Default:
            ``"mean"``.
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1.
        mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        weight: float, broadcastable to ``[N]``, multiplies the terms ij of row i; neither the divisor nor :math:`\mu`
            changes. Default: 1 for every row.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import rkd_distance
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0], [1.0], [3.0]])
        >>> loss = rkd_distance(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.0654, torch.Size([3, 2]))

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.
    """
    if group is not None:
        student, teacher, mask, weight = _split_samples.of_all(group, student, teacher, mask=mask, weight=weight)
    _check.embeddings(student, teacher, mask, weight)
    _check.normalize(normalize)
    _check.number("delta", delta)
    mask, weight = _for_rows(student, mask, weight)
    return _relational_loss("rkd_distance", student, teacher, normalize == "mean", float(delta), mask, weight)


def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: float = 1.0,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Angle-wise relational distillation: the student's triplets keep the teacher's angles.

    .. math:: \frac{1}{N^3} \sum_{aik} \mathrm{Huber}_\delta(\psi^s_{aik} - \psi^t_{aik}),\quad
        \psi_{aik} = \left\langle \frac{x_i - x_a}{\|x_i - x_a\|}, \frac{x_k - x_a}{\|x_k - x_a\|} \right\rangle

    Here :math:`\psi_{aik}` is the cosine at a of a triplet, and 0 where a is i or k or equals one of them. Equal
    samples have no gradient from each other. Of fewer than two samples the loss is 0. The work is O(N^2 D + N^3); no
    tensor ``[N, N, N]`` is held, but strips ``[512, N]`` or ``[1024, N]``.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]``.
        teacher: embeddings ``[N, D_t]``, a constant.
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1.
        mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import rkd_angle
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0], [1.0], [3.0]])
        >>> loss = rkd_angle(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1296, torch.Size([3, 2]))

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.
    """
    if group is not None:
        student, teacher, mask = _split_samples.of_all(group, student, teacher, mask=mask)
    _check.embeddings(student, teacher, mask)
    _check.number("delta", delta)
    (mask,) = _for_rows(student, mask)
    return _relational_loss("rkd_angle", student, teacher, float(delta), mask)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    distance_delta: float = 1.0,
    angle_delta: float = 1.0,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Relational distillation by distances and angles together, which share their work.

    .. math:: w_d\, \mathrm{rkd\_distance} + w_a\, \mathrm{rkd\_angle}

    See :func:`rkd_distance` and :func:`rkd_angle`. What all losses of relations share stands in
    :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]``.
        teacher: embeddings ``[N, D_t]``, a constant.
        distance_weight: the weight of the distances, a finite number of at least 0; at 0 their loss is not computed.
            Default 25.
        angle_weight: the weight of the angles, likewise. Default 50.
        distance_delta: where Huber's loss of distances turns from quadratic to linear, a positive number. Default 1.
        angle_delta: the same of angles. Default 1.
        mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import rkd_loss
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0], [1.0], [3.0]])
        >>> loss = rkd_loss(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 3), student.grad.shape
        (8.116, torch.Size([3, 2]))

    Source: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.
    """
    if group is not None:
        student, teacher, mask = _split_samples.of_all(group, student, teacher, mask=mask)
    _check.embeddings(student, teacher, mask)
    _check.at_least_zero("distance_weight", distance_weight)
    _check.at_least_zero("angle_weight", angle_weight)
    _check.number("distance_delta", distance_delta)
    _check.number("angle_delta", angle_delta)
    (mask,) = _for_rows(student, mask)
    options = (float(angle_weight), float(angle_delta), float(distance_weight), float(distance_delta))
    return _relational_loss("rkd_loss", student, teacher, *options, mask)
