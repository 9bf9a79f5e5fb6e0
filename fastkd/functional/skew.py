"""Skewed Kullback-Leibler divergences: of one side from a mixture of both. What they share with the other losses of
logits stands in :mod:`fastkd.functional.logits`."""

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits
from ._logits_loss import _logits_loss


def skew_kl_div(
    student: Logits,
    teacher: TeacherLogits,
    *,
    alpha: Tensor | float = 0.1,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of a mixture of both sides from the teacher.

    .. math:: T^2 \sum_v q_v (\log q_v - \log m_v),\quad m = \alpha q + (1 - \alpha) p

    It is bounded by -log(alpha) before T**2, and its gradient stays finite where the student gives a class almost no
    probability. A class that one side cannot give is like any other.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``skew_kl_div(a, b.detach())`` and
            ``skew_reverse_kl_div(b, a.detach())`` have their gradients.
        alpha: the teacher's share of the mixture, a number from 0 to 1, or a tensor that broadcasts to ``[*]``, one per
            row. 0 is ``kl_div``, of single rows as well; at 1 the loss is 0. Default 0.1.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*]``, one per row. Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2, so that gradients keep their size when T changes. Default:
            True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; ``"batchmean"``, the sum over the number of rows that
            count, the default; or ``"mean"``, which divides by V as well.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import skew_kl_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = skew_kl_div(student, teacher, alpha=0.1)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.0831, torch.Size([2, 3]))

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, alpha,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("skew_kl_div", student, teacher, options, dim)


def skew_reverse_kl_div(
    student: Logits,
    teacher: TeacherLogits,
    *,
    alpha: Tensor | float = 0.1,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of a mixture of both sides from the student.

    .. math:: T^2 \sum_v p_v (\log p_v - \log m_v),\quad m = \alpha p + (1 - \alpha) q

    It is bounded by -log(alpha) before T**2. A class that one side cannot give is like any other.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``skew_reverse_kl_div(a, b.detach())`` and
            ``skew_kl_div(b, a.detach())`` have their gradients.
        alpha: the student's share of the mixture, a number from 0 to 1, or a tensor that broadcasts to ``[*]``, one per
            row. 0 is ``reverse_kl_div``, of single rows as well; at 1 the loss is 0. Default 0.1.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*]``, one per row. Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2, so that gradients keep their size when T changes. Default:
            True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; ``"batchmean"``, the sum over the number of rows that
            count, the default; or ``"mean"``, which divides by V as well.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import skew_reverse_kl_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = skew_reverse_kl_div(student, teacher, alpha=0.1)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.0859, torch.Size([2, 3]))

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, alpha,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("skew_reverse_kl_div", student, teacher, options, dim)
