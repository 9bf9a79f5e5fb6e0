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
    target: Tensor | None = None  # [N] int64, the class of each row that counts, of a loss that has a hard part
    target_numbers: Tensor | None = None  # [3] float64 on the CPU: hard_weight, soft_weight, label_smoothing
    target_loss: int = 0  # 0: these; else the number of a loss in _divergences.TARGET_LOSSES
    second_parameter: float = 0.0  # as parameter, of a divergence or a target's loss that has two
    second_parameter_rows: Tensor | None = None  # [N] float64, or []


class RowsForward(NamedTuple):
    """The outputs of ``rows_fwd``. The gradient is that of the loss; it may be the student itself."""

    loss: Out  # [*], one per row; or [], the sum over rows times scale
    grad: OptionalOut  # [*, V], the student's dtype, any strides
    stats: OptionalOut  # [*, 7] float64, what rows_bwd needs
    parts: OptionalOut = None  # [*, 5] float64, of a hard loss beside a soft one: see RowParts in rows_params.h


class RowsBackward(NamedTuple):
    """What ``rows_bwd`` is told besides the call: it computes the gradient from the statistics of ``rows_fwd``."""

    stats: Tensor  # [*, 7] float64
    upstream: Tensor  # [N], or one element
    grad: Out  # [*, V], the student's dtype; may be the student itself


class FormRows(NamedTuple):
    """What ``form_rows`` is told besides a call of the rows schedule, whose student or teacher are no logits: hidden
    states ``[*, H]`` with a head; log-probabilities ``[*, K]`` of a teacher's best classes, or its probabilities. See
    ops/forms.py."""

    student_head: Tensor | None  # [V, H]; None: the student has logits
    student_bias: Tensor | None  # [V]
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    indices: Tensor | None  # [*, K] int64, the classes of the teacher's log-probabilities; negative: padding
    log_tail: Tensor | None  # [N], the log-probability of all other classes; None: what is left of 1
    tail: int  # of a teacher with indices: what becomes of all other classes, by its place in ops/top_k.py, TAILS
    probabilities: bool  # whether the teacher has probabilities [*, V]
    as_given: Tensor | None  # [N] bool, or [], of a teacher with probabilities: whether the loss's temperature is the
    #   one that they were taken at; None: as a number says
    numbers: Tensor  # [5] float64 on the CPU: scale and softcap of the student, those of the teacher; inf: no softcap;
    #   of log-probabilities and probabilities the teacher's scale is the temperature that they were taken at; and what
    #   log-probabilities are raised to where they are below it
    slab_rows: int  # how many rows of logits there are at a time, at most
    adaptive: bool  # the call's parameter is mu of head_weight, whose student_weight is the divergence's own


class FormOutputs(NamedTuple):
    """The outputs of ``form_rows``. Gradients of what learns nothing are not wanted."""

    loss: Out  # as of rows_fwd
    grad: OptionalOut  # that of call.student, in its dtype; of logits it may be the student itself
    head_grad: OptionalOut  # [V, H], the dtype of student_head
    bias_grad: OptionalOut  # [V]
    parts: OptionalOut  # as of rows_fwd


class FormDist(NamedTuple):
    """What ``form_dist_fwd`` and ``form_dist_bwd`` are told besides a call of the dist schedule, whose student or
    teacher are no logits. See ops/dist_forms.py, and FormRows."""

    student_head: Tensor | None
    student_bias: Tensor | None
    teacher_head: Tensor | None
    teacher_bias: Tensor | None
    probabilities: bool
    form_numbers: Tensor  # as FormRows.numbers
    slab_rows: int


class FormDistForward(NamedTuple):
    """The outputs of ``form_dist_fwd``, as those of dist_fwd."""

    loss: Out
    of_rows: Out
    columns: Out


class FormDistBackward(NamedTuple):
    """What ``form_dist_bwd`` is told besides the call. Gradients of what learns nothing are not wanted."""

    of_rows: Tensor
    columns: Tensor
    upstream: Tensor  # one element
    grad: OptionalOut  # that of call.student, in its dtype; of logits it may be the student itself
    head_grad: OptionalOut  # [V, H]
    bias_grad: OptionalOut  # [V]


class HeadWeight(NamedTuple):
    """``head_weight``: of each row the student's weight that makes ``symmetric_kl_div`` the ``adaptive_kl_div``: the
    share of sum |p - q| that does not lie in the teacher's head; 1/2 where p = q, and of rows that have no share."""

    student: Tensor  # [*, V], any strides
    teacher: Tensor  # [*, V], any strides
    temperature: float  # as in RowsCall
    temperature_rows: Tensor | None
    teacher_temperature: float
    teacher_temperature_rows: Tensor | None
    mask: Tensor | None  # [N] bool, True: the row counts
    mu: float  # what the classes of the head sum to, at most, where there is no mu_tensor
    mu_tensor: Tensor | None  # [] float64
    student_weight: Out  # [N] float64


