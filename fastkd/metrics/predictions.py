"""Measures of logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..functional import dkd_loss, kd_loss
from ._base import Metric, pair, plain, slabs, wide


def _logits(student: Any, teacher: Any) -> None:
    pair(student, teacher, "logits")
    _check.logits.logits(student, teacher, -1)


class Agreement(Metric):
    """The share of rows whose k best classes are the teacher's, batch by batch: :func:`agreement`.

    Args:
        k: how many classes are compared, at least 1. Default 1.
    """

    names: tuple[str, ...] = ("agree", "rows")

    def __init__(self, k: int = 1) -> None:
        _check.arguments.at_least("k", k, 1)
        self.k: int = k
        super().__init__()

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Takes logits ``[*, V]`` of both, and which rows ``[*]`` count."""
        _logits(student, teacher)
        if self.k > student.shape[-1]:
            raise ValueError(f"k: no more classes than the {student.shape[-1]} wanted, got {self.k}")
        if self.k == 1:
            agree = student.argmax(-1) == teacher.argmax(-1)
        else:
            best = [x.topk(self.k, sorted=False).indices.sort(-1).values for x in (student, teacher)]
            agree = (best[0] == best[1]).all(-1)
        counts = torch.ones_like(agree)
        if mask is not None:
            _check.arguments.mask(mask, student)
            counts = mask.expand(agree.shape)
        dtype = wide(student)
        self._add(agree=(agree & counts).sum().to(dtype), rows=counts.sum().to(dtype))

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The measure, a tensor without dimensions."""
        found = self._found()
        return found["agree"] / found["rows"]


def agreement(student: Tensor, teacher: Tensor, k: int = 1, *, mask: Tensor | None = None) -> Tensor:
    """The share of rows whose k best classes are the teacher's, in whichever order.

    Which of several classes of equal logits are the best is left to ``torch.topk``, and with k = 1 to ``argmax``.

    Args:
        student: logits, or anything that is in their order, ``[*, V]``.
        teacher: of the same shape.
        k: how many classes are compared, from 1 to V. Default 1.
        mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row counts.

    Returns:
        A tensor without dimensions, from 0 to 1, in float64; NaN where no row counts.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.metrics import agreement
        >>> student, teacher = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([[2.0, 3.0, 1.0]] * 2)
        >>> agreement(student, teacher).item(), agreement(student, teacher, k=2).item()
        (0.0, 0.5)
    """
    metric = Agreement(k)
    metric.update(student, teacher, mask)
    return metric.compute()


class ClassDivergence(NamedTuple):
    """Means over the rows of each class, ``[V]``; NaN where a class has none."""

    kl: Tensor  #: KL(q || p), the sum of the next two
    target: Tensor  #: that between the target and all other classes together
    non_target: Tensor  #: (1 - q of the target) times that between the other classes alone
    count: Tensor  #: the number of rows, whole numbers


class DivergenceByClass(Metric):
    """The divergence from the teacher, class by class and batch by batch: :func:`divergence_by_class`.

    Args:
        ignore_index: the target of rows that do not count. Default -100.
    """

    names: tuple[str, ...] = ("target", "non_target", "count")

    def __init__(self, ignore_index: int = -100) -> None:
        _check.whole_number("ignore_index", ignore_index)
        self.ignore_index = ignore_index
        super().__init__()

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, target: Tensor) -> None:
        """Takes logits ``[*, V]`` of both, and the class of each row, ``[*]``."""
        _logits(student, teacher)
        plain(target=target)
        self._same_widths(student=student)
        V, dtype = student.shape[-1], wide(student)
        options: Any = {"ignore_index": self.ignore_index, "reduction": "none"}
        nothing = {"temperature": 1.0, **options}
        of_target = dkd_loss(student, teacher, target, alpha=1.0, beta=0.0, **nothing)
        surprise = kd_loss(teacher, teacher, target, hard_weight=1.0, soft_weight=0.0, **options)  # -log q
        others = -torch.expm1(-surprise.double() if dtype is torch.float64 else -surprise)
        of_others = dkd_loss(student, teacher, target, alpha=0.0, beta=others, **nothing)
        valid = (target != self.ignore_index).reshape(-1)
        at = torch.where(valid, target.reshape(-1).long(), 0)

        def by_class(rows):
            rows = torch.where(valid, rows.reshape(-1).to(dtype), 0.0)
            return torch.zeros(V, dtype=dtype, device=student.device).index_add_(0, at, rows)

        self._add(target=by_class(of_target), non_target=by_class(of_others), count=by_class(valid))

    @torch.no_grad()
    def compute(self) -> ClassDivergence:
        """The measure."""
        found = self._found()
        target, non_target = (found[name] / found["count"] for name in ("target", "non_target"))
        return ClassDivergence(target + non_target, target, non_target, found["count"].long())


def divergence_by_class(
    student: Tensor, teacher: Tensor, target: Tensor, *, ignore_index: int = -100
) -> ClassDivergence:
    r"""Where student and teacher disagree: the Kullback-Leibler divergence of the rows of each class, in two parts.

    .. math:: \mathrm{KL}(q \| p) = \mathrm{KL}(\text{target, rest}) + (1 - q_y)\, \mathrm{KL}(\text{the rest alone})

    as ``dkd_loss`` splits it, at temperature 1: how sure the student is of the target, and how it shares out what is
    left. The backend that computes the losses of these tensors computes it; nothing of N x V numbers is made.

    Args:
        student: raw logits ``[*, V]``.
        teacher: raw logits ``[*, V]``.
        target: the class of each row, whole numbers ``[*]``.
        ignore_index: the target of rows that do not count. Default -100.

    Returns:
        A :class:`ClassDivergence`: means over the rows of each class, in float64, and their numbers.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.metrics import divergence_by_class
        >>> student, teacher = torch.tensor([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0, 1.0]] * 3)
        >>> found = divergence_by_class(student, teacher, torch.tensor([0, 1, 1]))
        >>> [round(x, 2) for x in found.kl.tolist()], found.count.tolist()
        ([0.0, 0.29], [1, 2])

    Source: Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", 2022.
    """
    metric = DivergenceByClass(ignore_index)
    metric.update(student, teacher, target)
    return metric.compute()


class CalibrationBins(NamedTuple):
    """The expected calibration error, and the bins ``[bins]`` behind it; means are NaN where a bin has no rows."""

    ece: Tensor  #: a tensor without dimensions
    confidence: Tensor  #: the mean of the largest probabilities
    accuracy: Tensor  #: the share of rows whose best class is the target
    count: Tensor  #: the number of rows, whole numbers


class Calibration(Metric):
    """The expected calibration error, batch by batch: :func:`calibration`.

    Args:
        bins: how many there are, at least 1. Default 15.
        ignore_index: the target of rows that do not count. Default -100.
    """

    names: tuple[str, ...] = ("confidence", "correct", "count")

    def __init__(self, bins: int = 15, ignore_index: int = -100) -> None:
        _check.arguments.at_least("bins", bins, 1)
        _check.whole_number("ignore_index", ignore_index)
        self.bins: int = bins
        self.ignore_index: int = ignore_index
        super().__init__()

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Takes logits ``[*, V]``, and the class of each row, ``[*]``."""
        plain(logits=logits, target=target)
        _check.arguments.is_tensor("logits", logits)
        _check.floating("logits", logits)
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(f"logits: at least one class wanted, [*, V], got shape {list(logits.shape)}")
        target = _check.as_classes(target)
        _check.logits.target(target, logits, self.ignore_index, None, logits.shape[-1])
        dtype, V = wide(logits), logits.shape[-1]
        rows, target = logits.reshape(-1, V), target.reshape(-1)
        sums = torch.zeros(3, self.bins, dtype=dtype, device=logits.device)
        edges = torch.linspace(0, 1, self.bins + 1, dtype=dtype, device=logits.device)[1:-1]
        for part in slabs(len(rows), V):
            z = rows[part]
            z = z if z.dtype is torch.float64 else z.float()
            top, best = z.max(-1, keepdim=True)
            confidence = (1 / (z - top).exp().sum(-1)).to(dtype)
            valid = target[part] != self.ignore_index
            correct = best.squeeze(-1) == target[part]
            at = torch.bucketize(confidence, edges)
            for i, x in enumerate((confidence, correct.to(dtype), torch.ones_like(confidence))):
                sums[i].index_add_(0, at, torch.where(valid, x, 0.0))
        self._add(**dict(zip(self.names, sums, strict=True)))

    @torch.no_grad()
    def compute(self) -> CalibrationBins:
        """The measure."""
        confidence, correct, count = (self._found()[name] for name in self.names)
        ece = (confidence - correct).abs().sum() / count.sum()
        return CalibrationBins(ece, confidence / count, correct / count, count.long())


def calibration(logits: Tensor, target: Tensor, bins: int = 15, *, ignore_index: int = -100) -> CalibrationBins:
    r"""Whether a model is as sure as it is right: the expected calibration error, and the bins behind it.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \left|\mathrm{accuracy}_b - \mathrm{confidence}_b\right|

    A row's confidence is its largest probability, at temperature 1. Bins are of equal width, each without its lower end
    and with its upper one.

    Args:
        logits: raw logits ``[*, V]``, of student or teacher.
        target: the class of each row, whole numbers ``[*]``.
        bins: how many there are, at least 1. Default 15.
        ignore_index: the target of rows that do not count. Default -100.

    Returns:
        A :class:`CalibrationBins`, in float64; all NaN where no row counts, but the numbers of rows.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.metrics import calibration
        >>> found = calibration(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([0, 0, 1]), bins=2)
        >>> round(found.ece.item(), 4), found.count.tolist()
        (0.4205, [1, 2])

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017.
    """
    metric = Calibration(bins, ignore_index)
    metric.update(logits, target)
    return metric.compute()
