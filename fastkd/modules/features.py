"""Losses of features as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check, functional
from .._types import FeatureNormalize, Layers, LossOrMore, Reduction
from ._loss import _Loss


def _check_layer_weights(value):
    if value is not None:
        _check.layer_weights(value, len(value) if hasattr(value, "__len__") else 1)


class FeatureMSELoss(_Loss):
    r"""Mean squared difference of features, of one layer or of lists of them.

    The formula and what the loss does are those of :func:`fastkd.functional.feature_mse`.

    Args:
        normalize: None; ``"l2"``, rows over their length; or ``"standardize"``, rows less their mean, over their
            standard deviation. Default None.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default: 1 for each.
        return_layers: whether each layer's own loss is returned as well. Default False.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Shape:
        student and teacher ``[*, D]`` or ``[B, C, H, W]``, or lists of these; the loss has no dimensions, or is one per
        row with ``reduction="none"``. With ``return_layers`` it is the pair (loss, layers).

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> loss = fastkd.FeatureMSELoss(normalize="l2")(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.1464
    """

    _options = ("normalize", "reduction", "layer_weights", "return_layers", "dim")

    def __init__(
        self,
        *,
        normalize: FeatureNormalize = None,
        reduction: Reduction = "mean",
        layer_weights: Sequence[float] | None = None,
        return_layers: bool = False,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        _check.feature_normalize(normalize)
        _check.reduction(reduction)
        _check_layer_weights(layer_weights)
        _check.feature_dim(dim)
        _check.flag("return_layers", return_layers)
        self.normalize: FeatureNormalize = normalize
        self.reduction: Reduction = reduction
        self.layer_weights: Sequence[float] | None = layer_weights
        self.return_layers = return_layers
        self.dim = dim

    def forward(
        self,
        student: Layers,
        teacher: Layers,
        *,
        mask: Layers | None = None,
        weight: Layers | None = None,
        normalizer: Tensor | float | None = None,
    ) -> LossOrMore:
        """The loss.

        Args:
            student: features ``[*, D]``, or maps ``[B, C, H, W]``; or a list of these, one for each layer.
            teacher: the same shapes, constants.
            mask: bool, broadcastable to the shape without the features, True where the row counts; or a list. Default:
                every row counts.
            weight: float, broadcastable likewise, multiplies the row's loss; or a list. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.feature_mse(
            student,
            teacher,
            normalize=self.normalize,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            layer_weights=self.layer_weights,
            return_layers=self.return_layers,
            dim=self.dim,
        )


class FeatureSmoothL1Loss(_Loss):
    r"""Smooth L1 of differences of features, of one layer or of lists of them.

    The formula and what the loss does are those of :func:`fastkd.functional.feature_smooth_l1`.

    Args:
        beta: where squares become absolute differences, a finite number of at least 0. Default 1.0.
        normalize: None; ``"l2"``, rows over their length; or ``"standardize"``, rows less their mean, over their
            standard deviation. Default None.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default: 1 for each.
        return_layers: whether each layer's own loss is returned as well. Default False.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Shape:
        student and teacher ``[*, D]`` or ``[B, C, H, W]``, or lists of these; the loss has no dimensions, or is one per
        row with ``reduction="none"``. With ``return_layers`` it is the pair (loss, layers).

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> loss = fastkd.FeatureSmoothL1Loss(beta=0.5)(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.375
    """

    _options = ("beta", "normalize", "reduction", "layer_weights", "return_layers", "dim")

    def __init__(
        self,
        *,
        beta: float = 1.0,
        normalize: FeatureNormalize = None,
        reduction: Reduction = "mean",
        layer_weights: Sequence[float] | None = None,
        return_layers: bool = False,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        _check.at_least_zero("beta", beta)
        _check.feature_normalize(normalize)
        _check.reduction(reduction)
        _check_layer_weights(layer_weights)
        _check.feature_dim(dim)
        _check.flag("return_layers", return_layers)
        self.beta = beta
        self.normalize: FeatureNormalize = normalize
        self.reduction: Reduction = reduction
        self.layer_weights: Sequence[float] | None = layer_weights
        self.return_layers = return_layers
        self.dim = dim

    def forward(
        self,
        student: Layers,
        teacher: Layers,
        *,
        mask: Layers | None = None,
        weight: Layers | None = None,
        normalizer: Tensor | float | None = None,
    ) -> LossOrMore:
        """The loss.

        Args:
            student: features ``[*, D]``, or maps ``[B, C, H, W]``; or a list of these, one for each layer.
            teacher: the same shapes, constants.
            mask: bool, broadcastable to the shape without the features, True where the row counts; or a list. Default:
                every row counts.
            weight: float, broadcastable likewise, multiplies the row's loss; or a list. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.feature_smooth_l1(
            student,
            teacher,
            beta=self.beta,
            normalize=self.normalize,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            layer_weights=self.layer_weights,
            return_layers=self.return_layers,
            dim=self.dim,
        )


class FeatureCosineLoss(_Loss):
    r"""One minus the cosine between student's and teacher's features, of one layer or of lists of them.

    The formula and what the loss does are those of :func:`fastkd.functional.feature_cosine`.

    Args:
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default: 1 for each.
        return_layers: whether each layer's own loss is returned as well. Default False.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Shape:
        student and teacher ``[*, D]`` or ``[B, C, H, W]``, or lists of these; the loss has no dimensions, or is one per
        row with ``reduction="none"``. With ``return_layers`` it is the pair (loss, layers).

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> loss = fastkd.FeatureCosineLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.1464
    """

    _options = ("reduction", "layer_weights", "return_layers", "dim")

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        layer_weights: Sequence[float] | None = None,
        return_layers: bool = False,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        _check.reduction(reduction)
        _check_layer_weights(layer_weights)
        _check.feature_dim(dim)
        _check.flag("return_layers", return_layers)
        self.reduction: Reduction = reduction
        self.layer_weights: Sequence[float] | None = layer_weights
        self.return_layers = return_layers
        self.dim = dim

    def forward(
        self,
        student: Layers,
        teacher: Layers,
        *,
        mask: Layers | None = None,
        weight: Layers | None = None,
        normalizer: Tensor | float | None = None,
    ) -> LossOrMore:
        """The loss.

        Args:
            student: features ``[*, D]``, or maps ``[B, C, H, W]``; or a list of these, one for each layer.
            teacher: the same shapes, constants.
            mask: bool, broadcastable to the shape without the features, True where the row counts; or a list. Default:
                every row counts.
            weight: float, broadcastable likewise, multiplies the row's loss; or a list. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.feature_cosine(
            student,
            teacher,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            layer_weights=self.layer_weights,
            return_layers=self.return_layers,
            dim=self.dim,
        )


