"""Losses of logits that weigh both directions row by row, as modules: see :mod:`fastkd.functional.adaptive`."""

from torch import Tensor

from .. import _check, _divergences, functional
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits
from ._loss import _Loss


class AdaptiveKLDivLoss(_Loss):
    r"""Both Kullback-Leibler divergences, weighted in each row by where student and teacher differ.

    .. math:: T^2 \left(g\, \mathrm{KL}(q \,\|\, p) + (1 - g)\, \mathrm{KL}(p \,\|\, q)\right)

    with g the share of :math:`\sum_v |p_v - q_v|` that lies in the teacher's head, its most probable classes.

    The options and what the loss does are those of :func:`fastkd.functional.adaptive_kl_div`.

    Args:
        mu: what the head's probabilities sum to at most, from 0 to 1. Default 0.5.
        temperature: T, a positive number. Default 1.
        teacher_temperature: the teacher's own temperature, a positive number. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2. Default True.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        reduction: ``"none"``, ``"sum"``, ``"batchmean"`` or ``"mean"``. Default: ``"batchmean"``.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split, not with :class:`fastkd.Probabilities`.
            Default: none.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``; the loss has no dimensions, or ``[*]`` with
        ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.AdaptiveKLDivLoss(mu=0.5)
        >>> loss = loss_function(student, teacher, mask=torch.tensor([True, False]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0893
    """

    _options = (
        "mu",
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
        mu: float = 0.5,
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
            temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction, inplace, group
        )
        _check.parameter(_divergences.DERIVED["adaptive_kl_div"].parameter, mu)
        self.mu = mu
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
        return functional.adaptive_kl_div(
            student,
            teacher,
            mu=self.mu,
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
