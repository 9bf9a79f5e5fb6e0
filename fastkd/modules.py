"""Every loss as an ``nn.Module``: options in the constructor, tensors in ``forward``."""

import torch

from . import _check, functional


class KLDivLoss(torch.nn.Module):
    r"""Kullback-Leibler divergence of student logits from teacher logits, softened by a temperature.

    See :func:`fastkd.functional.kl_div` for the formula and every option.

    Args:
        temperature, teacher_temperature, t_squared, reduction, inplace: as there.
    """

    def __init__(
        self, *, temperature=1.0, teacher_temperature=None, t_squared=True, reduction="batchmean", inplace=False
    ):
        super().__init__()
        _check.number("temperature", temperature)
        if teacher_temperature is not None:
            _check.number("teacher_temperature", teacher_temperature)
        _check.reduction(reduction)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.reduction = reduction
        self.inplace = inplace

    def extra_repr(self):
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in ("temperature", "teacher_temperature", "t_squared", "reduction", "inplace")
        )

    def forward(
        self, student, teacher, *, temperature=None, teacher_temperature=None, mask=None, weight=None, normalizer=None
    ):
        """The loss.

        Args:
            student, teacher: logits ``[*, V]``.
            temperature, teacher_temperature: for this call, instead of the module's (one per row).
            mask, weight, normalizer: as in :func:`fastkd.functional.kl_div`.
        """
        return functional.kl_div(
            student,
            teacher,
            temperature=self.temperature if temperature is None else temperature,
            teacher_temperature=self.teacher_temperature if teacher_temperature is None else teacher_temperature,
            t_squared=self.t_squared,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
        )
