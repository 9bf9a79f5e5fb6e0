"""Checks of what all losses are given: tensors, numbers, masks and weights of rows, reductions."""

import math
import numbers
import sys

import torch

from .. import _transforms

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
REDUCTIONS = ("none", "sum", "batchmean", "mean")


def is_tensor(name, x):
    if not isinstance(x, torch.Tensor):
        logits, hint = getattr(x, "logits", None), ""
        if isinstance(logits, torch.Tensor):  # what a model returns
            hint = "; its .logits is one"
        elif callable(logits):  # LinearLogits, where whole logits are needed
            hint = "; its .logits() makes one"
        raise TypeError(f"{name}: a torch.Tensor wanted, got {type(x).__name__}{hint}")


def tensor(name, x):
    is_tensor(name, x)
    _transforms.refuse(name, x)


def constant_teacher(teacher, loss=None, exchanged=None, note="", name="teacher"):
    """A teacher that waits for a gradient would wait in vain. exchanged: what is the loss with its sides exchanged."""
    if not (teacher.requires_grad and torch.is_grad_enabled()):
        return
    calls = ""
    if exchanged is not None:
        calls = ". Where both sides learn, two calls with the same options have their gradients: "
        calls += f"{loss}(student, teacher.detach()) and {exchanged.format('teacher, student.detach()')}{note}"
    raise ValueError(f"{name}: no gradient flows to it, and it requires one; detach() it{calls}")


def inputs(student, teacher, what):
    """Two dense tensors of floating dtypes."""
    for name, x in (("student", student), ("teacher", teacher)):
        tensor(name, x)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: float16, bfloat16, float32 or float64 {what} wanted, got {x.dtype}")
        if x.layout is not torch.strided or x.is_nested:
            raise TypeError(f"{name}: a dense tensor wanted, got {'a nested one' if x.is_nested else x.layout}")


def same_device(student, teacher):
    if student.device != teacher.device:
        raise ValueError(f"teacher: a tensor on the student's device {student.device} wanted, got {teacher.device}")


def whole_number(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: a whole number wanted, got {type(value).__name__}")


def at_least(name, value, least):
    """A whole number that is not smaller."""
    whole_number(name, value)
    if value < least:
        raise ValueError(f"{name}: at least {least} wanted, got {value}")


def finite(**tensors):
    """Where that can be seen. Not where a mask hides what is not."""
    for name, x in tensors.items():
        if values_known(x) and not _finite(x):
            raise ValueError(f"{name}: finite embeddings wanted, got some that are not")


def broadcasts(shape, to):
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def is_mask(name, x):
    if x.dtype is not torch.bool:
        raise TypeError(f"{name}: torch.bool wanted (True: the row counts), got {x.dtype}")


def constant(name, x, student, learned=""):
    """A tensor beside the student: on its device, and without a gradient while any is recorded. learned: what else
    gives it one."""
    tensor(name, x)
    if x.device != student.device:
        raise ValueError(f"{name}: a tensor on the student's device {student.device} wanted, got {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: no gradient flows to it, and it requires one; detach() it{learned}")


def floating(name, x):
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: a floating dtype wanted, got {x.dtype}")


def values_known(x):
    """Looking at values costs nothing only where no device has to be waited for; fake tensors have none."""
    ordinary = type(x) in (torch.Tensor, torch.nn.Parameter)
    return ordinary and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _finite(x):
    total = x.detach().sum(dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(torch.isfinite(x).all())  # a sum may also leave the range


def temperature(name, value, student, learned=""):
    """A positive number; or a tensor of them, broadcastable to the leading dimensions. learned: as of a constant."""
    if not isinstance(value, torch.Tensor):
        number(name, value)
        return
    rows_of_numbers(name, value, student, learned)
    if values_known(value) and not bool(((value > 0) & (value < math.inf)).all()):
        raise ValueError(f"{name}: positive finite values wanted")


def rows_of_numbers(name, value, student, learned=""):
    """A constant tensor of floating dtype that broadcasts to the student's rows; learned: as of a constant."""
    constant(name, value, student, learned)
    floating(name, value)
    leading = student.shape[:-1]
    if not broadcasts(value.shape, leading):
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


def _per_row(name, x, student):
    constant(name, x, student)
    rows = student.shape[:-1]
    if not broadcasts(x.shape, rows):
        raise ValueError(f"{name}: a shape that broadcasts to {list(rows)} wanted, one per row; got {list(x.shape)}")


def for_rows(x, rows):
    """What has been checked to broadcast to the rows, one for each; None counts for nothing."""
    return x if x is None or list(x.shape) == list(rows) else x.expand(rows).contiguous()


def mask(x, student):
    tensor("mask", x)
    is_mask("mask", x)
    _per_row("mask", x, student)


def weight(x, student):
    tensor("weight", x)
    floating("weight", x)
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
    constant("normalizer", value, student)
    if value.is_complex() or value.dtype is torch.bool:
        raise TypeError(f"normalizer: a real number or tensor wanted, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"normalizer: a number or a tensor of one element wanted, got shape {list(value.shape)}")
    if values_known(value) and not bool((value >= 0) & (value < math.inf)):
        raise ValueError("normalizer: a finite value of at least 0 wanted (0 only where no row counts)")
    if values_known(value) and not bool(value):
        _no_row_counts(student, mask)


def zero_as_tensor(value, student):
    """A normalizer; 0 as a tensor, by which every backend divides only where rows count."""
    if value is None or isinstance(value, torch.Tensor) or value != 0:
        return value
    return torch.zeros((), device=student.device)


def _no_row_counts(student, mask):
    """With a normalizer of 0. What a mask holds is not looked at: on other devices a look would wait for them."""
    if mask is None and student.numel():
        raise ValueError("normalizer: 0 is wanted only where no row counts, as masks or targets say; here all rows do")
