"""How much of the difference between both distributions lies in the teacher's head: what adaptive_kl_div weighs by."""

from typing import Any

import torch

from .._calls import HeadWeight
from .._check import LogitsOptions
from .._dtypes import compute_dtype
from .rows import changeable, first_classes, number_or_rows, standardized, temperatures

NAMES = ("head_weight",)
OPS: dict[str, Any] = {}  # by namespace


def use_namespace(namespace: str) -> None:
    """Makes the op of a namespace, which _library has defined, known here."""
    torch.library.register_fake(f"{namespace}::head_weight", lambda *_: None)
    OPS[namespace] = getattr(torch.ops, namespace).head_weight.default


use_namespace("fastkd")


def student_weight(
    namespace: str, student: torch.Tensor, teacher: torch.Tensor, options: LogitsOptions
) -> torch.Tensor:
    """Of each row the ``student_weight`` of ``symmetric_kl_div``, a constant; the arguments have been checked."""
    student = first_classes(student, options.num_classes).detach()
    dtype, mu, leading = compute_dtype(student, teacher), options.parameter, student.shape[:-1]
    if torch.compiler.is_compiling():
        mu = changeable(mu, student, torch.float64)
    weight = student.new_empty(leading, dtype=torch.float64)
    mask = None if options.mask is None else options.mask.reshape(-1).contiguous()
    call = HeadWeight(
        student, teacher.detach(), *temperatures(student, dtype, options), mask,
        *number_or_rows(mu, torch.Size(), torch.float64), weight,
    )  # fmt: skip
    OPS[standardized(namespace) if options.standardize else namespace](*call)
    return weight
