"""Losses of logits that have a target as well: the class of each row beside the teacher's distribution. What they share
with the other losses of logits stands in :mod:`fastkd.functional.logits`.

**Targets** are whole numbers from 0 to V - 1, one for each row: a tensor of int64, or of a smaller integer type. A
row whose target is ``ignore_index`` counts for nothing: its loss is 0, its gradient 0, and the divisor leaves it out.
Where a mask leaves a row out, its target may be anything. On the CPU a target out of range is an error. On other
devices, where a look at it would have to wait for the device, the row's loss and gradient are NaN.

**Rows without a possible class.** Where it is the teacher's, the row has its hard loss alone; where it is the
student's, the loss is +inf and the gradient 0.

**Memory.** As of the other losses of logits, but each thread of the CPU keeps 16 bytes a class, 32 in float64.
"""

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, TargetReduction, WholeTeacher
from ._logits_loss import _logits_loss


def dkd_loss(
    student: Logits,
    teacher: WholeTeacher,
    target: Tensor,
    *,
    alpha: Tensor | float = 1.0,
    beta: Tensor | float = 8.0,
    temperature: Tensor | float = 4.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TargetReduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Decoupled knowledge distillation: the target and the other classes are weighed by themselves.

    .. math:: T^2 \left(\alpha\, \mathrm{TCKD} + \beta\, \mathrm{NCKD}\right)

    TCKD is the divergence KL(q || p) between two classes, the target and all others together. NCKD is that between the
    other classes alone, each side renormalized without the target. ``kl_div`` is their sum with an alpha of 1 and a
    beta of 1 - q of the target. The cross-entropy that the publication adds is not a part of it:
    ``torch.nn.functional.cross_entropy`` is.

    It is finite where published code, which subtracts 1000 from the target's logit, is not: with two classes, and with
    logits of any size. With an alpha or a beta of 0 its part is left out. Where no other class is possible, NCKD is 0
    if so with the teacher, and +inf if so with the student alone.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`, and what is said of targets in
    :mod:`fastkd.functional.targets`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant.
        target: the class of each row, whole numbers ``[*]``.
        alpha: the weight of TCKD, at least 0, or a tensor that broadcasts to ``[*]``, one per row. Default 1.
        beta: the weight of NCKD, of the same form. Default 8.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*]``, one per row. Default 4.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2, so that gradients keep their size when T changes. Default:
            True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        ignore_index: the target of rows that do not count. Default -100.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts that has a target.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; or ``"batchmean"``, the sum over the number of rows
            that count, the default.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where no row counts. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says; targets are
            numbers of all classes. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import dkd_loss
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = dkd_loss(student, teacher, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.5734, torch.Size([2, 3]))

    Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022.
    """
    return _parted_target(
        "dkd_loss", student, teacher, target, beta, alpha, temperature, teacher_temperature, t_squared, standardize,
        ignore_index, dim, num_classes, mask, weight, reduction, normalizer, inplace, group,
    )  # fmt: skip


def nkd_loss(
    student: Logits,
    teacher: WholeTeacher,
    target: Tensor,
    *,
    gamma: Tensor | float = 1.5,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TargetReduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Normalized knowledge distillation: the target as the teacher sees it, and the other classes by themselves.

    .. math:: -q_y \log p_y + \gamma\, T^2 \left(-\sum_{v \ne y} \hat q_v \log \hat p_v\right)

    y is the target, and p and q of the first term are at temperature 1. The second is the cross-entropy between the
    other classes at temperature T, where each side is renormalized without the target. The cross-entropy with the
    target that the publication adds is not a part of it: ``torch.nn.functional.cross_entropy`` is.

    A target that the teacher cannot give, q = 0, contributes 0. Where no other class is possible, the second term is 0
    if so with the teacher, and +inf if so with the student alone; with a gamma of 0 it is left out.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`, and what is said of targets in
    :mod:`fastkd.functional.targets`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant.
        target: the class of each row, whole numbers ``[*]``.
        gamma: the weight of the second term, at least 0, or a tensor that broadcasts to ``[*]``, one per row. Default
            1.5.
        temperature: T of the second term, a positive number, or a tensor that broadcasts to ``[*]``, one per row.
            Default 1.
        teacher_temperature: the teacher's own temperature there, of the same form. Default: ``temperature``.
        t_squared: whether the second term is multiplied by T**2, so that its gradient keeps its size when T changes.
            Default: True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        ignore_index: the target of rows that do not count. Default -100.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts that has a target.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; or ``"batchmean"``, the sum over the number of rows
            that count, the default.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where no row counts. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says; targets are
            numbers of all classes. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import nkd_loss
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = nkd_loss(student, teacher, torch.tensor([0, 2]))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (1.2449, torch.Size([2, 3]))

    Source: Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
    Approach with Normalized Loss and Customized Soft Labels", 2023.
    """
    return _parted_target(
        "nkd_loss", student, teacher, target, gamma, None, temperature, teacher_temperature, t_squared, standardize,
        ignore_index, dim, num_classes, mask, weight, reduction, normalizer, inplace, group,
    )  # fmt: skip


def _parted_target(
    name, student, teacher, target, parameter, second, temperature, teacher_temperature, t_squared, standardize,
    ignore_index, dim, num_classes, mask, weight, reduction, normalizer, inplace, group,
):  # fmt: skip
    """A loss that parts the target from the other classes."""
    options = _check.LogitsOptions(
        temperature, temperature if teacher_temperature is None else teacher_temperature, t_squared, mask, weight,
        reduction, normalizer, inplace, parameter, _check.as_classes(target), ignore_index, target_loss=name,
        second=second, standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss(name, student, teacher, options, dim)
