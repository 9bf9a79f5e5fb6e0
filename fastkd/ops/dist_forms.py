"""The DIST loss of what stands in place of logits: hidden states with a head, or a teacher's probabilities.

A column's correlation follows from all rows, so that no gradient is known before the last one has been read: each slab
of logits is made twice. Forward sums up what rows and columns come to, by plain PyTorch, as the correlations of
csrc/math/correlation.h have it; backward makes the slabs again, and the dist schedule writes the gradient over them.
"""

import collections
import math
from typing import Any, NamedTuple

import torch

from .. import _library, reference
from .._calls import DistBackward, DistCall, FormDist, FormDistBackward, FormDistForward, Standardize
from .._check import DistOptions
from .._dtypes import compute_dtype, without_autocast
from .._inplace import overwritten
from ..forms import LinearLogits, Probabilities, logits_of
from . import dist, numbers, rows, standardize
from ._head_products import Gradients, Side, rows_of_slab
from .forms import Learns, checked, new_grads, of_first_classes, parts_of
from .gradient import forbid_double_backward
from .saved import restored, save
from .slabs import evenly, slabs

_Call = collections.namedtuple("_Call", (*DistCall._fields, *FormDist._fields))


class _Moments(NamedTuple):
    """Of n values of p, of D = p - q and of q: their means, and sums of products of what they are beyond these."""

    n: Any
    p: Any
    D: Any
    q: Any
    sums: Any  # [5, *]: of a a, b b, a b, a D and D D, where a is of p and b of q

    def merged(self, x):
        """With those of other values."""
        total = self.n + x.n
        share = x.n / torch.clamp(total, min=1)
        p, D, q = (y - z for y, z in zip(x[1:4], self[1:4], strict=True))
        beyond = torch.stack([p * p, q * q, p * q, p * D, D * D]) * (self.n * share)
        means = (z + y * share for y, z in zip((p, D, q), self[1:4], strict=True))
        return _Moments(total, *means, self.sums + x.sums + beyond)


def _moments(p, D, q, dim, counts=None):
    """Along a dimension; counts: which of the values do. In float64, from sums of what is computed in."""
    given = [x if counts is None else torch.where(counts, x, 0.0) for x in (p, D, q)]
    n = p.shape[dim] if counts is None else counts.sum()
    n = torch.as_tensor(n, dtype=torch.float64, device=p.device)
    at_least_one = n.clamp(min=1)
    means = [(x.sum(dim, keepdim=True).double() / at_least_one).to(x.dtype) for x in given]
    a, D_, b = (x - mean for x, mean in zip(given, means, strict=True))
    if counts is not None:
        a, D_, b = (torch.where(counts, x, 0.0) for x in (a, D_, b))
    # the mean was rounded: what is left of it is taken away from the sums of products
    left = [x.sum(dim).double() / at_least_one for x in (a, D_, b)]
    pairs = (a, a, 0, 0), (b, b, 2, 2), (a, b, 0, 2), (a, D_, 0, 1), (D_, D_, 1, 1)
    sums = torch.stack([(x * y).sum(dim).double() - left[i] * left[j] * n for x, y, i, j in pairs])
    sums[[0, 1, 4]] = torch.where(sums[[0, 1, 4]] < 0, 0.0, sums[[0, 1, 4]])  # rounding may leave less; NaN stays
    means = (mean.squeeze(dim).double() + rest for mean, rest in zip(means, left, strict=True))
    return _Moments(n, *means, sums)


def _correlations(m, eps, dtype):
    """See csrc/math/correlation.h: of each row or column its loss, its slope and its own."""
    aa, bb, ab, aD, DD = m.sums.unbind(0)
    finfo = torch.finfo(dtype)
    constant = torch.zeros_like(aa, dtype=torch.bool)
    for squares, mean in ((aa, m.p), (bb, m.q)):
        rounding = (4 * finfo.eps) ** 2 * (squares + m.n * mean * mean)
        constant = constant | (squares <= finfo.tiny) | (squares <= rounding)
    a, b = (torch.where(constant, 1.0, x).sqrt() for x in (aa, bb))
    inverse = 1 / (a * b + eps)
    far = ~(a * b / 2 > DD)
    apart = (2 * aD - DD) / (a + b)
    rest = DD - apart * apart
    rest = torch.where(rest < 0, 0.0, rest) / 2
    loss = (torch.where(far, a * b - ab, rest) + eps) * inverse
    slope = torch.where(far, -inverse, inverse)
    own = torch.where(far, ab * b / a, -(b / a * aD + eps)) * inverse * inverse
    return torch.where(constant, 1.0, loss), *(torch.where(constant, 0.0, x) for x in (slope, own))


