"""Checks of what a loss of features is given."""

import torch

from .arguments import (
    at_least_zero,
    broadcasts,
    constant,
    floating,
    for_rows,
    inputs,
    number,
    same_device,
    tensor,
    whole_number,
)


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
        inputs(student, teacher, f"features{where}")
        if student.dim() == 0:
            raise ValueError(f"student: features of shape [*, D] wanted{where}, got a tensor without dimensions")
        if student.shape != teacher.shape:
            raise ValueError(
                f"teacher: the student's shape {list(student.shape)} wanted{where}, got {list(teacher.shape)}"
            )
        _has_dim(student, dim, where)
        if student.shape[dim_of(student, dim)] == 0:
            raise ValueError(f"student: at least one feature wanted{where}, got shape {list(student.shape)}")
        same_device(student, teacher)
        if student.device != students[0].device:
            raise ValueError(f"student: all layers on one device wanted, got {students[0].device} and {student.device}")


def maps(student, teacher):
    """Two tensors [B, C, H, W] that differ in C at most."""
    inputs(student, teacher, "maps")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 4:
            raise ValueError(f"{name}: maps of shape [B, C, H, W] wanted, got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: at least one channel wanted, got shape {list(x.shape)}")
    wanted, given = ([x.shape[0], *x.shape[2:]] for x in (student, teacher))
    if wanted != given:
        raise ValueError(f"teacher: the student's B, H and W {wanted} wanted, got {given}")
    same_device(student, teacher)


def exponent(name, value):
    """A finite number of at least 1."""
    number(name, value)
    if not torch.compiler.is_compiling() and value < 1:
        raise ValueError(f"{name}: a finite number of at least 1 wanted, got {value}")


def projector(student, projector_weight, projector_bias, teacher, dim):
    """Features of widths D_s and D_t at dim, a weight [D_t, D_s] and, or not, a bias [D_t]."""
    inputs(student, teacher, "features")
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
    same_device(student, teacher)
    shapes = {"projector_weight": [teacher.shape[at], student.shape[at]], "projector_bias": [teacher.shape[at]]}
    for name, x in (("projector_weight", projector_weight), ("projector_bias", projector_bias)):
        if x is None and name == "projector_bias":
            continue
        tensor(name, x)
        floating(name, x)
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
        tensor(name, one)
        check_one(name, one)
        shape = list(student.shape)
        del shape[dim_of(student, dim)]
        where = f" in layer {layer}" if len(students) > 1 else ""
        if not broadcasts(one.shape, shape):
            raise ValueError(
                f"{name}: a shape that broadcasts to {shape} wanted{where}, one per row; got {list(one.shape)}"
            )
        constant(name, one, student)
        found[layer] = for_rows(one, shape)
    return found


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
