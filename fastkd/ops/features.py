"""The features schedule: distances between rows of features, of one layer or of many in one call."""

from typing import Any, NamedTuple

import torch

from .._check import REDUCTIONS
from .._dtypes import compute_dtype
from .._feature_calls import LayersBackward, LayersCall, LayersForward, OneLayerCall
from .gradient import all_scaled, forbid_double_backward, scaled
from .numbers import as_tensor
from .saved import is_inference

# The numbers are those of csrc/math/feature.h.
FEATURES = {"plain": 0, "l2": 1, "standardize": 2, "cosine": 3}
REDUCTION_NUMBERS = {name: number for number, name in enumerate(REDUCTIONS)}


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    fwd_: Any
    bwd: Any
    scale_: Any


NAMES = ("features_fwd", "features_fwd_", "features_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def _fake_fwd(*arguments):
    call = LayersCall(*arguments[: len(LayersCall._fields)])
    student, dtype = call.student, compute_dtype(*call.student, *call.teacher)
    rows = [x.numel() // x.shape[dim] for x, dim in zip(student, call.feature_dim, strict=True)]
    shape = (sum(rows),) if call.reduction == 0 else ()
    loss, layers = student[0].new_empty(shape, dtype=dtype), student[0].new_empty(len(student), dtype=dtype)
    save = LayersForward(*arguments[len(LayersCall._fields) :]).save
    return loss, layers, [torch.empty_like(x) for x in student] if save else []


def _fake_fwd_(*arguments):
    call = OneLayerCall(*arguments)
    shape = (call.student.numel() // call.student.shape[call.feature_dim],) if call.reduction == 0 else ()
    return call.student.new_empty(shape, dtype=compute_dtype(call.student, call.teacher))


def _fake_bwd(*arguments):
    return [torch.empty_like(x) for x in LayersCall(*arguments[: len(LayersCall._fields)]).student]


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    for name, fake in zip(NAMES, (_fake_fwd, _fake_fwd_, _fake_bwd), strict=True):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    OPS[namespace] = Ops(*(getattr(getattr(torch.ops, namespace), name).default for name in (*NAMES, "scale_")))


use_namespace("fastkd")


class _Features(torch.autograd.Function):
    """The loss of students that want a gradient.

    It is computed in forward, where both tensors are at hand, and saved. Where the upstream gradient
    is one per row ("none"), or the gradient in float16 would underflow before the loss scaler
    multiplies it, backward computes it from the features.
    """

    @staticmethod
    def forward(ctx, namespace, options, layer_weights, beta, *tensors):
        call = _call(options, layer_weights, beta, tensors)
        ctx.ops, ctx.options = OPS[namespace], options
        ctx.recompute = options.reduction == 0 or any(x.dtype is torch.float16 for x in call.student)
        loss, layers, grads = ctx.ops.fwd(*call, *LayersForward(not ctx.recompute))
        ctx.inference = tuple(x if is_inference(x) else None for x in tensors)
        if ctx.recompute:
            ctx.save_for_backward(layer_weights, beta, *(None if is_inference(x) else x for x in tensors))
        else:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(layers)
        return loss, layers

    @staticmethod
    def backward(ctx, upstream, _):
        grads = [forbid_double_backward(lambda x: x, grad) for grad in _gradients(ctx, upstream)]
        return None, None, None, None, *grads, *(None for _ in ctx.needs_input_grad[4 + len(grads) :])


def _gradients(ctx, upstream):
    with torch.no_grad():
        if not ctx.recompute:
            return all_scaled(ctx.ops.scale_, list(ctx.saved_tensors), upstream)
        layer_weights, beta, *saved = ctx.saved_tensors
        tensors = [x if y is None else y for x, y in zip(saved, ctx.inference, strict=True)]
        call = _call(ctx.options, layer_weights, beta, tensors)
        return ctx.ops.bwd(*call, *LayersBackward(upstream.contiguous()))


class Options(NamedTuple):
    """What the ops are told beside tensors."""

    feature_dim: tuple[int, ...]
    feature: int
    reduction: int
    masks: int  # how many of the tensors are


def _call(options, layer_weights, beta, tensors):
    """Of tensors as autograd wants them, one after the other: students, teachers, masks and weights."""
    layers = len(options.feature_dim)
    masks = 2 * layers + options.masks
    return LayersCall(
        student=list(tensors[:layers]), teacher=list(tensors[layers : 2 * layers]),
        feature_dim=list(options.feature_dim), feature=options.feature, mask=list(tensors[2 * layers : masks]),
        weight=list(tensors[masks:]), reduction=options.reduction, layer_weights=layer_weights, beta=beta,
    )  # fmt: skip


def _one_each(tensors):
    """A view in place of one that stands there already: compiled, an autograd function takes none twice."""
    return [x.view_as(x) if any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)]


def feature_loss(
    namespace: str,
    feature: str,
    students: list[torch.Tensor],
    teachers: list[torch.Tensor],
    dims: list[int],
    masks: list[torch.Tensor],
    weights: list[torch.Tensor],
    reduction: str,
    layer_weights: list[float],
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and layers of :mod:`fastkd.functional`; the arguments have been checked there. The loss is one
    value per row of all layers where the reduction is "none"."""
    dtype = compute_dtype(*students, *teachers)
    students = _one_each(students)
    teachers = [x.detach() for x in teachers]
    masks = [x.reshape(-1).contiguous() for x in masks]
    weights = [x.to(dtype).reshape(-1).contiguous() for x in weights]
    options = Options(tuple(dims), FEATURES[feature], REDUCTION_NUMBERS[reduction], len(masks))
    tensors = (*students, *teachers, *masks, *weights)
    numbers = as_tensor(*layer_weights), None if beta is None else as_tensor(beta)
    if torch.is_grad_enabled() and any(x.requires_grad for x in students):
        return _Features.apply(namespace, options, *numbers, *tensors)
    return OPS[namespace].fwd(*_call(options, *numbers, tensors), *LayersForward(False))[:2]


def _as_maps(x, dim):
    """[outer, features, inner]: the dimensions before the features, and those after them."""
    x = x.flatten(dim + 1)
    return x.flatten(0, dim - 1) if dim else x[None]


def _in_rows(x, dim):
    """Whether the features of a row lie next to each other, or are last anyway."""
    return dim == x.dim() - 1 or x.stride(dim) == 1


def _projected(student, projector_weight, projector_bias, dim):
    """In the student's own layout, so that nothing is copied: X W^T of rows, W X of each sample's maps."""
    if _in_rows(student, dim):
        return torch.nn.functional.linear(student.movedim(dim, -1), projector_weight, projector_bias).movedim(-1, dim)
    x = _as_maps(student, dim)
    W = projector_weight.expand(x.shape[0], -1, -1)
    y = torch.bmm(W, x) if projector_bias is None else torch.baddbmm(projector_bias[:, None], W, x)
    return y.view(*student.shape[:dim], len(projector_weight), *student.shape[dim + 1 :])


class _Linear(torch.autograd.Function):
    """The loss of projected features. Their residual, in the dtype of the projection, takes their place in
    memory; in backward, times the upstream gradient, it is multiplied by student and weight."""

    @staticmethod
    def forward(
        ctx, namespace, feature, reduction, dim, student, projector_weight, projector_bias, teacher, mask, weight
    ):
        ctx.scale_, ctx.dim = OPS[namespace].scale_, dim
        projected = _projected(student, projector_weight, projector_bias, dim)
        rows_or_sum = REDUCTION_NUMBERS["none" if reduction == "none" else "sum"]
        call = OneLayerCall(
            student=projected, teacher=teacher, feature_dim=dim, feature=FEATURES[feature], mask=mask, weight=weight,
            reduction=rows_or_sum, beta=None,
        )  # fmt: skip
        loss = OPS[namespace].fwd_(*call)
        ctx.divisor = _divisor(projected, dim, mask, reduction)
        inference = is_inference(projector_weight)
        ctx.save_for_backward(projected, student, None if inference else projector_weight)
        ctx.projector_weight = projector_weight if inference else None
        return loss if ctx.divisor is None else loss / ctx.divisor

    @staticmethod
    def backward(ctx, upstream):
        grads = [
            grad if grad is None else forbid_double_backward(lambda x: x, grad)
            for grad in _linear_gradients(ctx, upstream)
        ]
        return None, None, None, None, *grads, None, None, None


def _divisor(projected, dim, mask, reduction):
    """A number, or where the rows that count must be counted a tensor."""
    if reduction in ("none", "sum"):
        return None
    D = projected.shape[dim]
    rows = projected.numel() // D if mask is None else mask.sum()
    rows = max(rows, 1) if mask is None else rows.clamp(min=1)
    return rows * (D if reduction == "mean" else 1)


def _linear_gradients(ctx, upstream):
    """To student, projector_weight and projector_bias."""
    residual, student, projector_weight = ctx.saved_tensors
    projector_weight = ctx.projector_weight if projector_weight is None else projector_weight
    dim = ctx.dim
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        if ctx.divisor is not None:
            upstream = upstream / ctx.divisor
        if upstream.dim():
            of_rows = upstream.view(*residual.shape[:dim], 1, *residual.shape[dim + 1 :])
            grad = residual * of_rows.to(residual.dtype)
        else:
            grad = scaled(ctx.scale_, residual, upstream)
        W, in_rows = projector_weight.to(grad.dtype), _in_rows(grad, dim)
        to_student = to_weight = to_bias = None
        if ctx.needs_input_grad[4]:
            if in_rows:
                to_student = (grad.movedim(dim, -1) @ W).movedim(-1, dim)
            else:
                g = _as_maps(grad, dim)
                to_student = torch.bmm(W.T.expand(g.shape[0], -1, -1), g).view(student.shape)
            to_student = to_student.to(student.dtype)
        if ctx.needs_input_grad[5]:
            product = _product_of_rows if in_rows else _product_of_maps
            to_weight = product(grad, student.to(grad.dtype), dim).to(projector_weight.dtype)
        if ctx.needs_input_grad[6]:
            rows = [d for d in range(grad.dim()) if d != dim]
            to_bias = (grad.sum(rows) if rows else grad).to(projector_weight.dtype)
        return to_student, to_weight, to_bias


def _product_of_rows(grad, student, dim):
    """The sum over rows [D_t, D_s], where the features of each lie next to each other."""
    rows, x = (x.movedim(dim, -1).flatten(0, -2) if x.dim() > 1 else x[None] for x in (grad, student))
    return rows.T @ x


def _product_of_maps(grad, student, dim):
    """The same of maps, sample by sample; or of copies in rows, where these move less memory than each sample's sum,
    and in half precision, which only one product does not round again and again."""
    g, x = _as_maps(grad, dim), _as_maps(student, dim)
    (D_t, inner), D_s = g.shape[1:], x.shape[1]
    if g.dtype in (torch.float16, torch.bfloat16) or inner * (D_s + D_t) < D_s * D_t:
        return g.transpose(0, 1).flatten(1) @ x.transpose(0, 1).flatten(1).T
    return torch.addbmm(g.new_empty(D_t, D_s), g, x.mT, beta=0)


def linear_feature_loss(
    namespace: str,
    feature: str,
    student: torch.Tensor,
    projector_weight: torch.Tensor,
    projector_bias: torch.Tensor | None,
    teacher: torch.Tensor,
    dim: int,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`, one per row where the reduction is "none"; the arguments have been
    checked there."""
    learned = [x for x in (student, projector_weight, projector_bias) if x is not None and x.requires_grad]
    if learned and torch.is_grad_enabled():
        dtype = compute_dtype(student, teacher)
        mask = mask if mask is None else mask.reshape(-1).contiguous()
        weight = weight if weight is None else weight.to(dtype).reshape(-1).contiguous()
        return _Linear.apply(
            namespace, feature, reduction, dim,
            student, projector_weight, projector_bias, teacher.detach(), mask, weight,
        )  # fmt: skip
    projected = _projected(student, projector_weight, projector_bias, dim)
    masks, weights = ([] if x is None else [x] for x in (mask, weight))
    return feature_loss(namespace, feature, [projected], [teacher], [dim], masks, weights, reduction, [1.0])[0]
