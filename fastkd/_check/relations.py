"""Checks of what a loss of relations between samples is given."""

import numbers

import torch

from .arguments import (
    DTYPES,
    broadcasts,
    constant,
    finite,
    floating,
    inputs,
    is_mask,
    mask,
    number,
    rows_of_numbers,
    same_device,
    tensor,
    weight,
)

INTEGERS = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
SMALLEST_EPS = 1e-37  # in float32 too it is a number, by which one can divide


def embeddings(student, teacher, row_mask=None, row_weight=None):
    """Two tensors [N, D_s] and [N, D_t] on one device, of floating dtypes, finite where that can be seen; with what
    counts of their rows."""
    _shapes(student, teacher)
    _of_rows(student, teacher, row_mask, row_weight)


def samples_of_rank(student, teacher, of_rows):
    """The same of a rank's samples, but for values, of which other ranks do not know: mask, weight and labels of rows,
    by name. A teacher may be missing."""
    _shapes(student, student if teacher is None else teacher)
    for name, x in of_rows.items():
        if x is None:
            continue
        if name == "mask":
            mask(x, student)
        elif name == "labels":
            _labels(x, student)
        elif name == "weight":
            weight(x, student)
        else:
            rows_of_numbers(name, x, student)


def _shapes(student, teacher):
    inputs(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 2:
            raise ValueError(f"{name}: embeddings of shape [N, D] wanted, got {list(x.shape)}")
        if x.shape[1] == 0:
            raise ValueError(f"{name}: at least one feature wanted, got shape {list(x.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"teacher: the student's {student.shape[0]} rows wanted, got {teacher.shape[0]}")
    same_device(student, teacher)


def _labels(labels, student):
    tensor("labels", labels)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels: an integer dtype wanted, one class number per row; got {labels.dtype}")
    constant("labels", labels, student)
    if labels.shape != student.shape[:1]:
        raise ValueError(f"labels: shape [{len(student)}] wanted, one per row; got {list(labels.shape)}")


def triplet(student, teacher, labels, positives, row_mask, row_weight):
    """Embeddings [N, D_s]; labels [N], or embeddings [N, D_t] of which the nearest are similar; what counts of rows."""
    if teacher is None and labels is None:
        raise ValueError("teacher, labels: one of the two wanted, to tell who is similar to whom; got neither")
    embeddings(student, student if labels is not None else teacher, row_mask, row_weight)
    N = len(student)
    if labels is not None:
        _labels(labels, student)
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
    inputs(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() not in (2, 3):
            raise ValueError(f"{name}: embeddings of shape [N, D] or [B, N, D] wanted, got {list(x.shape)}")
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: at least one feature wanted, got shape {list(x.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        wanted, got = list(student.shape[:-1]), list(teacher.shape[:-1])
        raise ValueError(f"teacher: the student's rows {wanted} wanted, got {got}")
    same_device(student, teacher)
    _of_rows(student, teacher, row_mask, row_weight)


def relation(student, teacher, student_keys, teacher_keys, row_mask, key_mask, row_weight):
    """Embeddings [*, N, D_s] and [*, N, D_t], their keys [*, M, D_s] and [*, M, D_t] or none, what counts of both."""
    inputs(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() < 2 or x.shape[-1] == 0:
            raise ValueError(f"{name}: embeddings of shape [*, N, D] wanted, got {list(x.shape)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher: the student's rows {list(student.shape[:-1])} wanted, got {list(teacher.shape[:-1])}"
        )
    same_device(student, teacher)
    tensors = {"student": student, "teacher": teacher}
    if student_keys is not None or teacher_keys is not None:
        tensors |= _keys(student, teacher, student_keys, teacher_keys)
    rows = student.shape[:-1]
    keys = rows if student_keys is None else student_keys.shape[:-1]
    for name, x, shape in (("mask", row_mask, rows), ("key_mask", key_mask, keys), ("weight", row_weight, rows)):
        if x is None:
            continue
        tensor(name, x)
        (floating if name == "weight" else is_mask)(name, x)
        constant(name, x, student)
        if not broadcasts(x.shape, shape):
            raise ValueError(f"{name}: a shape that broadcasts to {list(shape)} wanted, got {list(x.shape)}")
    if row_mask is None and key_mask is None:
        finite(**tensors)


def _keys(student, teacher, student_keys, teacher_keys):
    """By name: both, and as many."""
    for name, x, keys in (("student_keys", student, student_keys), ("teacher_keys", teacher, teacher_keys)):
        if keys is None:
            other = "teacher_keys" if name == "student_keys" else "student_keys"
            raise ValueError(f"{name}: wanted beside {other}, got None")
        tensor(name, keys)
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
