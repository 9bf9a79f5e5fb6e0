"""Cross-entropy with labels beside a divergence from a teacher. What all losses with a target share stands in
:mod:`fastkd.functional.targets`."""

from typing import Literal, NamedTuple, overload

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, SoftDivergence, TargetReduction, TeacherLogits
from ._logits_loss import _logits_loss


class KDParts(NamedTuple):
    """What ``kd_loss`` returns with ``return_parts=True``. All but the loss are means over the rows that count, 0 where
    none does: tensors without dimensions, in the dtype of the loss, and constants for autograd."""

    loss: Tensor
    """The loss, as without ``return_parts``."""
    hard: Tensor
    """Cross-entropy with the target, before its weight."""
    soft: Tensor
    """The divergence from the teacher with its T**2, before its weight."""
    student_entropy: Tensor
    """The entropy of the student's p that the soft loss compares, which is at T and perhaps standardized."""
    teacher_entropy: Tensor
    """The entropy of the teacher's q, likewise."""
    agreement: Tensor
    """The share of rows whose best class, the first of equal ones, is the same with student and teacher."""


@overload
def kd_loss(
    student: Logits,
    teacher: TeacherLogits,
    target: Tensor,
    *,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    divergence: SoftDivergence = "kl_div",
    beta: Tensor | float | None = None,
    student_weight: Tensor | float | None = None,
    alpha: Tensor | float | None = None,
    mu: float | None = None,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TargetReduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    return_parts: Literal[False] = False,
) -> Tensor: ...
@overload
def kd_loss(
    student: Logits,
    teacher: TeacherLogits,
    target: Tensor,
    *,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    divergence: SoftDivergence = "kl_div",
    beta: Tensor | float | None = None,
    student_weight: Tensor | float | None = None,
    alpha: Tensor | float | None = None,
    mu: float | None = None,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TargetReduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    return_parts: Literal[True],
) -> KDParts: ...
def kd_loss(
    student: Logits,
    teacher: TeacherLogits,
    target: Tensor,
    *,
    hard_weight: float = 0.5,
    soft_weight: float = 0.5,
    divergence: SoftDivergence = "kl_div",
    beta: Tensor | float | None = None,
    student_weight: Tensor | float | None = None,
    alpha: Tensor | float | None = None,
    mu: float | None = None,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TargetReduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    return_parts: bool = False,
) -> Tensor | KDParts:
    r"""Cross-entropy with the target beside a divergence from the teacher, in one pass over the logits.

    .. math:: w_{hard} \left(-\log \mathrm{softmax}(student)_{target}\right) + w_{soft}\, T^2 D(q, p)

    The first part, the hard loss, is at temperature 1. The second, the soft loss, is any of the divergences that
    have functions of their own, with its temperatures. With label smoothing s the first part is (1 - s) times the
    target's -log p plus s times the mean of all classes', as that of ``torch.nn.functional.cross_entropy``. Where
    one part is +inf, so is the loss; the other part keeps its gradient. A part whose weight is 0 is left out.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`, and what is said of targets in
    :mod:`fastkd.functional.targets`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant.
        target: the class of each row, whole numbers ``[*]``.
        hard_weight: what the cross-entropy is multiplied by, at least 0. Default 0.5.
        soft_weight: what the divergence is multiplied by, at least 0. Default 0.5.
        divergence: ``"kl_div"``, the default, ``"soft_cross_entropy"``, ``"reverse_kl_div"``, ``"js_div"``,
            ``"symmetric_kl_div"``, ``"skew_kl_div"``, ``"skew_reverse_kl_div"``, ``"total_variation"``,
            ``"negative_log_acceptance"``, ``"alpha_beta_div"``, ``"bernoulli_kl_div"`` or ``"adaptive_kl_div"``.
        beta: of ``js_div`` and ``alpha_beta_div``, and of no other; see there. Default: that function's.
        student_weight: of ``symmetric_kl_div``, and of no other; see there. Default: that function's.
        alpha: of ``skew_kl_div``, ``skew_reverse_kl_div`` and ``alpha_beta_div``, and of no other; see there. Default:
            that function's.
        mu: of ``adaptive_kl_div``, and of no other; see there. Default: that function's.
        temperature: T of the soft loss, a positive number, or a tensor that broadcasts to ``[*]``, one per row.
            Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the soft loss is multiplied by T**2, so that gradients keep their size when T changes.
            Default: True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. The hard loss sees the logits as they are. Default False.
        ignore_index: the target of rows that do not count. Default -100.
        label_smoothing: s, from 0 to 1. Default 0.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts that has a target.
        weight: float, broadcastable to ``[*]``, multiplies both parts of the row's loss; the divisor does not change.
            Default: 1 for every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; or ``"batchmean"``, the sum over the number of rows
            that count, the default.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where no row counts. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says; targets are
            numbers of all classes. Default: none.
        return_parts: whether the loss comes with its parts, the entropies of both sides and their agreement, as a
            :class:`KDParts`. On the CPU they are from the same pass over memory; on a GPU a kernel before it reads both
            logits for them, and with a ``soft_weight`` of 0 the divergence takes a pass of its own. Default False.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``; with ``return_parts`` a named tuple
        that begins with it.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import kd_loss
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> target = torch.tensor([0, 2])
        >>> loss = kd_loss(student, teacher, target, temperature=2.0, hard_weight=0.1, soft_weight=0.9)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1839, torch.Size([2, 3]))

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    parameters = {"beta": beta, "student_weight": student_weight, "alpha": alpha, "mu": mu}
    parameter, second = _check.soft_divergence(divergence, parameters)
    target = _check.as_classes(target)
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, parameter,
        target, ignore_index, hard_weight, soft_weight, label_smoothing, second=second,
        standardize=standardize, num_classes=num_classes, return_parts=return_parts, group=group,
    )  # fmt: skip
    found = _logits_loss(divergence, student, teacher, options, dim)
    return KDParts(found[0], *found[1].unbind()) if return_parts else found
