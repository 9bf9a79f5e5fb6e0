"""Losses of logits whose classes are split over the ranks of a process group: each rank has its classes of every row.

The rows schedule in its phases. Each rank's statistics are gathered, the maximum and the sum of both sides, and merged:
a sum of e^((z - m) / T) times e^((m - M) / T) is one of e^((z - M) / T). Sums are in float64, and maxima in float32
where logits are: 24 bytes a row. With those of the whole row each rank knows p and q of its classes. Where the slopes
of a row add up to 0 it computes its gradient together with its share of the loss, and one number is exchanged for that;
else the sums of loss and slopes are, of each row, and the gradient comes after. The loss is summed from terms of one
sign, as in one process: nothing cancels near convergence.

What is gathered is summed in the ranks' order, so that the loss is the same on all of them, to the last bit. Backward
exchanges nothing.
"""

import math
from typing import Any, NamedTuple

import torch

from .._calls import RowsBackward, RowsCall, RowsStatistics, RowsSums
from .._check import LogitsOptions
from .._divergences import ENTRIES
from .._dtypes import compute_dtype
from .._inplace import overwritten
from .._split_classes import Ranks, wrong_targets
from . import rows
from .gradient import forbid_double_backward, scaled
from .saved import restored, save


class How(NamedTuple):
    """What is done with a call."""

    per_row: bool  # whether the loss is one per row
    mean: bool  # whether the divisor is to be multiplied by the number of classes
    hard: tuple[float, float, float] | None  # hard_weight, soft_weight, label_smoothing of rows that have targets


class Whole(NamedTuple):
    """What the classes of all ranks come to."""

    stats: torch.Tensor  # [N, 7]
    widths: torch.Tensor | None  # [2] float64: how many there are, and how many before this rank's, where asked for
    logits: torch.Tensor | None  # [N], the sum of the student's less the maximum, where labels are smoothed


def _moved(parts, at, inv_temperature):
    """A side's maximum and sum of whole rows, and the factors [ranks, N] of each rank's sum."""
    maximum = torch.where(parts[..., at + 1] == 0, -math.inf, parts[..., at])  # of -inf alone there is none
    top = maximum.amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    factors = torch.exp((maximum - top) * inv_temperature)
    factors = torch.where(parts[..., at + 1] == 0, 0.0, factors)
    return top, (parts[..., at + 1] * factors).sum(0), maximum - top


def _inverse(rows_, number):
    return 1 / number if rows_ is None else 1 / rows_.double()


def _packed(stats, dtype):
    """Maxima and sums of both sides, of what is computed in dtype: [N, 3], or [N, 4] in float64."""
    if dtype is torch.float64:
        return stats[:, :4]
    maxima = stats[:, [0, 2]].to(torch.float32).view(torch.float64)  # two in the place of one
    return torch.cat([maxima, stats[:, [1, 3]]], 1)


def _unpacked(parts, dtype):
    """[..., 4] of what was packed."""
    if dtype is torch.float64:
        return parts
    maxima = parts[..., :1].contiguous().view(torch.float32).double()
    return torch.stack([maxima[..., 0], parts[..., 1], maxima[..., 1], parts[..., 2]], -1)


