"""What every loss of logits does with its arguments: they are checked, and handed to the backend."""

import torch
from torch import Tensor

from .. import _backend, _check, _divergences, _dtensor, _masses, _sharded_heads, reference
from ..forms import LinearLogits, Probabilities, TopKLogProbs, in_dtype, logits_of, logits_of_rows, with_int64

# What each loss is with its two sides exchanged: the call that gives the teacher its gradient where both learn.
_EXCHANGED = {
    "kl_div": "reverse_kl_div({})",
    "reverse_kl_div": "kl_div({})",
    "js_div": "js_div({}, beta=1 - beta)",
    "symmetric_kl_div": "symmetric_kl_div({}, student_weight=1 - student_weight)",
    "skew_kl_div": "skew_reverse_kl_div({}, alpha=alpha)",
    "skew_reverse_kl_div": "skew_kl_div({}, alpha=alpha)",
    "total_variation": "total_variation({})",
    "negative_log_acceptance": "negative_log_acceptance({})",
    "alpha_beta_div": "alpha_beta_div({}, alpha=beta, beta=alpha)",
}

_GATHER = "gather the classes of a row, which are split over ranks, on each of them first"

FORMS = LinearLogits | TopKLogProbs | Probabilities


def _of_parameter(divergence, value):
    """The divergence and its parameter, as the op takes them. At an end of its range a number stands, by convention,
    for another divergence; of a tensor, and of a number that torch.compile may have made a symbol, the op sees to it.
    """
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        return divergence, value
    ends = _divergences.BY_NAME[divergence].parameter.ends
    return (ends[value], 0.0) if value in ends else (divergence, float(value))


def _side(name, side, options, dim):
    """What stands in place of logits, as the backends take it; logits as they are."""
    if isinstance(side, torch.Tensor) or not isinstance(side, FORMS):
        return side
    if name == "student" and not isinstance(side, LinearLogits):
        raise TypeError(f"student: logits or LinearLogits wanted, got {type(side).__name__}, which are a teacher's")
    if isinstance(side, LinearLogits):
        side = _sharded_heads.gathered(side)
    if _dtensor.given(*vars(side).values()):
        raise ValueError(
            f"{name}: {type(side).__name__} of plain tensors wanted, got DTensors; full_tensor() gathers them, and its "
            "grad_placements say how their gradients are brought back"
        )
    _check.flag("inplace", options.inplace)
    _check.whole_number("dim", dim)
    if options.inplace and name == "student":
        raise ValueError("inplace: LinearLogits have no logits that could be overwritten; leave it out")
    of_rows = side.indices if isinstance(side, TopKLogProbs) else next(iter(vars(side).values()))
    if dim not in (-1, of_rows.dim() - 1):
        raise ValueError(f"dim: the classes of {type(side).__name__} are last; leave it out, got {dim}")
    if isinstance(side, Probabilities):
        return side
    return with_int64(side) if isinstance(side, TopKLogProbs) else _in_autocast(name, side)


def _in_autocast(name, side):
    device = side.hidden.device.type
    narrow = torch.float64 not in (side.hidden.dtype, side.weight.dtype)
    autocast = narrow and device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    _check.linear_side(name, side, autocast)
    return in_dtype(side, torch.get_autocast_dtype(device)) if autocast else side


def of_forms(student, teacher, options, dim):
    """Both sides as the backends take them where one is no tensor of logits, else None."""
    if not any(isinstance(x, FORMS) for x in (student, teacher)):
        return None
    forms = _side("student", student, options, dim), _side("teacher", teacher, options, dim)
    if _dtensor.given(*(x for x in forms if isinstance(x, torch.Tensor)), *options):
        form = next(x for x in forms if not isinstance(x, torch.Tensor))
        raise ValueError(f"student, teacher: beside {type(form).__name__} plain tensors wanted, got DTensors")
    if options.inplace and isinstance(student, torch.Tensor) and _check.will_be_overwritten(student):
        for x in vars(teacher).values():
            if isinstance(x, torch.Tensor):
                _check.apart(student, x)
    return forms


def _exchanged(called, options):
    """The call that gives the teacher its gradient where both learn, None where there is none; and what is to be said
    of its options."""
    exchanged, note = None if options.target is not None else _EXCHANGED.get(called), ""
    if options.teacher_temperature is not options.temperature:
        exchanged = None if options.t_squared else exchanged  # it would multiply by the other temperature
        note = ", temperature and teacher_temperature exchanged"
    return exchanged, note + ", without inplace" * options.inplace


