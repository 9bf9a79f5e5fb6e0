"""DTensors: a loss of the whole batch from what each rank holds of it.

Rows of logits and of features are independent, so that each rank computes those that it has, by the same function as
without DTensors, and divides by what the whole batch has: the sum over ranks is the loss. Where one dimension of the
mesh splits the classes of logits, its ranks are the group of ops/group.py. Relations compare every sample with every
other: their embeddings are whole on every rank. The student's placements decide; whatever stands beside it is brought
to them. A plain tensor beside DTensors counts as whole, the same on every rank.

``item()`` of a ``Partial`` returns the summand of one rank, so that losses are summed here. The gradient of what is
replicated is summed over those ranks alone that split the batch: a projector's is, and a replicated student's is not.

Nothing imports ``torch.distributed.tensor`` here: where nobody has, there is no DTensor, and a call goes on at once.
"""

import contextlib
import sys
from typing import Any, NamedTuple

import torch

from . import _check
from ._divergences import REGISTRY, parameters_of
from ._dtypes import compute_dtype
from ._inplace import overwritten
from ._layouts import _GATHER, _dtensor, _first, _is_plain, _is_split, _layout, _list, _local, _mesh, _whole

_CLASSES = f"Classes may be split by one dimension of the mesh, on both sides alike; else {_GATHER}"
_ROWS = f"Classes may be split by one dimension of the mesh, on both sides alike; rows not: {_GATHER}"
_OTHERS = frozenset((torch.Tensor, torch.nn.Parameter, float, int, bool, str, type(None)))


def given(*arguments: Any) -> bool:
    """Whether some argument, or some part of one that is a list, is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or _OTHERS.issuperset(map(type, arguments)):
        return False
    return _first(module.DTensor, arguments) is not None


class _Overwritable(torch.autograd.Function):
    """What this rank has of logits, as a tensor of its own: nobody may overwrite the views that to_local makes."""

    @staticmethod
    def forward(ctx, x):
        ctx.of, ctx.layout = x.device_mesh, {"placements": x.placements, "shape": x.shape, "stride": x.stride()}
        local = x.to_local()
        return local.new_empty(0).set_(local)

    @staticmethod
    def backward(ctx, grad):
        return _dtensor().DTensor.from_local(grad, ctx.of, run_check=False, **ctx.layout)


def _sum(loss, layout):
    """Of the losses of all ranks."""
    kinds = _dtensor()
    total = kinds.DTensor.from_local(loss, layout.mesh, layout.pending(), run_check=False)
    if not any(layout.split):
        return total
    replicated = layout.replicated().placements
    # the second one sums a gradient that is pending, which from_local has not done in every version of torch
    return total.redistribute(placements=replicated).redistribute(placements=replicated)


def _rows(loss, layout, shape):
    """A loss per row, where the rows are."""
    stride = torch.empty(shape, device="meta").stride()
    return _dtensor().DTensor.from_local(
        loss, layout.mesh, layout.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _plain(x):
    """A normalizer, as a plain tensor."""
    return x.full_tensor() if isinstance(x, _dtensor().DTensor) else x


def _count(mesh, mask, rows):
    """How many rows of the whole batch count: a number, or a tensor, for which nothing waits."""
    if mask is None:
        return max(rows.numel(), 1)
    return _whole(mesh, mask).sum().full_tensor() * (rows.numel() // max(mask.numel(), 1))  # it may be for many rows


def _refuse_split(name, x, dims, wanted, parts, gather):
    """What must be whole on every rank. dims: those that may be split; parts: what lies along the others."""
    split = [p for p in getattr(x, "placements", ()) if _is_split(p) and p.dim % x.dim() not in dims]
    if split:
        raise ValueError(
            f"{name}: {wanted} wanted on every rank, got {parts} that are split over ranks, {split[0]!r}. {gather}"
        )


@contextlib.contextmanager
def _explained(student, **arguments):
    """Errors of arguments that are plain tensors, perhaps shards in place of whole ones, say what is taken for what."""
    try:
        yield
    except ValueError as problem:
        x = arguments.get(str(problem).partition(":")[0])
        if x is None or not any(_is_plain(one) for one in (*_list(student), *_list(x))):
            raise
        raise ValueError(
            f"{problem}. Beside DTensors a plain tensor counts as whole, the same on every rank; DTensor.from_local "
            "makes a DTensor of what each rank has"
        ) from None


def _refuse_unclear(name, x, layout, rows):
    """A plain tensor of size 1 where the rows are split, if some rank has one of these: it may be meant for all rows,
    or be a rank's own."""
    if not _is_plain(x):
        return
    for dim in {p.dim for p in layout.placements if _is_split(p)}:
        at = dim - len(rows)  # from behind, as shapes broadcast
        if x.dim() >= -at and x.shape[at] == 1 < rows[dim] and 1 in _sizes_of_shards(layout, dim, rows[dim]):
            raise ValueError(
                f"{name}: shape {list(rows)} wanted, got {list(x.shape)}: beside DTensors a plain tensor counts as "
                "whole, and this one may as well be what one rank has. Expand it, or make a DTensor of it"
            )


