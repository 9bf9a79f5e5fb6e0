"""Liger-Kernel: its losses of a language model's head under their names, with their arguments and their numbers,
computed by fastkd. One import is changed:

.. code-block:: python

    from fastkd.integrations.liger import LigerFusedLinearJSD  # was: from liger_kernel.transformers import ...
    from fastkd.integrations.liger import LigerFusedLinearJSDLoss  # was: from liger_kernel.chunked_loss import ...

What differs: they run on the CPU as well; logits are made a slab of rows at a time and in float32, and sums over rows
are in float32, whatever ``accum_dtype`` says; nothing is compiled; a teacher of more classes than the student is an
error, where Liger gives the student logits of 0 for the others. Beside these losses, fastkd's own multiply by T
squared, which these do not.
"""

import torch
from torch import Tensor

from .. import functional
from ..forms import LinearLogits, Probabilities


def _positive(name: str, x: float) -> float:
    if not isinstance(x, int | float) or isinstance(x, bool) or not 0 < x < float("inf"):
        raise ValueError(f"{name}: a positive finite number wanted, got {x!r}")
    return x


def _between(name: str, x: float) -> float:
    if not isinstance(x, int | float) or isinstance(x, bool) or not 0 <= x <= 1:
        raise ValueError(f"{name}: a number from 0 to 1 wanted, got {x!r}")
    return x


def _head(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int | None = None) -> LinearLogits:
    """rows: of a slab."""
    slab_bytes = None if rows is None else rows * len(weight) * (8 if weight.dtype is torch.float64 else 4)
    return LinearLogits(x, weight, bias, slab_bytes=slab_bytes)


def _teachers(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int | None = None) -> LinearLogits:
    """The same of a teacher, to which no gradient flows."""
    return _head(x.detach(), weight.detach(), None if bias is None else bias.detach(), rows)


def _classes(student_weight: Tensor, teacher_weight: Tensor) -> None:
    if len(student_weight) != len(teacher_weight):
        raise ValueError(
            f"teacher_weight: as many classes as the student's {len(student_weight)} wanted, got "
            f"{len(teacher_weight)}. Where one of both heads is padded, give the first classes of both: weight[:n]"
        )