class AttentionTransferLoss(_Loss):
    r"""Attention transfer: the student looks where the teacher looks.

    The formula and what the loss does are those of :func:`fastkd.functional.attention_transfer`.

    Args:
        p: the power, a finite number of at least 1. Default 2.

    Shape:
        student ``[B, C_s, H, W]`` and teacher ``[B, C_t, H, W]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]], requires_grad=True)
        >>> teacher = torch.tensor([[[[3.0, 1.0]]]])
        >>> loss = fastkd.AttentionTransferLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.6518
    """

    _options = ("p",)

    def __init__(self, *, p: float = 2) -> None:
        super().__init__()
        _check.exponent("p", p)
        self.p = p

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: maps ``[B, C_s, H, W]``.
            teacher: maps ``[B, C_t, H, W]``, a constant.
        """
        return functional.attention_transfer(student, teacher, p=self.p)


class LinearFeatureMSELoss(_Loss):
    r"""Mean squared difference of projected student features and a teacher's of another width.

    The formula and what the loss does are those of :func:`fastkd.functional.linear_feature_mse`. The module owns its
    projector, a ``torch.nn.Linear`` to be trained with the student: its parameters go to the optimizer. On several
    processes the module is wrapped in DistributedDataParallel, as the student is; otherwise each process trains a
    projector of its own.

    Args:
        student_features: the width D_s; of maps the number of channels.
        teacher_features: the width D_t, likewise.
        bias: whether the projector has one. Default True.
        normalize: None; ``"l2"``, rows over their length; or ``"standardize"``, rows less their mean, over their
            standard deviation. Default None.
        reduction: ``"mean"``, ``"batchmean"``, ``"sum"`` or ``"none"``. Default: ``"mean"``.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.
        device: of the projector. Default: torch's.
        dtype: of the projector. Default: torch's.

    Shape:
        student ``[*, D_s]`` or ``[B, D_s, H, W]``, teacher ``[*, D_t]`` or ``[B, D_t, H, W]``; the loss has no
        dimensions, or is one per row with ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> loss_function = fastkd.LinearFeatureMSELoss(2, 3)
        >>> loss = loss_function(torch.ones(4, 2, requires_grad=True), torch.ones(4, 3))
        >>> loss.backward()
        >>> loss_function.projector.weight.grad.shape
        torch.Size([3, 2])
    """

    _options = ("normalize", "reduction", "dim")

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        bias: bool = True,
        normalize: FeatureNormalize = None,
        reduction: Reduction = "mean",
        dim: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("student_features", student_features), ("teacher_features", teacher_features)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: a whole number wanted, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: at least 1 wanted, got {value}")
        _check.flag("bias", bias)
        _check.feature_normalize(normalize)
        _check.reduction(reduction)
        _check.feature_dim(dim)
        self.normalize: FeatureNormalize = normalize
        self.reduction: Reduction = reduction
        self.dim = dim
        self.projector: torch.nn.Linear = torch.nn.Linear(student_features, teacher_features, bias, device, dtype)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            student: features ``[*, D_s]``, or maps ``[B, D_s, H, W]``.
            teacher: features ``[*, D_t]``, or maps ``[B, D_t, H, W]``, a constant.
            mask: bool, broadcastable to the shape without the features, True where the row counts. Default: every row
                counts.
            weight: float, broadcastable likewise, multiplies the row's loss. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.linear_feature_mse(
            student,
            self.projector.weight,
            teacher,
            projector_bias=self.projector.bias,
            normalize=self.normalize,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            dim=self.dim,
        )
