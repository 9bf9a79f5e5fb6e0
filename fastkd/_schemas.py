"""The ops' schemas, and ``calls.h``: the C++ structs of what they are called with, each of which is told in _calls.py,
_feature_calls.py or _relation_calls.py.

The build runs this file, as a program, without torch; it prints the header.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

if __package__:
    from . import _calls, _feature_calls, _relation_calls
else:
    import _calls
    import _feature_calls
    import _relation_calls


class Op(NamedTuple):
    """What an op is called with, one list after the other, and what it returns."""

    calls: tuple[type, ...]
    returns: str = "()"


_LOSS = "(Tensor loss, Tensor grad)"

# Every implementation has these ops, in a namespace of its own.
OPS = {
    "rows_fwd": Op((_calls.RowsCall, _calls.RowsForward)),
    "rows_bwd": Op((_calls.RowsCall, _calls.RowsBackward)),
    "rows_statistics": Op((_calls.RowsCall, _calls.RowsStatistics)),
    "rows_sums": Op((_calls.RowsCall, _calls.RowsSums)),
    "inverse_divisor": Op((_calls.InverseDivisor,)),
    "standardize_fwd": Op((_calls.Standardize,)),
    "standardize_bwd": Op((_calls.StandardizeBackward,)),
    "head_weight": Op((_calls.HeadWeight,)),
    "complement_fwd": Op((_calls.Complement,)),
    "complement_bwd": Op((_calls.ComplementBackward,)),
    "dist_fwd": Op((_calls.DistCall, _calls.DistForward)),
    "dist_bwd": Op((_calls.DistCall, _calls.DistBackward)),
    "pairs_fwd": Op((_relation_calls.PairsCall,), _LOSS),
    "angles_fwd": Op((_relation_calls.AnglesCall,), _LOSS),
    "pkt_strip_": Op((_relation_calls.PktStripCall,), "Tensor loss"),
    "triplet_strip_": Op((_relation_calls.TripletStripCall,), "Tensor sums"),
    "features_fwd": Op(
        (_feature_calls.LayersCall, _feature_calls.LayersForward), "(Tensor loss, Tensor layers, Tensor[] grad)"
    ),
    "features_bwd": Op((_feature_calls.LayersCall, _feature_calls.LayersBackward), "Tensor[] grad"),
    "features_fwd_": Op((_feature_calls.OneLayerCall,), "Tensor loss"),
    "attention_fwd": Op((_feature_calls.AttentionCall, _feature_calls.AttentionForward), _LOSS),
    "attention_bwd": Op((_feature_calls.AttentionCall, _feature_calls.AttentionBackward), "Tensor grad"),
    "scale_": Op((_calls.ScaleCall,)),
}

# The ops that there are once, on the CPU alone.
CPU_OPS = {
    "samples_fwd": Op((_relation_calls.SamplesCall,), _LOSS),
    "relation_kl_sums": Op((_relation_calls.RelationKLSums,)),
    "relation_kl_weights_": Op((_relation_calls.RelationKLWeights,), "Tensor loss"),
    "relation_kl_few": Op((_relation_calls.RelationKLFew,), _LOSS),
}

# By annotation: in a schema, and in C++, where no op is handed a namespace.
_TYPES = {
    "Tensor": ("Tensor", "Tensor"),
    "Tensor | None": ("Tensor?", "OptionalTensor"),
    "list[Tensor]": ("Tensor[]", "std::vector<Tensor>"),
    "Out": ("Tensor({}!)", "Tensor"),
    "OptionalOut": ("Tensor({}!)?", "OptionalTensor"),
    "list[Out]": ("Tensor({}!)[]", "std::vector<Tensor>"),
    "bool": ("bool", "bool"),
    "int": ("SymInt", "int64_t"),  # a graph of any size is one graph; of what is but a number of a choice it is no less
    "list[int]": ("int[]", "std::vector<int64_t>"),
    "float": ("float", "double"),
    "str": ("str", None),
}


def _fields(structure):
    """Pairs of a field's name and its annotation, as it is written above."""
    for name, annotation in structure.__annotations__.items():
        yield name, getattr(annotation, "__forward_arg__", annotation)


