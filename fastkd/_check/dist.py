"""Checks of what the DIST loss is given."""

from typing import Any, NamedTuple

import torch

from .arguments import at_least_zero, flag, mask, number, whole_number
from .logits import count_of_classes, first_classes, group, inplace, logits
from .relations import eps


class DistOptions(NamedTuple):
    """What ``dist_loss`` takes beside its logits."""

    inter_weight: Any
    intra_weight: Any
    temperature: Any
    eps: Any
    standardize: bool
    mask: Any
    inplace: bool
    num_classes: Any = None  # that count, of both sides the first; None: all
    group: Any = None  # the ranks over which classes are split


def numbers(options):
    at_least_zero("inter_weight", options.inter_weight)
    at_least_zero("intra_weight", options.intra_weight)
    if isinstance(options.temperature, torch.Tensor):
        raise TypeError(
            f"temperature: a number wanted, got {type(options.temperature).__name__}: a column has all rows, so that "
            "they share one"
        )
    number("temperature", options.temperature)
    eps(options.eps)
    flag("standardize", options.standardize)


def dist_loss(student, teacher, options, dim, forms):
    """Of tensors whose classes have been brought from dim to the end; forms: they stand for what is no logits."""
    whole = student
    student, teacher = first_classes(student, teacher, options.num_classes)
    logits(student, teacher, dim, some=options.group is not None)
    numbers(options)
    if options.mask is not None:
        mask(options.mask, student)
    flag("inplace", options.inplace)
    if options.inplace and not forms:
        inplace(whole, teacher)


def dist_module(options, dim):
    """The options that the module is made with."""
    whole_number("dim", dim)
    count_of_classes(options.num_classes)
    numbers(options)
    flag("inplace", options.inplace)
    group(options.group)
