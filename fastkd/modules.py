"""Every loss as an ``nn.Module``: options in the constructor, tensors in ``forward``."""

import torch

from . import _check, functional


class _LogitsLoss(torch.nn.Module):
    """A logit loss; a subclass names its function of :mod:`fastkd.functional`, where the formula
    and every option are.

    Args:
        temperature, teacher_temperature, t_squared, reduction, inplace: as there.
    """

    _options = ("temperature", "teacher_temperature", "t_squared", "reduction", "inplace")

    def __init__(
        self, *, temperature=1.0, teacher_temperature=None, t_squared=True, reduction="batchmean", inplace=False
    ):
        super().__init__()
        _check.number("temperature", temperature)
        if teacher_temperature is not None:
            _check.number("teacher_temperature", teacher_temperature)
        _check.flag("t_squared", t_squared)
        _check.flag("inplace", inplace)
        _check.reduction(reduction)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.reduction = reduction
        self.inplace = inplace

    def extra_repr(self):
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)

    def forward(
        self, student, teacher, *, temperature=None, teacher_temperature=None, mask=None, weight=None, normalizer=None
    ):
        """The loss.

        Args:
            student, teacher: logits ``[*, V]``.
            temperature, teacher_temperature: for this call, instead of the module's (one per row).
            mask, weight, normalizer: as in the function.
        """
        options = {name: getattr(self, name) for name in self._options}
        if temperature is not None:
            options["temperature"] = temperature
        if teacher_temperature is not None:
            options["teacher_temperature"] = teacher_temperature
        return self._function(student, teacher, mask=mask, weight=weight, normalizer=normalizer, **options)


class KLDivLoss(_LogitsLoss):
    """:func:`fastkd.functional.kl_div` as a module: Hinton's distillation loss."""

    _function = staticmethod(functional.kl_div)


class SoftCrossEntropyLoss(_LogitsLoss):
    """:func:`fastkd.functional.soft_cross_entropy` as a module."""

    _function = staticmethod(functional.soft_cross_entropy)


class ReverseKLDivLoss(_LogitsLoss):
    """:func:`fastkd.functional.reverse_kl_div` as a module."""

    _function = staticmethod(functional.reverse_kl_div)


class JSDivLoss(_LogitsLoss):
    """:func:`fastkd.functional.js_div` as a module.

    Args:
        beta: the teacher's share of the mixture, from 0 to 1. Default 0.5.
        temperature, teacher_temperature, t_squared, reduction, inplace: as there.
    """

    _function = staticmethod(functional.js_div)
    _options = ("beta", *_LogitsLoss._options)

    def __init__(
        self,
        *,
        beta=0.5,
        temperature=1.0,
        teacher_temperature=None,
        t_squared=True,
        reduction="batchmean",
        inplace=False,
    ):
        super().__init__(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            t_squared=t_squared,
            reduction=reduction,
            inplace=inplace,
        )
        _check.share("beta", beta)
        self.beta = beta


class _RelationalLoss(torch.nn.Module):
    """A loss of two batches of embeddings; a subclass names its function of :mod:`fastkd.functional`."""

    _options = ()

    def _remember(self, **options):
        for name, value in options.items():
            setattr(self, name, value)
        self._options = tuple(options)

    def extra_repr(self):
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)

    def _given(self):
        return {name: getattr(self, name) for name in self._options}

    def forward(self, student, teacher, *, mask=None):
        """The loss of embeddings ``[N, D_s]`` and ``[N, D_t]``; mask: which rows count."""
        return self._function(student, teacher, mask=mask, **self._given())


class _WeightedRelationalLoss(_RelationalLoss):
    """The same of a loss whose terms each belong to a row."""

    def forward(self, student, teacher, *, mask=None, weight=None):
        """The loss of embeddings ``[N, D_s]`` and ``[N, D_t]``; mask, weight: one per row."""
        return self._function(student, teacher, mask=mask, weight=weight, **self._given())


class RKDDistanceLoss(_WeightedRelationalLoss):
    """:func:`fastkd.functional.rkd_distance` as a module.

    Args:
        normalize, delta: as there.
    """

    _function = staticmethod(functional.rkd_distance)

    def __init__(self, *, normalize="mean", delta=1.0):
        super().__init__()
        _check.normalize(normalize)
        _check.number("delta", delta)
        self._remember(normalize=normalize, delta=delta)


