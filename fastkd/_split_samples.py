"""Losses of relations whose samples are split over the ranks of a process group, on every backend.

Each rank gathers what the others have, and computes the loss of all samples; of its gradient the rank's own rows are
taken. So no gradient is exchanged, and every rank has the same loss. All that is said of a sample travels in one
exchange, as bytes; before it goes how many samples each rank has, and what they are like, so that ranks that do not fit
together all tell so, and none waits for another.
"""

from typing import Any

import torch

from . import _check, _dtensor, _transforms
from ._check.arguments import DTYPES
from ._split_classes import Own, Ranks

_OF_SPLIT = "of losses whose samples are split over ranks; gather the samples on each of them first"
_DTYPES = (*sorted(DTYPES, key=str), *sorted(_check.INTEGERS, key=str), torch.bool)


def _signature(x):
    """What ranks must have alike: a number for the dtype, and the width; -1 where there is nothing."""
    return (-1, -1) if x is None else (_DTYPES.index(x.dtype), x.shape[1:].numel())


def _as_bytes(x):
    """[n, *] of any dtype as [n, bytes]."""
    flat = x.detach().reshape(len(x), x.shape[1:].numel())
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # whatever strides a single row has


def _of_bytes(parts, like):
    """Of all ranks, from what each has sent."""
    found = torch.cat(parts).view(like.dtype)
    return found.view(len(found), *like.shape[1:])


def of_all(group: Any, student: Any, teacher: Any, **of_rows: Any) -> list[Any]:
    """Of all ranks, in their order: student and teacher, of which autograd sees this rank's rows, and what there is of
    each row besides, or None."""
    _check.group(group)
    if _dtensor.given(student, teacher, *of_rows.values()):
        raise ValueError("group: plain tensors, each rank's own, wanted beside it, got DTensors")
    _check.samples_of_rank(student, teacher, of_rows)
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "group: how many samples each rank has is known when the loss runs; call it outside of torch.compile"
        )
    for name, x in {"student": student, "teacher": teacher, **of_rows}.items():
        if x is not None:
            _transforms.refuse_all(name, x, _OF_SPLIT)
    tensors = [student, teacher, *(_check.for_rows(x, student.shape[:1]) for x in of_rows.values())]
    ranks, there = Ranks(group), [x for x in tensors if x is not None]
    told = torch.tensor([len(student), *(n for x in tensors for n in _signature(x))], device=student.device)
    told = ranks.gathered(told).tolist()
    if any(other[1:] != told[ranks.rank][1:] for other in told):
        names = ("student", "teacher", *of_rows)
        described = [
            {name: _described(*other[1 + 2 * i : 3 + 2 * i]) for i, name in enumerate(names)} for other in told
        ]
        raise ValueError(f"group: the same arguments on every rank, of one width and dtype, wanted; got {described}")
    counts = [count for count, *_ in told]
    sent = [_as_bytes(x) for x in there]
    padded = sent[0].new_zeros(max(counts), sum(x.shape[1] for x in sent))
    torch.cat(sent, 1, out=padded[: len(student)])
    everything, at, found = ranks.gathered(padded), 0, []
    for x in tensors:
        if x is None:
            found.append(None)
            continue
        columns = slice(at, at + x.shape[1:].numel() * x.itemsize)
        at = columns.stop
        found.append(_of_bytes([part[:n, columns] for part, n in zip(everything, counts, strict=True)], x))
    before = sum(counts[: ranks.rank])
    for i, x in enumerate((student, teacher)):
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            whole = found[i]
            found[i] = torch.cat([whole[:before], Own.apply(x, _OF_SPLIT), whole[before + len(x) :]])
    return found


def _described(dtype, width):
    return None if dtype < 0 else f"{_DTYPES[dtype]}, {width} wide"
