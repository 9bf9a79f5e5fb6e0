r"""Losses of logits: the student learns the teacher's distribution over classes or tokens.

With :math:`p = \mathrm{softmax}(student / T)` and :math:`q = \mathrm{softmax}(teacher / T_{teacher})` every row of
logits has a loss. Its formula stands at each function; here stands what holds for all of them.

**Inputs.** Student and teacher are raw logits ``[*, V]`` of one shape: V classes, any number of leading dimensions, any
strides. The dtype is float16, bfloat16, float32 or float64, and the teacher's may differ from the student's.
Log-probabilities are logits too, with ``teacher_temperature=1``.

**Heads in place of logits.** :class:`fastkd.LinearLogits` stands for the logits that a head makes of hidden states
``[*, H]``, of either side. They are made a slab of rows at a time, and the gradients are those of hidden states and
head. Every loss of logits takes it; ``inplace`` and ``dim`` are of logits alone, and DTensors
are not taken beside it.

**A teacher's best classes.** :class:`fastkd.TopKLogProbs` has the K best classes of each row with their
log-probabilities, as files and servers have them; all others are one class more, or do not count. The losses that need
all classes refuse it: ``dkd_loss``, ``nkd_loss``, ``dist_loss`` and ``bernoulli_kl_div``, and those of logits that are
standardized.

**A teacher's probabilities.** :class:`fastkd.Probabilities` has them as they are, also where they do not sum to 1.
Every loss of logits takes it.

**Maps.** ``dim`` says where the classes are if they are not last: ``dim=1`` for ``[B, V, H, W]``, in which every pixel
has a row. Nothing is copied, and pixels that lie side by side in memory are computed side by side. Without it a map's
last dimension, W, is taken for the classes.

**Padded heads.** With ``num_classes`` the first classes of both sides count, and the others may hold anything: widths
may differ then. The gradient of the others is 0. They are no part of any sum, mean or number of classes.

**Classes that are split over ranks**, as tensor parallel heads leave them. With ``group=`` each rank of a process group
gives its own classes of student and teacher, in the order of the ranks and as many as it has; rows, mask, weights and
targets, which are numbers of all classes, are the same on every rank. Every rank gets the loss of whole rows, the same
to the last bit, and the gradient of its own classes. Of ``kl_div``, ``soft_cross_entropy`` and ``bernoulli_kl_div``
24 bytes a row are exchanged before the gradient, 32 in float64, and one number for the loss, or one a row with
``"none"``; the others exchange three numbers a row in place of that one. Targets are one or two more a row. Backward
exchanges nothing of logits.

Every loss of logits has it. Those that need more of a row go over slabs of rows and exchange more, all of it once again
where backward computes the gradient, with ``"none"`` and in float16: ``standardize`` six numbers a row before and two
after; ``adaptive_kl_div`` four counts of 256 numbers a row, eight in float64, by which the teacher's head is found;
``dkd_loss`` the target's two logits, and ``nkd_loss`` these and the statistics at temperature 1; ``dist_loss`` thirteen
numbers a row, and one a row in backward.

In place of logits go :class:`fastkd.LinearLogits`, whose weight has the rank's own classes, and whose hidden states get
a gradient that is summed over ranks; :class:`fastkd.TopKLogProbs`, the same on every rank, of whose classes the
student's logits are exchanged, K + 1 numbers a row; and :class:`fastkd.Probabilities` of the rank's own classes, whose
sums are exchanged, but not with ``total_variation``, ``negative_log_acceptance``, ``alpha_beta_div`` and
``adaptive_kl_div``. With the last two forms backward exchanges the same once more where it computes the gradient. A
rank without classes has no head and no probabilities, which want one at least.

There is neither ``num_classes`` nor ``return_parts`` beside a group, and there are first derivatives alone. Smoothed
labels make the host wait for the device once, or once a slab; plain PyTorch gathers the logits, and waits as well. Maps
are read across their rows, which is slower than without a group. An error that one rank alone raises leaves the others
waiting, and so do ranks of which some want a gradient of the student and others do not: what is exchanged for it
they exchange alike. A module that has a group can be neither copied nor pickled, as the group cannot.

**Standardized logits.** With ``standardize=True`` every row of logits x becomes (x - mean) / (std + 1e-7), on both
sides, before it is divided by the temperature: the student learns how the teacher's logits relate to each other, and
not how large they are. The standard deviation is that of a sample, with V - 1. Logits of -inf stay so, and count for
neither number; a row whose other logits are all equal becomes 0, and its gradient is 0. The gradient flows through both
numbers. Beside the gradient this takes two slabs of rows, of 4 MiB each on the CPU and 32 MiB on a GPU, or of one row
where that is longer. (Source: Sun et al., "Logit Standardization in Knowledge Distillation", 2024.)

**The teacher is a constant.** A teacher that requires a gradient, while gradients are recorded, is an error: detach it.

**Logits of -inf** are allowed and never give NaN; each function says what they contribute. A row without any possible
class has gradient 0; its loss is 0 where the row is the teacher's and +inf where it is the student's. A row that holds
NaN or +inf gives NaN.

**The loss** is float64 where an input is float64, else float32. It is 0 where there are no rows, or none that counts.

**The gradient** has the student's dtype. It is computed in forward, and backward multiplies it by the incoming
gradient. With ``reduction="none"``, and for float16, backward computes it from the logits instead: in float16 it would
underflow before a loss scaler could multiply it. There is no second derivative: ``create_graph=True`` is an error.

**Memory.** One pass reads student and teacher and, where a gradient is wanted, writes it; nothing else of their size is
held. On the CPU each thread keeps scratch memory of 12 bytes a class, 24 in float64, from call to call.

**Precision.** No term cancels when student and teacher agree. Near convergence, at a loss of 5e-7, where plain PyTorch
in float32 has lost most digits of a divergence, the relative error stays below 2e-4.

**DTensors** (``torch.distributed.tensor``) are taken on a mesh of any dimensions, replicated or split by leading
dimensions. The loss is that of the whole batch: a replicated DTensor, so that ``item()`` is right on every rank; with
``reduction="none"`` it is split as the rows are. The gradient lies where the student does. What stands beside the
student is brought there too, sums that are pending (``Partial``) are made first, and a plain tensor counts as whole,
the same on every rank; so does a normalizer. Where rows are split the ranks add up the loss, and the number of rows
that a mask lets count; backward exchanges nothing. Where one dimension of the mesh splits the student's classes its
ranks are the group of above, and the teacher is brought there. ``inplace`` and ``torch.compile`` work as they do
elsewhere.

**Errors** are raised before anything is computed, and name the argument. The values of tensor temperatures, betas and
normalizers, those of masked rows too, and of numbers under ``torch.compile``, are checked on the CPU only: on other
devices a check would have to wait for the device, so that wrong values propagate into the loss.
"""