class _Slab(NamedTuple):
    """What forward finds of a slab."""

    p: torch.Tensor
    D: torch.Tensor
    q: torch.Tensor
    stats: list[torch.Tensor]  # [*, 1] in float64: maximum and sum of the student, those of the teacher


def _softmax(z, T):
    """Probabilities, and the maximum and the sum in float64."""
    top = z.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    e = ((z - top) / T).exp()
    return e, top.double(), e.sum(-1, keepdim=True).double()


def _sides(s, t, T, as_given):
    """as_given: whether t / T are logarithms of probabilities that are not to be normalized."""
    p, top, total = _softmax(s, T)
    q, teacher_top, teacher_total = _softmax(t, T)
    if as_given:
        teacher_total = torch.where(teacher_total == 0, 0.0, torch.exp(-teacher_top / T))
    p, q = (x * torch.where(y == 0, 0.0, 1 / y).to(x.dtype) for x, y in ((p, total), (q, teacher_total)))
    offset = (top - teacher_top) / T + torch.log(total / teacher_total)
    w = (s - t) / T - offset.to(s.dtype)
    w = torch.where((p == 0) | (q == 0), torch.inf, w)
    D = torch.where(w.abs() < 1, q * torch.expm1(w.clamp(-1, 1)), p - q)
    return _Slab(p, D, q, [top, total, teacher_top, teacher_total])


class _Runs:
    """The slabs of a call, forward or backward."""

    def __init__(self, namespace, call, form):
        self.namespace, self.call, self.form = namespace, call, form
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


def _standardized(namespace, x, mask, dtype):
    out = torch.empty_like(x, dtype=dtype)
    plain = namespace.removeprefix(rows.standardized(""))
    standardize.OPS[plain].fwd(*Standardize(x, mask, out, None))
    return out


@torch.no_grad()
def _form_dist_fwd(namespace, *arguments):
    ends = len(DistCall._fields), len(DistCall._fields) + len(FormDist._fields)
    call, form = DistCall(*arguments[: ends[0]]), FormDist(*arguments[ends[0] : ends[1]])
    out = FormDistForward(*arguments[ends[1] :])
    with without_autocast(call.student.device):
        runs = _Runs(namespace, call, form)
        dtype, scale = out.loss.dtype, call.scale if call.scale_tensor is None else call.scale_tensor
        columns, losses = None, call.student.new_zeros((), dtype=torch.float64)
        of_rows = out.of_rows.view(-1, dist.STATS_SIZE)
        for slab in runs.slabs:
            s, t, mask = runs.sides(slab)
            if runs.standardizes:
                s, t = (_standardized(namespace, x, mask, dtype) for x in (s, t))
            as_given = form.probabilities and not runs.standardizes and runs.own == runs.T
            s, t = (x.to(dtype).reshape(-1, x.shape[-1]) for x in (s, t))
            if mask is not None:
                s, t = (torch.where(mask[:, None], x, 0.0) for x in (s, t))
            found = _sides(s, t, runs.T, as_given)
            loss, slope, own = _correlations(_moments(*found[:3], -1), runs.eps, dtype)
            possible = ~((found.stats[1] == 0) | (found.stats[3] == 0)).squeeze(-1)
            loss = torch.where(possible, loss, 1.0)
            losses += (loss if mask is None else torch.where(mask, loss, 0.0)).sum()
            by = runs.inter * runs.T**2 * scale
            slopes = [torch.where(possible, x, 0.0)[:, None] * by for x in (slope, own)]
            of_rows[slab.first : slab.last] = torch.cat([*found.stats, *slopes], -1)
            of_slab = _moments(*found[:3], 0, None if mask is None else mask[:, None])
            columns = of_slab if columns is None else columns.merged(of_slab)
        _finish(runs, columns, losses * scale, scale, out)


def _finish(runs, columns, inter, scale, out):
    """The loss, and the slopes of the columns."""
    V = out.columns.shape[1] if columns is None else columns.p.shape[0]
    out.columns.zero_()
    out.loss.zero_()
    if columns is None:
        return
    loss, slope, own = _correlations(columns, runs.eps, out.loss.dtype)
    constant = -(slope * torch.where(slope < 0, columns.q, columns.D) + own * columns.p)
    by = runs.intra * runs.T**2 / V
    out.columns[:, :V] = torch.stack([slope, own, constant]) * by
    found = runs.T**2 * (runs.inter * inter + runs.intra * loss.sum() / V)
    out.loss.copy_(torch.where(torch.as_tensor(scale != 0, device=found.device) & (columns.n > 0), found, 0.0))


