"""The DIST loss as a module: see :mod:`fastkd.functional.dist`."""

from torch import Tensor

from .. import _check, functional
from .._types import Logits, ProcessGroup, WholeTeacher
from ._loss import _Loss


class DISTLoss(_Loss):
    r"""One less the correlation of the student's probabilities with the teacher's, along rows and along columns.

    .. math:: T^2 \left(\frac{w_{inter}}{N} \sum_n \left(1 - \rho(p_{n\cdot}, q_{n\cdot})\right)
        + \frac{w_{intra}}{V} \sum_v \left(1 - \rho(p_{\cdot v}, q_{\cdot v})\right)\right)

    The options and what the loss does are those of :func:`fastkd.functional.dist_loss`.

    Args:
        inter_weight: what the mean over rows is multiplied by, at least 0. Default 1.
        intra_weight: what the mean over columns is multiplied by, at least 0. Default 1.
        temperature: T, a positive number. Default 1.
        eps: what is added to the product of lengths, at least 1e-37. Default 1e-8.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split. Default: none.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.DISTLoss(intra_weight=2.0, temperature=4.0)
        >>> loss = loss_function(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        33.4998
    """

    _options = (
        "inter_weight",
        "intra_weight",
        "temperature",
        "eps",
        "standardize",
        "dim",
        "num_classes",
        "inplace",
        "group",
    )

    def __init__(
        self,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: float = 1.0,
        eps: float = 1e-8,
        standardize: bool = False,
        dim: int = -1,
        num_classes: int | None = None,
        inplace: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        options = _check.DistOptions(
            inter_weight, intra_weight, temperature, eps, standardize, None, inplace, num_classes, group
        )
        _check.dist_module(options, dim)
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.temperature = temperature
        self.eps = eps
        self.standardize = standardize
        self.dim = dim
        self.num_classes = num_classes
        self.inplace = inplace
        self.group = group

    def forward(
        self,
        student: Logits,
        teacher: WholeTeacher,
        *,
        temperature: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss: a tensor without dimensions.

        Args:
            student: raw logits ``[*, V]``, whose classes are at ``dim``.
            teacher: raw logits of the same shape, a constant.
            temperature: for this call, a positive number. Default: the module's.
            mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row counts.
        """
        return functional.dist_loss(
            student,
            teacher,
            inter_weight=self.inter_weight,
            intra_weight=self.intra_weight,
            temperature=self.temperature if temperature is None else temperature,
            eps=self.eps,
            standardize=self.standardize,
            dim=self.dim,
            num_classes=self.num_classes,
            mask=mask,
            inplace=self.inplace,
            group=self.group,
        )
