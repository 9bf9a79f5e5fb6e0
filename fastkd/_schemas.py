"""The ops' schemas, and ``calls.h``: the C++ structs of what they are called with, each of which is told in _calls.py.

The build runs this file, as a program, without torch; it prints the header.
"""

from __future__ import annotations

import hashlib

if __package__:
    from . import _calls
else:
    import _calls

OPS = {
    "rows_fwd": (_calls.RowsCall, _calls.RowsForward),
    "rows_bwd": (_calls.RowsCall, _calls.RowsBackward),
    "rows_statistics": (_calls.RowsCall, _calls.RowsStatistics),
    "rows_sums": (_calls.RowsCall, _calls.RowsSums),
    "inverse_divisor": (_calls.InverseDivisor,),
    "standardize_fwd": (_calls.Standardize,),
    "standardize_bwd": (_calls.StandardizeBackward,),
    "head_weight": (_calls.HeadWeight,),
    "complement_fwd": (_calls.Complement,),
    "complement_bwd": (_calls.ComplementBackward,),
    "dist_fwd": (_calls.DistCall, _calls.DistForward),
    "dist_bwd": (_calls.DistCall, _calls.DistBackward),
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


def schema(name, structures, *first, returns="()"):
    """The schema of an op, whose first arguments may be others."""
    letters = iter("abcdefgh")
    arguments = [*first]
    for structure in structures:
        for field, annotation in _fields(structure):
            kind = _TYPES[annotation][0]
            arguments.append(f"{kind.format(next(letters)) if '{}' in kind else kind} {field}")
    return f"{name}({', '.join(arguments)}) -> {returns}"


# Every implementation has these ops, in a namespace of its own: those that are told above, and the others.
EVERYWHERE = (
    *(schema(name, structures) for name, structures in OPS.items()),
    # Numbers, such as delta, are tensors in float64 on the CPU: see ops/numbers.py.
    # embeddings [N, D_s] and [N, D_t]; count: rows from there on are not, they hold finite numbers; weight: one per
    # row; grad, here as below, is in float32 where the student is in float16, whose range it would leave before a
    # loss scaler multiplies it; empty where it is not saved
    "pairs_fwd(Tensor student, Tensor teacher, Tensor? count, Tensor? weight, int relation, Tensor delta, "
    "bool normalize, bool save) -> (Tensor loss, Tensor grad)",
    # the weighted sum of both losses; numbers: angle_weight, angle_delta, distance_weight, distance_delta; a loss of
    # weight 0 is left out
    "angles_fwd(Tensor student, Tensor teacher, Tensor? count, Tensor numbers, bool save) "
    "-> (Tensor loss, Tensor grad)",
    # Rows row .. row + n of all pairs of samples, in strips that become weights of the gradient; what is said of
    # samples is [N]. pkt: cosines [n, N - row], from the diagonal on, which become weights of unit vectors;
    # slopes += in float64; see csrc/cpu/pkt_kernel.h
    "pkt_strip_(Tensor(a!) student, Tensor teacher, Tensor(b!) slopes, Tensor valid, Tensor student_inverse, "
    "Tensor teacher_inverse, Tensor weight, Tensor scale, float eps, int row) -> Tensor loss",
    # triplets: inner products [n, N] of centred rows, of which norms are the squared lengths; x: the rows as they were
    # given, [N, D]; positives of sample i: positives[first[i] .. last[i]]; count: of those that are valid; grad, where
    # weights are wanted: += of near pairs, whose weights in the strip are 0; sums: of the loss, the active triplets
    # and all; see csrc/cpu/triplet_kernel.h
    "triplet_strip_(Tensor(a!) strip, Tensor x, Tensor norms, Tensor positives, Tensor first, Tensor last, "
    "Tensor valid, Tensor count, Tensor weight, float margin, int row, Tensor(b!)? grad) -> Tensor sums",
    # features of one layer or more, whose rows are along feature_dim; mask, weight: one per layer, [N] each, or
    # none at all; beta: of smooth L1, else squares; loss: of all layers, weighted, one per row where nothing is
    # reduced; layers: each one's own
    "features_fwd(Tensor[] student, Tensor[] teacher, int[] feature_dim, int feature, Tensor[] mask, Tensor[] weight, "
    "int reduction, Tensor layer_weights, Tensor? beta, bool save) -> (Tensor loss, Tensor layers, Tensor[] grad)",
    "features_bwd(Tensor[] student, Tensor[] teacher, int[] feature_dim, int feature, Tensor[] mask, Tensor[] weight, "
    "int reduction, Tensor layer_weights, Tensor? beta, Tensor upstream) -> Tensor[] grad",
    # one layer; the gradient is written over the student; reduction: per row, or their sum
    "features_fwd_(Tensor(a!) student, Tensor teacher, int feature_dim, int feature, Tensor? mask, Tensor? weight, "
    "int reduction, Tensor? beta) -> Tensor loss",
    # maps [B, C, H, W], whose channels may differ in number
    "attention_fwd(Tensor student, Tensor teacher, Tensor p, bool save) -> (Tensor loss, Tensor grad)",
    "attention_bwd(Tensor student, Tensor teacher, Tensor p, Tensor upstream) -> Tensor grad",
    # x *= factor, of one element, for all x at once; nothing where it is 1, which is seen on the device
    "scale_(Tensor(a!)[] x, Tensor factor) -> ()",
)

# The same on the CPU, of strips from the diagonal on, [n, N - row]: both orders of a pair at once.
_RELATION_KL_STRIP = "Tensor valid, float student_scale, float teacher_scale, int row"

# The ops that there are once in C++.
ONCE = (
    "cpu_isa(str name) -> str",  # "?" only reads, "" chooses the best
    "cpu_calls() -> str",  # digest() of the sources that a library was built from, and that of the divergences
    "cuda_calls() -> str",
    "cuda_code() -> str",  # "": the CUDA library has code for the current GPU; else why it has none
    # few samples on the CPU: one of similarity_fwd, gram_fwd and pkt_fwd, whole; relation: which, see ops/samples.py;
    # the rest as there
    "samples_fwd(Tensor student, Tensor teacher, int relation, bool normalize, int clamp, Tensor eps, Tensor? mask, "
    "Tensor? weight, bool save) -> (Tensor loss, Tensor grad)",
    # sums [N, 2]: += of exponentials, of student and teacher; then products become weights; see
    # csrc/cpu/relation_kl_kernel.h
    f"relation_kl_sums(Tensor student, Tensor teacher, {_RELATION_KL_STRIP}, Tensor(a!) sums) -> ()",
    f"relation_kl_weights_(Tensor(a!) student, Tensor teacher, {_RELATION_KL_STRIP}, Tensor student_inverse, "
    "Tensor teacher_inverse, Tensor difference, Tensor weight, Tensor scale) -> Tensor loss",
    schema("relation_kl_few", (_calls.RelationKLFew,), returns="(Tensor loss, Tensor grad)"),
)

# The ops that are put together in ops/, of others and of matrix products, which torch has for every device.
IN_PYTHON = (
    # mask, weight: one per row
    "similarity_fwd(Tensor student, Tensor teacher, Tensor? mask, Tensor? weight, bool save) "
    "-> (Tensor loss, Tensor grad)",
    # embeddings [N, D] or [B, N, D]; clamp: negative similarities of none, the teacher, both; mask, weight: one per row
    "gram_fwd(Tensor student, Tensor teacher, bool normalize, int clamp, Tensor? mask, Tensor? weight, bool save) "
    "-> (Tensor loss, Tensor grad)",
    # embeddings [N, D]; mask, weight: one per row; strips: the namespace whose op computes each strip
    "pkt_fwd(Tensor student, Tensor teacher, Tensor eps, Tensor? mask, Tensor? weight, str strips, bool save) "
    "-> (Tensor loss, Tensor grad)",
    # who is similar to whom: labels, or the positives (0: the default) nearest to each row of the teacher; strips: the
    # namespace whose op computes each strip; active: the share of triplets that have a loss
    "triplet_fwd(Tensor student, Tensor? teacher, Tensor? labels, int positives, Tensor margin, Tensor? mask, "
    "Tensor? weight, str strips, bool save) -> (Tensor loss, Tensor active, Tensor grad)",
    # the rows schedule of logits that are made a slab at a time; rows: the namespace whose ops compute each slab
    schema("form_rows", (_calls.RowsCall, _calls.FormRows, _calls.FormOutputs), "str rows"),
    # the same of classes that are split over the ranks of a group, which is named
    schema(
        "form_group_rows",
        (_calls.RowsCall, _calls.FormRows, _calls.FormGroup, _calls.FormOutputs),
        "str rows",
        "str group",
    ),
    # the dist schedule of logits that are made a slab at a time, twice
    schema("form_dist_fwd", (_calls.DistCall, _calls.FormDist, _calls.FormDistForward), "str rows"),
    schema("form_dist_bwd", (_calls.DistCall, _calls.FormDist, _calls.FormDistBackward), "str rows"),
    # rows and dist schedule of standardized logits, in slabs; rows: the namespace whose ops compute each slab
    schema("standardized_rows_fwd", OPS["rows_fwd"], "str rows"),
    schema("standardized_rows_bwd", OPS["rows_bwd"], "str rows"),
    schema("standardized_head_weight", OPS["head_weight"], "str rows"),
    schema("standardized_dist_fwd", OPS["dist_fwd"], "str rows"),
    schema("standardized_dist_bwd", OPS["dist_bwd"], "str rows"),
    # embeddings [B, N, D_s], [B, N, D_t], their keys [B, M, *]: none, the rows themselves; what is said of rows is
    # [B, N]; exclude_self: key i from row i; rows: the namespace whose rows ops compute each strip of similarities
    "relation_kl_fwd(Tensor student, Tensor teacher, Tensor? student_keys, Tensor? teacher_keys, bool exclude_self, "
    "bool normalize, str rows, int divergence, float parameter, Tensor? parameter_rows, float temperature, "
    "Tensor? temperature_rows, float teacher_temperature, Tensor? teacher_temperature_rows, Tensor? mask, "
    "Tensor? key_mask, Tensor? weight, "
    "bool save, bool save_keys) -> (Tensor loss, Tensor grad, Tensor keys_grad)",
)


def digest():
    """Which schemas these are that compiled libraries implement. One that was built from others would read its
    arguments wrongly."""
    return hashlib.sha256(" ".join((*EVERYWHERE, *ONCE)).encode()).hexdigest()[:16]


def header():
    """``calls.h``: the structs, and how each is read off the dispatcher's stack."""
    structures = list(dict.fromkeys(structure for structures in OPS.values() for structure in structures))
    structures.append(_calls.RelationKLFew)
    lines = [
        "// Written by fastkd/_schemas.py; fastkd/_calls.py explains the fields.",
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
