"""Checks of what a loss of logits is given."""

import numbers
from typing import Any, NamedTuple

import torch

from .._divergences import BY_NAME, parameters_of
from .._inplace import was_overwritten
from .arguments import (
    at_least,
    at_least_zero,
    constant,
    flag,
    inputs,
    is_tensor,
    mask,
    normalizer,
    number,
    reduction,
    rows_of_numbers,
    same_device,
    temperature,
    tensor,
    values_known,
    weight,
    whole_number,
)

# What a temperature's error adds: the call that gives it a gradient.
LEARNED = ". Where T is learned, pass student / T with temperature=1 and teacher_temperature=T.detach()"


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
    # The class of each row, and what is said of the hard loss that it has then. None, not a number: torch.compile takes
    # a default that is a float for one that may change, and compiles once more.
    target: Any = None
    ignore_index: Any = None
    hard_weight: Any = None
    soft_weight: Any = None
    label_smoothing: Any = None
    target_loss: Any = None  # the name of a loss that parts the target from the other classes
    second: Any = None  # the second parameter of a loss that has two
    standardize: Any = False
    return_parts: Any = False
    num_classes: Any = None  # that count, of both sides the first; None: all
    group: Any = None  # the ranks over which classes are split


def logits_loss(student, teacher, options, dim=-1):
    """Everything that a logit loss is given; of tensors whose classes have been brought from dim to the end. Returns
    whether it has a target that may leave out rows."""
    whole = student
    student, teacher = first_classes(student, teacher, options.num_classes)
    logits(student, teacher, dim, some=options.group is not None)
    temperature("temperature", options.temperature, student, LEARNED)
    if options.teacher_temperature is not options.temperature:
        temperature("teacher_temperature", options.teacher_temperature, student)
    if options.mask is not None:
        mask(options.mask, student)
    if options.weight is not None:
        weight(options.weight, student)
    flag("t_squared", options.t_squared)
    flag("standardize", options.standardize)
    flag("return_parts", options.return_parts)
    flag("inplace", options.inplace)
    if options.target is None:
        reduction(options.reduction)
    says_which_rows_count = options.mask
    if options.target is not None:
        if options.target_loss is None:
            hard_options(options.hard_weight, options.soft_weight, options.label_smoothing)
        target_reduction(options.reduction)
        classes = student.shape[-1] if options.group is None else None
        if target(options.target, student, options.ignore_index, options.mask, classes):
            says_which_rows_count = options.target
    if options.normalizer is not None:
        normalizer(options.normalizer, student, says_which_rows_count, options.reduction)
    if options.inplace:
        inplace(whole, teacher)
    return options.target is not None and says_which_rows_count is options.target


INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


