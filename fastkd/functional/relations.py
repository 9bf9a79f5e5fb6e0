r"""Losses of relations: the student keeps how the teacher's samples relate to each other.

Each function has its formula; here stands what holds for all of them.

**Inputs.** Student and teacher are embeddings ``[N, D_s]`` and ``[N, D_t]`` of the same N samples, with any strides;
the widths may differ. The dtype is float16, bfloat16, float32 or float64, and the teacher's may differ from the
student's.

**The teacher is a constant.** A teacher that requires a gradient, while gradients are recorded, is an error: detach it.
Where both sides learn, the same call with the two exchanged has the other's gradient, unless a function says otherwise.

**Rows that a mask leaves out are not there**: N is the number of those that count, the gradient of the others is 0, and
they may hold anything. A weight multiplies the terms of its row, and the divisor does not change.

**The loss** is a tensor without dimensions, float64 where an input is float64, else float32.

**The gradient** has the student's dtype. It is computed in forward, and backward multiplies it by the incoming
gradient. There is no second derivative: ``create_graph=True`` is an error.

**Memory.** No matrix ``[N, N]`` is held, forward or backward: beside the inputs there are a few arrays of their size,
and tiles or strips that are computed one after the other.

**Samples that are split over ranks**, as data parallelism leaves them. With ``group=`` each rank of a process group
gives its own samples ``[n, D]``, as many as it has, perhaps none, and what is said of them. Every rank gets the loss of
all samples, in the order of the ranks, and the gradient of its own. Embeddings are gathered once, after a few numbers
that say how many there are, for which the host waits; each rank then computes the whole loss, and no gradient is
exchanged. That gradient is one part of the whole: where ranks average the gradients of their parameters, as
``DistributedDataParallel`` does, multiply the loss by the number of ranks. Ranks that give other arguments than the
others, or embeddings of another width, make all of them raise; any other error that one rank alone raises leaves the
others waiting. It is called outside of ``torch.compile``, and has first derivatives alone.

**DTensors** are taken where student, teacher and keys are replicated; the loss is a replicated DTensor, and the
gradient lies where the student does. Sums that are pending (``Partial``) are made first, and a plain tensor counts as
whole, the same on every rank. Every sample is compared with all others, so that samples that are split over ranks are
an error: gather them, or give each rank's own as plain tensors, with ``group=``.

**Errors** are raised before anything is computed, and name the argument. Embeddings that are not finite are an error on
the CPU where there is no mask. On other devices a check would have to wait for the device, so that they give NaN.
"""

from torch import Tensor

from .. import _check, _divergences, _split_samples
from .._types import Divergence, LossOrMore, ProcessGroup
from ._logits_loss import _of_parameter
from ._relational_loss import _for_rows, _relational_loss
from .rkd import rkd_angle, rkd_distance, rkd_loss
from .similarity import gram_mse, pkt, similarity_preserving

__all__ = [
    "gram_mse",
    "pkt",
    "relation_kl",
    "relational_triplet",
    "rkd_angle",
    "rkd_distance",
    "rkd_loss",
    "similarity_preserving",
]


