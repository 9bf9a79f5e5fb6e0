"""The arguments of each op of relations between samples, as _calls.py has those of logits.

Numbers, such as delta, are tensors in float64 on the CPU: see ops/numbers.py. Where the gradient is wanted, ``save``,
the ops return it beside the loss, else an empty one. It is in float32 where the student is in float16, whose range it
would leave before a loss scaler multiplies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ._calls import OptionalOut, Out


class PairsCall(NamedTuple):
    """``pairs_fwd``."""

    student: Tensor  # [N, D_s], any strides
    teacher: Tensor  # [N, D_t], any strides
    count: Tensor | None  # one element of int64: rows from there on are not, they hold finite numbers
    weight: Tensor | None  # [N] in the dtype that is computed in
    relation: int  # its number in csrc/common/embeddings_params.h
    delta: Tensor
    normalize: bool
    save: bool


class AnglesCall(NamedTuple):
    """``angles_fwd``: the weighted sum of the losses of angles and of distances."""

    student: Tensor  # as in PairsCall, and so are the next two
    teacher: Tensor
    count: Tensor | None
    numbers: Tensor  # angle_weight, angle_delta, distance_weight, distance_delta; a loss of weight 0 is left out
    save: bool


class SimilarityCall(NamedTuple):
    """``similarity_fwd``."""

    student: Tensor  # [N, D_s]
    teacher: Tensor  # [N, D_t]
    mask: Tensor | None  # [N] bool, True: the row counts
    weight: Tensor | None  # [N]
    save: bool


class GramCall(NamedTuple):
    """``gram_fwd``."""

    student: Tensor  # [N, D_s] or [B, N, D_s]
    teacher: Tensor  # [N, D_t] or [B, N, D_t]
    normalize: bool  # rows to length 1
    clamp: int  # negative similarities of none, the teacher, both: its number in ops/gram.py
    mask: Tensor | None  # one per row
    weight: Tensor | None  # one per row
    save: bool


class PktCall(NamedTuple):
    """``pkt_fwd``."""

    student: Tensor  # [N, D_s]
    teacher: Tensor  # [N, D_t]
    eps: Tensor
    mask: Tensor | None  # [N] bool
    weight: Tensor | None  # [N]
    strips: str  # the namespace whose pkt_strip_ computes each strip
    save: bool


class SamplesCall(NamedTuple):
    """``samples_fwd``: of few samples on the CPU one of similarity_fwd, gram_fwd and pkt_fwd, whole."""

    student: Tensor  # [N, D_s]
    teacher: Tensor  # [N, D_t]
    relation: int  # which: its number in ops/samples.py
    normalize: bool  # of gram
    clamp: int  # of gram
    eps: Tensor  # of pkt
    mask: Tensor | None  # [N] bool
    weight: Tensor | None  # [N]
    save: bool


class PktStripCall(NamedTuple):
    """``pkt_strip_``: the rows row .. row + n of all pairs of samples. It returns their loss; see
    csrc/cpu/pkt_kernel.h."""

    student: Out  # cosines [n, N - row], from the diagonal on, which become weights of unit vectors
    teacher: Tensor  # cosines, the same
    slopes: Out  # [N] float64: +=
    valid: Tensor  # [N] in the strip's dtype: 1 or 0; and so are the next four
    student_inverse: Tensor
    teacher_inverse: Tensor
    weight: Tensor
    scale: Tensor
    eps: float
    row: int


class TripletCall(NamedTuple):
    """``triplet_fwd``: the loss, the share of triplets that have one, and the gradient. Who is similar to whom follows
    from labels, or from the teacher."""

    student: Tensor  # [N, D_s]
    teacher: Tensor | None  # [N, D_t]
    labels: Tensor | None  # [N]
    positives: int  # how many rows of the teacher are similar, the nearest; 0: the default
    margin: Tensor
    mask: Tensor | None  # [N] bool
    weight: Tensor | None  # [N]
    strips: str  # the namespace whose triplet_strip_ computes each strip
    save: bool


class TripletStripCall(NamedTuple):
    """``triplet_strip_``: the rows row .. row + n of all pairs of samples. It returns sums, [3] float64: of the loss,
    the active triplets and all; see csrc/cpu/triplet_kernel.h."""

    strip: Out  # inner products [n, N] of centred rows, which become weights of the gradient
    x: Tensor  # [N, D]: the rows as they were given, in the strip's dtype
    norms: Tensor  # [N]: squared lengths of the centred rows
    positives: Tensor  # int64: those of sample i are positives[first[i] .. last[i]]
    first: Tensor  # [N] int64
    last: Tensor  # [N] int64
    valid: Tensor  # [N] bool
    count: Tensor  # one element of int64: of those that are valid
    weight: Tensor  # [N]
    margin: float
    row: int
    grad: OptionalOut  # [N, D], where weights are wanted: += of near pairs, whose weights in the strip are 0


class RelationKLCall(NamedTuple):
    """``relation_kl_fwd``: the loss, and the gradients of student and student_keys. Of a row's softmax as RowsCall has
    it; temperatures are of similarities. M is the number of keys."""

    student: Tensor  # [B, N, D_s]
    teacher: Tensor  # [B, N, D_t]
    student_keys: Tensor | None  # [B, M, D_s]; None: the rows themselves
    teacher_keys: Tensor | None  # [B, M, D_t], of both sides or of none
    exclude_self: bool  # key i from row i
    normalize: bool  # rows and keys to length 1
    rows: str  # the namespace whose rows ops compute each strip of similarities
    divergence: int
    parameter: float
    parameter_rows: Tensor | None  # [B, N]; or [], and so are the next two
    temperature: float
    temperature_rows: Tensor | None
    teacher_temperature: float
    teacher_temperature_rows: Tensor | None
    mask: Tensor | None  # [B, N] bool
    key_mask: Tensor | None  # [B, M] bool
    weight: Tensor | None  # [B, N]
    save: bool
    save_keys: bool


class RelationKLFew(NamedTuple):
    """The arguments of ``relation_kl_few``, on the CPU alone: relation_kl_fwd of one batch without keys. Of a row's
    softmax as RowsCall has it; temperatures are of products, as they are multiplied."""

    student: Tensor  # [N, D_s]
    teacher: Tensor  # [N, D_t]
    exclude_self: bool
    normalize: bool
    divergence: int
    parameter: float
    parameter_rows: Tensor | None
    temperature: float
    temperature_rows: Tensor | None
    teacher_temperature: float
    teacher_temperature_rows: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    save: bool  # whether the gradient is wanted


class RelationKLSums(NamedTuple):
    """``relation_kl_sums``, on the CPU alone: of a strip of products from the diagonal on, which has both orders of a
    pair at once, the sums of exponentials; see csrc/cpu/relation_kl_kernel.h."""

    student: Tensor  # [n, N - row], the rows row .. row + n of all pairs
    teacher: Tensor
    valid: Tensor  # [N] in the strips' dtype: 1 or 0
    student_scale: float  # of products: similarities
    teacher_scale: float
    row: int
    sums: Out  # [N, 2] float64: += of student and teacher


class RelationKLWeights(NamedTuple):
    """``relation_kl_weights_``, which follows: products become weights. It returns the strip's loss."""

    student: Out  # as in RelationKLSums, and so are the next five
    teacher: Tensor
    valid: Tensor
    student_scale: float
    teacher_scale: float
    row: int
    student_inverse: Tensor  # [N] in the strips' dtype, and so are the next four
    teacher_inverse: Tensor
    difference: Tensor
    weight: Tensor
    scale: Tensor
