"""Cross-entropy with the teacher's probabilities. What it shares with the other losses of logits stands in
:mod:`fastkd.functional.logits`."""

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits
from ._logits_loss import _logits_loss


def soft_cross_entropy(
    student: Logits,
    teacher: TeacherLogits,
    *,
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
    r"""Cross-entropy of the student with the teacher's distribution as soft labels.

    .. math:: T^2 \left(-\sum_v q_v \log p_v\right)

    It is ``kl_div`` plus the teacher's entropy: the gradient is the same, and the loss does not go to 0.

    A class with q = 0 contributes 0; one with p = 0 and q > 0 makes the loss +inf.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant.
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
        >>> from fastkd.functional import soft_cross_entropy
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = soft_cross_entropy(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (4.0695, torch.Size([2, 3]))

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, 0.0,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("soft_cross_entropy", student, teacher, options, dim)