def relational_triplet(
    student: Tensor,
    teacher: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    margin: float = 1.0,
    positives: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    return_active: bool = False,
    group: ProcessGroup | None = None,
) -> LossOrMore:
    r"""Contrastive relations: similar samples are nearer than all others, by a margin.

    .. math:: \frac{1}{N} \sum_i \frac{1}{|neg(i)|} \sum_{j \in pos(i)} \sum_{k \in neg(i)}
        \max(0,\ margin + d_{ij} - d_{ik}),\quad d_{ij} = \sqrt{\max(\|s_i - s_j\|^2, 10^{-12})}

    of the student's distances. pos(i) are the other samples of i's label, or the nearest neighbours that i has in the
    teacher; neg(i) are all the rest. A row without positives or without negatives has loss 0, and equal samples have no
    gradient from each other. The loss is often printed with the signs of :math:`d_{ij}` and :math:`d_{ik}` exchanged;
    that form pushes similar samples apart, so this is the one that is computed.

    All triplets count, and none is held: distances are made strip by strip, and of a row all its triplets follow from
    ranks of its negatives among its positives.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]``.
        teacher: embeddings ``[N, D_t]``, a constant, whose nearest neighbours are the positives. Where there are labels
            they decide, and the teacher is not looked at. No call of this loss has its gradient. Default: none.
        labels: integers ``[N]``, the class of each row. Default: none. One of teacher and labels is wanted.
        margin: a positive number. Default 1.
        positives: how many of the teacher's nearest neighbours, from 1 to N - 1; of equally near ones any. Default: 5,
            or N - 2 in batches of fewer than 7.
        mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        weight: float, broadcastable to ``[N]``, multiplies the terms of row i; the divisor does not change. Default: 1
            for every row.
        return_active: whether the share of active triplets, those that have a loss, is returned as well: a float32
            tensor without dimensions, for which nothing waits. Default False.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions; or the pair (loss, share).

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import relational_triplet
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], requires_grad=True)
        >>> loss, active = relational_triplet(student, labels=torch.tensor([0, 0, 1, 1]), return_active=True)
        >>> loss.backward()
        >>> round(loss.item(), 4), round(active.item(), 4), student.grad.shape
        (0.8814, 0.75, torch.Size([4, 2]))

    Source: Schroff et al., "FaceNet", 2015; of all triplets of a batch: Hermans et al., "In Defense of the Triplet
    Loss for Person Re-Identification", 2017.
    """
    if group is not None:
        student, teacher, labels, mask, weight = _split_samples.of_all(
            group, student, teacher, labels=labels, mask=mask, weight=weight
        )
    _check.triplet(student, teacher, labels, positives, mask, weight)
    _check.number("margin", margin)
    _check.flag("return_active", return_active)
    if labels is not None:
        teacher = None
    mask, weight = _for_rows(student, mask, weight)
    loss, active = _relational_loss(
        "relational_triplet", student, teacher, labels, positives or 0, float(margin), mask, weight
    )
    return (loss, active) if return_active else loss


def _constant_relation_teacher(divergence, teacher, teacher_keys, same_temperature):
    exchanged = {
        "kl_div": '"reverse_kl_div"',
        "reverse_kl_div": '"kl_div"',
        "js_div": '"js_div", beta=1 - beta',
        "total_variation": '"total_variation"',
    }
    if teacher_keys is not None:
        _check.constant_teacher(teacher_keys, name="teacher_keys")
    if teacher_keys is not None or divergence not in exchanged:
        _check.constant_teacher(teacher)
    note = "" if same_temperature else ", temperature and teacher_temperature exchanged"
    _check.constant_teacher(teacher, "relation_kl", f"relation_kl({{}}, divergence={exchanged.get(divergence)})", note)


