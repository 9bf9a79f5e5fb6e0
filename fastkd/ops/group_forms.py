"""Losses of classes that are split over the ranks of a process group, where student or teacher are no logits: hidden
states of all rows with a rank's classes of the head; a teacher's best classes, or its probabilities. And of logits,
where more is asked for than ops/group.py exchanges: ops/group_logits.py.

A slab of rows at a time, as in ops/forms.py: each rank makes its logits of these rows, and ops/group.py compares them.
A slab has the same rows on all ranks, however many classes they have. Its statistics are exchanged, and where the
slopes of a row do not add up to 0 its sums; the loss, which is a sum over slabs, once at the end. What is exchanged
beside best classes and probabilities, slab by slab, stands in ops/group_top_k.py and ops/group_probabilities.py.

The gradient of hidden states is a sum over classes, and so one over ranks. It is exchanged once, in float32 at least,
and rounded once; where forward makes it, forward exchanges it. Where backward makes the slabs once more, of a teacher
of logits, it has the statistics of forward, and exchanges nothing else; of others it exchanges all once more.
"""

import math
from typing import Any

import torch

from .. import _check, _library
from .._calls import FormGroup, FormOutputs, FormRows, RowsBackward, RowsCall, RowsForward
from .._check import LogitsOptions
from .._check.arguments import values_known
from .._divergences import DERIVED, ENTRIES
from .._dtypes import compute_dtype, without_autocast
from .._inplace import overwritten
from .._split_classes import Ranks, group_named, name_of
from ..forms import LinearLogits, TopKLogProbs, logits_of
from . import rows
from ._head_products import ROWS, SLAB_BYTES
from .forms import Call, Learns, call_of, gradients, new_grads, parts_of, rounded, run
from .group import How, how_of, in_group, of_rows, together
from .group_logits import LogitsOfRanks
from .group_probabilities import ProbabilitiesOfRanks
from .group_top_k import FewOfRanks
from .saved import restored, save
from .slabs import Gathered
from .teachers import Teacher
from .top_k import rows_of_slab as rows_of_few

# Slabs are of as many rows as if so many classes were split evenly: how many another rank has nobody knows, and to ask
# would make the host wait. With fewer classes they take less memory.
CLASSES = 2**18


