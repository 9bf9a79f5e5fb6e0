"""Checks of what stands in place of logits."""

import numbers
import sys

import torch

from .arguments import DTYPES, at_least, constant, is_tensor, number, tensor, values_known
from .logits import INTEGERS


def _dense(name, x):
    is_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: float16, bfloat16, float32 or float64 wanted, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: a dense tensor wanted, got {'a nested one' if x.is_nested else x.layout}")


def linear_logits(hidden, weight, bias, scale, softcap, slab_bytes):
    """What LinearLogits is made with."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None or name != "bias":
            _dense(name, x)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        found = f"shape {list(hidden.shape)}" if hidden.dim() else "a tensor without dimensions"
        raise ValueError(f"hidden: hidden states of shape [*, H] wanted, H at least 1, got {found}")
    if weight.dim() != 2:
        raise ValueError(f"weight: a head of shape [V, H] wanted, got {list(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        turned = ", whose first dimension is the classes" if weight.shape[0] == hidden.shape[-1] else ""
        raise ValueError(
            f"weight: a head of shape [V, {hidden.shape[-1]}] wanted{turned}, for hidden states "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: at least one class wanted, got shape {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [len(weight)]:
        raise ValueError(f"bias: shape [{len(weight)}] wanted, one for each class, got {list(bias.shape)}")
    number("scale", scale)
    if softcap is not None:
        number("softcap", softcap)
    if slab_bytes is not None:
        at_least("slab_bytes", slab_bytes, 1)


def linear_side(side, of, autocast):
    """The LinearLogits of a side, where it is used. autocast: whether their dtypes are made one there."""
    for name, x in (("weight", of.weight), ("bias", of.bias)):
        if x is None:
            continue
        if x.device != of.hidden.device:
            raise ValueError(
                f"{side}.{name}: a tensor on the device of hidden, {of.hidden.device}, wanted, got {x.device}"
            )
        if x.dtype != of.hidden.dtype and not autocast:
            raise TypeError(f"{side}.{name}: the dtype of hidden, {of.hidden.dtype}, wanted, got {x.dtype}")
    for name in ("hidden", "weight", "bias"):
        x = getattr(of, name)
        if x is not None:
            tensor(f"{side}.{name}", x)
            if side == "teacher" and x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"teacher.{name}: no gradient flows to it, and it requires one; detach() it")


TAILS = ("bucket", "renormalize", "ignore")
CLASSES = INTEGERS | {torch.uint16, torch.uint32}  # as tokens are stored
# How far the sum of probabilities may be above 1: log-probabilities may have been stored in half precision, or as
# decimals, whatever they are in now.
SLACK = 1e-2


def top_k(indices, log_probs, tail, temperature, log_tail, log_prob_min):
    """What TopKLogProbs is made with."""
    is_tensor("indices", indices)
    if indices.dtype not in CLASSES:
        raise TypeError(f"indices: whole numbers wanted, torch.int64 or a smaller type, got {indices.dtype}")
    if indices.layout is not torch.strided or indices.is_nested:
        raise TypeError(
            f"indices: a dense tensor wanted, got {'a nested one' if indices.is_nested else indices.layout}"
        )
    _dense("log_probs", log_probs)
    if indices.dim() == 0 or indices.shape[-1] == 0:
        raise ValueError(f"indices: shape [*, K] wanted, K at least 1, got {list(indices.shape)}")
    if log_probs.shape != indices.shape:
        raise ValueError(f"log_probs: the shape of indices, {list(indices.shape)}, wanted, got {list(log_probs.shape)}")
    if tail not in TAILS:
        raise ValueError(f"tail: 'bucket', 'renormalize' or 'ignore' wanted, got {tail!r}")
    number("temperature", temperature)
    if log_tail is not None:
        _dense("log_tail", log_tail)
        if tail != "bucket":
            raise ValueError(f"log_tail: tail={tail!r} has no bucket; leave it out")
        if log_tail.shape != indices.shape[:-1]:
            raise ValueError(
                f"log_tail: shape {list(indices.shape[:-1])} wanted, one for each row, got {list(log_tail.shape)}"
            )

    if log_prob_min is not None:
        if isinstance(log_prob_min, bool) or not isinstance(log_prob_min, numbers.Real):
            raise TypeError(f"log_prob_min: a number wanted, got {type(log_prob_min).__name__}")
        if tail != "ignore":
            raise ValueError(f"log_prob_min: with tail='ignore' alone, got tail={tail!r}; leave it out")
        if not torch.compiler.is_compiling() and not -sys.float_info.max <= log_prob_min < 0:
            raise ValueError(f"log_prob_min: a negative finite number wanted, got {log_prob_min}")


def top_k_teacher(teacher, loss, options, student):
    """TopKLogProbs where they are used. student: like its logits."""
    without = {"dkd_loss", "nkd_loss", "bernoulli_kl_div"}
    if loss in without or options.target_loss in without:
        name = options.target_loss or loss
        raise ValueError(f"teacher: {name} needs all classes of the teacher; TopKLogProbs know the best alone")
    if options.standardize:
        raise ValueError("standardize: it needs all logits of the teacher; TopKLogProbs know the best classes alone")
    if teacher.tail == "ignore" and loss in {"negative_log_acceptance", "adaptive_kl_div"}:
        raise ValueError(f"teacher: {loss} is no sum of terms, some of which tail='ignore' could leave out")
    for name in ("indices", "log_probs", "log_tail"):
        x = getattr(teacher, name)
        if x is not None:
            constant(f"teacher.{name}", x, student)


def top_k_temperature(teacher, temperature):
    """Unless they are renormalized the teacher's temperature is the one that its probabilities were taken at."""
    if teacher.tail == "renormalize":
        return
    if isinstance(temperature, torch.Tensor):
        right = values_known(temperature) and bool((temperature == teacher.temperature).all())
    else:
        right = temperature == teacher.temperature
    if not right:
        at = "" if torch.compiler.is_compiling() else f" {teacher.temperature},"  # which may be a symbol
        raise ValueError(
            f"teacher_temperature: that at which the log-probabilities were taken,{at} wanted with "
            f"tail={teacher.tail!r}: probabilities that are known in part cannot be softened. tail='renormalize' takes "
            "any temperature"
        )


