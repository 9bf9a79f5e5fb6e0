"""Skewed Kullback-Leibler divergences as modules: see :mod:`fastkd.functional.skew`."""

from torch import Tensor

from .. import _check, _divergences, functional
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits
from ._loss import _Loss


class SkewKLDivLoss(_Loss):
    r"""Kullback-Leibler divergence of a mixture of both sides from the teacher.

    .. math:: T^2\, \mathrm{KL}(q \,\|\, \alpha q + (1 - \alpha) p)

    The options and what the loss does are those of :func:`fastkd.functional.skew_kl_div`.

    Args:
        alpha: the teacher's share of the mixture, from 0 to 1. Default 0.1.
        temperature: T, a positive number. Default 1.
        teacher_temperature: the teacher's own temperature, a positive number. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2. Default True.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        reduction: ``"none"``, ``"sum"``, ``"batchmean"`` or ``"mean"``. Default: ``"batchmean"``.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split. Default: none.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``; the loss has no dimensions, or ``[*]`` with
        ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.SkewKLDivLoss(alpha=0.1)
        >>> loss = loss_function(student, teacher, mask=torch.tensor([True, False]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0678
    """

    _options = (
        "alpha",
        "temperature",
        "teacher_temperature",
        "t_squared",
        "standardize",
        "dim",
        "num_classes",
        "reduction",
        "inplace",
        "group",
    )

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        t_squared: bool = True,
        standardize: bool = False,
        dim: int = -1,
        num_classes: int | None = None,
        reduction: Reduction = "batchmean",
        inplace: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.logits_module(
            temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction, inplace,
            group,
        )  # fmt: skip
        _check.parameter(_divergences.REGISTRY["skew_kl_div"].parameter, alpha)
        self.alpha = alpha
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.standardize = standardize
        self.dim = dim
        self.num_classes = num_classes
        self.reduction: Reduction = reduction
        self.inplace = inplace
        self.group = group

    def forward(
        self,
        student: Logits,
        teacher: TeacherLogits,
        *,
        temperature: Tensor | float | None = None,
        teacher_temperature: Tensor | float | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """The loss: a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

        Args:
            student: raw logits ``[*, V]``, whose classes are at ``dim``, or :class:`fastkd.LinearLogits`.
            teacher: of the same shape, a constant, of either form.
            temperature: for this call, a number or a tensor that broadcasts to ``[*]``. Default: the module's.
            teacher_temperature: for this call, of the same form. Default: the module's.
            mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[*]``, multiplies the row's loss. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.skew_kl_div(
            student,
            teacher,
            alpha=self.alpha,
            temperature=self.temperature if temperature is None else temperature,
            teacher_temperature=self.teacher_temperature if teacher_temperature is None else teacher_temperature,
            t_squared=self.t_squared,
            standardize=self.standardize,
            dim=self.dim,
            num_classes=self.num_classes,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
            group=self.group,
        )


class SkewReverseKLDivLoss(_Loss):
    r"""Kullback-Leibler divergence of a mixture of both sides from the student.

    .. math:: T^2\, \mathrm{KL}(p \,\|\, \alpha p + (1 - \alpha) q)

    The options and what the loss does are those of :func:`fastkd.functional.skew_reverse_kl_div`.

    Args:
        alpha: the student's share of the mixture, from 0 to 1. Default 0.1.
        temperature: T, a positive number. Default 1.
        teacher_temperature: the teacher's own temperature, a positive number. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2. Default True.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        reduction: ``"none"``, ``"sum"``, ``"batchmean"`` or ``"mean"``. Default: ``"batchmean"``.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split. Default: none.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``; the loss has no dimensions, or ``[*]`` with
        ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.SkewReverseKLDivLoss(alpha=0.1)
        >>> loss = loss_function(student, teacher, mask=torch.tensor([True, False]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.075
    """

    _options = (
        "alpha",
        "temperature",
        "teacher_temperature",
        "t_squared",
        "standardize",
        "dim",
        "num_classes",
        "reduction",
        "inplace",
        "group",
    )

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        t_squared: bool = True,
        standardize: bool = False,
        dim: int = -1,
        num_classes: int | None = None,
        reduction: Reduction = "batchmean",
        inplace: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.logits_module(
            temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction, inplace,
            group,
        )  # fmt: skip
        _check.parameter(_divergences.REGISTRY["skew_reverse_kl_div"].parameter, alpha)
        self.alpha = alpha
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.standardize = standardize
        self.dim = dim
        self.num_classes = num_classes
        self.reduction: Reduction = reduction
        self.inplace = inplace
        self.group = group

    def forward(
        self,
        student: Logits,
        teacher: TeacherLogits,
        *,
        temperature: Tensor | float | None = None,
        teacher_temperature: Tensor | float | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """The loss: a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

        Args:
            student: raw logits ``[*, V]``, whose classes are at ``dim``, or :class:`fastkd.LinearLogits`.
            teacher: of the same shape, a constant, of either form.
            temperature: for this call, a number or a tensor that broadcasts to ``[*]``. Default: the module's.
            teacher_temperature: for this call, of the same form. Default: the module's.
            mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[*]``, multiplies the row's loss. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.skew_reverse_kl_div(
            student,
            teacher,
            alpha=self.alpha,
            temperature=self.temperature if temperature is None else temperature,
            teacher_temperature=self.teacher_temperature if teacher_temperature is None else teacher_temperature,
            t_squared=self.t_squared,
            standardize=self.standardize,
            dim=self.dim,
            num_classes=self.num_classes,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
            group=self.group,
        )
