"""Losses of logits that weigh both directions of the divergence row by row. What they share with the other losses of
logits stands in :mod:`fastkd.functional.logits`."""

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits
from ._logits_loss import _logits_loss


def adaptive_kl_div(
    student: Logits,
    teacher: TeacherLogits,
    *,
    mu: float = 0.5,
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
    r"""Both Kullback-Leibler divergences, weighted in each row by where student and teacher differ.

    .. math:: T^2 \left(g \sum_v q_v (\log q_v - \log p_v) + (1 - g) \sum_v p_v (\log p_v - \log q_v)\right), \quad
        g = \frac{\sum_{v \in head} |p_v - q_v|}{\sum_v |p_v - q_v|}

    The teacher's head are the classes with :math:`q \ge \tau`, for the smallest :math:`\tau` whose classes sum to at
    most mu, and always the best class. Classes of equal logits go together, so that their order does not matter. Where
    the two differ in the head, as the forward divergence sees best, it counts for more; where they differ in the tail,
    the reverse one. g is a constant, through which no gradient flows. Where p = q it is 1/2.

    A class that one side cannot give and the other can makes the loss +inf. Where it is the teacher that cannot, the
    row has no gradient: it is 0. A divergence whose weight is 0 is left out.

    Beside what the other losses of logits read and write, it reads student and teacher once more, and keeps a number
    for each row. On the CPU each thread's scratch memory is 20 bytes a class here, 40 in float64.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. There are no two calls that have the gradients of both sides where
            both learn, as the head is the teacher's.
        mu: what the head's probabilities sum to at most, a number from 0 to 1. At 0 the best class alone is the head; 1
            is ``kl_div``. Default 0.5.
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
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says; not with
            :class:`fastkd.Probabilities`. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import adaptive_kl_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = adaptive_kl_div(student, teacher, mu=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1053, torch.Size([2, 3]))

    Source: Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    2024.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, mu,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("adaptive_kl_div", student, teacher, options, dim)