@torch.no_grad()
def _form_dist_bwd(namespace, *arguments):
    ends = len(DistCall._fields), len(DistCall._fields) + len(FormDist._fields)
    call, form = DistCall(*arguments[: ends[0]]), FormDist(*arguments[ends[0] : ends[1]])
    rest = FormDistBackward(*arguments[ends[1] :])
    with without_autocast(call.student.device):
        runs = _Runs(namespace, call, form)
        back = None if runs.student.head is None else Gradients(runs.student, rest)
        for slab in runs.slabs:
            s, t, mask = runs.sides(slab)
            grad = back.of(s) if back else rest.grad[slab.index]
            part = call._replace(student=s, teacher=t, mask=mask)
            of_slab = rest.of_rows[slab.index]
            dist.OPS[namespace].bwd(*part, *DistBackward(of_slab, rest.columns, rest.upstream, grad))
            if back:
                back.add(slab, s, grad)
        if back:
            back.finish()


for _name, _implementation in (("form_dist_fwd", _form_dist_fwd), ("form_dist_bwd", _form_dist_bwd)):
    _library.fastkd.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastkd::{_name}", lambda *_: None)


class _DistForms(torch.autograd.Function):
    """The loss of a student that wants a gradient. Backward makes the slabs once more."""

    @staticmethod
    def forward(ctx, namespace, inplace, num_classes, learns, *fields):
        call = _Call(*fields)
        if inplace:
            overwritten(call.student)
            call = call._replace(student=call.student.detach())
        ctx.namespace, ctx.inplace, ctx.num_classes, ctx.learns = namespace, inplace, num_classes, learns
        out = _forward(namespace, call, num_classes)
        save(ctx, call, out.of_rows, out.columns)
        return out.loss

    @staticmethod
    def backward(ctx, upstream):
        grads = forbid_double_backward(_gradients, ctx, upstream)
        found = dict(zip(("student", "student_head", "student_bias"), grads, strict=True))
        return *(None for _ in range(4)), *(found.get(name) for name in _Call._fields)


def _forward(namespace, call, num_classes):
    call, _ = of_first_classes(call, num_classes, (None, None, None))
    like = DistCall(*call[: len(DistCall._fields)])._replace(student=_like(call), teacher=_like(call))
    loss, of_rows, columns = dist.new_outputs(like)
    out = FormDistForward(loss.to(compute_dtype(call.student, call.teacher)), of_rows, columns.to(loss.dtype))
    torch.ops.fastkd.form_dist_fwd(namespace, *call, *out)
    return out


def _like(call):
    """A tensor that is like the student's logits, and holds no memory of its own."""
    if call.student_head is None:
        return call.student
    dtype = compute_dtype(call.student, call.teacher)
    return call.student.new_empty((), dtype=dtype).expand(*call.student.shape[:-1], len(call.student_head))


def _gradients(ctx, upstream):
    call, of_rows, columns = restored(ctx, _Call)
    grads = new_grads(call, ctx.learns, ctx.inplace)
    counted, of_counted = of_first_classes(call, ctx.num_classes, grads)
    torch.ops.fastkd.form_dist_bwd(
        ctx.namespace, *counted, *FormDistBackward(of_rows, columns, upstream.contiguous(), *of_counted)
    )
    if ctx.inplace:
        torch.autograd.graph.increment_version(call.student)  # another backward must not read it
    return grads


def dist_loss(namespace: str, student: Any, teacher: Any, options: DistOptions) -> torch.Tensor:
    """As that of the dist schedule; student or teacher, or both, are no logits."""
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
    heads = [rows_of_slab(x) for x in (student, teacher) if isinstance(x, LinearLogits)]
    call = _Call(
        of_student.x, constants[0], mask, scale, scale_tensor,
        numbers.as_tensor(options.inter_weight, options.intra_weight, options.temperature, options.eps),
        of_student.head, of_student.bias, *constants[1:], isinstance(teacher, Probabilities),
        numbers.as_tensor(*of_student.numbers, *of_teacher.numbers, -math.inf),
        min(heads) if heads else standardize.rows_of_slab(like),
    )  # fmt: skip
    learns = Learns(*(x is not None and x.requires_grad for x in of_student[:3]))
    if any(learns) and torch.is_grad_enabled():
        return _DistForms.apply(namespace, options.inplace, count, learns, *call)
    return _forward(namespace, call, count).loss
