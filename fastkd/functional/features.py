r"""Losses of features: the student's hidden layers imitate the teacher's.

Each function has its formula; here stands what holds for all of them.

**Inputs.** A row is a feature vector. Features are ``[*, D]``, or maps ``[B, C, H, W]`` in any memory format, whose
features are the channels. The dtype is float16, bfloat16, float32 or float64, and the teacher's may differ from the
student's.

**Where the features are.** Without ``dim`` they are dimension 1 of tensors with four dimensions, which are taken for
maps, and the last one of tensors with fewer. Attention heads ``[B, H, L, D]`` want ``dim=-1``. Tensors of five and more
dimensions, such as video ``[B, C, T, H, W]``, want ``dim`` said.

**Layers.** :func:`fastkd.functional.feature_mse`, :func:`fastkd.functional.feature_smooth_l1` and
:func:`fastkd.functional.feature_cosine` take lists of tensors, one for each layer, in one call: one kernel on a GPU,
one parallel region on the CPU.

**The teacher is a constant.** A teacher that requires a gradient, while gradients are recorded, is an error: detach it.
Where both sides learn, the same call with the two exchanged has the other's gradient, unless a function says otherwise.

**The loss** is float64 where an input is float64, else float32. It is 0 where there are no rows, or none that counts.

**The gradient** has the student's dtype. It is computed in forward, and backward multiplies it by the incoming
gradient. With ``reduction="none"``, and for float16, backward computes it from the features instead. There is no
second derivative: ``create_graph=True`` is an error.

**Memory.** One pass reads student and teacher and, where a gradient is wanted, writes it.

**DTensors** are taken as losses of logits take them (:mod:`fastkd.functional.logits`): replicated, or split by any
dimension but that of the features; lists of layers by the same dimensions of the mesh. ``attention_transfer`` takes
maps that are split by samples. A projector is whole on every rank, gathered where it is split, and its gradient is
summed over ranks in backward.

**Errors** are raised before anything is computed, and name the argument.
"""

from collections.abc import Sequence

from torch import Tensor

from .. import _backend, _check, _dtensor, reference
from .._types import FeatureNormalize, Layers, LossOrMore, Reduction
from ._feature_loss import _feature_loss, _normalized


def feature_mse(
    student: Layers,
    teacher: Layers,
    *,
    normalize: FeatureNormalize = None,
    mask: Layers | None = None,
    weight: Layers | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    layer_weights: Sequence[float] | None = None,
    return_layers: bool = False,
    dim: int | None = None,
) -> LossOrMore:
    r"""Mean squared difference of features, of one layer or of all layers in one call.

    .. math:: \frac{1}{N D} \sum_{nk} (\hat s_{nk} - \hat t_{nk})^2

    with :math:`\hat x` the rows as they are, over their length, or standardized.

    What all losses of features share stands in :mod:`fastkd.functional.features`.

    Args:
        student: features ``[*, D]``, or maps ``[B, C, H, W]``; or a list of these, one for each layer.
        teacher: the same shapes, constants.
        normalize: None; ``"l2"``, rows over their length (of at least 1e-12; a row of zeros has no gradient); or
            ``"standardize"``, rows less their mean, over sqrt(variance + 1e-6). Default None.
        mask: bool, broadcastable to the shape without the features, True where the row counts. A masked row has loss 0
            and gradient 0 whatever it holds. With lists one for all layers, or a list of one for each. Default: every
            row counts.
        weight: float, broadcastable likewise, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"mean"``, the sum over (rows that count x D), the default; ``"batchmean"``, the sum over the number
            of rows that count; ``"sum"``; or ``"none"``, a loss per row, and of lists a list.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default: 1 for each.
        return_layers: whether each layer's own loss, without its weight, is returned as well: ``[layers]``, detached.
            Default False.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Returns:
        The loss, a tensor without dimensions, or what ``"none"`` says; with ``return_layers`` the pair (loss, layers).

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import feature_mse
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> loss = feature_mse(student, teacher)
        >>> loss.backward()
        >>> loss.item(), student.grad.shape
        (0.5, torch.Size([2, 2]))
        >>> feature_mse([student, student], [teacher, teacher], normalize="l2", return_layers=True)[1].shape
        torch.Size([2])

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015.
    """
    _check.feature_normalize(normalize)
    feature = normalize or "plain"
    return _feature_loss(
        feature, student, teacher, mask, weight, reduction, normalizer, layer_weights, return_layers, dim
    )