class RKDAngleLoss(_RelationalLoss):
    """:func:`fastkd.functional.rkd_angle` as a module.

    Args:
        delta: as there.
    """

    _function = staticmethod(functional.rkd_angle)

    def __init__(self, *, delta=1.0):
        super().__init__()
        _check.number("delta", delta)
        self._remember(delta=delta)


class RKDLoss(_RelationalLoss):
    """:func:`fastkd.functional.rkd_loss` as a module: distances and angles, which share their work.

    Args:
        distance_weight, angle_weight, distance_delta, angle_delta: as there.
    """

    _function = staticmethod(functional.rkd_loss)

    def __init__(self, *, distance_weight=25.0, angle_weight=50.0, distance_delta=1.0, angle_delta=1.0):
        super().__init__()
        _check.at_least_zero("distance_weight", distance_weight)
        _check.at_least_zero("angle_weight", angle_weight)
        _check.number("distance_delta", distance_delta)
        _check.number("angle_delta", angle_delta)
        self._remember(
            distance_weight=distance_weight,
            angle_weight=angle_weight,
            distance_delta=distance_delta,
            angle_delta=angle_delta,
        )


class SimilarityPreservingLoss(_WeightedRelationalLoss):
    """:func:`fastkd.functional.similarity_preserving` as a module."""

    _function = staticmethod(functional.similarity_preserving)


class GramMSELoss(_WeightedRelationalLoss):
    """:func:`fastkd.functional.gram_mse` as a module, of embeddings ``[N, D]`` or ``[B, N, D]``.

    Args:
        normalize, clamp: as there.
    """

    _function = staticmethod(functional.gram_mse)

    def __init__(self, *, normalize=True, clamp=None):
        super().__init__()
        _check.flag("normalize", normalize)
        _check.clamp(clamp)
        self._remember(normalize=normalize, clamp=clamp)


class PKTLoss(_WeightedRelationalLoss):
    """:func:`fastkd.functional.pkt` as a module.

    Args:
        eps: as there.
    """

    _function = staticmethod(functional.pkt)

    def __init__(self, *, eps=1e-7):
        super().__init__()
        _check.eps(eps)
        self._remember(eps=eps)


class RelationalTripletLoss(_RelationalLoss):
    """:func:`fastkd.functional.relational_triplet` as a module.

    Args:
        margin, positives, return_active: as there.
    """

    def __init__(self, *, margin=1.0, positives=None, return_active=False):
        super().__init__()
        _check.number("margin", margin)
        if positives is not None:
            _check.count_of_positives(positives)
        _check.flag("return_active", return_active)
        self._remember(margin=margin, positives=positives, return_active=return_active)

    def forward(self, student, teacher=None, labels=None, *, mask=None, weight=None):
        """The loss of embeddings ``[N, D_s]``, with labels ``[N]`` or a teacher ``[N, D_t]``; mask, weight: per row."""
        return functional.relational_triplet(student, teacher, labels, mask=mask, weight=weight, **self._given())


class RelationKLLoss(_RelationalLoss):
    """:func:`fastkd.functional.relation_kl` as a module.

    Args:
        temperature, teacher_temperature, divergence, beta, normalize: as there.
    """

    def __init__(self, *, temperature=1.0, teacher_temperature=None, divergence="kl_div", beta=0.5, normalize=False):
        super().__init__()
        _check.number("temperature", temperature)
        if teacher_temperature is not None:
            _check.number("teacher_temperature", teacher_temperature)
        _check.divergence(divergence, functional.reference.DIVERGENCES)
        _check.share("beta", beta)
        _check.flag("normalize", normalize)
        self._remember(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            divergence=divergence,
            beta=beta,
            normalize=normalize,
        )

    def forward(self, student, teacher, *, student_keys=None, teacher_keys=None, mask=None, key_mask=None, weight=None):
        """The loss of embeddings ``[*, N, D]``; keys, masks and weight as in the function."""
        return functional.relation_kl(
            student,
            teacher,
            student_keys=student_keys,
            teacher_keys=teacher_keys,
            mask=mask,
            key_mask=key_mask,
            weight=weight,
            **self._given(),
        )


