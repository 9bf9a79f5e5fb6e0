"""Losses of relations that keep similarities of samples, or probabilities made of them. What they share with the other
losses of relations stands in :mod:`fastkd.functional.relations`."""

from typing import Literal

from torch import Tensor

from .. import _check, _split_samples
from .._types import ProcessGroup
from ._relational_loss import _for_rows, _relational_loss


def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Similarity-preserving distillation: samples that excite the teacher alike do so in the student.

    .. math:: \frac{1}{N^2} \sum_i \left\| \frac{G^s_i}{\|G^s_i\|} - \frac{G^t_i}{\|G^t_i\|} \right\|^2,
        \quad G = X X^T

    A row of zeros in G stays zero, and has no gradient. Of fewer than two samples the loss is 0. It is computed from
    products ``[N, D] x [D, D]`` where N is large, linear in N, else from blocks of rows of G: the cheaper way is taken.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]``. Tensors of more dimensions are flattened by the caller, ``x.flatten(1)``.
        teacher: embeddings ``[N, D_t]``, a constant.
        mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        weight: float, broadcastable to ``[N]``, multiplies the terms of row i; the divisor does not change. Default: 1
            for every row.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import similarity_preserving
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0], [1.0], [3.0]])
        >>> loss = similarity_preserving(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.0688, torch.Size([3, 2]))

    Source: Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019.
    """
    if group is not None:
        student, teacher, mask, weight = _split_samples.of_all(group, student, teacher, mask=mask, weight=weight)
    _check.embeddings(student, teacher, mask, weight)
    mask, weight = _for_rows(student, mask, weight)
    return _relational_loss("similarity_preserving", student, teacher, mask, weight)


def gram_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    clamp: Literal["both", "teacher"] | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Gram matrix distillation: similarities between samples, or between the patches of an image, are kept.

    .. math:: \frac{1}{N^2} \sum_{ij} \left( \langle s_i, s_j \rangle - \langle t_i, t_j \rangle \right)^2

    of rows of length 1 (of at least 1e-12; a row of zeros stays, and has no gradient), or of rows as they are. Of
    ``[B, N, D]``, such as the dense features of vision transformers, it is the mean over B. Of no samples it is 0. It
    is computed from products ``[N, D] x [D, D]`` where N is large, linear in N, else from blocks of rows: the cheaper
    way is taken. With a clamp or a weight, rows are compared with all others: the work is O(N^2 D), and the
    memory stays linear.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]`` or ``[B, N, D_s]``.
        teacher: embeddings ``[N, D_t]`` or ``[B, N, D_t]``, a constant.
        normalize: whether rows are divided by their length. Default True.
        clamp: ``"both"``, where negative similarities count as 0; ``"teacher"``, where the teacher's do (then no call
            of this loss has the teacher's gradient); or None. Default None.
        mask: bool, broadcastable to ``[N]`` or ``[B, N]``, True where the row counts. An entry of the batch without any
            such row is not there either. Default: every row counts.
        weight: float, broadcastable likewise, multiplies the terms ij of row i; the divisor does not change. Default: 1
            for every row.
        group: a process group over which samples ``[N, D]`` are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import gram_mse
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0], [1.0], [3.0]])
        >>> loss = gram_mse(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.2603, torch.Size([3, 2]))

    Source: Siméoni et al., "DINOv3", 2025, as Gram anchoring.
    """
    if group is not None:
        student, teacher, mask, weight = _split_samples.of_all(group, student, teacher, mask=mask, weight=weight)
    _check.batches_of_embeddings(student, teacher, mask, weight)
    _check.flag("normalize", normalize)
    _check.clamp(clamp)
    if clamp == "teacher":  # exchanged it would be the student's
        _check.constant_teacher(teacher)
    mask, weight = _for_rows(student, mask, weight)
    return _relational_loss("gram_mse", student, teacher, normalize, clamp, mask, weight)


def pkt(
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-7,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Probabilistic knowledge transfer: the student keeps the probabilities with which samples are alike.

    .. math:: \frac{1}{N^2} \sum_{ij} t_{ij} \log \frac{t_{ij} + \epsilon}{s_{ij} + \epsilon},\quad
        s_{ij} = \frac{\cos_{ij} + 1}{\sum_k (\cos_{ik} + 1)},\
        \cos_{ij} = \left\langle \frac{x_i}{\|x_i\| + \epsilon}, \frac{x_j}{\|x_j\| + \epsilon} \right\rangle

    with s of the student's embeddings and t of the teacher's. A row of zeros has no gradient. Of fewer than two samples
    the loss is 0. The sums over rows have a closed form, so that one sweep over half of the pairs makes loss and
    gradient.

    What all losses of relations share stands in :mod:`fastkd.functional.relations`.

    Args:
        student: embeddings ``[N, D_s]``.
        teacher: embeddings ``[N, D_t]``, a constant. There is no call of this loss that has the teacher's gradient.
        eps: what is added to probabilities and to the lengths of rows, a number of at least 1e-37. Default 1e-7, as
            published.
        mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
        weight: float, broadcastable to ``[N]``, multiplies the terms of row i; the divisor does not change. Default: 1
            for every row.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import pkt
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = pkt(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (0.0028, torch.Size([3, 2]))

    Source: Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018.
    """
    if group is not None:
        student, teacher, mask, weight = _split_samples.of_all(group, student, teacher, mask=mask, weight=weight)
    _check.embeddings(student, teacher, mask, weight)
    _check.eps(eps)
    mask, weight = _for_rows(student, mask, weight)
    return _relational_loss("pkt", student, teacher, float(eps), mask, weight)
