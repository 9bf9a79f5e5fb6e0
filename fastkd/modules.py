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

    def forward(self, student, teacher):
        """The loss of embeddings ``[N, D_s]`` and ``[N, D_t]``."""
        return self._function(student, teacher, **{name: getattr(self, name) for name in self._options})


class RKDDistanceLoss(_RelationalLoss):
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


class SimilarityPreservingLoss(_RelationalLoss):
    """:func:`fastkd.functional.similarity_preserving` as a module."""

    _function = staticmethod(functional.similarity_preserving)
