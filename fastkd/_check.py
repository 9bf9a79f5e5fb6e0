"""What a loss is given, checked before anything is computed. Every error names the argument."""

import math
import numbers
import sys
from typing import Any, NamedTuple

import torch

from . import _transforms
from ._inplace import was_overwritten

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
REDUCTIONS = ("none", "sum", "batchmean", "mean")
SMALLEST_EPS = 1e-37  # in float32 too it is a number, by which one can divide


class LogitsOptions(NamedTuple):
    """What every logit loss takes beside its logits; see fastkd.functional."""

    temperature: Any
    teacher_temperature: Any
    t_squared: bool
    mask: Any
    weight: Any
    reduction: str
    normalizer: Any
    inplace: bool
    parameter: Any  # the divergence's own; 0.0 where it has none


def _tensor(name, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: a torch.Tensor wanted, got {type(x).__name__}")
    _transforms.refuse(name, x)


def logits_loss(student, teacher, options, dim=-1):
    """Everything that a logit loss is given; of tensors whose classes have been brought from dim to the end."""
    logits(student, teacher, dim)
    temperature("temperature", options.temperature, student)
    if options.teacher_temperature is not options.temperature:
        temperature("teacher_temperature", options.teacher_temperature, student)
    if options.mask is not None:
        mask(options.mask, student)
    if options.weight is not None:
        weight(options.weight, student)
    flag("t_squared", options.t_squared)
    flag("inplace", options.inplace)
    reduction(options.reduction)
    if options.normalizer is not None:
        normalizer(options.normalizer, student, options.mask, options.reduction)
    if options.inplace:
        inplace(student, teacher)


def logits_module(temperature, teacher_temperature, t_squared, dim, reduction_, inplace_):
    """The options that the module of a logit loss is made with."""
    whole_number("dim", dim)
    number("temperature", temperature)
    if teacher_temperature is not None:
        number("teacher_temperature", teacher_temperature)
    flag("t_squared", t_squared)
    flag("inplace", inplace_)
    reduction(reduction_)


def constant_teacher(teacher, loss=None, exchanged=None, note="", name="teacher"):
    """A teacher that waits for a gradient would wait in vain. exchanged: what is the loss with its sides exchanged."""
    if not (teacher.requires_grad and torch.is_grad_enabled()):
        return
    calls = ""
    if exchanged is not None:
        calls = ". Where both sides learn, two calls with the same options have their gradients: "
        calls += f"{loss}(student, teacher.detach()) and {exchanged.format('teacher, student.detach()')}{note}"
    raise ValueError(f"{name}: no gradient flows to it, and it requires one; detach() it{calls}")


def _inputs(student, teacher, what):
    """Two dense tensors of floating dtypes."""
    for name, x in (("student", student), ("teacher", teacher)):
        _tensor(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: float16, bfloat16, float32 or float64 {what} wanted, got {x.dtype}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: a dense tensor wanted, got {'a nested one' if x.is_nested else x.layout}")


def _same_device(student, teacher):
    if student.device != teacher.device:
        raise ValueError(f"teacher: a tensor on the student's device {student.device} wanted, got {teacher.device}")


def whole_number(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: a whole number wanted, got {type(value).__name__}")


def class_dim(dim, student, teacher):
    """The dimension of the classes is one of both tensors."""
    whole_number("dim", dim)
    if dim == -1:
        return
    for name, x in (("student", student), ("teacher", teacher)):
        _tensor(name, x)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim: a dimension of the {name}'s shape {list(x.shape)} wanted, got {dim}")


def logits(student, teacher, dim):
    """Two tensors [*, V] of one shape, on one device, of floating dtypes; dim: where the user has the classes."""
    _inputs(student, teacher, "logits")
    if student.dim() == 0:
        raise ValueError("student: logits of shape [*, V] wanted, got a tensor without dimensions")
    if student.shape != teacher.shape:
        shape, teacher_shape = (list(x.movedim(-1, dim).shape) for x in (student, teacher))
        padded = ""
        if student.shape[:-1] == teacher.shape[:-1]:
            name, fewer = min(
                ("student", teacher.shape[-1]), ("teacher", student.shape[-1]), key=lambda wider: wider[1]
            )
            part = f"[..., :{fewer}]" if dim == -1 else f".narrow({dim}, 0, {fewer})"
            padded = f". Where a head is padded, slice the wider one: {name}{part}"
        raise ValueError(f"teacher: the student's shape {shape} wanted, got {teacher_shape}{padded}")
    if student.shape[-1] == 0:
        raise ValueError(f"student: at least one class wanted, got shape {list(student.movedim(-1, dim).shape)}")
    _same_device(student, teacher)


def embeddings(student, teacher, row_mask=None, row_weight=None):
    """Two tensors [N, D_s] and [N, D_t] on one device, of floating dtypes, finite where that can be seen; with what
    counts of their rows."""
    _inputs(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 2:
            raise ValueError(f"{name}: embeddings of shape [N, D] wanted, got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: at least one feature wanted, got shape {list(x.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"teacher: the student's {student.shape[0]} rows wanted, got {teacher.shape[0]}")
    _same_device(student, teacher)
    _of_rows(student, teacher, row_mask, row_weight)


def triplet(student, teacher, labels, positives, row_mask, row_weight):
    """Embeddings [N, D_s]; labels [N], or embeddings [N, D_t] of which the nearest are similar; what counts of rows."""
    if teacher is None and labels is None:
        raise ValueError("teacher, labels: one of the two wanted, to tell who is similar to whom; got neither")
    embeddings(student, student if labels is not None else teacher, row_mask, row_weight)
    N = len(student)
    if labels is not None:
        _tensor("labels", labels)
        if labels.dtype not in INTEGERS:
            raise TypeError(f"labels: an integer dtype wanted, one class number per row; got {labels.dtype}")
        _constant("labels", labels, student)
        if labels.shape != student.shape[:1]:
            raise ValueError(f"labels: shape [{N}] wanted, one per row; got {list(labels.shape)}")
    if positives is None:
        return
    count_of_positives(positives)
    if labels is not None:
        raise ValueError("positives: wanted with the teacher's neighbours alone; here labels tell who is similar")
    if positives > N - 1 and N > 0:
        raise ValueError(f"positives: at most the {N - 1} other rows wanted, got {positives}")


def count_of_positives(value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"positives: a whole number wanted, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"positives: at least 1 wanted, got {value}")


def _of_rows(student, teacher, row_mask, row_weight):
    """What is said of the rows of embeddings; these, which must be finite where no mask hides what is not."""
    if row_weight is not None:
        weight(row_weight, student)
    if row_mask is None:
        finite(student=student, teacher=teacher)
    else:
        mask(row_mask, student)


def batches_of_embeddings(student, teacher, row_mask=None, row_weight=None):
    """The same, and also [B, N, D_s] and [B, N, D_t]."""
    _inputs(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() not in (2, 3):
            raise ValueError(f"{name}: embeddings of shape [N, D] or [B, N, D] wanted, got {list(x.shape)}")
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: at least one feature wanted, got shape {list(x.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        wanted, got = list(student.shape[:-1]), list(teacher.shape[:-1])
        raise ValueError(f"teacher: the student's rows {wanted} wanted, got {got}")
    _same_device(student, teacher)
    _of_rows(student, teacher, row_mask, row_weight)


def finite(**tensors):
    """Where that can be seen. Not where a mask hides what is not."""
    for name, x in tensors.items():
        if _values_known(x) and not _finite(x):
            raise ValueError(f"{name}: finite embeddings wanted, got some that are not")


def relation(student, teacher, student_keys, teacher_keys, row_mask, key_mask, row_weight):
    """Embeddings [*, N, D_s] and [*, N, D_t], their keys [*, M, D_s] and [*, M, D_t] or none, what counts of both."""
    _inputs(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() < 2 or x.shape[-1] == 0:
            raise ValueError(f"{name}: embeddings of shape [*, N, D] wanted, got {list(x.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: the student's rows {list(student.shape[:-1])} wanted, got {list(teacher.shape[:-1])}"
        )
    _same_device(student, teacher)
    tensors = {"student": student, "teacher": teacher}
    if student_keys is not None or teacher_keys is not None:
        tensors |= _keys(student, teacher, student_keys, teacher_keys)
    rows = student.shape[:-1]
    keys = rows if student_keys is None else student_keys.shape[:-1]
    for name, x, shape in (("mask", row_mask, rows), ("key_mask", key_mask, keys), ("weight", row_weight, rows)):
        if x is None:
            continue
        _tensor(name, x)
        (_floating if name == "weight" else is_mask)(name, x)
        _constant(name, x, student)
        if not _broadcasts(x.shape, shape):
            raise ValueError(f"{name}: a shape that broadcasts to {list(shape)} wanted, got {list(x.shape)}")
    if row_mask is None and key_mask is None:
        finite(**tensors)


def _keys(student, teacher, student_keys, teacher_keys):
    """By name: both, and as many."""
    for name, x, keys in (("student_keys", student, student_keys), ("teacher_keys", teacher, teacher_keys)):
        if keys is None:
            other = "teacher_keys" if name == "student_keys" else "student_keys"
            raise ValueError(f"{name}: wanted beside {other}, got None")
        _tensor(name, keys)
        if keys.dtype not in DTYPES:
            raise TypeError(f"{name}: float16, bfloat16, float32 or float64 keys wanted, got {keys.dtype}")
        if keys.layout is not torch.strided or keys.is_nested:
            raise TypeError(f"{name}: a dense tensor wanted, got {'a nested one' if keys.is_nested else keys.layout}")
        wanted = [*x.shape[:-2], "M", x.shape[-1]]
        if keys.dim() != x.dim() or [*keys.shape[:-2], "M", keys.shape[-1]] != wanted:
            shape = ", ".join(map(str, wanted))
            side = name.removesuffix("_keys")
            raise ValueError(f"{name}: shape [{shape}] wanted, of the {side}'s width; got {list(keys.shape)}")
        if keys.device != student.device:
            raise ValueError(f"{name}: a tensor on the student's device {student.device} wanted, got {keys.device}")
    if student_keys.shape[-2] != teacher_keys.shape[-2]:
        raise ValueError(
            f"teacher_keys: {student_keys.shape[-2]} wanted, as many as student_keys; got {teacher_keys.shape[-2]}"
        )
    return {"student_keys": student_keys, "teacher_keys": teacher_keys}


def _broadcasts(shape, to):
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def divergence(value, names):
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"divergence: one of {', '.join(names)} wanted, got {value!r}")


def eps(value):
    """What keeps logarithms and quotients finite: 0 would not."""
    number("eps", value)
    if not torch.compiler.is_compiling() and value < SMALLEST_EPS:
        raise ValueError(f"eps: a number of at least {SMALLEST_EPS} wanted, got {value}")


def clamp(value):
    if value not in (None, "teacher", "both"):
        raise ValueError(f"clamp: None, 'teacher' or 'both' wanted, got {value!r}")


def features(students, teachers, dim):
    """Lists of tensors, layer by layer of one shape, on one device, of floating dtypes."""
    for name, x in (("student", students), ("teacher", teachers)):
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name}: a tensor, or a list of one for each layer wanted, got {type(x).__name__}")
    feature_dim(dim)
    if not students:
        raise ValueError("student: at least one layer wanted, got an empty list")
    if len(students) != len(teachers):
        raise ValueError(
            f"teacher: one tensor for each of the student's {len(students)} layers wanted, got {len(teachers)}"
        )
    for layer, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        where = f" in layer {layer}" if len(students) > 1 else ""
        _inputs(student, teacher, f"features{where}")
        if student.dim() == 0:
            raise ValueError(f"student: features of shape [*, D] wanted{where}, got a tensor without dimensions")
        if student.shape != teacher.shape:
            raise ValueError(
                f"teacher: the student's shape {list(student.shape)} wanted{where}, got {list(teacher.shape)}"
            )
        _has_dim(student, dim, where)
        if student.shape[dim_of(student, dim)] == 0:
            raise ValueError(f"student: at least one feature wanted{where}, got shape {list(student.shape)}")
        _same_device(student, teacher)
        if student.device != students[0].device:
            raise ValueError(f"student: all layers on one device wanted, got {students[0].device} and {student.device}")


def maps(student, teacher):
    """Two tensors [B, C, H, W] that differ in C at most."""
    _inputs(student, teacher, "maps")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 4:
            raise ValueError(f"{name}: maps of shape [B, C, H, W] wanted, got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: at least one channel wanted, got shape {list(x.shape)}")
    wanted, given = ([x.shape[0], *x.shape[2:]] for x in (student, teacher))
    if wanted != given:
        raise ValueError(f"teacher: the student's B, H and W {wanted} wanted, got {given}")
    _same_device(student, teacher)


def exponent(name, value):
    """A finite number of at least 1."""
    number(name, value)
    if not torch.compiler.is_compiling() and value < 1:
        raise ValueError(f"{name}: a finite number of at least 1 wanted, got {value}")


def projector(student, projector_weight, projector_bias, teacher, dim):
    """Features of widths D_s and D_t at dim, a weight [D_t, D_s] and, or not, a bias [D_t]."""
    _inputs(student, teacher, "features")
    feature_dim(dim)
    if student.dim() == 0:
        raise ValueError("student: features of shape [*, D] wanted, got a tensor without dimensions")
    _has_dim(student, dim)
    at = dim_of(student, dim) % student.dim()
    wanted = [*student.shape[:at], "D", *student.shape[at + 1 :]]
    if [*teacher.shape[:at], "D", *teacher.shape[at + 1 :]] != wanted:
        shape = ", ".join(map(str, wanted))
        raise ValueError(
            f"teacher: the student's shape but for its features, [{shape}], wanted; got {list(teacher.shape)}. "
            "dim says where the features are"
        )
    for name, x in (("student", student), ("teacher", teacher)):
        if x.shape[at] == 0:
            raise ValueError(f"{name}: at least one feature wanted, got shape {list(x.shape)}")
    _same_device(student, teacher)
    shapes = {"projector_weight": [teacher.shape[at], student.shape[at]], "projector_bias": [teacher.shape[at]]}
    for name, x in (("projector_weight", projector_weight), ("projector_bias", projector_bias)):
        if x is None and name == "projector_bias":
            continue
        _tensor(name, x)
        _floating(name, x)
        if list(x.shape) != shapes[name]:
            raise ValueError(f"{name}: shape {shapes[name]} wanted, got {list(x.shape)}")
        if x.device != student.device:
            raise ValueError(f"{name}: a tensor on the student's device {student.device} wanted, got {x.device}")
        if x.dtype != student.dtype and not torch.is_autocast_enabled(student.device.type):
            raise TypeError(f"{name}: the student's dtype {student.dtype} wanted, got {x.dtype}")


def dim_of(x, dim):
    """Where the features of a row are: of maps [B, C, H, W] the channels, else the last."""
    if dim is None:
        return 1 if x.dim() == 4 else x.dim() - 1
    return dim


def _has_dim(x, dim, where=""):
    """The dimension of the features is one of x, and said where nothing tells it."""
    if dim is None and x.dim() > 4:
        raise ValueError(
            f"dim: wanted{where} of five and more dimensions (1 where they are video, [B, C, T, H, W]); "
            f"got None and shape {list(x.shape)}"
        )
    if not -x.dim() <= dim_of(x, dim) < x.dim():
        raise ValueError(f"dim: a dimension of shape {list(x.shape)} wanted{where}, got {dim}")


def per_layer(name, x, students, dim, check_one):
    """One tensor for all layers, or a list of one for each; as a list of tensors [*], one per row of their layer."""
    listed = isinstance(x, (list, tuple))
    if listed and len(x) != len(students):
        raise ValueError(f"{name}: one tensor for all layers, or one for each of {len(students)} wanted, got {len(x)}")
    found = list(x) if listed else [x] * len(students)
    for layer, (one, student) in enumerate(zip(found, students, strict=True)):
        _tensor(name, one)
        check_one(name, one)
        shape = list(student.shape)
        del shape[dim_of(student, dim)]
        where = f" in layer {layer}" if len(students) > 1 else ""
        if not _broadcasts(one.shape, shape):
            raise ValueError(
                f"{name}: a shape that broadcasts to {shape} wanted{where}, one per row; got {list(one.shape)}"
            )
        _constant(name, one, student)
        found[layer] = for_rows(one, shape)
    return found


def is_mask(name, x):
    if x.dtype is not torch.bool:
        raise TypeError(f"{name}: torch.bool wanted (True: the row counts), got {x.dtype}")


def layer_weights(value, layers):
    if isinstance(value, (str, torch.Tensor)) or not hasattr(value, "__len__"):
        raise TypeError(f"layer_weights: a list of numbers wanted, got {type(value).__name__}")
    if len(value) != layers:
        raise ValueError(f"layer_weights: one for each of {layers} layers wanted, got {len(value)}")
    for weight_ in value:
        at_least_zero("layer_weights", weight_)


def feature_dim(value):
    if value is not None:
        whole_number("dim", value)


def feature_normalize(value):
    if value not in (None, "l2", "standardize"):
        raise ValueError(f"normalize: None, 'l2' or 'standardize' wanted, got {value!r}")


def _constant(name, x, student):
    """A tensor beside the student: on its device, and without a gradient."""
    _tensor(name, x)
    if x.device != student.device:
        raise ValueError(f"{name}: a tensor on the student's device {student.device} wanted, got {x.device}")
    if x.requires_grad:
        raise ValueError(f"{name}: no gradient flows to it; detach it")


def _floating(name, x):
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: a floating dtype wanted, got {x.dtype}")


def _values_known(x):
    """Looking at values costs nothing only where no device has to be waited for; fake tensors have none."""
    ordinary = type(x) in (torch.Tensor, torch.nn.Parameter)
    return ordinary and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _finite(x):
    total = x.detach().sum(dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(torch.isfinite(x).all())  # a sum may also leave the range


def temperature(name, value, student):
    """A positive number; or a tensor of them, broadcastable to the leading dimensions."""
    if not isinstance(value, torch.Tensor):
        number(name, value)
        return
    _rows_of_numbers(name, value, student)
    if _values_known(value) and not bool(((value > 0) & (value < math.inf)).all()):
        raise ValueError(f"{name}: positive finite values wanted")


def _rows_of_numbers(name, value, student):
    """A constant tensor of floating dtype that broadcasts to the student's rows."""
    _constant(name, value, student)
    _floating(name, value)
    leading = student.shape[:-1]
    if not _broadcasts(value.shape, leading):
        raise ValueError(f"{name}: a shape that broadcasts to {list(leading)} wanted, got {list(value.shape)}")


def number(name, value):
    """A positive finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number wanted, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return  # the number may be a symbol; the op checks it when it runs
    if not 0 < value <= sys.float_info.max:  # false for NaN
        raise ValueError(f"{name}: a positive finite number wanted, got {value}")


def flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: True or False wanted, got {value!r}")


def normalize(value):
    if value not in ("mean", None):
        raise ValueError(f"normalize: 'mean' or None wanted, got {value!r}")


def at_least_zero(name, value):
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number wanted, got {type(value).__name__}")
    if torch.compiler.is_compiling():
        return
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name}: a finite number of at least 0 wanted, got {value}")


def parameter(entry, value, student=None):
    """A divergence's own number, within the range of its entry in _divergences; or, where there is a student, a tensor
    of them, broadcastable to the leading dimensions."""
    name = entry.name
    if student is not None and isinstance(value, torch.Tensor):
        _rows_of_numbers(name, value, student)
        if _values_known(value) and not bool(((value >= entry.low) & (value <= entry.high)).all()):
            raise ValueError(f"{name}: values {entry.range} wanted")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number{' or a tensor' * (student is not None)} wanted, got {type(value).__name__}")
    if student is not None and torch.compiler.is_compiling():
        return  # the number may be a symbol; the op checks it when it runs
    if not entry.low <= value <= entry.high:  # false for NaN
        raise ValueError(f"{name}: a number {entry.range} wanted, got {value}")


def _per_row(name, x, student):
    _constant(name, x, student)
    rows = student.shape[:-1]
    if not _broadcasts(x.shape, rows):
        raise ValueError(f"{name}: a shape that broadcasts to {list(rows)} wanted, one per row; got {list(x.shape)}")


def for_rows(x, rows):
    """What has been checked to broadcast to the rows, one for each; None counts for nothing."""
    return x if x is None or list(x.shape) == list(rows) else x.expand(rows).contiguous()


def mask(x, student):
    _tensor("mask", x)
    is_mask("mask", x)
    _per_row("mask", x, student)


def weight(x, student):
    _tensor("weight", x)
    _floating("weight", x)
    _per_row("weight", x, student)


def reduction(value):
    if value not in REDUCTIONS:
        raise ValueError(f"reduction: one of {', '.join(REDUCTIONS)} wanted, got {value!r}")


def normalizer(value, student, mask, reduction):
    """A number or a tensor of one element, of at least 0; more where it is seen that rows count."""
    if reduction == "none":
        raise ValueError("normalizer: reduction='none' has no divisor to replace")
    if not isinstance(value, torch.Tensor):
        at_least_zero("normalizer", value)
        if torch.compiler.is_compiling():
            return
        if value == 0:
            _no_row_counts(student, mask)
        elif not math.isfinite(1 / value):
            raise ValueError(f"normalizer: a number with a finite inverse wanted, got {value}")
        return
    _constant("normalizer", value, student)
    if value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"normalizer: a real number or tensor wanted, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"normalizer: a number or a tensor of one element wanted, got shape {list(value.shape)}")
    if _values_known(value) and not bool((value >= 0) & (value < math.inf)):
        raise ValueError("normalizer: a finite value of at least 0 wanted (0 only where no row counts)")
    if _values_known(value) and not bool(value):
        _no_row_counts(student, mask)


def zero_as_tensor(value, student):
    """A normalizer; 0 as a tensor, by which every backend divides only where rows count."""
    if value is None or isinstance(value, torch.Tensor) or value != 0:
        return value
    return torch.zeros((), device=student.device)


def _no_row_counts(student, mask):
    """With a normalizer of 0. What a mask holds is not looked at: on other devices a look would wait for them."""
    if mask is None and student.numel():
        raise ValueError("normalizer: 0 is wanted only where no row counts, as a mask says; here there is no mask")


def will_be_overwritten(student):
    """Whether the gradient will be written over the student's logits; an error where their history forbids it."""
    if torch.compiler.is_compiling():
        raise RuntimeError("inplace: not under torch.compile, which plans memory itself; leave it out")
    if not (student.requires_grad and torch.is_grad_enabled()):
        return False
    if student.is_leaf or (student._base is not None and student._base.is_leaf and student._base.requires_grad):
        raise ValueError(
            "inplace: the student's logits are a leaf that requires a gradient, or a view of one; "
            "they cannot be overwritten"
        )
    if was_overwritten(student):
        raise ValueError(
            "inplace: the student's logits, or others of the same tensor, have been overwritten by a loss with "
            "inplace=True, and no gradient passes by that. Compute the logits of each chunk by themselves, or leave "
            "inplace out"
        )
    return True


def inplace(student, teacher):
    """The gradient can be written over the student's logits."""
    if not will_be_overwritten(student):
        return
    if _overlaps_itself(student):
        raise ValueError("inplace: several of the student's logits share one place in memory (expand, unfold)")
    same_storage = student.untyped_storage().data_ptr() == teacher.untyped_storage().data_ptr()
    if same_storage and student.numel() and _first(student) <= _last(teacher) and _first(teacher) <= _last(student):
        raise ValueError("inplace: student and teacher share their memory")


def _overlaps_itself(x):
    """Whether two elements may lie in one place: a dimension steps within what the smaller ones span."""
    span = 0
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False


def _first(x):
    return x.data_ptr()


def _last(x):
    """Where the last element begins."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + steps * x.element_size()