def top_k_values(teacher, classes, mask):
    """Of rows that count, where looking at them waits for nothing."""
    indices, log_probs = teacher.indices, teacher.log_probs.detach()
    if not (values_known(indices) and values_known(log_probs)) or not indices.numel():
        return
    there = indices >= 0

    def refuse(argument, wrong, wanted):
        wrong = wrong if mask is None else wrong & mask
        if bool(wrong.any()):
            row = tuple(wrong.nonzero()[0].tolist())
            where = f"row {row[0] if len(row) == 1 else row} has others" if row else "got others"
            raise ValueError(f"teacher.{argument}: {wanted}; {where}")

    refuse("indices", (indices >= classes).any(-1), f"classes below {classes} wanted, or negative ones as padding")
    ordered = indices.sort(-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
    refuse("indices", twice, "each class once in a row wanted")
    slack = SLACK + 8 * torch.finfo(log_probs.dtype).eps
    refuse("log_probs", (there & ~(log_probs <= slack)).any(-1), "log-probabilities, at most 0, wanted")
    total = log_probs.masked_fill(~there, -torch.inf).double().exp().sum(-1)
    refuse("log_probs", ~(total <= 1 + slack), "probabilities whose sum is at most 1 wanted")
    if teacher.log_tail is not None and values_known(teacher.log_tail):
        wrong = ~(teacher.log_tail.detach() <= slack) & there.any(-1)  # of padding alone it is ignored
        refuse("log_tail", wrong, "log-probabilities, at most 0, wanted")


def probabilities(given, temperature):
    """What Probabilities is made with."""
    _dense("probabilities", given)
    if given.dim() == 0 or given.shape[-1] == 0:
        raise ValueError(f"probabilities: shape [*, V] wanted, V at least 1, got {list(given.shape)}")
    number("temperature", temperature)


def probabilities_teacher(teacher, loss, student, num_classes, mask):
    """Probabilities where they are used; values of rows that count, where looking at them waits for nothing."""
    given, coins = teacher.probabilities, loss == "bernoulli_kl_div"
    most = 1.0 if coins else torch.finfo(given.dtype).max
    constant("teacher.probabilities", given, student)
    given = given.detach()[..., :num_classes]
    if not values_known(given) or not given.numel():
        return
    least, largest = given.aminmax()
    if least >= 0 and largest <= most:
        return
    wrong = ~((given >= 0) & (given <= most)).all(-1)
    wrong = wrong if mask is None else wrong & mask
    if bool(wrong.any()):
        row = tuple(wrong.nonzero()[0].tolist())
        where = f"row {row[0] if len(row) == 1 else row} has others" if row else "got others"
        wanted = "from 0 to 1" if coins else "of at least 0"
        raise ValueError(f"teacher.probabilities: numbers {wanted} wanted; {where}")
