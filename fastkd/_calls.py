"""The arguments of each op: one list, from which all else follows.

Its order is that of the op's schema, of the C++ struct that the binding reads (the build runs this file, which prints
the header ``calls.h``), and of what Triton's implementation and autograd are handed. No other place knows an argument
by its position. Nothing is imported from torch, as the build runs this file without it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    Out = Tensor  # an output: its memory is the caller's, and the op writes into it
    OptionalOut = Tensor | None  # the same; None where it is not wanted


class RowsCall(NamedTuple):
    """What every op of the rows schedule begins with. N is the number of rows of ``[*, V]``; the per-row tensors are
    in the dtype that is computed in, but where another is named."""

    student: Tensor  # [*, V], any strides
    teacher: Tensor  # [*, V], any strides
    divergence: int  # its number in fastkd/_divergences.py
    parameter: float  # the divergence's own, where it has one and there are no parameter_rows
    parameter_rows: Tensor | None  # [N] float64; or [], one for all rows
    temperature: float  # of all rows, where there are no temperature_rows
    temperature_rows: Tensor | None  # [N], or []
    teacher_temperature: float
    teacher_temperature_rows: Tensor | None  # [N], or []
    t_squared: bool
    mask: Tensor | None  # [N] bool, True: the row counts
    weight: Tensor | None  # [N]
    scale: float  # 1 / divisor of the reduction, where there is no scale_tensor
    scale_tensor: Tensor | None  # [] float64, as inverse_divisor makes it


class RowsForward(NamedTuple):
    """The outputs of ``rows_fwd``. The gradient is that of the loss; it may be the student itself."""

    loss: Out  # [*], one per row; or [], the sum over rows times scale
    grad: OptionalOut  # [*, V], the student's dtype, any strides
    stats: OptionalOut  # [*, 5] float64, what rows_bwd needs


class RowsBackward(NamedTuple):
    """What ``rows_bwd`` is told besides the call: it computes the gradient from the statistics of ``rows_fwd``."""

    stats: Tensor  # [*, 5] float64
    upstream: Tensor  # [N], or one element
    grad: Out  # [*, V], the student's dtype; may be the student itself


class InverseDivisor(NamedTuple):
    """``inverse_divisor``: 1 / divisor of a reduction that only the device knows; 0 where no row counts. The divisor is
    the normalizer, or else the number of rows that count times ``each``. One of mask and normalizer is given."""

    mask: Tensor | None  # [N] bool, True: the row counts; None: all N do
    normalizer: Tensor | None  # [], float32 or float64
    rows: int  # N
    each: int
    scale: Out  # [] float64


OPS = {
    "rows_fwd": (RowsCall, RowsForward),
    "rows_bwd": (RowsCall, RowsBackward),
    "inverse_divisor": (InverseDivisor,),
}

# By annotation: in a schema, and in C++.
_TYPES = {
    "Tensor": ("Tensor", "Tensor"),
    "Tensor | None": ("Tensor?", "OptionalTensor"),
    "Out": ("Tensor({}!)", "Tensor"),
    "OptionalOut": ("Tensor({}!)?", "OptionalTensor"),
    "bool": ("bool", "bool"),
    "int": ("SymInt", "int64_t"),  # a graph of any size is one graph
    "float": ("float", "double"),
}


def _fields(structure):
    """Pairs of a field's name and its annotation, as it is written above."""
    for name, annotation in structure.__annotations__.items():
        yield name, getattr(annotation, "__forward_arg__", annotation)


def schema(name):
    """The schema of an op."""
    letters = iter("abcdefgh")
    arguments = []
    for structure in OPS[name]:
        for field, annotation in _fields(structure):
            kind = _TYPES[annotation][0]
            arguments.append(f"{kind.format(next(letters)) if '{}' in kind else kind} {field}")
    return f"{name}({', '.join(arguments)}) -> ()"


def digest():
    """Which lists these are. A library that was built from others would read its arguments wrongly."""
    return hashlib.sha256(" ".join(schema(name) for name in OPS).encode()).hexdigest()[:16]


def header():
    """``calls.h``: the structs, and how each is read off the dispatcher's stack."""
    structures = list(dict.fromkeys(structure for structures in OPS.values() for structure in structures))
    lines = [
        "// Written by fastkd/_calls.py, where the fields are explained.",
        "#pragma once",
        '#include "common/arguments.h"',
    ]
    lines += ["", "namespace fastkd {", ""]
    lines += [f'inline constexpr const char* kCallsDigest = "{digest()}";', ""]
    for structure in structures:
        fields = [(field, _TYPES[annotation][1]) for field, annotation in _fields(structure)]
        lines.append(f"struct {structure.__name__} {{")
        lines += [f"  {kind} {field};" for field, kind in fields]
        # an initializer list is evaluated from left to right
        read = ", ".join(f"a.next<{kind}>()" for _, kind in fields)
        lines += [f"  static {structure.__name__} read(Arguments& a) {{ return {{{read}}}; }}", "};", ""]
    return "\n".join([*lines, "}  // namespace fastkd"])


if __name__ == "__main__":
    print(header())
