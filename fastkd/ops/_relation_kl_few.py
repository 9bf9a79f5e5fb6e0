"""relation_kl of few samples on the CPU: one op, csrc/cpu/relation_kl_few.cpp; and what relation_kl's ops are told."""

import math
from typing import Any, NamedTuple

import torch

from .._calls import RelationKLFew
from .._divergences import ENTRIES, NUMBERS
from .._dtypes import compute_dtype
from ..reference import gradient_dtype
from .gradient import forbid_double_backward, scaled
from .samples import are_few

BLOCK = {"cpu": 2**21, "cuda": 2**24}  # elements of a strip: products of fewer rows are slower


class Options(NamedTuple):
    """What the op is told beside its embeddings [B, N, D]; of rows: [B, N], the keys' mask [B, M]."""

    exclude_self: bool
    normalize: bool
    rows: str  # the namespace of the rows ops
    divergence: int
    parameter: float
    parameter_rows: Any
    temperature: float
    temperature_rows: Any
    teacher_temperature: float
    teacher_temperature_rows: Any
    mask: Any
    key_mask: Any
    weight: Any


def with_numbers(options):
    """Rows that all have the same number have one, which is less work. On the CPU, where looking at them is cheap."""
    changed = {}
    for name in ("parameter", "temperature", "teacher_temperature"):
        rows = getattr(options, f"{name}_rows")
        if rows is not None and rows.device.type == "cpu" and bool((rows == rows.flatten()[0]).all()):
            changed |= {name: rows.flatten()[0].item(), f"{name}_rows": None}
    entry = ENTRIES[options.divergence].parameter
    if entry is not None and changed.get("parameter") in entry.ends:
        changed |= {"divergence": NUMBERS[entry.ends[changed["parameter"]]], "parameter": 0.0}
    return options._replace(**changed) if changed else options


def with_widths(options, widths, dtype):
    """Temperatures times sqrt(D), where similarities are divided by it."""
    a, b = (1.0 if options.normalize else math.sqrt(D) for D in widths)
    rows = options.temperature_rows, options.teacher_temperature_rows
    rows = [None if x is None else (x * by).to(dtype) for x, by in zip(rows, (a, b), strict=True)]
    return options._replace(
        temperature=options.temperature * a,
        temperature_rows=rows[0],
        teacher_temperature=options.teacher_temperature * b,
        teacher_temperature_rows=rows[1],
    )


def relation_is_few(student, options):
    """Whether the CPU has one op for these samples [N, D]: csrc/cpu/relation_kl_few.cpp."""
    own_keys = options.key_mask is options.mask
    return own_keys and options.rows == "fastkd" and student.numel() > 0 and are_few(student, BLOCK)


def few_call(student, teacher, options, save):
    """What it is told, of options that are one per sample, [N]."""
    options = with_widths(with_numbers(options), (student.shape[1], teacher.shape[1]), compute_dtype(student, teacher))
    return RelationKLFew(
        student, teacher, options.exclude_self, options.normalize, options.divergence, options.parameter,
        options.parameter_rows, options.temperature, options.temperature_rows, options.teacher_temperature,
        options.teacher_temperature_rows, options.mask, options.weight, save,
    )  # fmt: skip


def fake_grad(x, save):
    return x.new_empty(x.shape if save else (0,), dtype=gradient_dtype(x))


torch.library.register_fake(
    "fastkd::relation_kl_few",
    lambda *call: (call[0].new_empty((), dtype=compute_dtype(*call[:2])), fake_grad(call[0], call[-1])),
)
FEW = torch.ops.fastkd.relation_kl_few.default


class FewRelations(torch.autograd.Function):
    """The loss of few samples that want a gradient, which is computed in forward and saved."""

    @staticmethod
    def forward(ctx, scale_, student, call):
        ctx.scale_, ctx.dtype = scale_, student.dtype
        loss, grad = FEW(*call)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return None, forbid_double_backward(scaled, ctx.scale_, grad, upstream).to(ctx.dtype), None


def of_few(scale_, student, teacher, options):
    """The loss of samples [N, D] that are few; None of others. Past the op that takes all of relation_kl, which costs
    as much as the arithmetic of 32 samples does."""
    mask, weight = options.mask, options.weight
    if mask is not None or weight is not None:
        mask, weight = (x if x is None else x.expand(student.shape[:1]).contiguous() for x in (mask, weight))
        key_mask = mask if options.key_mask is None else options.key_mask
        options = options._replace(mask=mask, key_mask=key_mask, weight=weight)
    if not relation_is_few(student, options):
        return None
    wanted = torch.is_grad_enabled() and student.requires_grad
    call = few_call(student.detach(), teacher.detach(), options, wanted)
    return FewRelations.apply(scale_, student, call) if wanted else FEW(*call)[0]
