"""Rows a slab at a time: what is made of one stays in the caches, or takes little memory."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .._calls import RowsCall

# Of what a call has for each row, where that is a tensor.
OF_ROWS = (
    "parameter_rows",
    "second_parameter_rows",
    "temperature_rows",
    "teacher_temperature_rows",
    "mask",
    "weight",
    "target",
)


class Slab(NamedTuple):
    """Some rows: x[index] of a tensor [*, V], and first to last of what is [N]."""

    index: tuple[Any, ...]
    first: int
    last: int

    def call(self, call: RowsCall) -> RowsCall:
        """Of these rows."""
        return call._replace(student=call.student[self.index], teacher=call.teacher[self.index], **self.options(call))

    def options(self, call: RowsCall) -> dict[str, torch.Tensor | None]:
        """What the call says of these rows."""
        return {name: self.of_rows(getattr(call, name)) for name in OF_ROWS}

    def of_rows(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.dim() == 0 else x[self.first : self.last]


def evenly(count: int, most: int) -> int:
    """Rows of a slab, at most so many, where slabs of ``count`` rows are to be of nearly equal size."""
    return math.ceil(count / max(math.ceil(count / most), 1))


def slabs(leading: torch.Size, most: int) -> Iterator[Slab]:
    """Slabs of at most so many rows, in their order: ranges of one of the leading dimensions. They are the same for any
    number of threads, and so are the sums over their rows."""
    if not leading:
        yield Slab((), 0, 1)
        return
    split = 0
    while split + 1 < len(leading) and math.prod(leading[split + 1 :]) > most:
        split += 1
    rows_of_one = math.prod(leading[split + 1 :])
    step = evenly(leading[split], max(most // max(rows_of_one, 1), 1))
    row = 0
    for at in itertools.product(*map(range, leading[:split])):
        for begin in range(0, leading[split], max(step, 1)):
            end = min(begin + step, leading[split])
            last = row + (end - begin) * rows_of_one
            yield Slab((*at, slice(begin, end)), row, last)
            row = last


class Gathered(NamedTuple):
    """Some rows that need not lie beside each other; what is taken of them is a copy."""

    index: tuple[torch.Tensor, ...]
    rows: torch.Tensor  # their numbers

    def options(self, call: RowsCall) -> dict[str, torch.Tensor | None]:
        """What the call says of these rows, which all count."""
        found = {name: self.of_rows(getattr(call, name)) for name in OF_ROWS}
        return found | {"mask": None}

    def of_rows(self, x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.dim() == 0 else x[self.rows]


def gathered(leading: torch.Size, mask: torch.Tensor, most: int) -> Iterator[Gathered]:
    """Slabs of the rows that a mask, [N] on the CPU, lets count."""
    counted = mask.nonzero().squeeze(-1)
    for rows in counted.split(evenly(len(counted), most)) if len(counted) else ():
        yield Gathered(torch.unravel_index(rows, leading), rows)


class Room:
    """Memory for a slab, which the next one of its layout takes again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: dict[Any, torch.Tensor] = {}

    def of(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Rows that lie side by side do so there."""
        key = name, like.shape, like.stride()
        if key not in self.kept:
            self.kept = {of: x for of, x in self.kept.items() if of[0] != name}
            self.kept[key] = torch.empty_like(like, dtype=self.dtype)
        return self.kept[key]
