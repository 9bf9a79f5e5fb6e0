"""The DIST loss of what stands in place of logits: hidden states with a head, or a teacher's probabilities.

A column's correlation follows from all rows, so that no gradient is known before the last one has been read: each slab
of logits is made twice. Forward sums up what rows and columns come to, by plain PyTorch (ops/_correlations.py);
backward makes the slabs again, and the dist schedule writes the gradient over them.

Of classes that are split over ranks, of whichever form, forward exchanges what slabs of rows come to: four numbers a
row, the maxima and sums of both sides, and nine, the sums of products. Columns are a rank's own, and the sum of their
losses is exchanged once. A row's gradient has a sum over its classes, one number a row that backward exchanges; so
plain PyTorch computes it.
"""

import collections
import functools
import math
from typing import Any

import torch

from .. import _library, reference
from .._calls import DistBackward, DistCall, FormDist, FormDistBackward, FormDistForward, Standardize
from .._check import DistOptions
from .._dtypes import compute_dtype, without_autocast
from .._inplace import overwritten
from .._split_classes import Ranks, group_named, name_of
from ..forms import LinearLogits, Probabilities, logits_of
from . import dist, numbers, rows, standardize
from ._correlations import compared, compared_again, correlations, moments, of_all_ranks
from ._head_products import Gradients, Side, rows_of_slab
from .forms import Learns, checked, new_grads, of_first_classes, parts_of, rounded
from .gradient import forbid_double_backward
from .group_forms import rows_of_slab as rows_of_ranks
from .group_standardize import standardized
from .saved import restored, save
from .slabs import evenly, slabs

_Call = collections.namedtuple("_Call", (*DistCall._fields, *FormDist._fields))