def whole(ops: rows.Ops, call: RowsCall, ranks: Any, counts_classes: bool = False, sums_logits: bool = False) -> Whole:
    """Phase one, and what the ranks have found together. Who sums logits counts classes."""
    N, V = math.prod(call.student.shape[:-1]), call.student.shape[-1]
    own = call.student.new_zeros((N, rows.STATS_SIZE), dtype=torch.float64)
    if V:
        ops.statistics(*call, *RowsStatistics(own))
    dtype = compute_dtype(call.student, call.teacher)
    columns = [_packed(own, dtype)]
    packed = columns[0].shape[1]
    if call.target is not None:
        columns.append(own[:, 5:6])
    if sums_logits:
        columns.append(own[:, 6:7])
    sent = torch.cat(columns, 1).reshape(-1)
    if counts_classes:
        sent = torch.cat([sent, own.new_full((1,), V)])
    received = ranks.gathered(sent)
    parts = received[:, : N * sum(x.shape[1] for x in columns)].reshape(ranks.size, N, -1)
    more = iter(parts[..., packed:].unbind(-1))
    parts = _unpacked(parts[..., :packed], dtype)
    stats = torch.zeros_like(own)
    stats[:, 0], stats[:, 1], below = _moved(parts, 0, _inverse(call.temperature_rows, call.temperature))
    stats[:, 2], stats[:, 3], _ = _moved(parts, 2, _inverse(call.teacher_temperature_rows, call.teacher_temperature))
    if call.target is not None:
        hard = next(more)
        stats[:, 5] = torch.where(hard == 0, 0.0, hard * torch.exp(below)).sum(0)
    widths = received[:, -1] if counts_classes else None
    logits = None
    if sums_logits:
        logits = (next(more) + widths[:, None] * (parts[..., 0] - stats[:, 0])).sum(0)
    return Whole(stats, None if widths is None else torch.stack([widths.sum(), widths[: ranks.rank].sum()]), logits)


def _acceptance(total, accepted):
    """Of the total variation and of sum min(p, q) of each row: -log of the latter, and its inverse."""
    loss = torch.where(total < 0.5, -torch.log1p(-total), -torch.log(accepted))
    disjoint = accepted == 0
    return torch.where(disjoint, math.inf, loss), torch.where(disjoint, 0.0, 1 / accepted)


class _Rows:
    """What is known of each row on all ranks: from sums over classes to the loss."""

    def __init__(self, call, stats):
        self.mask, stats = call.mask, stats.unbind(1)
        self.no_student, self.no_teacher = stats[1] == 0, stats[3] == 0
        self.log_teacher = torch.where(self.no_teacher, 0.0, torch.log(torch.where(self.no_teacher, 1.0, stats[3])))
        self.loud = 0.0 * (stats[1] + stats[3])  # a NaN anywhere in a row is one everywhere in it
        by = 1.0 if call.weight is None else call.weight.double()
        T = call.temperature if call.temperature_rows is None else call.temperature_rows.double()
        self.soft_scale = by * T * T if call.t_squared else by
        self.hard_scale = by

    def soft(self, total, weight=1.0):
        """The loss of each row, from that of its classes."""
        if weight == 0:  # leaves out what may be infinite
            return torch.zeros_like(total)
        loss = torch.where(self.no_student, math.inf, total) + self.loud
        return self.counting(torch.where(self.no_teacher, 0.0, loss) * self.soft_scale * weight)

    def counting(self, losses):
        return losses if self.mask is None else torch.where(self.mask, losses, 0.0)


def _hard(call, numbers, whole, of_rows):
    """The cross-entropy of the rows whose target is here; of the others 0."""
    weight, _, smoothing = numbers
    here, V = (call.target >= 0) if call.mask is None else (call.target >= 0) & call.mask, call.student.shape[-1]
    nothing = torch.zeros_like(of_rows.loud)
    if V == 0:
        return nothing
    if weight == 0:  # leaves out what may be infinite; a target that is no class is as loud as elsewhere
        return torch.where(here & (call.target >= V), math.nan, nothing)
    top, total = whole.stats[:, 0], whole.stats[:, 5]
    at = call.target.clamp(0, V - 1).view(*call.student.shape[:-1], 1)
    logit = call.student.detach().gather(-1, at).reshape(-1).double()
    loss = torch.log(total)
    if smoothing < 1:
        loss = loss + (1 - smoothing) * (top - logit)
    if smoothing > 0:
        loss = loss - smoothing * (whole.logits / whole.widths[0])
    loss = torch.where(total == 0, math.inf, loss) * weight * of_rows.hard_scale
    loss = torch.where(call.target < V, loss, math.nan)
    return torch.where(here, loss, 0.0)


