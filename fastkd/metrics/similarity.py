"""Measures of embeddings."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._dtypes import without_autocast
from ._base import Metric, pair, slabs, wide

LEAST = 4  # rows, of which the unbiased estimate exists
ROWS = 8192  # that are widened at a time
STRIP = 512  # rows of distances that are made at a time
BLOCK = 64  # distances, of which the least is looked at first


def _embeddings(student: Any, teacher: Any) -> None:
    pair(student, teacher, "embeddings")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dim() != 2:
            raise ValueError(f"{name}: embeddings [N, D] wanted, got shape {list(x.shape)}")
    if len(student) != len(teacher):
        raise ValueError(f"teacher: the student's {len(student)} rows wanted, got {len(teacher)}")


class CKA(Metric):
    r"""Linear centered kernel alignment of embeddings, debiased, batch by batch: :func:`cka`.

    It keeps :math:`D_s^2 + D_t^2 + D_s D_t` numbers and a few more, whatever the number of rows. The mean of the first
    batch is taken away from all of them: that changes nothing, and keeps digits. Among ``torchmetrics`` it is not, as
    ranks begin with other batches: there means that are a hundred times as large as what varies cost eight of sixteen
    digits.

    Example:
        >>> import torch
        >>> from fastkd import metrics
        >>> measure = metrics.CKA()
        >>> for batch in torch.arange(24.0).sin().view(2, 6, 2):
        ...     measure.update(batch, batch @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        >>> round(measure.compute().item(), 4)  # a rotation and a factor change nothing
        1.0
    """

    names: tuple[str, ...] = ("n", "x", "y", "xx", "yy", "xy", "k", "l", "kk", "ll", "kl", "xk", "xl", "yk", "yl")

    def reset(self) -> None:
        """Begins again, as if no batch had been given."""
        super().reset()
        self._origins: Any = None

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Takes embeddings ``[N, D_s]`` and ``[N, D_t]`` of the same samples."""
        _embeddings(student, teacher)
        self._same_widths(student=student, teacher=teacher)
        if len(student) == 0:
            return
        with without_autocast(student.device):
            self._add_batch(student, teacher)

    def _add_batch(self, student, teacher):
        dtypes = [wide(x) if self.of_many else _dtype(x) for x in (student, teacher)]
        sides = [(x, dtype) for x, dtype in zip((student, teacher), dtypes, strict=True)]
        if self._origins is None:
            self._origins = (0.0, 0.0) if self.of_many else [x.to(dtype).mean(0) for x, dtype in sides]
        for first in range(0, len(student), ROWS):
            parts = [x[first : first + ROWS].to(dtype) for x, dtype in sides]
            self._add(**_sums(*(x - at.to(x.dtype) if isinstance(at, Tensor) else x
                                for x, at in zip(parts, self._origins, strict=True)), wide(student)))  # fmt: skip

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The measure, a tensor without dimensions."""
        s = self._found()
        with without_autocast(s["n"].device):
            return self._of_sums(s)

    def _of_sums(self, s):
        n = s["n"]
        if n < LEAST:
            raise ValueError(f"student: at least {LEAST} rows wanted, got {int(n)}")
        of_pairs = (
            ("x", "x", "k", "k", s["xx"], s["kk"], s["xk"], s["xk"]),
            ("y", "y", "l", "l", s["yy"], s["ll"], s["yl"], s["yl"]),
            ("x", "y", "k", "l", s["xy"], s["kl"], s["xl"], s["yk"]),
        )
        found = []
        for x, y, k, l_, products, squares, x_by, y_by in of_pairs:
            x, y = s[x], s[y]  # noqa: PLW2901
            inner = x @ products @ y - x @ x_by - y @ y_by + squares
            sums = (x @ x - s[k]) * (y @ y - s[l_])
            found.append(_unbiased(n, products.square().sum() - squares, sums, inner))
        return _ratio(*found)


def _dtype(x):
    """What products of some rows are computed in; their sums are wider."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _sums(x, y, dtype):
    """Of a batch, in a dtype: with k = |x|^2 and l = |y|^2 of each row."""
    x, y = (z.to(torch.promote_types(x.dtype, y.dtype)) for z in (x, y))
    k, l_ = x.square().sum(1), y.square().sum(1)
    sums = {
        "n": x.new_full((), len(x)), "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y,
        "k": k.sum(), "l": l_.sum(), "kk": k @ k, "ll": l_ @ l_, "kl": k @ l_,
        "xk": k @ x, "xl": l_ @ x, "yk": k @ y, "yl": l_ @ y,
    }  # fmt: skip
    return {name: z.to(dtype) for name, z in sums.items()}


def _unbiased(n, products, sums, inner):
    """The unbiased estimate of HSIC, times n (n - 3): of K and L without their diagonals sum K L, sum K sum L, and the
    sum over rows of the products of their sums."""
    return products + sums / ((n - 1) * (n - 2)) - 2 * inner / (n - 2)


def _ratio(of_student, of_teacher, of_both):
    return of_both / (of_student * of_teacher).sqrt()


@torch.no_grad()
def cka(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Linear centered kernel alignment of embeddings, debiased: how far both tell the same samples apart alike.

    .. math:: \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\, \mathrm{HSIC}(L, L)}},\quad K = X X^T, L = Y Y^T

    HSIC is its unbiased estimate, with :math:`\tilde K` for K without its diagonal, and so of L:

    .. math:: \mathrm{HSIC}(K, L) = \frac{1}{n (n - 3)} \left(\sum \tilde K \circ \tilde L
        + \frac{\sum \tilde K \sum \tilde L}{(n - 1)(n - 2)} - \frac{2}{n - 2} 1^T \tilde K \tilde L 1\right)

    It is 1 where student and teacher differ by a rotation and a factor, and about 0, perhaps below, where they have
    nothing in common, however few the samples are: the estimate that is not debiased is nearly 1 where there are fewer
    samples than features. It is computed from products of features, or where there are fewer samples from blocks of
    rows of K and L: products in float32, or in float64 of embeddings in float64, and their sums in float64. NaN where
    all rows of a side are alike.

    Args:
        student: embeddings ``[N, D_s]``, of at least 4 samples.
        teacher: embeddings ``[N, D_t]`` of the same samples.

    Returns:
        A tensor without dimensions, in float64.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.metrics import cka
        >>> x = torch.arange(24.0).sin().view(12, 2)
        >>> round(cka(x, 3 * x.flip(1)).item(), 3), round(cka(x, x.square()).item(), 3)
        (1.0, 0.281)

    Source: Kornblith, Norouzi, Lee, Hinton, "Similarity of Neural Network Representations Revisited", 2019; debiased as
    in Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", 2021.
    """
    _embeddings(student, teacher)
    N = len(student)
    if N < LEAST:
        raise ValueError(f"student: at least {LEAST} rows wanted, got {N}")
    widths = [student.shape[1], teacher.shape[1]]
    # what is taken away from all rows changes nothing, and keeps digits
    sides = [(x, x.to(_dtype(x)).mean(0)) for x in (student, teacher)]
    if N * sum(widths) < sum(a * b for a, b in ((widths[0], widths[0]), (widths[1], widths[1]), widths)):
        with without_autocast(student.device):
            return _by_rows(*(x.to(mean.dtype) - mean for x, mean in sides))
    metric = CKA()
    metric._origins = [mean for _, mean in sides]
    metric.update(student, teacher)
    return metric.compute()


def _by_rows(x, y):
    """From blocks of rows of K and L."""
    N, dtype = len(x), wide(x)
    totals = [x.new_zeros((), dtype=dtype) for _ in range(3)]
    sums = x.new_zeros(2, N, dtype=dtype)
    for rows in slabs(N, N):
        both = [(z[rows] @ z.T).to(dtype) for z in (x, y)]
        for i, K in enumerate(both):
            K.diagonal(rows.start).zero_()
            sums[i, rows] = K.sum(1)
        for i, (a, b) in enumerate(((0, 0), (1, 1), (0, 1))):
            totals[i] += (both[a] * both[b]).sum()
    pairs = ((0, 0), (1, 1), (0, 1))
    return _ratio(*(
        _unbiased(N, total, sums[a].sum() * sums[b].sum(), sums[a] @ sums[b])
        for total, (a, b) in zip(totals, pairs, strict=True)
    ))  # fmt: skip


class Neighbours(Metric):
    """How many of the teacher's nearest neighbours are the student's, batch by batch: :func:`neighbours`.

    It keeps the embeddings, as every sample may be every other's neighbour.

    Args:
        k: how many neighbours a sample has, at least 1. Default 10.
    """

    names: tuple[str, ...] = ("student", "teacher")
    appends: bool = True

    def __init__(self, k: int = 10) -> None:
        _check.arguments.at_least("k", k, 1)
        self.k: int = k
        super().__init__()

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Takes embeddings ``[N, D_s]`` and ``[N, D_t]`` of the same samples."""
        _embeddings(student, teacher)
        self._same_widths(student=student, teacher=teacher)
        self._add(student=student.detach(), teacher=teacher.detach())

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The measure, a tensor without dimensions."""
        return neighbours(**self._found(), k=self.k)


def _smallest(x, k):
    """Where the k smallest of each row are: they lie in the k blocks whose least elements are the smallest."""
    blocks = x.view(len(x), -1, BLOCK)
    if k >= blocks.shape[1]:
        return x.topk(k, largest=False).indices
    chosen = blocks.amin(-1).topk(k, largest=False).indices
    few = blocks.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).flatten(1)
    at = few.topk(k, largest=False).indices
    return chosen.gather(1, at // BLOCK) * BLOCK + at % BLOCK


@torch.no_grad()
def neighbours(student: Tensor, teacher: Tensor, k: int = 10) -> Tensor:
    r"""Which share of the teacher's k nearest neighbours of a sample are among the student's, in the mean over samples.

    .. math:: \frac{1}{N k} \sum_i \left|\mathrm{kNN}_{student}(i) \cap \mathrm{kNN}_{teacher}(i)\right|

    Nearest in Euclidean distance, without the sample itself. Embeddings in half precision are compared in float32,
    from products of what lies beyond their mean. Which of several samples at the same distance are the nearest is left
    to rounding. 512 rows of the N x N distances are made at a time, 2 KiB a sample; most of the time is that of their
    products, 2 N^2 (D_s + D_t) operations.

    Args:
        student: embeddings ``[N, D_s]``.
        teacher: embeddings ``[N, D_t]`` of the same samples.
        k: how many neighbours a sample has, from 1 to N - 1. Default 10.

    Returns:
        A tensor without dimensions, from 0 to 1, in float64.

    Raises:
        TypeError, ValueError: an argument is not as described, or embeddings are not finite, which is seen on the CPU;
            elsewhere the measure is NaN. The message names the argument.

    Example:
        >>> import torch
        >>> from fastkd.metrics import neighbours
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [6.0], [10.0]])
        >>> neighbours(x, x.square(), k=1).item(), neighbours(x, -2 * x, k=2).item()
        (1.0, 1.0)
    """
    _embeddings(student, teacher)
    _check.arguments.at_least("k", k, 1)
    N = len(student)
    if k >= N:
        raise ValueError(f"k: fewer neighbours than the {N} samples wanted, got {k}")
    _check.finite(student=student, teacher=teacher)
    with without_autocast(student.device):
        return _neighbours(student, teacher, k)


def _neighbours(student, teacher, k):
    N, sides = len(student), []
    for given in (student, teacher):
        x = given if given.dtype is torch.float64 else given.float()
        x = x - x.mean(0)
        sides.append((x, x.square().sum(1) / 2))
    common = torch.zeros((), dtype=torch.int64, device=student.device)
    columns = (N + BLOCK - 1) // BLOCK * BLOCK
    room = [x.new_full((min(STRIP, N), columns), math.inf) for x, _ in sides]
    if room[0].dtype is room[1].dtype:
        room[1] = room[0]
    for first in range(0, N, STRIP):
        found = []
        for (x, halves), apart in zip(sides, room, strict=True):
            own = x[first : first + STRIP]
            part = apart[: len(own)]
            # half of the squared distances, less a row's own
            torch.addmm(halves, own, x.T, alpha=-1, out=part[:, :N])
            part.diagonal(first).fill_(math.inf)
            found.append(_smallest(part, k))
        for part in slabs(len(found[0]), k * k):
            common += (found[0][part, :, None] == found[1][part, None, :]).sum()
    loud = sum(0.0 * halves.sum() for _, halves in sides)  # where no check could look
    return common.to(wide(student)) / (N * k) + loud