class _FeatureLoss(torch.nn.Module):
    """A loss of features; a subclass names its function of :mod:`fastkd.functional`."""

    _options = ()

    def __init__(self, **options):
        super().__init__()
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def extra_repr(self):
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)

    def _given(self):
        return {name: getattr(self, name) for name in self._options}


def _check_layer_weights(value):
    if value is not None:
        _check.layer_weights(value, len(value) if hasattr(value, "__len__") else 1)


class FeatureMSELoss(_FeatureLoss):
    """:func:`fastkd.functional.feature_mse` as a module, of one layer or of lists of them.

    Args:
        normalize, reduction, layer_weights, return_layers, dim: as there.
    """

    def __init__(self, *, normalize=None, reduction="mean", layer_weights=None, return_layers=False, dim=None):
        _check.feature_normalize(normalize)
        _check.reduction(reduction)
        _check_layer_weights(layer_weights)
        _check.feature_dim(dim)
        _check.flag("return_layers", return_layers)
        super().__init__(
            normalize=normalize, reduction=reduction, layer_weights=layer_weights, return_layers=return_layers, dim=dim
        )

    def forward(self, student, teacher, *, mask=None, weight=None):
        """The loss of tensors, or lists of them; mask and weight as in the function."""
        return functional.feature_mse(student, teacher, mask=mask, weight=weight, **self._given())


class FeatureCosineLoss(_FeatureLoss):
    """:func:`fastkd.functional.feature_cosine` as a module, of one layer or of lists of them.

    Args:
        reduction, layer_weights, return_layers, dim: as there.
    """

    def __init__(self, *, reduction="mean", layer_weights=None, return_layers=False, dim=None):
        _check.reduction(reduction)
        _check_layer_weights(layer_weights)
        _check.feature_dim(dim)
        _check.flag("return_layers", return_layers)
        super().__init__(reduction=reduction, layer_weights=layer_weights, return_layers=return_layers, dim=dim)

    def forward(self, student, teacher, *, mask=None, weight=None):
        """The loss of tensors, or lists of them; mask and weight as in the function."""
        return functional.feature_cosine(student, teacher, mask=mask, weight=weight, **self._given())


class AttentionTransferLoss(_FeatureLoss):
    """:func:`fastkd.functional.attention_transfer` as a module.

    Args:
        p: as there.
    """

    def __init__(self, *, p=2):
        _check.exponent("p", p)
        super().__init__(p=p)

    def forward(self, student, teacher):
        """The loss of maps ``[B, C_s, H, W]`` and ``[B, C_t, H, W]``."""
        return functional.attention_transfer(student, teacher, p=self.p)


class LinearFeatureMSELoss(_FeatureLoss):
    """:func:`fastkd.functional.linear_feature_mse` as a module that owns its projector, a ``torch.nn.Linear``
    to be trained with the student: its parameters go to the optimizer. On several processes the module is wrapped in
    DistributedDataParallel, as the student is; otherwise each process trains a projector of its own.

    Args:
        student_features, teacher_features: the widths D_s and D_t; of maps the numbers of channels.
        bias: whether the projector has one. Default True.
        normalize, reduction, dim: as there.
        device, dtype: of the projector.
    """

    def __init__(
        self,
        student_features,
        teacher_features,
        *,
        bias=True,
        normalize=None,
        reduction="mean",
        dim=None,
        device=None,
        dtype=None,
    ):
        for name, value in (("student_features", student_features), ("teacher_features", teacher_features)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: a whole number wanted, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: at least 1 wanted, got {value}")
        _check.flag("bias", bias)
        _check.feature_normalize(normalize)
        _check.reduction(reduction)
        _check.feature_dim(dim)
        super().__init__(normalize=normalize, reduction=reduction, dim=dim)
        self.projector = torch.nn.Linear(student_features, teacher_features, bias, device, dtype)

    def forward(self, student, teacher, *, mask=None, weight=None):
        """The loss of features ``[*, D_s]`` and ``[*, D_t]``, or of maps; mask and weight as in the function."""
        return functional.linear_feature_mse(
            student,
            self.projector.weight,
            teacher,
            projector_bias=self.projector.bias,
            mask=mask,
            weight=weight,
            **self._given(),
        )