def _here(call, smooths, widths, size):
    """The call with targets among the classes of this rank; negative where they are another's."""
    V, all_classes = call.student.shape[-1], widths[0]
    target = call.target - widths[1].long()
    wrong = wrong_targets(call.target, all_classes, call.mask)
    target = torch.where((target >= 0) & (target < V), target, -1)
    target = torch.where(wrong, V, target)  # none of any rank's: NaN, as loud as a device may be
    # only labels that are smoothed need the number itself, for which the host waits
    classes = all_classes.cpu() if smooths else torch.tensor(float(V + (size > 1)), dtype=torch.float64)
    return call._replace(target=target, target_numbers=torch.cat([call.target_numbers, classes.view(1)]))


class Found(NamedTuple):
    """What a rank has found of some rows."""

    loss: torch.Tensor  # [N], or []
    is_share: bool  # whether that is this rank's part of it
    stats: torch.Tensor  # [N, 7], for the third phase
    call: RowsCall  # for the third phase
    widths: torch.Tensor | None  # [2] float64: classes of all ranks, and of those before this one, where asked for


def in_group(call: RowsCall, how: How, widths: torch.Tensor | None, size: int) -> RowsCall:
    """The call of this rank's classes, where it is known how many there are: see Found."""
    if how.hard is not None:
        call = _here(call, how.hard[2] > 0, widths, size)
    return with_mean(call, widths) if how.mean else call


def with_mean(call: RowsCall, widths: torch.Tensor) -> RowsCall:
    """A call whose divisor is multiplied by the number of all ranks' classes."""
    scale = call.scale if call.scale_tensor is None else call.scale_tensor
    return call._replace(scale=1.0, scale_tensor=scale / widths[0])


def of_rows(
    namespace: str, how: How, ranks: Any, call: RowsCall, grad: torch.Tensor | None, found: Whole | None = None
) -> Found:
    """The loss of some rows; and their gradient, where it is wanted by now. found: what has been exchanged already, of
    a call without targets."""
    per_row, mean, hard_numbers = how
    ops, entry = rows.OPS[namespace], ENTRIES[call.divergence]
    targets = hard_numbers is not None
    smooths = targets and hard_numbers[2] > 0
    first = call._replace(target_numbers=_anywhere(call)) if targets else call
    first = first._replace(target=torch.full_like(call.target, -1)) if targets else first
    found = found or whole(ops, first, ranks, targets or mean, smooths)
    stats, widths = found.stats, found.widths
    call = in_group(call, how, widths, ranks.size)
    if entry.given == "LogOdds":  # no softmax: of a row nothing else is asked for
        stats[:, 1] = stats[:, 3] = 1.0
    N, V = len(stats), call.student.shape[-1]
    known = _Rows(call, stats)
    sums = stats.new_zeros(N, 3)
    hard = _hard(call, hard_numbers, found, known) if targets else None  # before the logits are written over
    if V:
        ops.sums(*call, *RowsSums(stats, sums, grad if entry.centred else None))
    soft_weight = hard_numbers[1] if targets else 1.0
    scale = call.scale if call.scale_tensor is None else call.scale_tensor
    if entry.centred:
        if entry.teacher_entropy and ranks.rank == 0:
            sums[:, 0] += known.log_teacher
        losses = known.soft(sums[:, 0], soft_weight)
        losses = losses if hard is None else losses + hard
    else:
        mine = sums if hard is None else torch.cat([sums, hard[:, None]], 1)
        together = ranks.gathered(mine).sum(0)
        total, slope = together[:, 0], together[:, 1]
        if entry.two_sums:
            total, stats[:, 6] = _acceptance(total, together[:, 2])
            slope = torch.where(total == math.inf, math.inf, slope)
        stats[:, 4] = torch.where(known.no_teacher, 0.0, slope)
        losses = known.soft(total, soft_weight)
        losses = losses if hard is None else losses + together[:, 3]
        if grad is not None and V:
            upstream = losses.new_ones(1, dtype=compute_dtype(call.student, call.teacher))
            ops.bwd(*call, *RowsBackward(stats, upstream, grad))
    loss = losses if per_row else losses.sum() * scale
    return Found(loss, entry.centred, stats, call, widths)