from torch import Tensor

from .. import _check
from .._types import Logits, ProcessGroup, Reduction, TeacherLogits
from ._logits_loss import _logits_loss
from .cross_entropy import soft_cross_entropy

__all__ = ["kl_div", "reverse_kl_div", "soft_cross_entropy", "total_variation"]


def kl_div(
    student: Logits,
    teacher: TeacherLogits,
    *,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the student from the teacher: Hinton's distillation loss.

    .. math:: T^2 \sum_v q_v (\log q_v - \log p_v)

    with the gradient :math:`T (p - q)` for each row.

    It differs from ``torch.nn.functional.kl_div``: both sides are raw logits, in place of log-probabilities and
    probabilities; a temperature softens them; and ``"batchmean"`` is the default reduction.

    A class with q = 0 contributes 0; one with p = 0 and q > 0 makes the loss +inf.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``kl_div(a, b.detach())`` and
            ``reverse_kl_div(b, a.detach())`` have their gradients.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*]``, one per row. Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2, so that gradients keep their size when T changes. Default:
            True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; ``"batchmean"``, the sum over the number of rows that
            count, the default; or ``"mean"``, which divides by V as well.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import kl_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = kl_div(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1207, torch.Size([2, 3]))

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, 0.0,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("kl_div", student, teacher, options, dim)


def reverse_kl_div(
    student: Logits,
    teacher: TeacherLogits,
    *,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of the teacher from the student, which seeks the teacher's modes.

    .. math:: T^2 \sum_v p_v (\log p_v - \log q_v)

    with the gradient :math:`T p (\log p - \log q - \mathrm{KL})` for each row.

    A class with p = 0 contributes 0. A class with q = 0 that the student can give makes the row's loss +inf, which has
    no gradient: the row's is 0.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``reverse_kl_div(a, b.detach())`` and
            ``kl_div(b, a.detach())`` have their gradients.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*]``, one per row. Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2, so that gradients keep their size when T changes. Default:
            True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; ``"batchmean"``, the sum over the number of rows that
            count, the default; or ``"mean"``, which divides by V as well.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import reverse_kl_div
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = reverse_kl_div(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.1199, torch.Size([2, 3]))

    Source: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2024.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, 0.0,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("reverse_kl_div", student, teacher, options, dim)


def total_variation(
    student: Logits,
    teacher: TeacherLogits,
    *,
    temperature: Tensor | float = 1.0,
    teacher_temperature: Tensor | float | None = None,
    t_squared: bool = True,
    standardize: bool = False,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    normalizer: Tensor | float | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Total variation distance between student and teacher.

    .. math:: \frac{T^2}{2} \sum_v |p_v - q_v|

    It lies between 0 and 1 before T**2. A class where p = q adds nothing to the gradient. A class that one side cannot
    give is like any other.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``total_variation(a, b.detach())`` and
            ``total_variation(b, a.detach())`` have their gradients.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*]``, one per row. Default 1.
        teacher_temperature: the teacher's own temperature, of the same form. Default: ``temperature``.
        t_squared: whether the loss is multiplied by T**2, so that gradients keep their size when T changes. Default:
            True.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            :mod:`fastkd.functional.logits` says. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts.
        weight: float, broadcastable to ``[*]``, multiplies the row's loss; the divisor does not change. Default: 1 for
            every row.
        reduction: ``"none"``, a loss per row ``[*]``; ``"sum"``; ``"batchmean"``, the sum over the number of rows that
            count, the default; or ``"mean"``, which divides by V as well.
        normalizer: a number, or a tensor of one element, that replaces the divisor, for gradient accumulation and
            several ranks. It is positive, or 0 where a mask lets no row count. Not with ``"none"``. Default: none.
        inplace: whether the gradient is written over the student's logits, which saves its memory. Such logits must not
            be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is refused. Default
            False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says. Default: none.

    Returns:
        The loss, a tensor without dimensions, or ``[*]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import total_variation
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = total_variation(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.2107, torch.Size([2, 3]))

    Source: Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023.
    """
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = _check.LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, 0.0,
        standardize=standardize, num_classes=num_classes, group=group,
    )  # fmt: skip
    return _logits_loss("total_variation", student, teacher, options, dim)
