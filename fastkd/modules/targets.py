"""Losses of logits that have a target, as modules: see :mod:`fastkd.functional.targets`."""

from torch import Tensor

from .. import _check, _divergences, functional
from .._types import Logits, ProcessGroup, TargetReduction, WholeTeacher
from ._loss import _Loss


class DKDLoss(_Loss):
    r"""Decoupled knowledge distillation: the target and the other classes are weighed by themselves.

    .. math:: T^2 \left(\alpha\, \mathrm{TCKD} + \beta\, \mathrm{NCKD}\right)

    The options and what the loss does are those of :func:`fastkd.functional.dkd_loss`.

    Args:
        alpha: the weight of the divergence between the target and all other classes together, at least 0. Default 1.
        beta: the weight of the divergence between the other classes, at least 0. Default 8.
        temperature: T, a positive number. Default 4.
        teacher_temperature: the teacher's own temperature, a positive number. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2. Default True.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1. Default False.
        ignore_index: the target of rows that do not count. Default -100.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        reduction: ``"none"``, ``"sum"`` or ``"batchmean"``. Default: ``"batchmean"``.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split. Default: none.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``, and target ``[*]``; the loss has no dimensions, or ``[*]``
        with ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.DKDLoss(beta=2.0)
        >>> loss = loss_function(student, teacher, torch.tensor([0, -100]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.1241
    """

    _options = (
        "alpha",
        "beta",
        "temperature",
        "teacher_temperature",
        "t_squared",
        "standardize",
        "ignore_index",
        "dim",
        "num_classes",
        "reduction",
        "inplace",
        "group",
    )

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        teacher_temperature: float | None = None,
        t_squared: bool = True,
        standardize: bool = False,
        ignore_index: int = -100,
        dim: int = -1,
        num_classes: int | None = None,
        reduction: TargetReduction = "batchmean",
        inplace: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.parameter(_divergences.TARGET_LOSSES["dkd_loss"].second, alpha)
        _check.parameter(_divergences.TARGET_LOSSES["dkd_loss"].parameter, beta)
        _check.target_reduction(reduction)
        _check.logits_module(
            temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction, inplace, group
        )
        _check.whole_number("ignore_index", ignore_index)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.standardize = standardize
        self.ignore_index = ignore_index
        self.dim = dim
        self.num_classes = num_classes
        self.reduction: TargetReduction = reduction
        self.inplace = inplace
        self.group = group

    def forward(
        self,
        student: Logits,
        teacher: WholeTeacher,
        target: Tensor,
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
            target: the class of each row, whole numbers ``[*]``.
            temperature: for this call, a number or a tensor that broadcasts to ``[*]``. Default: the module's.
            teacher_temperature: for this call, of the same form. Default: the module's.
            mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row that has a target.
            weight: float, broadcastable to ``[*]``, multiplies the row's loss. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.dkd_loss(
            student,
            teacher,
            target,
            alpha=self.alpha,
            beta=self.beta,
            t_squared=self.t_squared,
            standardize=self.standardize,
            ignore_index=self.ignore_index,
            temperature=self.temperature if temperature is None else temperature,
            teacher_temperature=self.teacher_temperature if teacher_temperature is None else teacher_temperature,
            dim=self.dim,
            num_classes=self.num_classes,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
            group=self.group,
        )


class NKDLoss(_Loss):
    r"""Normalized knowledge distillation: the target as the teacher sees it, and the other classes by themselves.

    .. math:: -q_y \log p_y + \gamma\, T^2 \left(-\sum_{v \ne y} \hat q_v \log \hat p_v\right)

    The options and what the loss does are those of :func:`fastkd.functional.nkd_loss`.

    Args:
        gamma: the weight of the second term, at least 0. Default 1.5.
        temperature: T of the second term, a positive number. Default 1.
        teacher_temperature: the teacher's own temperature there, a positive number. Default: ``temperature``.
        t_squared: whether the second term is multiplied by T**2. Default True.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1. Default False.
        ignore_index: the target of rows that do not count. Default -100.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        reduction: ``"none"``, ``"sum"`` or ``"batchmean"``. Default: ``"batchmean"``.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split. Default: none.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``, and target ``[*]``; the loss has no dimensions, or ``[*]``
        with ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.NKDLoss(temperature=2.0)
        >>> loss = loss_function(student, teacher, torch.tensor([0, -100]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        4.321
    """

    _options = (
        "gamma",
        "temperature",
        "teacher_temperature",
        "t_squared",
        "standardize",
        "ignore_index",
        "dim",
        "num_classes",
        "reduction",
        "inplace",
        "group",
    )

    def __init__(
        self,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        t_squared: bool = True,
        standardize: bool = False,
        ignore_index: int = -100,
        dim: int = -1,
        num_classes: int | None = None,
        reduction: TargetReduction = "batchmean",
        inplace: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.parameter(_divergences.TARGET_LOSSES["nkd_loss"].parameter, gamma)
        _check.target_reduction(reduction)
        _check.logits_module(
            temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction, inplace, group
        )
        _check.whole_number("ignore_index", ignore_index)
        self.gamma = gamma
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.standardize = standardize
        self.ignore_index = ignore_index
        self.dim = dim
        self.num_classes = num_classes
        self.reduction: TargetReduction = reduction
        self.inplace = inplace
        self.group = group

    def forward(
        self,
        student: Logits,
        teacher: WholeTeacher,
        target: Tensor,
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
            target: the class of each row, whole numbers ``[*]``.
            temperature: for this call, a number or a tensor that broadcasts to ``[*]``. Default: the module's.
            teacher_temperature: for this call, of the same form. Default: the module's.
            mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row that has a target.
            weight: float, broadcastable to ``[*]``, multiplies the row's loss. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.nkd_loss(
            student,
            teacher,
            target,
            gamma=self.gamma,
            t_squared=self.t_squared,
            standardize=self.standardize,
            ignore_index=self.ignore_index,
            temperature=self.temperature if temperature is None else temperature,
            teacher_temperature=self.teacher_temperature if teacher_temperature is None else teacher_temperature,
            dim=self.dim,
            num_classes=self.num_classes,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
            group=self.group,
        )