class _Runs:
    """The slabs of a call, forward or backward."""

    def __init__(self, namespace, group, call, form):
        self.namespace, self.call, self.form = namespace, call, form
        self.ranks = None if group is None else Ranks(group)
        given = checked(form.form_numbers.tolist())
        leading, self.own = call.student.shape[:-1], given[2]
        N = math.prod(leading)
        most = max(1, evenly(N, form.slab_rows))
        self.student = Side(call.student, form.student_head, form.student_bias, *given[:2], most)
        self.teacher = Side(call.teacher, form.teacher_head, form.teacher_bias, *given[2:4], most)
        self.inter, self.intra, self.T, self.eps = dist.read_numbers(call.numbers)
        self.standardizes = namespace.startswith(rows.standardized(""))
        self.slabs = list(slabs(leading, most))

    def sides(self, slab):
        """Both sides' logits, and which rows count."""
        mask = slab.of_rows(self.call.mask)
        s, t = self.student.logits(slab, mask), self.teacher.logits(slab, mask)
        if self.form.probabilities:
            t = reference.forms.logits(t.to(compute_dtype(s, t)), self.own, False)
        return s, t, mask

    def compared(self, s, t, mask, dtype):
        """Both sides as they are compared, [n, V]; and what brings a gradient back to the student's logits of several
        ranks, or None."""
        back = None
        if self.standardizes and self.ranks is None:
            s, t = (_standardized(self.namespace, x, mask, dtype) for x in (s, t))
        elif self.standardizes:
            back, teacher = standardized(self.call._replace(student=s, teacher=t, mask=mask), self.ranks, dtype)
            s, t = back.values(), teacher.values()
        s, t = (x.to(dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (s, t))
        if mask is not None:
            s, t = (torch.where(mask[:, None], x, 0.0) for x in (s, t))
        return s, t, back


def _standardized(namespace, x, mask, dtype):
    out = torch.empty_like(x, dtype=dtype)
    plain = namespace.removeprefix(rows.standardized(""))
    standardize.OPS[plain].fwd(*Standardize(x, mask, out, None))
    return out


@torch.no_grad()
def _form_dist_fwd(namespace, group, *arguments):
    ends = len(DistCall._fields), len(DistCall._fields) + len(FormDist._fields)
    call, form = DistCall(*arguments[: ends[0]]), FormDist(*arguments[ends[0] : ends[1]])
    out = FormDistForward(*arguments[ends[1] :])
    with without_autocast(call.student.device):
        runs = _Runs(namespace, group, call, form)
        dtype, scale = out.loss.dtype, call.scale if call.scale_tensor is None else call.scale_tensor
        columns, losses = None, call.student.new_zeros((), dtype=torch.float64)
        classes = call.student.new_ones((), dtype=torch.float64)
        of_rows = out.of_rows.view(-1, dist.STATS_SIZE)
        for slab in runs.slabs:
            s, t, mask = runs.sides(slab)
            as_given = form.probabilities and not runs.standardizes and runs.own == runs.T
            s, t, _ = runs.compared(s, t, mask, dtype)
            found = compared(s, t, runs.T, as_given, runs.ranks)
            of_each = moments(*found[:3], -1)
            of_each = of_each if runs.ranks is None else of_all_ranks(of_each, runs.ranks)
            classes = of_each.n.max()
            loss, slope, own = correlations(of_each, runs.eps, dtype)
            possible = ~((found.stats[1] == 0) | (found.stats[3] == 0)).squeeze(-1)
            loss = torch.where(possible, loss, 1.0)
            losses += (loss if mask is None else torch.where(mask, loss, 0.0)).sum()
            by = runs.inter * runs.T**2 * scale
            slopes = [torch.where(possible, x, 0.0)[:, None] * by for x in (slope, own)]
            of_rows[slab.first : slab.last] = torch.cat([*found.stats, *slopes], -1)
            of_slab = moments(*found[:3], 0, None if mask is None else mask[:, None])
            columns = of_slab if columns is None else columns.merged(of_slab)
        _finish(runs, columns, classes, losses * scale, scale, out)


def _finish(runs, columns, classes, inter, scale, out):
    """The loss, and the slopes of the columns. classes: how many there are."""
    out.columns.zero_()
    out.loss.zero_()
    if columns is None:
        return
    loss, slope, own = correlations(columns, runs.eps, out.loss.dtype)
    constant = -(slope * torch.where(slope < 0, columns.q, columns.D) + own * columns.p)
    by = runs.intra * runs.T**2 / classes
    out.columns[:, : len(slope)] = torch.stack([slope, own, constant]) * by
    intra = loss.sum().view(1)
    intra = (intra if runs.ranks is None else runs.ranks.gathered(intra).sum(0)).squeeze(0)
    found = runs.T**2 * (runs.inter * inter + runs.intra * intra / classes)
    out.loss.copy_(torch.where(torch.as_tensor(scale != 0, device=found.device) & (columns.n > 0), found, 0.0))


@torch.no_grad()
def _form_dist_bwd(namespace, group, *arguments):
    ends = len(DistCall._fields), len(DistCall._fields) + len(FormDist._fields)
    call, form = DistCall(*arguments[: ends[0]]), FormDist(*arguments[ends[0] : ends[1]])
    rest = FormDistBackward(*arguments[ends[1] :])
    with without_autocast(call.student.device):
        runs = _Runs(namespace, group, call, form)
        back = None if runs.student.head is None else Gradients(runs.student, rest)
        for slab in runs.slabs:
            s, t, mask = runs.sides(slab)
            grad = back.of(s) if back else rest.grad[slab.index]
            part = call._replace(student=s, teacher=t, mask=mask)
            of_slab = rest.of_rows[slab.index]
            of_slab = DistBackward(of_slab, rest.columns, rest.upstream, grad)
            if runs.ranks is None:
                dist.OPS[namespace].bwd(*part, *of_slab)
            else:
                _gradient_of_ranks(runs, part, of_slab)
            if back:
                back.add(slab, grad)
        if back:
            back.finish()
            if runs.ranks is not None and rest.grad is not None:
                runs.ranks.sum_(rest.grad)


def _gradient_of_ranks(runs, part, rest):
    """Fills rest.grad, of a slab."""
    V, dtype = part.student.shape[-1], compute_dtype(part.student, part.teacher)
    s, t, back = runs.compared(part.student, part.teacher, part.mask, dtype)
    *stats, slope, own = rest.rows.reshape(len(s), dist.STATS_SIZE).unsqueeze(-1).unbind(1)
    p, D, q, _ = compared_again(s, t, runs.T, stats)
    of_class, own_of_class, constant = rest.columns[:, :V]
    G = slope.to(dtype) * torch.where(slope < 0, q, D) + own.to(dtype) * p
    G = p * (G + of_class * torch.where(of_class < 0, q, D) + own_of_class * p + constant)
    total = runs.ranks.gathered(G.sum(-1, keepdim=True).double()).sum(0).to(dtype)
    grad = (G - p * total) * (rest.upstream.to(dtype) / runs.T)
    if part.mask is not None:
        grad = torch.where(part.mask[:, None], grad, 0.0)
    grad = grad.view(part.student.shape)
    rest.grad.copy_(grad if back is None else back.gradient(grad, runs.ranks))


def _op(name, namespace, group, *arguments):
    """Calls the op; of ranks outside of graphs its implementation, which takes a group that has no name."""
    if group is None:
        getattr(torch.ops.fastkd, f"form_dist_{name}")(namespace, *arguments)
    elif torch.compiler.is_compiling():
        getattr(torch.ops.fastkd, f"form_group_dist_{name}")(namespace, name_of(group), *arguments)
    else:
        _IMPLEMENTATIONS[name](namespace, group, *arguments)


def _of_one(implementation, namespace, *arguments):
    implementation(namespace, None, *arguments)


def _of_named(implementation, namespace, name, *arguments):
    implementation(namespace, group_named(name), *arguments)


_IMPLEMENTATIONS = {"fwd": _form_dist_fwd, "bwd": _form_dist_bwd}
for _kind, _called in (("form_dist", _of_one), ("form_group_dist", _of_named)):
    for _name, _implementation in _IMPLEMENTATIONS.items():
        _called_so = functools.partial(_called, _implementation)
        _library.fastkd.impl(f"{_kind}_{_name}", _called_so, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastkd::{_kind}_{_name}", lambda *_: None)


class _DistForms(torch.autograd.Function):
    """The loss of a student that wants a gradient. Backward makes the slabs once more."""

    @staticmethod
    def forward(ctx, namespace, inplace, group, num_classes, learns, *fields):
        call = _Call(*fields)
        if inplace:
            overwritten(call.student)
            call = call._replace(student=call.student.detach())
        ctx.namespace, ctx.inplace, ctx.num_classes, ctx.learns = namespace, inplace, num_classes, learns
        ctx.group = group
        out = _forward(namespace, group, call, num_classes)
        save(ctx, call, out.of_rows, out.columns)
        return out.loss

    @staticmethod
    def backward(ctx, upstream):
        grads = forbid_double_backward(_gradients, ctx, upstream)
        found = dict(zip(("student", "student_head", "student_bias"), grads, strict=True))
        return *(None for _ in range(5)), *(found.get(name) for name in _Call._fields)


def _forward(namespace, group, call, num_classes):
    call, _ = of_first_classes(call, num_classes, (None, None, None))
    like = DistCall(*call[: len(DistCall._fields)])._replace(student=_like(call), teacher=_like(call))
    loss, of_rows, columns = dist.new_outputs(like)
    dtype = compute_dtype(call.student, call.teacher)
    out = FormDistForward(loss.to(dtype), of_rows, columns.to(dtype))
    _op("fwd", namespace, group, *call, *out)
    return out


def _like(call):
    """A tensor that is like the student's logits, and holds no memory of its own."""
    if call.student_head is None:
        return call.student
    dtype = compute_dtype(call.student, call.teacher)
    return call.student.new_empty((), dtype=dtype).expand(*call.student.shape[:-1], len(call.student_head))


def _gradients(ctx, upstream):
    call, of_rows, columns = restored(ctx, _Call)
    grads = new_grads(call, ctx.learns, ctx.inplace, ctx.group is not None)
    counted, of_counted = of_first_classes(call, ctx.num_classes, grads)
    told = FormDistBackward(of_rows, columns, upstream.contiguous(), *of_counted)
    _op("bwd", ctx.namespace, ctx.group, *counted, *told)
    if ctx.inplace:
        torch.autograd.graph.increment_version(call.student)  # another backward must not read it
    return rounded(grads, call.student.dtype)


def dist_loss(namespace: str, student: Any, teacher: Any, options: DistOptions) -> torch.Tensor:
    """As that of the dist schedule; student or teacher, or both, are no logits, or a rank has some of the classes."""
    if options.standardize:
        namespace = rows.standardized(namespace)
    count = options.num_classes
    of_teacher = parts_of(teacher, count)
    # detached also because torch.compile gives an autograd.Function no tensor twice, and both may have one head
    constants = [x if x is None else x.detach() for x in of_teacher[:3]]
    of_student = parts_of(student, None)
    like = logits_of(student, count)
    mask = None if options.mask is None else options.mask.reshape(-1).contiguous()
    dtype = compute_dtype(of_student.x, constants[0])
    scale, scale_tensor = rows.inverse_divisor(rows.OPS[namespace], like, "batchmean", mask, None, dtype)
    heads = [x for x in (student, teacher) if isinstance(x, LinearLogits)]
    if options.group is not None:  # of as many rows on all ranks
        ranks = Ranks(options.group).size
        each = [rows_of_ranks(x.weight, x.slab_bytes, ranks) for x in heads] or [rows_of_ranks(like, None, ranks)]
    else:
        each = [rows_of_slab(x) for x in heads] or [standardize.rows_of_slab(like)]
    call = _Call(
        of_student.x, constants[0], mask, scale, scale_tensor,
        numbers.as_tensor(options.inter_weight, options.intra_weight, options.temperature, options.eps),
        of_student.head, of_student.bias, *constants[1:], isinstance(teacher, Probabilities),
        numbers.as_tensor(*of_student.numbers, *of_teacher.numbers, -math.inf),
        min(each),
    )  # fmt: skip
    learns = Learns(*(x is not None and x.requires_grad for x in of_student[:3]))
    if any(learns) and torch.is_grad_enabled():
        return _DistForms.apply(namespace, options.inplace, options.group, count, learns, *call)
    return _forward(namespace, options.group, call, count).loss
