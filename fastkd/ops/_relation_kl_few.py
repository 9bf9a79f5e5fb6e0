"""relation_kl of few samples on the CPU: one op, csrc/cpu/relation_kl_few.cpp; and what its call says."""

import math

import torch

from .._check.arguments import values_known
from .._divergences import ENTRIES, NUMBERS
from .._dtypes import compute_dtype
from .._relation_calls import RelationKLFew
from ..reference import gradient_dtype
from .gradient import forbid_double_backward, scaled
from .samples import are_few

BLOCK = {"cpu": 2**21, "cuda": 2**24}  # elements of a strip: products of fewer rows are slower


def with_numbers(call):
    """Rows that all have the same number have one, which is less work. On the CPU, where looking at them is cheap."""
    changed = {}
    for name in ("parameter", "temperature", "teacher_temperature"):
        rows = getattr(call, f"{name}_rows")
        if rows is not None and values_known(rows) and bool((rows == rows.flatten()[0]).all()):
            changed |= {name: rows.flatten()[0].item(), f"{name}_rows": None}
    entry = ENTRIES[call.divergence].parameter
    if entry is not None and changed.get("parameter") in entry.ends:
        changed |= {"divergence": NUMBERS[entry.ends[changed["parameter"]]], "parameter": 0.0}
    return call._replace(**changed) if changed else call


def with_widths(call, dtype):
    """Temperatures times sqrt(D), where similarities are divided by it."""
    a, b = (1.0 if call.normalize else math.sqrt(x.shape[-1]) for x in (call.student, call.teacher))
    rows = call.temperature_rows, call.teacher_temperature_rows
    rows = [None if x is None else (x * by).to(dtype) for x, by in zip(rows, (a, b), strict=True)]
    return call._replace(
        temperature=call.temperature * a,
        temperature_rows=rows[0],
        teacher_temperature=call.teacher_temperature * b,
        teacher_temperature_rows=rows[1],
    )


def relation_is_few(student, call):
    """Whether the CPU has one op for these samples [N, D]: csrc/cpu/relation_kl_few.cpp."""
    own_keys = call.key_mask is call.mask
    return own_keys and call.rows == "fastkd" and student.numel() > 0 and are_few(student, BLOCK)


def few_call(call):
    """What it is told, of a call of samples [N, D]."""
    call = with_widths(with_numbers(call), compute_dtype(call.student, call.teacher))
    return RelationKLFew(
        student=call.student, teacher=call.teacher, exclude_self=call.exclude_self, normalize=call.normalize,
        divergence=call.divergence, parameter=call.parameter, parameter_rows=call.parameter_rows,
        temperature=call.temperature, temperature_rows=call.temperature_rows,
        teacher_temperature=call.teacher_temperature, teacher_temperature_rows=call.teacher_temperature_rows,
        mask=call.mask, weight=call.weight, save=call.save,
    )  # fmt: skip


def fake_grad(x, save):
    return x.new_empty(x.shape if save else (0,), dtype=gradient_dtype(x))


def _fake(*arguments):
    call = RelationKLFew(*arguments)
    loss = call.student.new_empty((), dtype=compute_dtype(call.student, call.teacher))
    return loss, fake_grad(call.student, call.save)


torch.library.register_fake("fastkd::relation_kl_few", _fake)
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


def of_few(scale_, call):
    """The loss of samples [N, D] that are few; None of others. Past the op that takes all of relation_kl, which costs
    as much as the arithmetic of 32 samples does."""
    mask, weight = call.mask, call.weight
    if mask is not None or weight is not None:
        mask, weight = (x if x is None else x.expand(call.student.shape[:1]).contiguous() for x in (mask, weight))
        call = call._replace(mask=mask, key_mask=mask if call.key_mask is None else call.key_mask, weight=weight)
    if not relation_is_few(call.student, call):
        return None
    few = few_call(call)
    return FewRelations.apply(scale_, call.student, few) if call.save else FEW(*few)[0]