def _compute(namespace, group, how, call, grad):
    """Found of all rows, with the whole loss."""
    if math.prod(call.student.shape[:-1]) == 0:  # of no rows there is nothing to exchange
        loss = call.student.new_zeros(call.student.shape[:-1] if how.per_row else (), dtype=torch.float64)
        return Found(loss, False, loss.new_zeros(0, rows.STATS_SIZE), call, None)
    ranks = Ranks(group)
    found = of_rows(namespace, how, ranks, call, grad)
    return found._replace(loss=together(ranks, found.loss)) if found.is_share else found


def loss_of_rows(
    namespace: str, how: How, ranks: Any, call: RowsCall, grad: torch.Tensor | None, found: Whole | None = None
) -> torch.Tensor:
    """The same, of all ranks."""
    own = of_rows(namespace, how, ranks, call, grad, found)
    return together(ranks, own.loss) if own.is_share else own.loss


def together(ranks: Any, share: torch.Tensor) -> torch.Tensor:
    """The sum of what each rank has, in the ranks' order: the same bits on all of them."""
    return ranks.gathered(share.reshape(-1)).sum(0).view(share.shape)


def _anywhere(call):
    """The numbers of targets none of which need be here."""
    more = call.target_numbers.new_full((1,), call.student.shape[-1] + 1)
    return torch.cat([call.target_numbers, more])


class _GroupRows(torch.autograd.Function):
    """The loss of a student whose classes want a gradient: as rows._Rows."""

    @staticmethod
    def forward(ctx, namespace, inplace, group, how, *fields):
        call, per_row = RowsCall(*fields), how.per_row
        student = call.student
        ctx.ops, ctx.inplace = rows.OPS[namespace], inplace
        ctx.recompute = per_row or student.dtype is torch.float16
        if inplace:
            overwritten(student)
            call = call._replace(student=student.detach())
        grad = None if ctx.recompute else call.student if inplace else rows.new_grad(student)
        found = _compute(namespace, group, how, call, grad)
        if ctx.recompute:
            save(ctx, found.call._replace(student=call.student), found.stats)
        else:
            ctx.save_for_backward(grad)
        return _as_loss(found.loss, call, per_row)

    @staticmethod
    def backward(ctx, upstream):
        grad = forbid_double_backward(_gradient, ctx, upstream)
        student = 4 + RowsCall._fields.index("student")
        return tuple(grad if i == student else None for i in range(len(ctx.needs_input_grad)))


def _gradient(ctx, upstream):
    if not ctx.recompute:
        return scaled(ctx.ops.scale_, *ctx.saved_tensors, upstream)
    call, stats = restored(ctx, RowsCall)
    grad = call.student if ctx.inplace else rows.new_grad(call.student)
    if call.student.shape[-1]:
        ctx.ops.bwd(*call, *RowsBackward(stats, upstream.reshape(-1).contiguous(), grad))
    if ctx.inplace:
        torch.autograd.graph.increment_version(call.student)  # another backward must not read it
    return grad


def _as_loss(loss, call, per_row):
    shape = call.student.shape[:-1] if per_row else ()
    return loss.to(compute_dtype(call.student, call.teacher)).reshape(shape)


def logits_loss(
    namespace: str, divergence: str, student: torch.Tensor, teacher: torch.Tensor, options: LogitsOptions
) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`, of what each rank has; the arguments have been checked there."""
    mean = options.reduction == "mean" and options.normalizer is None
    if mean:  # over the classes of all ranks, which are counted with the first exchange
        options = options._replace(reduction="batchmean")
    call = rows.call_of(namespace, divergence, student.detach(), teacher.detach(), options)
    how = how_of(options, mean)
    if student.requires_grad and torch.is_grad_enabled():
        return _GroupRows.apply(namespace, options.inplace, options.group, how, *call._replace(student=student))
    with torch.no_grad():
        return _as_loss(_compute(namespace, options.group, how, call, None).loss, call, how.per_row)


def how_of(options: LogitsOptions, mean: bool) -> How:
    hard = None
    if options.target is not None and options.target_loss is None:
        hard = options.hard_weight, options.soft_weight, options.label_smoothing
    return How(options.reduction == "none", mean, hard)