def as_classes(x):
    """A target, whose dtype can tell ignore_index from every class."""
    is_tensor("target", x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"target: whole numbers wanted, torch.int64 or a smaller type, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"target: a dense tensor wanted, got {'a nested one' if x.is_nested else x.layout}")
    return x.to(torch.int64)


def hard_options(hard_weight, soft_weight, label_smoothing):
    """What a loss with a hard part is told of it."""
    at_least_zero("hard_weight", hard_weight)
    at_least_zero("soft_weight", soft_weight)
    at_least_zero("label_smoothing", label_smoothing)
    if not torch.compiler.is_compiling() and label_smoothing > 1:
        raise ValueError(f"label_smoothing: a number from 0 to 1 wanted, got {label_smoothing}")


def target_reduction(reduction_):
    """That of a loss with a target."""
    if reduction_ not in ("none", "sum", "batchmean"):
        raise ValueError(
            f"reduction: 'none', 'sum' or 'batchmean' wanted with a target, got {reduction_!r}. Libraries mean three "
            "things by 'mean'; 'batchmean' is the mean over the rows that count, as that of torch's cross_entropy"
        )


def target(x, student, ignore_index, mask_, classes):
    """A class for each row; classes: how many there are, None where that is not known yet. Values are looked at where
    that waits for nothing, and where the row counts. Whether there may be rows that are ignored."""
    whole_number("ignore_index", ignore_index)
    constant("target", x, student)
    rows = student.shape[:-1]
    if x.shape != rows:
        raise ValueError(f"target: shape {list(rows)} wanted, a class for each row; got {list(x.shape)}")
    if classes is None or not values_known(x) or not x.numel():
        return True
    lowest, highest = (value.item() for value in x.aminmax())
    if lowest >= 0 and highest < classes:
        return lowest <= ignore_index <= highest
    wrong = ((x < 0) | (x >= classes)) & (x != ignore_index)
    if mask_ is not None and values_known(mask_):
        wrong = wrong & mask_
    if bool(wrong.any()):
        raise ValueError(
            f"target: classes from 0 to {classes - 1} wanted, or ignore_index={ignore_index}, got {x[wrong][0].item()}"
        )
    return True


def not_overwritten(student):
    """For a loss that writes over nothing: else backward would raise, and speak of what came last. A call that is being
    compiled keeps no such record."""
    if torch.compiler.is_compiling() or not (student.requires_grad and torch.is_grad_enabled()):
        return
    if was_overwritten(student):
        raise ValueError(
            "student: these logits, or others of the same tensor, have been overwritten by a loss with "
            "inplace=True, and no gradient passes by that. Use them before, or leave inplace out"
        )


def logits_module(
    temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction_, inplace_, group_=None
):
    """The options that the module of a logit loss is made with."""
    whole_number("dim", dim)
    count_of_classes(num_classes)
    if isinstance(temperature, torch.nn.Parameter):
        raise TypeError(f"temperature: a number wanted, got {type(temperature).__name__}{LEARNED}")
    number("temperature", temperature)
    if teacher_temperature is not None:
        number("teacher_temperature", teacher_temperature)
    flag("t_squared", t_squared)
    flag("standardize", standardize)
    flag("inplace", inplace_)
    reduction(reduction_)
    group(group_)


def group(group_):
    """A process group that this process is a member of, or None."""
    if group_ is None:
        return
    dist = torch.distributed
    if not (dist.is_available() and isinstance(group_, dist.ProcessGroup)):
        raise TypeError(f"group: a torch.distributed.ProcessGroup wanted, got {type(group_).__name__}")
    if dist.get_rank(group_) < 0:
        raise ValueError("group: one that this process is a member of wanted")


def beside_group(options):
    """What a loss of classes that are split over ranks does not have."""
    group(options.group)
    if options.num_classes is not None:
        raise ValueError(
            "num_classes: not with classes that are split over ranks; beside group= each rank gives those of its own "
            "that count, logits[..., :n]"
        )
    if getattr(options, "return_parts", False):
        raise ValueError("return_parts: not with classes that are split over ranks")


def class_dim(dim, student, teacher):
    """The dimension of the classes is one of both tensors."""
    whole_number("dim", dim)
    if dim == -1:
        return
    for name, x in (("student", student), ("teacher", teacher)):
        tensor(name, x)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim: a dimension of the {name}'s shape {list(x.shape)} wanted, got {dim}")


def count_of_classes(num_classes):
    """Of those that count, or None: all."""
    if num_classes is None:
        return
    at_least("num_classes", num_classes, 1)


def first_classes(student, teacher, num_classes):
    """The classes of both sides that count, as constants; of tensors whose classes are last."""
    if num_classes is None:
        return student, teacher
    count_of_classes(num_classes)
    inputs(student, teacher, "logits")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() == 0 or num_classes > x.shape[-1]:
            found = f"{x.shape[-1]} classes" if x.dim() else "no dimension of classes"
            raise ValueError(f"num_classes: no more classes than the {name} has wanted, got {num_classes} of {found}")
    return student.detach()[..., :num_classes], teacher.detach()[..., :num_classes]


def logits(student, teacher, dim, some=False):
    """Two tensors [*, V] of one shape, on one device, of floating dtypes; dim: where the user has the classes; some:
    others may be elsewhere, and even all."""
    inputs(student, teacher, "logits")
    if student.dim() == 0:
        raise ValueError("student: logits of shape [*, V] wanted, got a tensor without dimensions")
    if student.shape != teacher.shape:
        shape, teacher_shape = (list(x.movedim(-1, dim).shape) for x in (student, teacher))
        padded = ""
        if student.shape[:-1] == teacher.shape[:-1] and not some:
            fewer = min(student.shape[-1], teacher.shape[-1])
            padded = f". Where a head is padded, num_classes={fewer} takes the classes that both have"
        raise ValueError(f"teacher: the student's shape {shape} wanted, got {teacher_shape}{padded}")
    if student.shape[-1] == 0 and not some:
        raise ValueError(f"student: at least one class wanted, got shape {list(student.movedim(-1, dim).shape)}")
    same_device(student, teacher)


def parameter(entry, value, student=None):
    """A divergence's own number, within the range of its entry in _divergences; or, where there is a student, a tensor
    of them, broadcastable to the leading dimensions."""
    name = entry.name
    tensors = student is not None and entry.per_row
    if tensors and isinstance(value, torch.Tensor):
        rows_of_numbers(name, value, student)
        if values_known(value) and not bool(((value >= entry.low) & (value <= entry.high)).all()):
            raise ValueError(f"{name}: values {entry.range} wanted")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number{' or a tensor' * tensors} wanted, got {type(value).__name__}")
    if student is not None and torch.compiler.is_compiling():
        return  # the number may be a symbol; the op checks it when it runs
    if not entry.low <= value <= entry.high:  # false for NaN
        raise ValueError(f"{name}: a number {entry.range} wanted, got {value}")


def soft_divergence(name, parameters):
    """The two parameters of the divergence that a loss with a target names, None where it has less: of those that
    there are, by name, only its own may be given."""
    if not isinstance(name, str) or name not in BY_NAME:
        raise ValueError(f"divergence: one of {', '.join(BY_NAME)} wanted, got {name!r}")
    own = {entry.name: entry.default for entry in parameters_of(name)}
    for other, value in parameters.items():
        if value is not None and other not in own:
            has = f"has {' and '.join(own)}" if own else "has no parameter"
            raise ValueError(f"{other}: divergence={name!r} {has}; leave {other} out")
    found = [default if parameters[key] is None else parameters[key] for key, default in own.items()]
    first, second, *_ = *found, None, None
    return 0.0 if first is None else first, second


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
    apart(student, teacher)


def apart(student, teacher):
    """What the gradient is written over, and what is read after that."""
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