class LigerFusedLinearJSD(torch.nn.Module):
    r"""The generalized Jensen-Shannon divergence of two heads, as ``liger_kernel.transformers`` has it.

    With p and q the softmax of the student's and the teacher's logits / T, and :math:`M = \beta q + (1 - \beta) p`, the
    mean over rows whose label is not ``ignore_index`` of :math:`\beta KL(q, M) + (1 - \beta) KL(p, M)`; KL(q, p) where
    beta is 0, KL(p, q) where it is 1. It is not multiplied by T squared.

    Args:
        jsd_beta: beta, from 0 to 1. Default: 0.5.
        ignore_index: the label of rows that do not count. Default: -100.
        temperature: T. Default: 1.
        accum_dtype: changes nothing, as sums are in float32 at least.

    Source: Liger-Kernel 0.8.5, ``LigerFusedLinearJSD``.

    >>> loss = LigerFusedLinearJSD(jsd_beta=0.1, temperature=2.0)
    >>> x, w = torch.randn(4, 3, requires_grad=True), torch.randn(10, 3, requires_grad=True)
    >>> loss(x, w, torch.randn(4, 5), torch.randn(10, 5), torch.tensor([1, 2, -100, 3])).backward()
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.jsd_beta: float = _between("jsd_beta", jsd_beta)
        self.ignore_index: int = ignore_index
        self.temperature: float = _positive("temperature", temperature)
        self.accum_dtype: torch.dtype | None = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student_input: hidden states ``[N, H]``.
            student_weight: the head ``[V, H]``.
            teacher_input: ``[N, H_t]``, a constant.
            teacher_weight: ``[V, H_t]``, a constant.
            shift_labels: ``[N]``, of which only ``ignore_index`` is looked for. Default: every row counts.
        """
        _classes(student_weight, teacher_weight)
        return functional.js_div(
            _head(student_input, student_weight, None), _teachers(teacher_input, teacher_weight, None),
            beta=self.jsd_beta, temperature=self.temperature, t_squared=False,
            mask=None if shift_labels is None else shift_labels != self.ignore_index,
        )  # fmt: skip


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    r"""KL(q, p) of a head beside probabilities q that are given, as ``liger_kernel.transformers`` has it.

    p is the softmax of the student's logits / T, and :math:`\sum_v q_v (\log q_v - \log p_v)` of the rows whose label
    is not ``ignore_index`` is summed; q may sum to anything. It is not multiplied by T squared.

    Args:
        reduction: what the sum is divided by: ``"batchmean"``, the rows that count; ``"mean"``, these times V;
            ``"sum"``, nothing. Default: ``"batchmean"``.
        ignore_index: the label of rows that do not count. Default: -100.
        temperature: T. Default: 1.
        eps: changes nothing: a q of 0 contributes 0, and one above it what it is.
        accum_dtype: changes nothing, as sums are in float32 at least.

    Source: Liger-Kernel 0.8.5, ``LigerFusedLinearKLDivLoss``.

    >>> x, w = torch.randn(4, 3, requires_grad=True), torch.randn(10, 3, requires_grad=True)
    >>> LigerFusedLinearKLDivLoss(temperature=2.0)(x, w, torch.rand(4, 10).softmax(-1)).backward()
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(f"reduction: 'batchmean', 'mean' or 'sum' wanted, got {reduction!r}")
        self.reduction: str = reduction
        self.ignore_index: int = ignore_index
        self.temperature: float = _positive("temperature", temperature)
        self.eps: float = eps
        self.accum_dtype: torch.dtype | None = accum_dtype

    def forward(
        self, student_input: Tensor, student_weight: Tensor, target: Tensor, shift_labels: Tensor | None = None
    ) -> Tensor:
        """The loss, a tensor without dimensions.

        Args:
            student_input: hidden states ``[N, H]``.
            student_weight: the head ``[V, H]``.
            target: probabilities ``[N, V]``, a constant.
            shift_labels: ``[N]``, of which only ``ignore_index`` is looked for. Default: every row counts.
        """
        return functional.kl_div(
            _head(student_input, student_weight, None), Probabilities(target.detach(), temperature=self.temperature),
            temperature=self.temperature, t_squared=False, reduction=self.reduction,
            mask=None if shift_labels is None else shift_labels != self.ignore_index,
        )  # fmt: skip


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """The divergence of :class:`LigerFusedLinearJSD` beside the cross-entropy with labels, as
    ``liger_kernel.chunked_loss`` has it: ``weight_hard_loss`` CE + ``weight_soft_loss`` JSD, where CE is that of the
    student's softmax at temperature 1; the mean over rows whose label is not ``ignore_index``.

    Args:
        weight_hard_loss: that of the cross-entropy. Default: 0.5.
        weight_soft_loss: that of the divergence. Default: 0.5.
        beta: that of the divergence, from 0 to 1. Default: 0.5.
        ignore_index: the label of rows that do not count. Default: -100.
        temperature: of the divergence. Default: 1.
        compiled: changes nothing.
        chunk_size: rows of logits that there are at a time, at most. Default: 1024.
        return_soft_hard_loss: whether both parts, before their weights, are returned as well.

    Source: Liger-Kernel 0.8.5, ``LigerFusedLinearJSDLoss``.

    >>> x, w = torch.randn(4, 3, requires_grad=True), torch.randn(10, 3, requires_grad=True)
    >>> teacher = torch.randn(4, 5), torch.randn(10, 5)
    >>> LigerFusedLinearJSDLoss(temperature=2.0)(x, w, *teacher, torch.tensor([1, 2, -100, 3])).backward()
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size: a whole number of at least 1 wanted, got {chunk_size!r}")
        self.weight_hard_loss: float = weight_hard_loss
        self.weight_soft_loss: float = weight_soft_loss
        self.beta: float = _between("beta", beta)
        self.ignore_index: int = ignore_index
        self.temperature: float = _positive("temperature", temperature)
        self.compiled: bool = compiled
        self.chunk_size: int = chunk_size
        self.return_soft_hard_loss: bool = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, a tensor without dimensions; with ``return_soft_hard_loss`` it, the soft and the hard part.

        Args:
            student_input: hidden states ``[N, H]``.
            student_weight: the head ``[V, H]``.
            teacher_input: ``[N, H_t]``, a constant.
            teacher_weight: ``[V, H_t]``, a constant.
            true_labels: ``[N]``, classes or ``ignore_index``.
            student_bias: ``[V]``.
            teacher_bias: ``[V]``, a constant.
        """
        _classes(student_weight, teacher_weight)
        parts = functional.kd_loss(
            _head(student_input, student_weight, student_bias, self.chunk_size),
            _teachers(teacher_input, teacher_weight, teacher_bias, self.chunk_size), true_labels,
            hard_weight=self.weight_hard_loss, soft_weight=self.weight_soft_loss, divergence="js_div", beta=self.beta,
            temperature=self.temperature, t_squared=False, ignore_index=self.ignore_index, return_parts=True,
        )  # fmt: skip
        return (parts.loss, parts.soft, parts.hard) if self.return_soft_hard_loss else parts.loss
