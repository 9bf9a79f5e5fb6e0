"""The arguments of each op: one list, from which all else follows. Here those of logits; those of features are in
_feature_calls.py, those of relations between samples in _relation_calls.py.

Its order is that of the op's schema and of the C++ struct that the binding reads, both in _schemas.py, and of what
Triton's implementation and autograd are handed. No other place knows an argument by its position. Nothing is imported
from torch, as the build reads this file without it.
"""

from __future__ import annotations

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


class RowsStatistics(NamedTuple):
    """The output of ``rows_statistics``, the first of three phases of a row whose classes are in several places: what
    the call's classes come to. A row's own is what these come to together. Not with parted targets."""

    stats: Out  # [*, 7] float64, as of rows_fwd, but for the slopes, which are 0, and, where labels are smoothed, for
    #   the factor, which is the sum of z - max of the student


class RowsSums(NamedTuple):
    """What ``rows_sums``, the second phase, is told besides: from the statistics of whole rows to what the call's
    classes have in the loss, and where the slopes of a row add up to 0 in the gradient. The third phase is
    ``rows_bwd``. A negative target is none of the call's classes."""

    stats: Tensor  # [*, 7] float64
    sums: Out  # [*, 3] float64: loss, slopes, and what a second sum is of; of the loss without the target's part, T^2,
    #   weights and log(sum of the teacher)
    grad: OptionalOut  # as of rows_fwd, where the slopes of a row add up to 0


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


class FormGroup(NamedTuple):
    """What ``form_group_rows`` is told besides a call of ``form_rows``, whose classes are split over ranks. See
    ops/group_forms.py."""

    mean: bool  # whether the divisor is to be multiplied by the number of classes
    stats: OptionalOut  # [N, 7] float64: filled, where there is no upstream gradient; else read
    widths: OptionalOut  # [2] float64, the same: the classes of all ranks, and of those before this one
    upstream: Tensor | None  # [N], or one element: the gradient alone is wanted, from what forward has filled


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


class ScaleCall(NamedTuple):
    """``scale_``: x *= factor for all x at once; nothing where it is 1, which is seen on the device."""

    x: list[Out]
    factor: Tensor  # one element of float32 or float64