def schema(name, op, *first):
    """The schema of an op, whose first arguments may be others."""
    letters = iter("abcdefgh")
    arguments = [*first]
    for structure in op.calls:
        for field, annotation in _fields(structure):
            kind = _TYPES[annotation][0]
            arguments.append(f"{kind.format(next(letters)) if '{}' in kind else kind} {field}")
    return f"{name}({', '.join(arguments)}) -> {op.returns}"


EVERYWHERE = tuple(schema(*named) for named in OPS.items())

# The ops that there are once in C++.
ONCE = (
    "cpu_isa(str name) -> str",  # "?" only reads, "" chooses the best
    "cpu_calls() -> str",  # digest() of the sources that a library was built from, and that of the divergences
    "cuda_calls() -> str",
    "cuda_code() -> str",  # "": the CUDA library has code for the current GPU; else why it has none
    *(schema(*named) for named in CPU_OPS.items()),
)

# The ops that are put together in ops/, of others and of matrix products, which torch has for every device.
IN_PYTHON = (
    schema("similarity_fwd", Op((_relation_calls.SimilarityCall,), _LOSS)),
    schema("gram_fwd", Op((_relation_calls.GramCall,), _LOSS)),
    schema("pkt_fwd", Op((_relation_calls.PktCall,), _LOSS)),
    schema("triplet_fwd", Op((_relation_calls.TripletCall,), "(Tensor loss, Tensor active, Tensor grad)")),
    schema("relation_kl_fwd", Op((_relation_calls.RelationKLCall,), "(Tensor loss, Tensor grad, Tensor keys_grad)")),
    # the rows schedule of logits that are made a slab at a time; rows: the namespace whose ops compute each slab
    schema("form_rows", Op((_calls.RowsCall, _calls.FormRows, _calls.FormOutputs)), "str rows"),
    # the same of classes that are split over the ranks of a group, which is named
    schema(
        "form_group_rows",
        Op((_calls.RowsCall, _calls.FormRows, _calls.FormGroup, _calls.FormOutputs)),
        "str rows",
        "str group",
    ),
    # the dist schedule of logits that are made a slab at a time, twice
    schema("form_dist_fwd", Op((_calls.DistCall, _calls.FormDist, _calls.FormDistForward)), "str rows"),
    schema("form_dist_bwd", Op((_calls.DistCall, _calls.FormDist, _calls.FormDistBackward)), "str rows"),
    schema(
        "form_group_dist_fwd",
        Op((_calls.DistCall, _calls.FormDist, _calls.FormDistForward)),
        "str rows",
        "str group",
    ),
    schema(
        "form_group_dist_bwd",
        Op((_calls.DistCall, _calls.FormDist, _calls.FormDistBackward)),
        "str rows",
        "str group",
    ),
    # rows and dist schedule of standardized logits, in slabs; rows: the namespace whose ops compute each slab
    *(
        schema(f"standardized_{name}", OPS[name], "str rows")
        for name in ("rows_fwd", "rows_bwd", "head_weight", "dist_fwd", "dist_bwd")
    ),
)


def digest():
    """Which schemas these are that compiled libraries implement. One that was built from others would read its
    arguments wrongly."""
    return hashlib.sha256(" ".join((*EVERYWHERE, *ONCE)).encode()).hexdigest()[:16]


def header():
    """``calls.h``: the structs, and how each is read off the dispatcher's stack."""
    structures = dict.fromkeys(structure for op in (*OPS.values(), *CPU_OPS.values()) for structure in op.calls)
    lines = [
        "// Written by fastkd/_schemas.py; the files that it imports explain the fields.",
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