def feature_smooth_l1(
    student: Layers,
    teacher: Layers,
    *,
    beta: float = 1.0,
    normalize: FeatureNormalize = None,
    mask: Layers | None = None,
    weight: Layers | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    layer_weights: Sequence[float] | None = None,
    return_layers: bool = False,
    dim: int | None = None,
) -> LossOrMore:
    r"""Smooth L1 of differences of features, of one layer or of all layers in one call.

    .. math:: \frac{1}{N D} \sum_{nk} \ell(\hat s_{nk} - \hat t_{nk}),\quad
        \ell(e) = \begin{cases} e^2 / (2 \beta) & |e| < \beta \\ |e| - \beta / 2 & \text{else} \end{cases}

    with :math:`\hat x` the rows as they are, over their length, or standardized. A large difference pulls no harder
    than one of :math:`\beta`. With ``beta=0`` the loss is L1, :math:`|e|`, which has the gradient 0 where nothing
    differs; times :math:`\beta` it is Huber's, ``F.huber_loss``.

    What all losses of features share stands in :mod:`fastkd.functional.features`.

    Args:
        student: features ``[*, D]``, or maps ``[B, C, H, W]``; or a list of these, one for each layer.
        teacher: the same shapes, constants.
        beta: where squares become absolute differences, a finite number of at least 0. Default 1.0, as of
            ``F.smooth_l1_loss``.
        normalize: None; ``"l2"``, rows over their length (of at least 1e-12; a row of zeros has no gradient); or
            ``"standardize"``, rows less their mean, over sqrt(variance + 1e-6). Default None.
        mask: bool, broadcastable to the shape without the features, True where the row counts. A masked row has loss 0
            and gradient 0 whatever it holds. With lists one for all layers, or a list of one for each. Default: every
            row counts.
        weight: float, broadcastable likewise, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"mean"``, the sum over (rows that count x D), the default; ``"batchmean"``, the sum over the number
            of rows that count; ``"sum"``; or ``"none"``, a loss per row, and of lists a list.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default: 1 for each.
        return_layers: whether each layer's own loss, without its weight, is returned as well: ``[layers]``, detached.
            Default False.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Returns:
        The loss, a tensor without dimensions, or what ``"none"`` says; with ``return_layers`` the pair (loss, layers).

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import feature_smooth_l1
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 3.0], [1.0, 0.5]])
        >>> loss = feature_smooth_l1(student, teacher)
        >>> loss.backward()
        >>> loss.item(), student.grad.tolist()
        (0.40625, [[0.0, -0.25], [0.0, -0.125]])
        >>> feature_smooth_l1(student, teacher, beta=0).item()
        0.625

    Source: Girshick, "Fast R-CNN", 2015, for beta = 1.
    """
    _check.at_least_zero("beta", beta)
    _check.feature_normalize(normalize)
    return _feature_loss(
        normalize or "plain", student, teacher, mask, weight, reduction, normalizer, layer_weights, return_layers, dim,
        float(beta),
    )  # fmt: skip


def feature_cosine(
    student: Layers,
    teacher: Layers,
    *,
    mask: Layers | None = None,
    weight: Layers | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    layer_weights: Sequence[float] | None = None,
    return_layers: bool = False,
    dim: int | None = None,
) -> LossOrMore:
    r"""One minus the cosine between student's and teacher's features.

    .. math:: \frac{1}{N} \sum_n \left(1 - \frac{\langle s_n, t_n \rangle}{\|s_n\| \|t_n\|}\right)

    It is computed as half the squared difference of rows of length 1, so that nothing cancels near convergence. Lengths
    are of at least 1e-12; a row of zeros has no gradient, and a loss of 1/2 beside any other.

    What all losses of features share stands in :mod:`fastkd.functional.features`.

    Args:
        student: features ``[*, D]``, or maps ``[B, C, H, W]``; or a list of these, one for each layer.
        teacher: the same shapes, constants.
        mask: bool, broadcastable to the shape without the features, True where the row counts. A masked row has loss 0
            and gradient 0 whatever it holds. With lists one for all layers, or a list of one for each. Default: every
            row counts.
        weight: float, broadcastable likewise, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"mean"`` and ``"batchmean"``, the sum over the number of rows that count, the default; ``"sum"``;
            or ``"none"``, a loss per row, and of lists a list.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default: 1 for each.
        return_layers: whether each layer's own loss, without its weight, is returned as well: ``[layers]``, detached.
            Default False.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Returns:
        The loss, a tensor without dimensions, or what ``"none"`` says; with ``return_layers`` the pair (loss, layers).

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import feature_cosine
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
        >>> loss = feature_cosine(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1464, torch.Size([2, 2]))

    Source: Sanh et al., "DistilBERT", 2019.
    """
    return _feature_loss(
        "cosine", student, teacher, mask, weight, reduction, normalizer, layer_weights, return_layers, dim
    )


