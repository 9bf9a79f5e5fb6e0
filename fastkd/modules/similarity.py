"""Losses of relations that keep similarities of samples, as modules: see :mod:`fastkd.functional.similarity`."""

from typing import Literal

from torch import Tensor

from .. import _check, functional
from .._types import ProcessGroup
from ._loss import _Loss


class SimilarityPreservingLoss(_Loss):
    r"""Similarity-preserving distillation: samples that excite the teacher alike do so in the student.

    The formula and what the loss does are those of :func:`fastkd.functional.similarity_preserving`.

    Args:
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.SimilarityPreservingLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0377
    """

    _options = ("group",)

    def __init__(self, *, group: ProcessGroup | None = None) -> None:
        super().__init__()
        _check.group(group)
        self.group = group

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[N]``, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.similarity_preserving(student, teacher, mask=mask, weight=weight, group=self.group)


class GramMSELoss(_Loss):
    r"""Gram matrix distillation: similarities between samples, or between the patches of an image, are kept.

    The formula and what the loss does are those of :func:`fastkd.functional.gram_mse`.

    Args:
        normalize: whether rows are divided by their length. Default True.
        clamp: ``"both"``, where negative similarities count as 0; ``"teacher"``, where the teacher's do; or None.
            Default None.
        group: a process group over which samples ``[N, D]`` are split, each rank giving its own. Default: none.

    Shape:
        student ``[N, D_s]`` or ``[B, N, D_s]``, the teacher likewise; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.GramMSELoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0574
    """

    _options = ("normalize", "clamp", "group")

    def __init__(
        self,
        *,
        normalize: bool = True,
        clamp: Literal["both", "teacher"] | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
        _check.flag("normalize", normalize)
        _check.clamp(clamp)
        self.normalize = normalize
        self.clamp: Literal["both", "teacher"] | None = clamp

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]`` or ``[B, N, D_s]``.
            teacher: embeddings ``[N, D_t]`` or ``[B, N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]`` or ``[B, N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable likewise, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.gram_mse(
            student,
            teacher,
            normalize=self.normalize,
            clamp=self.clamp,
            mask=mask,
            weight=weight,
            group=self.group,
        )


class PKTLoss(_Loss):
    r"""Probabilistic knowledge transfer: the student keeps the probabilities with which samples are alike.

    The formula and what the loss does are those of :func:`fastkd.functional.pkt`.

    Args:
        eps: what is added to probabilities and to the lengths of rows, at least 1e-37. Default 1e-7.
        group: a process group over which samples are split, of which each rank gives its own. Default: none.

    Shape:
        student ``[N, D_s]`` and teacher ``[N, D_t]``; the loss has no dimensions.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
        >>> loss = fastkd.PKTLoss()(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.0028
    """

    _options = ("eps", "group")

    def __init__(self, *, eps: float = 1e-7, group: ProcessGroup | None = None) -> None:
        super().__init__()
        _check.group(group)
        self.group = group
        _check.eps(eps)
        self.eps = eps

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student: embeddings ``[N, D_s]``.
            teacher: embeddings ``[N, D_t]``, a constant.
            mask: bool, broadcastable to ``[N]``, True where the row counts. Default: every row counts.
            weight: float, broadcastable to ``[N]``, multiplies the terms of row i. Default: 1 for every row.
        """
        return functional.pkt(student, teacher, eps=self.eps, mask=mask, weight=weight, group=self.group)
