"""Losses of logits that are no Kullback-Leibler divergence between two softmaxes. What they share with the other
losses of logits stands in :mod:`fastkd.functional.logits`.
"""

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits, WholeTeacher
from ._logits_loss import _logits_loss


def negative_log_acceptance(
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
    r"""Negative logarithm of the rate at which speculative decoding accepts the student's tokens.

    .. math:: -T^2 \log \sum_v \min(p_v, q_v)

    The sum is 1 less the total variation: the probability with which a token that the student drafts is accepted by the
    teacher. With a temperature, ``t_squared=False`` keeps the loss a logarithm of that. A class where p = q adds
    nothing to the gradient. Where no class is possible with both, the loss is +inf and the gradient 0; so it is where
    the rate is smaller than a number of the dtype can be, 1e-38 in float32, which is a loss of 87.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``negative_log_acceptance(a, b.detach())``
            and ``negative_log_acceptance(b, a.detach())`` have their gradients.
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
        >>> from fastkd.functional import negative_log_acceptance
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = negative_log_acceptance(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.2374, torch.Size([2, 3]))

    Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023, for the rate.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature,
        teacher_temperature,
        t_squared,
        mask,
        weight,
        reduction,
        normalizer,
        inplace,
        0.0,
        standardize=standardize,
        num_classes=num_classes,
        group=group,
    )
    return _logits_loss("negative_log_acceptance", student, teacher, options, dim)


def alpha_beta_div(
    student: Logits,
    teacher: TeacherLogits,
    *,
    alpha: Tensor | float = 0.2,
    beta: Tensor | float = 0.7,
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
    r"""Alpha-beta divergence, which weighs where the student is wrong and where it is sure by two numbers.

    .. math::

        -\frac{T^2}{\alpha \beta} \sum_v \left(q_v^\alpha p_v^\beta - \frac{\alpha}{\alpha + \beta} q_v^{\alpha + \beta}
        - \frac{\beta}{\alpha + \beta} p_v^{\alpha + \beta}\right)

    with its limits where alpha, beta or both are 0: ``(1, 0)`` is ``kl_div``, ``(0, 1)`` is ``reverse_kl_div``, and
    ``(0, 0)`` is half the sum of the squared differences of log-probabilities.

    A class that only one side can give adds a finite term, but +inf where its power is 0: with a beta of 0 where p = 0,
    and with an alpha of 0 where q = 0; of the latter, and with both 0, the row has no gradient: it is 0. Far from p = q
    the relative error is about 1e-7 over the larger of alpha and beta.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``alpha_beta_div(a, b.detach())`` and
            ``alpha_beta_div(b, a.detach(), alpha=beta, beta=alpha)`` have their gradients.
        alpha: the power of q, a number of at least 0, or a tensor that broadcasts to ``[*]``, one per row. Default 0.2.
        beta: the power of p, of the same form. Default 0.7.
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
        >>> from fastkd.functional import alpha_beta_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = alpha_beta_div(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1213, torch.Size([2, 3]))

    Source: Wang, Yang, Wang, Wang, Xu, Huang, "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
    Distillation via Alpha-Beta-Divergence", 2025.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature,
        teacher_temperature,
        t_squared,
        mask,
        weight,
        reduction,
        normalizer,
        inplace,
        alpha,
        standardize=standardize,
        num_classes=num_classes,
        group=group,
        second=beta,
    )
    return _logits_loss("alpha_beta_div", student, teacher, options, dim)


def bernoulli_kl_div(
    student: Logits,
    teacher: WholeTeacher,
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
    r"""Kullback-Leibler divergence of labels that do not exclude each other: every class is a coin.

    .. math:: T^2 \sum_v \left(q_v \log \frac{q_v}{p_v} + (1 - q_v) \log \frac{1 - q_v}{1 - p_v}\right)

    with :math:`p = \sigma(student / T)` and :math:`q = \sigma(teacher / T_{teacher})` of each class, without a softmax,
    and the gradient :math:`T (p - q)`.

    A logit of -inf is a coin that never falls: where it is the student's alone, the loss is +inf. No row is without a
    possible class.

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
        >>> from fastkd.functional import bernoulli_kl_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = bernoulli_kl_div(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.0709, torch.Size([2, 3]))

    Source: Yang, Xie, Zong, Feng, Niu, Sugiyama, Huang, "Multi-Label Knowledge Distillation", 2023.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature,
        teacher_temperature,
        t_squared,
        mask,
        weight,
        reduction,
        normalizer,
        inplace,
        0.0,
        standardize=standardize,
        num_classes=num_classes,
        group=group,
    )
    return _logits_loss("bernoulli_kl_div", student, teacher, options, dim)
