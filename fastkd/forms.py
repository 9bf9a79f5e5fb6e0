"""What may stand in place of logits: hidden states with a head, a teacher's best classes, or its probabilities."""

from typing import Literal

import torch
from torch import Tensor

from . import _check
from ._dtypes import compute_dtype, without_autocast


class LinearLogits:
    r"""Logits as hidden states and the head that makes them, of a student or of a teacher.

    .. math:: z = scale \cdot (hidden\, weight^\top + bias), \qquad
              softcap \cdot \tanh(z / softcap) \text{ where there is a softcap}

    Every loss of logits takes it in place of a tensor ``[*, V]``. The logits are made a slab of
    rows at a time, in float32 (in float64 where hidden and weight are), and never held whole; student and teacher may
    be of either form. The gradients are those of hidden, weight and bias, as far as they require one: what is frozen
    costs nothing, neither product nor memory. They are computed in forward, as those of logits are, and nothing of the
    size of logits is kept. With ``reduction="none"``, and for a student in float16, backward makes the logits once
    more; ``dist_loss``, whose columns are of all rows, makes them twice in any case.

    The logits are not rounded to the type of hidden and weight before they are compared. In half precision their
    gradient is rounded once, on a GPU, for the products back to hidden and weight; on the CPU it is not rounded at all.
    The gradient of weight and bias is summed in float32, in memory of its size, and rounded once.

    Inside ``torch.autocast`` hidden, weight and bias are taken in autocast's dtype, as ``torch.nn.Linear`` takes them:
    each call makes a copy of the head, also of a frozen one, and the gradient is rounded to that dtype.

    A head that is sharded over the ranks that share a batch, a DTensor beside plain hidden states, as FSDP2 leaves it
    outside of forward, is gathered for the call, and its gradient is the mean over ranks, scattered to the shards, as
    FSDP2 makes it of heads that the model calls itself. All ranks must make the call.

    Of a head whose classes are split over the ranks of a tensor-parallel group, with ``group=`` of the loss, each rank
    gives the rows of weight and bias that it has, and hidden states that are the same on every rank; they want a
    gradient on all ranks or on none. Each rank's weight gets the gradient of its own rows. That of the hidden states is
    a sum over ranks, made in float32 and rounded once, which every rank gets: it is exchanged in forward, where forward
    computes the gradient, else in backward, which all ranks must call then. A weight that is a DTensor, ``Shard(0)`` on
    a mesh of one dimension, beside hidden states that are replicated on it, finds its group itself, and the loss is a
    DTensor then. A slab has the same rows on all ranks: as many as there would be if 262144 classes were split evenly
    over them.

    A row that a mask leaves out may hold anything, NaN too: it reaches no gradient. On the CPU it costs nothing.

    Args:
        hidden: the last hidden states ``[*, H]``.
        weight: of the head, ``[V, H]``, in the dtype of ``hidden``; that of the embeddings where these are tied.
        bias: of the head, ``[V]``, in the same dtype. Default: none.
        scale: what the logits are multiplied by, a positive number, such as Cohere's ``logit_scale``. Default 1.
        softcap: what they stay below in size, a positive number, such as Gemma's ``final_logit_softcapping``. Default:
            none.
        slab_bytes: memory for the logits of a slab, a positive whole number; a slab has one row at least. Default: 32
            MiB on the CPU, 512 MiB on a GPU, and 64 rows where these are more.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> import torch, fastkd
        >>> from fastkd.functional import kl_div
        >>> head, teacher_head = torch.nn.Linear(8, 100, bias=False), torch.nn.Linear(16, 100, bias=False)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 16)
        >>> student = fastkd.LinearLogits(hidden, head.weight)
        >>> teacher = fastkd.LinearLogits(teacher_hidden, teacher_head.weight.detach())
        >>> kl_div(student, teacher, temperature=2.0).backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([100, 8]))
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        slab_bytes: int | None = None,
    ) -> None:
        _check.linear_logits(hidden, weight, bias, scale, softcap, slab_bytes)
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.scale = scale
        self.softcap = softcap
        self.slab_bytes = slab_bytes

    def __repr__(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return f"LinearLogits(hidden {list(self.hidden.shape)}, weight {list(self.weight.shape)}{bias})"

    def logits(self) -> Tensor:
        """The whole logits ``[*, V]``, by plain PyTorch: in float32 or float64, differentiable."""
        dtype = compute_dtype(self.weight)
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (self.hidden, self.weight, self.bias))
        with without_autocast(self.weight.device):
            logits = torch.nn.functional.linear(hidden, weight, bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class TopKLogProbs:
    r"""A teacher's K best classes of each row, with their log-probabilities: of a file, or of a server.

    Every loss of logits takes it for the teacher, but for ``dkd_loss``, ``nkd_loss``, ``dist_loss``,
    ``bernoulli_kl_div`` and ``standardize``, which need the others. The student is whole logits or
    :class:`LinearLogits`. With ``tail="bucket"`` all other classes are one class more on both sides,

    .. math:: q_{K+1} = 1 - \sum_{k=1}^{K} q_k, \qquad
              p_{K+1} = \sum_{v \notin \{v_1, \ldots, v_K\}} p_v,

    and the loss is that of K + 1 classes: never below 0, and 0 where the student agrees with all that is known. With
    ``tail="renormalize"`` both sides are distributions over the K classes alone, and the gradient of all others is 0:
    what the student gives to them is left free. With ``tail="ignore"`` only the K terms of the sum count, with p and q
    of all V classes: of ``kl_div``, for instance, sum over k of q_k (log q_k - log p_k). Such a loss may be negative,
    and its digits may cancel; ``negative_log_acceptance`` and ``adaptive_kl_div``, which are no sums of terms, refuse
    it.

    The student's bucket is summed from the logits of the classes in it, so that it keeps its digits however little is
    in it. That of the teacher is as exact as what is given. Where rounding leaves nothing of it, the losses that
    forbid what the teacher rules out, ``reverse_kl_div``, ``symmetric_kl_div`` and ``adaptive_kl_div``, are +inf, and
    have no gradient in that row: give ``log_tail`` with them.

    Args:
        indices: the classes ``[*, K]``, whole numbers below V, each once in a row, in any order; what comes of one that
            stands twice where nobody can look is not defined. A negative one is padding: what stands beside it is
            ignored. A row of padding alone has loss 0, and counts.
        log_probs: their log-probabilities ``[*, K]`` among all V classes. Float, of any precision.
        tail: ``"bucket"``, the default, ``"renormalize"`` or ``"ignore"``.
        temperature: what the teacher's logits were divided by before its probabilities were taken, a positive number.
            Default 1. With ``"bucket"`` and ``"ignore"`` it is the teacher's temperature of the loss, as probabilities
            that are known in part cannot be softened: give the loss ``teacher_temperature`` where the student's is
            another. With ``"renormalize"`` the loss may have any.
        log_tail: the log-probability ``[*]`` of the bucket. Default: that of 1 less the sum of the others.
        log_prob_min: what log-probabilities of both sides are raised to where they are below it, a negative number,
            with ``tail="ignore"``. Where the student's are, the gradient is 0. Default: none.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Values are checked where the
            loss is computed, on the CPU and outside of ``torch.compile``: log-probabilities above 0, or whose sum of
            probabilities exceeds 1 by more than 0.01, which rounding may do, and classes that stand twice in a row, or
            beyond V. Elsewhere a class beyond V makes its row NaN.

    Example:
        >>> import torch, fastkd
        >>> from fastkd.functional import kl_div
        >>> student = torch.randn(4, 100, requires_grad=True)
        >>> log_probs, indices = torch.randn(4, 100).log_softmax(-1).topk(8)
        >>> loss = kl_div(student, fastkd.TopKLogProbs(indices, log_probs))
        >>> loss.backward()
        >>> student.grad.shape
        torch.Size([4, 100])
    """

    def __init__(
        self,
        indices: Tensor,
        log_probs: Tensor,
        *,
        tail: Literal["bucket", "renormalize", "ignore"] = "bucket",
        temperature: float = 1.0,
        log_tail: Tensor | None = None,
        log_prob_min: float | None = None,
    ) -> None:
        _check.top_k(indices, log_probs, tail, temperature, log_tail, log_prob_min)
        self.indices = indices
        self.log_probs = log_probs
        self.tail: Literal["bucket", "renormalize", "ignore"] = tail
        self.temperature = temperature
        self.log_tail = log_tail
        self.log_prob_min = log_prob_min

    def __repr__(self) -> str:
        return f"TopKLogProbs({list(self.indices.shape)}, tail={self.tail!r}, temperature={self.temperature})"


class Probabilities:
    r"""A teacher's probabilities: means of several teachers, smoothed labels, targets that people gave.

    Every loss of logits takes it for the teacher. Where the loss's teacher temperature T is the
    one that they were taken at, T0, q is as it is given: it need not sum to 1, and of what is defined as a sum over
    classes nothing is renormalized. Elsewhere they are softened,

    .. math:: q'_v = \frac{q_v^{T_0 / T}}{\sum_u q_u^{T_0 / T}}

    Of ``bernoulli_kl_div`` they are those of its coins, softened as sigmoid(T0 logit(q) / T). With ``standardize`` they
    stand for logits T0 log q. ``dkd_loss`` takes what its target leaves of their sum for the other classes. A row of 0
    alone knows nothing: its loss and its gradient are 0. Their logarithms are made a slab of rows at a time.

    Args:
        probabilities: ``[*, V]``, float of any precision, at least 0; of ``bernoulli_kl_div`` at most 1.
        temperature: what the teacher's logits were divided by before its probabilities were taken, a positive number.
            Default 1. A loss at another temperature softens them; where it is not to, say ``teacher_temperature``.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Values are checked where the
            loss is computed, on the CPU and outside of ``torch.compile``. Elsewhere a negative one makes its row NaN.

    Example:
        >>> import torch, fastkd
        >>> from fastkd.functional import kl_div
        >>> student = torch.randn(4, 10, requires_grad=True)
        >>> teachers = torch.randn(3, 4, 10).softmax(-1)
        >>> kl_div(student, fastkd.Probabilities(teachers.mean(0))).backward()
        >>> student.grad.shape
        torch.Size([4, 10])
    """

    def __init__(self, probabilities: Tensor, *, temperature: float = 1.0) -> None:
        _check.probabilities(probabilities, temperature)
        self.probabilities = probabilities
        self.temperature = temperature

    def __repr__(self) -> str:
        return f"Probabilities({list(self.probabilities.shape)}, temperature={self.temperature})"


def _with_tensors(form, hidden, weight, bias):
    return LinearLogits(hidden, weight, bias, scale=form.scale, softcap=form.softcap, slab_bytes=form.slab_bytes)


def in_dtype(form: LinearLogits, dtype: torch.dtype) -> LinearLogits:
    """The same in another dtype."""
    return _with_tensors(form, *(None if x is None else x.to(dtype) for x in (form.hidden, form.weight, form.bias)))


def with_hidden(form: LinearLogits, hidden: Tensor) -> LinearLogits:
    """The same of other hidden states."""
    return _with_tensors(form, hidden, form.weight, form.bias)


def with_int64(form: TopKLogProbs) -> TopKLogProbs:
    """The same with classes that can be compared with any number of them."""
    if form.indices.dtype is torch.int64:
        return form
    options = {name: x for name, x in vars(form).items() if name not in ("indices", "log_probs")}
    return TopKLogProbs(form.indices.to(torch.int64), form.log_probs, **options)


def logits_of_rows(form: LinearLogits, mask: Tensor | None) -> Tensor:
    """Whole logits, to which the hidden states of rows that do not count give nothing; else the gradient of the weight
    would be NaN where these are. mask: bool, one per row, or None."""
    if mask is not None:
        form = _with_tensors(form, form.hidden.masked_fill(~mask[..., None], 0), form.weight, form.bias)
    return form.logits()


def logits_of(
    side: Tensor | LinearLogits | TopKLogProbs | Probabilities,
    num_classes: int | None = None,
    student: Tensor | None = None,
) -> Tensor:
    """A tensor that is like the logits of a side, the first so many or all of them: in shape, dtype and device, and
    where they are a tensor in all else. It holds no memory of its own. student: the same of the student, whose classes
    a teacher has who does not know them all."""
    if isinstance(side, TopKLogProbs):
        classes = student.shape[-1] if student is not None and student.dim() else 1
        return side.log_probs.detach().new_empty(()).expand(*side.log_probs.shape[:-1], classes)
    if isinstance(side, LinearLogits):
        classes = len(side.weight) if num_classes is None else num_classes
        return side.hidden.detach().new_empty(()).expand(*side.hidden.shape[:-1], classes)
    if isinstance(side, Probabilities):
        side = side.probabilities.detach()
    return side if num_classes is None else side[..., :num_classes]