def beside_group(called, student, teacher, options):
    """An error where classes are split over ranks, and something is given that they do not go with."""
    _check.beside_group(options)
    for name, side in (("student", student), ("teacher", teacher)):
        if _dtensor.given(side):
            raise ValueError(f"{name}: plain tensors, each rank's own, wanted beside group=, got a DTensor")
    if isinstance(teacher, Probabilities) and called in (*_masses.WITHOUT, *_divergences.DERIVED):
        raise ValueError(f"group: not with {called} of Probabilities: {_GATHER}")


def _logits_loss(called, student, teacher, options, dim=-1):
    """Checks what a logit loss is given, and hands it to the backend; called: the divergence, as the user names it."""
    if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
        student, teacher, group, mesh = _sharded_heads.of_ranks(student, teacher, options.group)
        loss = _checked_loss(called, student, teacher, options._replace(group=group), dim)
        return loss if mesh is None else _sharded_heads.replicated(loss, mesh)
    return _checked_loss(called, student, teacher, options, dim)


def _checked_loss(called, student, teacher, options, dim):
    """The same, of which heads are no DTensors that are split by classes."""
    divergence, parameters = called, _divergences.parameters_of(called)
    if options.group is not None:
        beside_group(called, student, teacher, options)
    forms = of_forms(student, teacher, options, dim)
    if forms:  # in checks, and where only shape, dtype and device matter, tensors that hold nothing stand for them
        student = logits_of(forms[0])
        like = student if isinstance(student, torch.Tensor) else None
        teacher, dim = logits_of(forms[1], student=like), -1
    _check.class_dim(dim, student, teacher)
    if _dtensor.given(student, teacher, *options):
        return _dtensor.logits_loss(_logits_loss, called, student, teacher, options, dim)
    if dim != -1:  # views: the backends take any strides
        student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    ignores = _check.logits_loss(student, teacher, options, dim)
    if not options.inplace:
        _check.not_overwritten(student)
    for entry, value in zip(parameters, (options.parameter, options.second), strict=False):
        _check.parameter(entry, value, student)
    if options.target_loss is not None:
        divergence = _divergences.NON_TARGET.name
    elif parameters:
        divergence, parameter = _of_parameter(called, options.parameter)
        options = options._replace(parameter=parameter)
    _check.constant_teacher(teacher, called, *_exchanged(called, options))
    few = forms[1] if forms and isinstance(forms[1], TopKLogProbs) else None
    given = forms[1] if forms and isinstance(forms[1], Probabilities) else None
    if few:
        _check.top_k_teacher(few, called, options, student)
        _check.top_k_temperature(few, options.teacher_temperature)
    rows = student.shape[:-1]
    mask = _check.for_rows(options.mask, rows)
    if ignores:
        valid = options.target != options.ignore_index
        mask = valid if mask is None else mask & valid
    if few and options.group is None:  # else other ranks have classes, too
        _check.top_k_values(few, student.shape[-1] if options.num_classes is None else options.num_classes, mask)
    if given:
        _check.probabilities_teacher(given, divergence, student, options.num_classes, mask)
    options = options._replace(
        mask=mask,
        weight=_check.for_rows(options.weight, rows),
        normalizer=_check.zero_as_tensor(options.normalizer, student),
    )
    return _computed(divergence, *(forms or (student, teacher)), options, student.device)


def _computed(divergence, student, teacher, options, device):
    """The loss of what has been checked."""
    if isinstance(teacher, torch.Tensor):
        teacher = teacher[..., : options.num_classes]
    backend = _backend.select(device)
    if options.group is not None:
        from .. import _split_classes

        return _split_classes.logits_loss(backend, divergence, student, teacher, options)
    if backend == "torch":
        student, teacher = (
            logits_of_rows(x, options.mask) if isinstance(x, LinearLogits) else x for x in (student, teacher)
        )
        if isinstance(teacher, torch.Tensor):
            teacher = teacher[..., : options.num_classes]
        return reference.logits_loss(divergence, student, teacher, options)
    from ..ops import forms, head, rows

    namespace = _backend.namespace(backend)
    if not (isinstance(student, torch.Tensor) and isinstance(teacher, torch.Tensor)):
        return forms.logits_loss(namespace, divergence, student, teacher, options)
    if divergence in _divergences.DERIVED:
        options = options._replace(parameter=head.student_weight(namespace, student, teacher, options))
        divergence = _divergences.DERIVED[divergence].divergence
    return rows.logits_loss(namespace, divergence, student, teacher, options)