class InverseDivisor(NamedTuple):
    """``inverse_divisor``: 1 / divisor of a reduction that only the device knows; 0 where no row counts. The divisor is
    the normalizer, or else the number of rows that count times ``each``. One of mask and normalizer is given."""

    mask: Tensor | None  # [N] bool, True: the row counts; None: all N do
    normalizer: Tensor | None  # [], float32 or float64
    rows: int  # N
    each: int
    scale: Out  # [] float64


class Standardize(NamedTuple):
    """``standardize_fwd``: each row less its mean, over its standard deviation + 1e-7."""

    x: Tensor  # [*, V], any strides
    mask: Tensor | None  # [N] bool, True: the row counts; of others nothing is read, and anything written
    out: Out  # [*, V], float32 or float64: at least what x has
    moments: OptionalOut  # [N, 3] float64: mean, standard deviation, number of classes that are not -inf


class StandardizeBackward(NamedTuple):
    """``standardize_bwd``: from the gradient of what became of x to that of x."""

    x: Tensor  # [*, V], any strides
    mask: Tensor | None  # [N] bool
    moments: Tensor  # [N, 3] float64, as standardize_fwd makes them
    upstream: Tensor  # [*, V], the dtype of standardize_fwd's out
    addend: Tensor | None  # the same, in the same strides: a gradient of x itself, which is added
    grad: Out  # [*, V], the dtype of x; it may be x itself


class Complement(NamedTuple):
    """``complement_fwd``: of each row the logits of K classes, and that of all others together, which is
    T log sum exp(z / T)."""

    student: Tensor  # [*, V], any strides
    indices: Tensor  # [N, K] int64; negative: padding
    temperature: float  # T of all rows, where there are no temperature_rows
    temperature_rows: Tensor | None  # [N] in the dtype that is computed in; or [], one for all rows
    mask: Tensor | None  # [N] bool, True: the row counts; of others nothing is read
    logits: Out  # [N, K + 1] float64; of padding -inf, of a class that there is not NaN, of rows that do not count 0
    sums: Out  # [N, 2] float64: the maximum of the others, and their sum of e^((z - max) / T)


class ComplementBackward(NamedTuple):
    """``complement_bwd``: from the gradient of those logits to that of the student's."""

    student: Tensor  # as in Complement, and so are the next four
    indices: Tensor
    temperature: float
    temperature_rows: Tensor | None
    mask: Tensor | None
    sums: Tensor  # as complement_fwd makes them
    upstream: Tensor  # [N, K + 1] float64
    addend: Tensor | None  # [*, V] in the dtype that is computed in: what the gradient has besides; 0 in other rows
    grad: Out  # [*, V], the student's dtype; it may be the student itself


class DistCall(NamedTuple):
    """What both ops of the dist schedule begin with, as those of the rows schedule do."""

    student: Tensor  # [*, V], any strides
    teacher: Tensor  # [*, V], any strides
    mask: Tensor | None  # [N] bool, True: the row counts
    scale: float  # 1 / rows that count, where there is no scale_tensor
    scale_tensor: Tensor | None  # [] float64, as inverse_divisor makes it
    numbers: Tensor  # [4] float64 on the CPU: inter_weight, intra_weight, temperature, eps


class DistForward(NamedTuple):
    """The outputs of ``dist_fwd``: the loss, and what dist_bwd needs of rows and columns."""

    loss: Out  # []
    rows: Out  # [*, 6] float64: maximum and sum of the student, those of the teacher, the row's slopes
    columns: Out  # [3, V rounded up to 16] in the loss's dtype: the slopes of each class, and 0 behind them


class DistBackward(NamedTuple):
    """What ``dist_bwd`` is told besides the call."""

    rows: Tensor
    columns: Tensor
    upstream: Tensor  # one element
    grad: Out  # [*, V], the student's dtype; may be the student itself


OPS = {
    "rows_fwd": (RowsCall, RowsForward),
    "rows_bwd": (RowsCall, RowsBackward),
    "inverse_divisor": (InverseDivisor,),
    "standardize_fwd": (Standardize,),
    "standardize_bwd": (StandardizeBackward,),
    "head_weight": (HeadWeight,),
    "complement_fwd": (Complement,),
    "complement_bwd": (ComplementBackward,),
    "dist_fwd": (DistCall, DistForward),
    "dist_bwd": (DistCall, DistBackward),
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


def schema(name, structures, *first):
    """The schema of an op, whose first arguments may be others."""
    letters = iter("abcdefgh")
    arguments = [*first]
    for structure in structures:
        for field, annotation in _fields(structure):
            kind = _TYPES[annotation][0]
            arguments.append(f"{kind.format(next(letters)) if '{}' in kind else kind} {field}")
    return f"{name}({', '.join(arguments)}) -> ()"


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
    schema("form_rows", (RowsCall, FormRows, FormOutputs), "str rows"),
    # the dist schedule of logits that are made a slab at a time, twice
    schema("form_dist_fwd", (DistCall, FormDist, FormDistForward), "str rows"),
    schema("form_dist_bwd", (DistCall, FormDist, FormDistBackward), "str rows"),
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