def _sizes_of_shards(layout, dim, size):
    """What ranks may have of a dimension."""
    sizes = {size}
    for ranks, placement in zip(layout.mesh.shape, layout.placements, strict=True):
        if _is_split(placement) and placement.dim == dim:
            chunks = {(n, max(-(-n // ranks), 1)) for n in sizes}
            sizes = {min(chunk, max(n - chunk * rank, 0)) for n, chunk in chunks for rank in range(ranks)}
    return sizes


def _per_row(name, x, layout, rows):
    """What this rank's rows have of something that broadcasts to all rows."""
    if not isinstance(x, torch.Tensor):
        return x
    _refuse_unclear(name, x, layout, rows)
    if list(x.shape) != list(rows):
        whole = _whole(layout.mesh, x)
        x = whole.redistribute(placements=layout.replicated().placements).expand(rows)
    return _local(x, layout)


def _rows_that_count(mesh, options):
    """A mask of them on all ranks, or None."""
    if options.target is None:
        return options.mask
    valid = _whole(mesh, options.target) != options.ignore_index
    return valid if options.mask is None else valid & _whole(mesh, options.mask)


def _student_here(mesh, layout, student, inplace):
    """What this rank has of the student's logits, over which a gradient may be written."""
    if not inplace:
        _check.not_overwritten(student)
    elif _check.will_be_overwritten(student):
        here = _Overwritable.apply(_whole(mesh, student).redistribute(placements=layout.placements))
        overwritten(student)
        return here
    return _local(student, layout)


def _share_of_rows(mesh, options, local, here, rows):
    """How many of the rows that count are here. local: the options of these; options: of all."""
    count = _count(mesh, _rows_that_count(mesh, options), rows)
    counts = torch.ones(here, dtype=torch.bool, device=local["target"].device)
    if local["mask"] is not None:
        counts = counts & local["mask"]
    counts = counts & (local["target"] != options.ignore_index)
    return counts.sum().double() / (count.clamp(min=1) if isinstance(count, torch.Tensor) else count)


def _splits_classes(x, dim):
    """Which dimension of the mesh splits the classes of a tensor, None where none does, or more than one."""
    placements = getattr(x, "placements", ())
    found = [i for i, p in enumerate(placements) if _is_split(p) and p.dim % x.dim() == dim % x.dim()]
    return found[0] if len(found) == 1 and type(placements[found[0]]) is _dtensor().Shard else None


def logits_loss(again, divergence, student, teacher, options, dim):
    """again: the function that computes it of plain tensors; the other arguments are its own."""
    over = _splits_classes(student, dim)
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, torch.Tensor) and x.dim() and not (over is not None and _splits_classes(x, dim) == over):
            rows = [d for d in range(x.dim()) if d != dim % x.dim()]
            _refuse_split(name, x, rows, "all classes of a row", "classes", _CLASSES)
    if dim != -1:
        student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    names = ("temperature", "teacher_temperature", "mask", "weight", "target")
    per_row = {name: getattr(options, name) for name in names}
    parameters = dict(zip(("parameter", "second"), parameters_of(divergence), strict=False))
    per_row |= {entry.name: getattr(options, field) for field, entry in parameters.items()}
    mesh = _mesh(student=student, teacher=teacher, **per_row, normalizer=options.normalizer)
    of_logits = layout = _layout(mesh, student)
    if over is not None:
        layout = layout.whole_over(over)
        options = options._replace(group=mesh.get_group(over))
    options = options._replace(normalizer=_plain(options.normalizer))
    with _explained(student, teacher=teacher, **per_row):
        _check.logits_loss(student, teacher, options._replace(inplace=False, group=None), dim)
        for field, entry in parameters.items():
            _check.parameter(entry, getattr(options, field), student)
    rows = student.shape[:-1]
    local = {name: _per_row(name, x, layout, rows) for name, x in per_row.items()}
    local |= {field: local.pop(entry.name) for field, entry in parameters.items()}
    if options.teacher_temperature is options.temperature:
        local["teacher_temperature"] = local["temperature"]
    if any(layout.split) and options.normalizer is None and options.reduction in ("batchmean", "mean"):
        classes = student.shape[-1] if options.num_classes is None else options.num_classes
        each = classes if options.reduction == "mean" else 1
        options = options._replace(normalizer=_count(mesh, _rows_that_count(mesh, options), rows) * each)
    here = _student_here(mesh, of_logits, student, options.inplace)
    loss = again(divergence, here, _local(teacher, of_logits), options._replace(**local))
    if options.return_parts:
        loss, means = loss
        if any(layout.split):  # of the rows here
            means = means * _share_of_rows(mesh, options, local, here.shape[:-1], rows)
        parts = _sum(means, layout)
        return (_rows(loss, layout, rows) if options.reduction == "none" else _sum(loss, layout)), parts
    return _rows(loss, layout, rows) if options.reduction == "none" else _sum(loss, layout)


def dist_loss(again, student, teacher, options, dim):
    """The columns need all rows, on every rank; the rows need all columns, which may be split."""
    mesh = _mesh(student=student, teacher=teacher, mask=options.mask)
    over = _splits_classes(student, dim)
    for name, x in (("student", student), ("teacher", teacher)):
        if isinstance(x, torch.Tensor):
            may_be_split = [dim % x.dim()] if over is not None and _splits_classes(x, dim) == over else []
            _refuse_split(name, x, may_be_split, "all rows", "logits", _ROWS)
    layout = of_logits = _layout(mesh, None)
    if over is not None:
        of_logits = _layout(mesh, student)
        layout, options = of_logits.whole_over(over), options._replace(group=mesh.get_group(over))
    tensor = isinstance(student, torch.Tensor)
    here = _student_here(mesh, of_logits, student, options.inplace) if tensor else student
    teacher = _local(teacher, of_logits) if isinstance(teacher, torch.Tensor) else teacher
    mask = options.mask if options.mask is None else _local(options.mask, layout)
    return _sum(again(here, teacher, options._replace(mask=mask), dim), layout)


def _feature_layouts(mesh, dims, student, teacher):
    """Of the student's layers. A row of features is whole on a rank; rows may be split by any dimension."""
    for name, layers in (("student", student), ("teacher", teacher)):
        for x, at in zip(layers, dims, strict=True):
            rows = [i for i in range(x.dim()) if i != at]
            _refuse_split(name, x, rows, "all features of a row", "features", _GATHER)
    layouts = [_layout(mesh, x) for x in student]
    for one in layouts:
        if one.split != layouts[0].split:
            found = [x.placements for x in layouts]
            raise ValueError(f"student: layers that the same dimensions of the mesh split wanted, got {found}")
    return layouts


class _Rows(NamedTuple):
    """What a feature loss is told of its rows."""

    mask: Any
    weight: Any
    reduction: str
    normalizer: Any

    def local(self, like, widths, layouts, dim, tensors):
        """The same of this rank's rows: what they are divided by is that of the whole batch. like: what masks and
        weights are one per row of, layer by layer; widths: what "mean" divides by as well."""
        _check.reduction(self.reduction)
        normalizer, reduction = _plain(self.normalizer), self.reduction
        if normalizer is not None:
            _check.normalizer(normalizer, like[0], self.mask, reduction)
        mask, masks = self._per_layer("mask", like, layouts, dim, _check.is_mask)
        _, weights = self._per_layer("weight", like, layouts, dim, _check.floating)
        if normalizer is None and any(layouts[0].split) and reduction in ("batchmean", "mean"):
            # among a layer's weights its divisor is in the one call that there is for all layers
            dtype = compute_dtype(*tensors)
            for i, (layer, width) in enumerate(zip(like, widths, strict=True)):
                rows = torch.Size(x for j, x in enumerate(layer.shape) if j != _check.dim_of(layer, dim) % layer.dim())
                divisor = _count(layouts[i].mesh, mask and mask[i], rows) * (width if reduction == "mean" else 1)
                if not isinstance(divisor, torch.Tensor):
                    divisor = torch.full((), divisor, dtype=dtype, device=tensors[0].device)
                scale = 1 / divisor.clamp(min=1).to(dtype)  # the count is 0 where no row counts
                weights[i] = scale if weights[i] is None else weights[i].to(dtype) * scale
            reduction = "sum"
        return _Rows(
            None if self.mask is None else masks, None if weights[0] is None else weights, reduction, normalizer
        )

    def _per_layer(self, name, like, layouts, dim, check_one):
        """Of each layer what all ranks have, and what this one has."""
        x = getattr(self, name)
        if x is None:
            return None, [None] * len(like)
        with _explained(None, **{name: x}):
            found = _check.per_layer(name, x, like, dim, check_one)
        local = []
        each = x if isinstance(x, (list, tuple)) else [x] * len(like)
        for one, whole, layer, layout in zip(each, found, like, layouts, strict=True):
            rows = layout.without(_check.dim_of(layer, dim) % layer.dim())
            _refuse_unclear(name, one, rows, whole.shape)
            local.append(_local(whole, rows))
        return found, local


def _wrapped(loss, reduction, students, dims, layouts):
    """The losses of layers, as one or by rows."""
    if reduction != "none":
        return _sum(loss, layouts[0])
    shapes = [[*x.shape[:at], *x.shape[at + 1 :]] for x, at in zip(students, dims, strict=True)]
    places = [layout.without(at) for layout, at in zip(layouts, dims, strict=True)]
    rows = [_rows(*each) for each in zip(_list(loss), places, shapes, strict=True)]
    return rows if isinstance(loss, list) else rows[0]


def feature_loss(
    again, feature, student, teacher, mask, weight, reduction, normalizer, layer_weights, return_layers, dim, beta
):
    """again: the function that computes it of plain tensors; the other arguments are its own."""
    listed = isinstance(student, (list, tuple))
    students, teachers = ([x] if isinstance(x, torch.Tensor) and not listed else x for x in (student, teacher))
    mesh = _mesh(student=student, teacher=teacher, mask=mask, weight=weight, normalizer=normalizer)
    with _explained(student, teacher=teacher):
        _check.features(students, teachers, dim)
    dims = [_check.dim_of(x, dim) % x.dim() for x in students]
    layouts = _feature_layouts(mesh, dims, students, teachers)
    widths = [1 if feature == "cosine" else x.shape[at] for x, at in zip(students, dims, strict=True)]
    rows = _Rows(mask, weight, reduction, normalizer).local(students, widths, layouts, dim, [*students, *teachers])
    local = [[_local(x, at) for x, at in zip(layers, layouts, strict=True)] for layers in (students, teachers)]
    loss = again(feature, *(local if listed else (x[0] for x in local)), *rows, layer_weights, return_layers, dim, beta)
    if not return_layers:
        return _wrapped(loss, reduction, students, dims, layouts)
    return _wrapped(loss[0], reduction, students, dims, layouts), _sum(loss[1], layouts[0])


def linear_feature_mse(again, student, projector_weight, teacher, projector_bias, normalize, dim, **of_rows):
    """The same, with a projector that every rank has: its gradient is the sum over the ranks that split the rows."""
    mesh = _mesh(
        student=student, projector_weight=projector_weight, teacher=teacher, projector_bias=projector_bias, **of_rows
    )
    with _explained(student, teacher=teacher):
        _check.projector(student, projector_weight, projector_bias, teacher, dim)
    at = _check.dim_of(student, dim) % student.dim()
    (layout,) = layouts = _feature_layouts(mesh, [at], [student], [teacher])
    tensors = [student, teacher, projector_weight]
    rows = _Rows(**of_rows).local([teacher], [teacher.shape[at]], layouts, dim, tensors)
    projector = [
        x if x is None else _local(x, layout.replicated(), layout.pending()) for x in (projector_weight, projector_bias)
    ]
    mask, weight = (x and x[0] for x in rows[:2])
    loss = again(
        _local(student, layout), projector[0], _local(teacher, layout), projector_bias=projector[1],
        normalize=normalize, dim=dim, **rows._replace(mask=mask, weight=weight)._asdict(),
    )  # fmt: skip
    return _wrapped(loss, of_rows["reduction"], [student], [at], layouts)


def attention_transfer(again, student, teacher, p):
    """Maps are as independent as rows are."""
    mesh = _mesh(student=student, teacher=teacher)
    layout = _layout(mesh, student)
    with _explained(student, teacher=teacher):
        _check.maps(student, teacher)
    for name, x in (("student", student), ("teacher", teacher)):
        _refuse_split(name, x, [0], "whole maps", "maps", _GATHER)
    local = _local(student, layout)
    loss = again(local, _local(teacher, layout), p=p)
    return _sum(loss * (len(local) / max(len(student), 1)) if any(layout.split) else loss, layout)


def relational_loss(again, name, student, teacher, options):
    """again: the function that computes it of plain tensors, whose arguments have been checked but for their values."""
    names = ["student", "teacher", *(["student_keys", "teacher_keys"] if name == "relation_kl" else [])]
    embeddings = dict(zip(names, (student, teacher, *options), strict=False))
    layout = _layout(_mesh(**embeddings, **{"mask, weight, labels or temperature": list(options)}), None)
    for argument, x in embeddings.items():
        _refuse_split(argument, x, (), "all samples, which are compared with each other,", "samples", _GATHER)
    local = [_local(x, layout) if isinstance(x, torch.Tensor) else x for x in (student, teacher, *options)]
    if not any(isinstance(x, torch.Tensor) and x.dtype is torch.bool for x in local):  # no mask
        _check.finite(**{argument: x for argument, x in zip(names, local, strict=False) if x is not None})
    if name == "relation_kl":
        for argument, x in zip(("temperature", "teacher_temperature"), local[8:10], strict=True):
            _check.temperature(argument, x, local[0])
        if isinstance(local[7], torch.Tensor):
            _check.parameter(REGISTRY[local[6]].parameter, local[7], local[0])
    found = again(name, *local)
    return tuple(_sum(x, layout) for x in found) if isinstance(found, tuple) else _sum(found, layout)