def rows_of_slab(x: torch.Tensor, slab_bytes: int | None, ranks: int) -> int:
    """At most, of what is computed in the dtype of x; the same on every rank."""
    row = math.ceil(CLASSES / ranks) * compute_dtype(x).itemsize
    if slab_bytes is not None:
        return max(slab_bytes // row, 1)
    return max(SLAB_BYTES.get(x.device.type, SLAB_BYTES["cpu"]) // row, ROWS)


def _slab_rows(student, teacher, options):
    ranks = Ranks(options.group).size
    heads = [x for x in (student, teacher) if isinstance(x, LinearLogits)]
    if heads:
        return min(rows_of_slab(x.weight, x.slab_bytes, ranks) for x in heads)
    # of whole logits, beside a teacher's best classes, nothing is held
    if isinstance(teacher, TopKLogProbs) and options.target is None:
        return rows_of_few(teacher.indices.shape[-1])
    return rows_of_slab(student, None, ranks)


class _OfRanks(Teacher):
    """Of a slab what ops/group.py makes of its logits."""

    def __init__(self, namespace: str, ranks: Any, how: How, group: FormGroup) -> None:
        super().__init__(namespace, False)
        self.ranks: Any = ranks
        self.how: How = how
        self.group: FormGroup = group

    def loss(self, part: RowsCall, slab: Any, out: RowsForward) -> None:
        at = slab.rows if isinstance(slab, Gathered) else slice(slab.first, slab.last)
        stats, widths, upstream = self.group.stats, self.group.widths, self.group.upstream
        if upstream is None:
            found = of_rows(self.namespace, self.how, self.ranks, part, out.grad)
            out.loss.copy_(found.loss.view(out.loss.shape))
            if stats is not None:
                stats[at] = found.stats
            if widths is not None:
                widths.copy_(found.widths)
            return
        part = in_group(part, self.how, widths, self.ranks.size)
        if part.student.shape[-1]:
            upstream = upstream if upstream.numel() == 1 else upstream[at].contiguous()
            rows.OPS[self.namespace].bwd(*part, *RowsBackward(stats[at].contiguous(), upstream, out.grad))


def _keeps_statistics(namespace, call):
    """Whether backward knows from forward what has been exchanged: of rows of logits as they are."""
    more = call.adaptive or call.target_loss or namespace.startswith(rows.standardized(""))
    return call.indices is None and not call.probabilities and not more


@torch.no_grad()
def _form_group_rows(namespace, group, *arguments):
    """The implementation of the op; group: its name, or itself."""
    of, at = [], 0
    for kind in (RowsCall, FormRows, FormGroup, FormOutputs):
        of.append(kind(*arguments[at : at + len(kind._fields)]))
        at += len(kind._fields)
    call, linear, told, out = of
    form = Call(*call, *linear)
    ranks = Ranks(group_named(group) if isinstance(group, str) else group)
    hard = None if call.target is None or call.target_loss else tuple(call.target_numbers.tolist())
    how = How(out.loss.dim() > 0, told.mean, hard)
    with without_autocast(call.student.device):
        _, _, temperature, _, least = linear.numbers.tolist()
        dtype, beside = compute_dtype(call.student, call.teacher), (ranks, told.mean, told.widths)
        if linear.indices is not None:
            of_teacher = FewOfRanks(namespace, linear, temperature, least, dtype, *beside)
        elif linear.probabilities:
            of_teacher = ProbabilitiesOfRanks(namespace, linear.as_given, temperature, dtype, *beside)
        elif not _keeps_statistics(namespace, form):
            of_teacher = LogitsOfRanks(namespace, linear.adaptive, dtype, *beside)
        else:
            of_teacher = _OfRanks(namespace, ranks, how, told)
        run(namespace, call, linear, out, of_teacher)
        if _keeps_statistics(namespace, form) and told.upstream is None and ENTRIES[call.divergence].centred:
            out.loss.copy_(together(ranks, out.loss))
        if linear.student_head is not None and out.grad is not None:
            ranks.sum_(out.grad)


_library.fastkd.impl("form_group_rows", _form_group_rows, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::form_group_rows", lambda *_: None)


def _op(namespace, group, call, told, loss, grads):
    arguments = *call, *told, *FormOutputs(loss, *grads, None)
    if torch.compiler.is_compiling():
        torch.ops.fastkd.form_group_rows(namespace, name_of(group), *arguments)
    else:
        _form_group_rows(namespace, group, *arguments)


def _known(call, mean):
    """Room for what forward finds, and backward reads: see FormGroup."""
    N = math.prod(call.student.shape[:-1])
    stats = call.student.new_empty((N, rows.STATS_SIZE), dtype=torch.float64)
    return stats, stats.new_empty(2) if mean or call.target is not None else None


class _GroupForms(torch.autograd.Function):
    """As forms._Forms."""

    @staticmethod
    def forward(ctx, namespace, inplace, group, how, learns, widths, *fields):
        """widths: of all ranks, and of those before this one, where it is known already."""
        call = Call(*fields)
        ctx.namespace, ctx.inplace, ctx.group, ctx.mean, ctx.learns = namespace, inplace, group, how.mean, learns
        ctx.recompute = how.per_row or call.student.dtype is torch.float16
        if inplace:
            overwritten(call.student)
            call = call._replace(student=call.student.detach())
        loss = _new_loss(call, how.per_row)
        if ctx.recompute:
            stats, widths = _known(call, how.mean) if widths is None else (call.student.new_empty(0), widths)
            of_all = stats if _keeps_statistics(namespace, call) else None
            _op(namespace, group, call, FormGroup(how.mean, of_all, widths, None), loss, (None, None, None))
            ctx.counts = widths is not None
            save(ctx, call, stats, *([widths] if ctx.counts else []))
        else:
            grads = new_grads(call, learns, inplace, True)
            _op(namespace, group, call, FormGroup(how.mean, None, widths, None), loss, grads)
            ctx.save_for_backward(*(x for x in rounded(grads, call.student.dtype) if x is not None))
        return _as_loss(call, loss)

    @staticmethod
    def backward(ctx, upstream):
        return *(None for _ in range(6)), *gradients(ctx, upstream, _recomputed)


def _recomputed(ctx, upstream):
    call, stats, *widths = restored(ctx, Call)
    grads = new_grads(call, ctx.learns, ctx.inplace, True)
    widths = widths[0] if ctx.counts else None
    if _keeps_statistics(ctx.namespace, call):
        told = FormGroup(ctx.mean, stats, widths, upstream.reshape(-1).contiguous())
    else:  # all over again, with the upstream gradient for a weight
        upstream = upstream.expand(call.student.shape[:-1]).reshape(-1)
        weight = upstream.contiguous() if call.weight is None else call.weight * upstream
        call, told = call._replace(weight=weight), FormGroup(ctx.mean, None, widths, None)
    _op(ctx.namespace, ctx.group, call, told, _new_loss(call, False), grads)
    if ctx.inplace:
        torch.autograd.graph.increment_version(call.student)  # another backward must not read it
    return rounded(grads, call.student.dtype)


def _new_loss(call, per_row):
    return call.student.new_zeros(call.student.shape[:-1] if per_row else (), dtype=torch.float64)


def _as_loss(call, loss):
    return loss.to(compute_dtype(call.student, call.teacher))


def _widths(teacher, student, options):
    """How many classes all ranks have, and how many there are before this rank's. A teacher's classes are checked
    against the former where that waits for nothing."""
    ranks = Ranks(options.group)
    each = ranks.gathered(torch.tensor([student.shape[-1]], dtype=torch.float64, device=student.device)).squeeze(1)
    if isinstance(teacher, TopKLogProbs) and values_known(teacher.indices):
        _check.top_k_values(teacher, int(each.sum()), options.mask)
    return torch.stack([each.sum(), each[: ranks.rank].sum()])


def logits_loss(namespace: str, divergence: str, student: Any, teacher: Any, options: LogitsOptions) -> torch.Tensor:
    """As that of ops/group.py; student or teacher, or both, are no logits, or more is asked for than it exchanges."""
    if options.standardize:
        namespace = rows.standardized(namespace)
    adaptive = divergence in DERIVED
    divergence = DERIVED[divergence].divergence if adaptive else divergence
    mean = options.reduction == "mean" and options.normalizer is None
    if mean:
        options = options._replace(reduction="batchmean")
    sides, like = [parts_of(student, None), parts_of(teacher, None)], logits_of(student)
    rows_call = rows.call_of(namespace, divergence, like, logits_of(teacher, None, like), options)
    slab_rows = _slab_rows(student, teacher, options)
    call = call_of(rows_call, sides, teacher, options.teacher_temperature, slab_rows, adaptive)
    learns = Learns(*(x is not None and x.requires_grad for x in sides[0][:3]))
    how = how_of(options, mean)
    widths = None if _keeps_statistics(namespace, call) else _widths(teacher, like, options)
    if any(learns) and torch.is_grad_enabled():
        return _GroupForms.apply(namespace, options.inplace, options.group, how, learns, widths, *call)
    loss = _new_loss(call, how.per_row)
    _op(namespace, options.group, call, FormGroup(mean, None, widths, None), loss, (None, None, None))
    return _as_loss(call, loss)