def attention_transfer(student: Tensor, teacher: Tensor, *, p: float = 2) -> Tensor:
    r"""Attention transfer: the student looks where the teacher looks.

    .. math:: \frac{1}{B H W} \sum_{bhw} \left(f^s_{bhw} - f^t_{bhw}\right)^2,\quad
        f = \frac{A}{\|A\|},\ A = \frac{1}{C} \sum_c |x_c|^p

    with the lengths of maps over H W, of at least 1e-12. What is summed over channels is never stored. A map of zeros
    has no gradient; in float16 the gradient is computed in backward.

    What all losses of features share stands in :mod:`fastkd.functional.features`.

    Args:
        student: maps ``[B, C, H, W]``, in any memory format.
        teacher: maps ``[B, C, H, W]``, a constant; the number of channels may differ.
        p: the power, a finite number of at least 1; whole ones up to 4 are fastest. Default 2.

    Returns:
        The loss, a tensor without dimensions. Of no samples 0.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import attention_transfer
        >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]], requires_grad=True)
        >>> teacher = torch.tensor([[[[3.0, 1.0]]]])
        >>> loss = attention_transfer(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.6518, torch.Size([1, 2, 1, 2]))

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017.
    """
    if _dtensor.given(student, teacher):
        return _dtensor.attention_transfer(attention_transfer, student, teacher, p)
    _check.maps(student, teacher)
    _check.exponent("p", p)
    _check.constant_teacher(teacher, "attention_transfer", "attention_transfer({})")
    backend = _backend.select(student.device)
    if backend == "torch":
        return reference.attention_transfer(student, teacher, float(p))
    from ..ops import attention

    return attention.attention_transfer(_backend.namespace(backend), student, teacher, float(p))


def linear_feature_mse(
    student: Tensor,
    projector_weight: Tensor,
    teacher: Tensor,
    *,
    projector_bias: Tensor | None = None,
    normalize: FeatureNormalize = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: Tensor | float | None = None,
    dim: int | None = None,
) -> Tensor:
    r"""Mean squared difference of projected student features and a teacher's of another width.

    .. math:: \mathrm{feature\_mse}(student\, W^\top + b,\ teacher)

    with gradients to student, projector_weight and projector_bias, all by torch's matrix products. Of maps
    ``[B, C, H, W]`` the projector is a 1x1 convolution over the channels. Of the projected features only the
    residual is kept, in their own place and in the dtype of the projection.

    What all losses of features share stands in :mod:`fastkd.functional.features`.

    Args:
        student: features ``[*, D_s]``, or maps ``[B, D_s, H, W]``.
        projector_weight: W, ``[D_t, D_s]``, of the student's dtype (any under autocast).
        teacher: features ``[*, D_t]``, or maps ``[B, D_t, H, W]``, a constant. No call of this loss has its gradient.
        projector_bias: b, ``[D_t]``. Default: none.
        normalize: None, ``"l2"`` or ``"standardize"``, as in :func:`feature_mse`. Default None.
        mask: bool, broadcastable to the shape without the features, True where the row counts. Default: every row
            counts.
        weight: float, broadcastable likewise, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"mean"``, the default, ``"batchmean"``, ``"sum"`` or ``"none"``, as in :func:`feature_mse`.
        normalizer: a number, or a tensor of one element, that replaces the divisor, as in :func:`feature_mse`. Default:
            none.
        dim: where the features are. Default: 1 of four dimensions, the last of fewer.

    Returns:
        The loss, a tensor without dimensions, or one loss per row with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import linear_feature_mse
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
        >>> projector_weight = torch.tensor([[1.0, 2.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> loss = linear_feature_mse(student, projector_weight, torch.ones(2, 3))
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape, projector_weight.grad.shape
        (0.3333, torch.Size([2, 2]), torch.Size([3, 2]))

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015.
    """
    if _dtensor.given(student, projector_weight, teacher, projector_bias, mask, weight, normalizer):
        return _dtensor.linear_feature_mse(
            linear_feature_mse, student, projector_weight, teacher, projector_bias, normalize, dim,
            mask=mask, weight=weight, reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
    _check.projector(student, projector_weight, projector_bias, teacher, dim)
    _check.constant_teacher(teacher)
    _check.feature_normalize(normalize)
    rows = [teacher]  # what masks and weights are one per row of
    if mask is not None:
        (mask,) = _check.per_layer("mask", mask, rows, dim, _check.is_mask)
    if weight is not None:
        (weight,) = _check.per_layer("weight", weight, rows, dim, _check.floating)
    _check.reduction(reduction)
    if normalizer is not None:
        _check.normalizer(normalizer, student, mask, reduction)
        normalizer, reduction = _check.zero_as_tensor(normalizer, student), "sum"
    dim = _check.dim_of(student, dim) % student.dim()
    feature, backend = normalize or "plain", _backend.select(student.device)
    arguments = (feature, student, projector_weight, projector_bias, teacher, dim, mask, weight, reduction)
    if backend == "torch":
        loss = reference.linear_feature_loss(*arguments)
    else:
        from ..ops import features

        loss = features.linear_feature_loss(_backend.namespace(backend), *arguments)
    if normalizer is not None:
        return _normalized(loss, normalizer)
    return loss.view([*student.shape[:dim], *student.shape[dim + 1 :]]) if reduction == "none" else loss