def relation_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    divergence: Divergence = "kl_div",
    beta: Tensor | float = 0.5,
    normalize: bool = False,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Divergence of student's and teacher's relations: a softmax over similarities for each sample.

    .. math:: \frac{1}{N} \sum_i \mathrm{KL}\left(q_i \,\|\, p_i\right),\quad
        p_i = \mathrm{softmax}_j \frac{\langle s_i, k^s_j \rangle}{\sqrt{D_s}\, T},\quad
        q_i = \mathrm{softmax}_j \frac{\langle t_i, k^t_j \rangle}{\sqrt{D_t}\, T_{teacher}}

    over the other samples, :math:`j \ne i`; or over keys, such as a queue or a memory bank. Of attention heads
    ``[B, H, L, D]`` it is the mean over B, H and L. With ``student_keys=student, teacher_keys=teacher`` a sample is
    compared with itself as well: MiniLMv2's loss is this one of queries, of keys and of values, or of the three
    stacked to ``[3, B, H, L, D]``. A row that is compared with nothing has loss 0.

    The similarities are made strip by strip: 2 N M (D_s + D_t) flops for the loss and 4 N M D_s for the gradient.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[*, N, D_s]``.
        teacher: embeddings ``[*, N, D_t]``, a constant. Where both sides learn, and there are no keys, the call with
            the two exchanged has the other's gradient: of ``"kl_div"`` with ``"reverse_kl_div"`` and the other way
            round, of ``"js_div"`` with ``beta=1 - beta``.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*, N]``. The loss is not multiplied by
            T**2. Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        divergence: ``"kl_div"``, ``"reverse_kl_div"``, ``"js_div"``, ``"total_variation"`` or
            ``"soft_cross_entropy"``, as the losses of logits of these names. Default: ``"kl_div"``.
        beta: of ``"js_div"``, a number from 0 to 1, or a tensor that broadcasts to ``[*, N]``. Default 0.5.
        normalize: whether similarities are cosines over T: rows and keys are divided by their length (of at least
            1e-12; a row of zeros has no gradient), and nothing by sqrt(D). Default False.
        student_keys: ``[*, M, D_s]``, what the student's rows are compared with; they have a gradient where they
            require one. Default: the other rows.
        teacher_keys: ``[*, M, D_t]``, what the teacher's rows are compared with, constants as the teacher is. Default:
            the other rows.
        mask: bool, broadcastable to ``[*, N]``, True where the row counts. The others have no loss, and no row is
            compared with them. Default: every row counts.
        key_mask: bool, broadcastable to ``[*, M]``, True where rows are compared with the key. Default: with every one;
            without other keys, or with ``student_keys=student``, with those of ``mask``.
        weight: float, broadcastable to ``[*, N]``, multiplies the row's loss; the divisor, the number of rows that
            count, does not change. Default: 1 for every row.
        group: a process group over which samples ``[N, D]`` are split, of which each rank gives its own; they are
            compared with each other, there are no other keys. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import relation_kl
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0], [1.0], [3.0]])
        >>> loss = relation_kl(student, teacher, temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.102, torch.Size([3, 2]))

    Source: Wang et al., "MiniLM", 2020, and "MiniLMv2", 2021; with keys and cosines: Fang et al., "SEED", 2021.
    """
    if group is not None:
        own = student_keys is student and teacher_keys is teacher
        if key_mask is not None or not (own or (student_keys is None and teacher_keys is None)):
            raise ValueError("group: not with keys that are not the rows themselves, nor with a mask of keys")
        of_rows = {"temperature": temperature, "teacher_temperature": teacher_temperature, "beta": beta}
        of_rows = {name: x if isinstance(x, Tensor) and x.dim() else None for name, x in of_rows.items()}
        student, teacher, mask, weight, *numbers = _split_samples.of_all(
            group, student, teacher, mask=mask, weight=weight, **of_rows
        )
        temperature, teacher_temperature, beta = (
            x if whole is None else whole
            for x, whole in zip((temperature, teacher_temperature, beta), numbers, strict=True)
        )
        student_keys, teacher_keys = (student, teacher) if own else (None, None)
    _check.relation(student, teacher, student_keys, teacher_keys, mask, key_mask, weight)
    _check.divergence(divergence, _divergences.OF_RELATIONS)
    _check.parameter(_divergences.REGISTRY["js_div"].parameter, beta, student)
    _check.flag("normalize", normalize)
    _check.temperature("temperature", temperature, student)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        _check.temperature("teacher_temperature", teacher_temperature, student)
    _constant_relation_teacher(divergence, teacher, teacher_keys, teacher_temperature is temperature)
    exclude_self = student_keys is None
    if student_keys is student and teacher_keys is teacher:
        student_keys = teacher_keys = None
    elif student_keys is student:
        student_keys = student.view_as(student)
        key_mask = mask if key_mask is None else key_mask
    chosen, parameter = _of_parameter(divergence, beta) if divergence == "js_div" else (divergence, 0.0)
    return _relational_loss(
        "relation_kl", student, teacher, student_keys, teacher_keys, exclude_self, normalize, chosen,
        parameter, temperature, teacher_temperature, mask, key_mask, weight,
    )  # fmt: skip
