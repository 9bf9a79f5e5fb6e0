"""What every loss of features does with its arguments: they are checked, and handed to the backend."""

import torch

from .. import _backend, _check, _dtensor, reference


def _normalized(total, normalizer):
    """Sums over the normalizer; 0 / 0 is 0, of no row that counts."""
    if not isinstance(normalizer, torch.Tensor):
        if torch.compiler.is_compiling():  # it may be a symbol, which nobody has checked
            divisor = total.new_ones(()) * normalizer
            return total / torch.where(divisor > 0, divisor, torch.nan)
        return total / float(normalizer)
    divisor = reference.ordinary(normalizer).to(total.dtype).reshape(())
    return total / torch.where((total == 0) & (divisor == 0), 1.0, divisor)


def _feature_loss(
    feature, student, teacher, mask, weight, reduction, normalizer, layer_weights, return_layers, dim, beta=None
):
    """Checks what a feature loss is given, and hands it to the backend. beta: of smooth L1, else squares."""
    if _dtensor.given(student, teacher, mask, weight, normalizer):
        return _dtensor.feature_loss(
            _feature_loss, feature, student, teacher, mask, weight, reduction, normalizer, layer_weights,
            return_layers, dim, beta,
        )  # fmt: skip
    listed = isinstance(student, (list, tuple))
    students, teachers = ([x] if isinstance(x, torch.Tensor) and not listed else x for x in (student, teacher))
    _check.features(students, teachers, dim)
    name = "feature_cosine" if feature == "cosine" else "feature_mse" if beta is None else "feature_smooth_l1"
    for x in teachers:
        _check.constant_teacher(x, name, f"{name}({{}})")
    dims = [_check.dim_of(x, dim) % x.dim() for x in students]
    masks = [] if mask is None else _check.per_layer("mask", mask, students, dim, _check.is_mask)
    weights = [] if weight is None else _check.per_layer("weight", weight, students, dim, _check.floating)
    _check.reduction(reduction)
    if normalizer is not None:
        for x in students:
            _check.normalizer(normalizer, x, mask, reduction)
        normalizer, reduction = _check.zero_as_tensor(normalizer, students[0]), "sum"
    if layer_weights is None:
        layer_weights = [1.0] * len(students)
    else:
        _check.layer_weights(layer_weights, len(students))
    _check.flag("return_layers", return_layers)
    backend = _backend.select(students[0].device)
    of_layers = [float(x) for x in layer_weights]
    arguments = (list(students), list(teachers), dims, masks, weights, reduction, of_layers, beta)
    if backend == "torch":
        loss, layers = reference.feature_loss(feature, *arguments)
    else:
        from ..ops import features

        loss, layers = features.feature_loss(_backend.namespace(backend), feature, *arguments)
    if normalizer is not None:
        loss, layers = _normalized(loss, normalizer), _normalized(layers, normalizer)
    if reduction == "none":
        shapes = [[*x.shape[:at], *x.shape[at + 1 :]] for x, at in zip(students, dims, strict=True)]
        parts = loss.split([x.numel() // x.shape[at] for x, at in zip(students, dims, strict=True)])
        rows = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        loss = rows if listed else rows[0]
    return (loss, layers) if return_layers else loss
