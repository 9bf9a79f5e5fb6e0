"""relation_kl on every device: strips of similarities, and the rows schedule over each.

    s_ij = <x_i, k_j> / (sqrt(D) T) of the student, t_ij of the teacher: rows of M keys, as rows of logits are
    loss = mean_i divergence(softmax(s_i), softmax(t_i)), W = dL/d<x_i, k_j>
    dL/dX = W K, dL/dK = W^T X; where the keys are the rows themselves the sum of both

On the CPU the products of samples with each other are symmetric, and few enough flops to be worth it: where no
exponential can leave its range, strips begin at the diagonal, once for the sums of exponentials, and once more for
both orders' weights: 2 N^2 (D_s + D_t) flops in all, and 2 N^2 D_s for the gradient.

A strip [rows, M] of both sides stays in the caches; the rows kernels write W over the student's. The least work is
2 N M (D_s + D_t) flops for the loss and 4 N M D_s for the gradient.

Softmax does not see what is added to a row, so keys lose their mean first: embeddings far from the origin keep
their digits. On CUDA half-precision rows that are not divided by their length are multiplied as they are,
with sums in float32 (a student's in float16 are not: W would leave its range).

Saved for backward: the gradients. Beside them the rows in the dtype that is computed in, and two strips.
"""

import math
from typing import Any

import torch

from .. import _library
from .._calls import InverseDivisor, RowsCall
from .._divergences import NUMBERS, REGISTRY
from .._dtypes import compute_dtype, without_autocast
from ..reference import gradient_dtype
from . import rows as rows_schedule
from ._relation_kl_few import (
    BLOCK,
    FEW,
    Options,
    fake_grad,
    few_call,
    of_few,
    relation_is_few,
    with_numbers,
    with_widths,
)
from ._relation_sides import HALF, Side
from .gradient import forbid_double_backward, scaled
from .products import blocks_of, unit_backward
from .rows import changeable, number_or_rows, positive

MAX_SIMILARITY = 30.0  # of similarities whose exponentials, and sums of them, are numbers without more ado


def _check_shapes(student, teacher, student_keys, teacher_keys, options):
    """What the function has checked already; an op may be called past it."""
    x = student if student_keys is None else student_keys
    right = student.dim() == x.dim() == teacher.dim() == 3 and student.shape[:2] == teacher.shape[:2]
    right = right and (student_keys is None) == (teacher_keys is None)
    if right:
        keys = len(student), x.shape[1]
        right = all(x is None or x.shape == student.shape[:2] for x in (options.mask, options.weight))
        right = right and (options.key_mask is None or options.key_mask.shape == keys)
        pairs = ((student, student_keys), (teacher, teacher_keys))
        right = right and all(k is None or k.shape == (*keys, x.shape[2]) for x, k in pairs)
    if not right:
        raise RuntimeError(
            "student, teacher, their keys, mask, weight and key_mask: "
            "shapes [B, N, D_s], [B, N, D_t], [B, M, D_s], [B, M, D_t], [B, N], [B, N] and [B, M] wanted"
        )


def _some(x, *at):
    """Of some samples; what is one for all has no dimensions."""
    return x if x is None or x.dim() == 0 else x[at]


class _Strips:
    """The sum of the rows' losses of a few samples, strip by strip; and its gradients."""

    def __init__(self, B, N, M, options, like, dtype):
        self.samples, self.rows = (blocks_of(BLOCK, *sizes, like.device) for sizes in ((B, N * M), (N, M)))
        together = self.samples[0].stop
        if together > 1:
            self.rows = [slice(0, N)]
        self.strips = [like.new_empty(together * self.rows[0].stop * M, dtype=dtype) for _ in range(2)]
        self.options, self.M, self.dtype = options, M, dtype
        # 1 / the number of all rows that count: a number, or a tensor
        self.scale = 1.0 / (B * N), None
        if options.mask is not None:
            scale = like.new_empty((), dtype=torch.float64)
            call = InverseDivisor(options.mask.reshape(-1).contiguous(), None, B * N, 1, scale)
            rows_schedule.OPS[options.rows].inverse_divisor(*call)
            self.scale = 1.0, scale

    def of(self, s, t, options, grad, keys_grad):
        """Of the sides of some samples, and what the options say of them."""
        if len(self.rows) > 1 and self._both_orders(s, t, options):
            return self._of_pairs(s, t, options, grad)
        loss = 0.0
        for rows in self.rows:
            shape = len(s.x), rows.stop - rows.start, self.M
            strips = (x[: math.prod(shape)].view(shape) for x in self.strips)
            S, T = (side.similarities(rows, strip) for side, strip in zip((s, t), strips, strict=True))
            for x in (S, T):
                if options.exclude_self:
                    x.diagonal(rows.start, 1, 2).fill_(-math.inf)
                if options.key_mask is not None:
                    x.masked_fill_(~options.key_mask[:, None], -math.inf)
            logits = S.view(-1, self.M), T.view(-1, self.M)
            wanted = grad is not None or keys_grad is not None
            call = self._call(*logits, options, rows)
            loss += rows_schedule.forward(options.rows, call, grad=logits[0] if wanted else None).double()
            if wanted:
                s.add_gradients(rows, S, grad, grad if s.own_keys else keys_grad)
        return loss

    def _both_orders(self, s, t, options):
        """Whether the products are symmetric, and all exponentials of them in range, which the host may look at."""
        like = s.own_keys and t.own_keys and self.options.key_mask is self.options.mask
        simple = options.temperature_rows is None and options.teacher_temperature_rows is None
        if not (like and simple and options.rows == "fastkd" and s.x.device.type == "cpu"):
            return False
        if options.divergence != NUMBERS["kl_div"]:
            return False
        pairs = (s.x, options.temperature), (t.x, options.teacher_temperature)
        return all(torch.linalg.vecdot(x, x).max() <= MAX_SIMILARITY * T for x, T in pairs)  # false of NaN

    def _of_pairs(self, s, t, options, grad):
        """Of one sample: strips from the diagonal on."""
        x, y = s.x[0], t.x[0]
        N = len(x)
        valid = x.new_ones(N) if options.mask is None else options.mask[0].to(x.dtype)
        scales = 1 / options.temperature, 1 / options.teacher_temperature
        sums = torch.zeros(N, 2, dtype=torch.float64)

        def strips():
            for rows in self.rows:
                shape = rows.stop - rows.start, N - rows.start
                S, T = (memory[: math.prod(shape)].view(shape) for memory in self.strips)
                for z, out in ((x, S), (y, T)):
                    torch.mm(z[rows], z[rows.start :].T, out=out)
                    if options.exclude_self:
                        out.diagonal().fill_(-math.inf)
                yield rows, S, T

        for rows, S, T in strips():
            torch.ops.fastkd.relation_kl_sums.default(S, T, valid, *scales, rows.start, sums)
        inverses = torch.where((sums > 0) & (valid[:, None] > 0), 1 / sums, 0.0)
        logarithms = torch.where(sums > 0, sums, 1.0).log()
        number, tensor = self.scale
        weight = valid * (number if tensor is None else tensor)
        if options.weight is not None:
            weight = torch.where(valid > 0, weight * options.weight[0], 0.0)
        of_samples = [z.to(x.dtype) for z in (*inverses.T.contiguous(), logarithms[:, 0] - logarithms[:, 1], weight)]
        loss = torch.zeros((), dtype=torch.float64)
        for rows, S, T in strips():
            loss += torch.ops.fastkd.relation_kl_weights_.default(
                S, T, valid, *scales, rows.start, *of_samples, of_samples[-1] * scales[0]
            )  # fmt: skip
            if grad is not None:
                grad[0, rows].addmm_(S, x[rows.start :])
                grad[0, rows.stop :].addmm_(S[:, rows.stop - rows.start :].T, x[rows])
        return loss

    def _call(self, student, teacher, options, rows):
        """Of the rows schedule, for the logits of some rows."""
        names = ("parameter_rows", "temperature_rows", "teacher_temperature_rows", "mask", "weight")
        parameters, temperatures, teacher_temperatures, mask, weight = (
            x if x is None or x.dim() == 0 else x[:, rows].reshape(-1)
            for x in (getattr(options, name) for name in names)
        )
        return RowsCall(
            student, teacher, options.divergence, options.parameter, parameters, options.temperature, temperatures,
            options.teacher_temperature, teacher_temperatures, False, mask, weight, *self.scale,
        )  # fmt: skip


@torch.no_grad()
def _relation_kl_fwd(student, teacher, student_keys, teacher_keys, *options):
    *options, save, save_keys = options
    options = Options(*options)
    _check_shapes(student, teacher, student_keys, teacher_keys, options)
    dtype = compute_dtype(student, teacher, student_keys, teacher_keys)
    keys = student if student_keys is None else student_keys
    (B, N, D), M = student.shape, keys.shape[1]
    if B * N * M > 0:
        if student_keys is None and options.key_mask is None:
            options = options._replace(key_mask=options.mask)
        if student_keys is None and B == 1 and relation_is_few(student[0], options):
            own = options._replace(**{name: _some(getattr(options, name), 0) for name in _PER_SAMPLE})
            loss, grad = FEW(*few_call(student[0], teacher[0], own, save))
            return loss, grad[None] if save else grad, grad.new_empty(0)
        options = with_widths(with_numbers(options), (D, teacher.shape[2]), dtype)
    grad = torch.zeros(student.shape if save else (0,), dtype=gradient_dtype(student), device=student.device)
    keys_grad = torch.zeros(keys.shape if save_keys else (0,), dtype=gradient_dtype(keys), device=keys.device)
    loss = student.new_zeros((), dtype=torch.float64)
    if B * N * M == 0:
        return loss.to(dtype), grad, keys_grad
    strips = _Strips(B, N, M, options, student, dtype)
    halves = HALF[1:] if save or save_keys else HALF
    with without_autocast(student.device):
        for some in strips.samples:
            here = options._replace(**{name: _some(getattr(options, name), some) for name in _PER_SAMPLE})
            s = Side(student[some], _some(student_keys, some), here, dtype, halves)
            t = Side(teacher[some], _some(teacher_keys, some), here, dtype, HALF)
            # in their own memory where the dtype is that which is computed in
            both = (grad, save), (keys_grad, save_keys)
            to, to_keys = (x[some].to(dtype) if wanted else None for x, wanted in both)
            loss += strips.of(s, t, here, to, to_keys)
            for x, g, through in ((grad, to, s.through), (keys_grad, to_keys, s.keys_through)):
                if g is not None:
                    if through is not None:
                        unit_backward(g, *through)
                    if x.dtype is not dtype:
                        x[some] = g
    return loss.to(dtype), grad, keys_grad


_PER_SAMPLE = ("parameter_rows", "temperature_rows", "teacher_temperature_rows", "mask", "key_mask", "weight")


def _fake_fwd(student, teacher, student_keys, teacher_keys, *options):
    *_, save, save_keys = options
    keys = student if student_keys is None else student_keys
    return (
        student.new_empty((), dtype=compute_dtype(student, teacher, student_keys, teacher_keys)),
        fake_grad(student, save),
        fake_grad(keys, save_keys),
    )


_library.fastkd.impl("relation_kl_fwd", _relation_kl_fwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::relation_kl_fwd", _fake_fwd)
torch.library.register_fake("fastkd::relation_kl_sums", lambda *_: None)
torch.library.register_fake(
    "fastkd::relation_kl_weights_", lambda student, *_: student.new_empty((), dtype=torch.float64)
)  # fmt: skip
FWD = torch.ops.fastkd.relation_kl_fwd.default


class _RelationKL(torch.autograd.Function):
    """The loss of rows or keys that want a gradient, which is computed in forward and saved."""

    @staticmethod
    def forward(ctx, scale_, student, student_keys, teacher, teacher_keys, *options):
        ctx.scale_ = scale_
        ctx.wanted = ctx.needs_input_grad[1:3]
        loss, *grads = FWD(student, teacher, student_keys, teacher_keys, *options, *ctx.wanted)
        ctx.dtypes = student.dtype, None if student_keys is None else student_keys.dtype
        ctx.save_for_backward(*(grad for grad, wanted in zip(grads, ctx.wanted, strict=True) if wanted))
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grads = iter([forbid_double_backward(scaled, ctx.scale_, grad, upstream) for grad in ctx.saved_tensors])
        both = zip(ctx.wanted, ctx.dtypes, strict=True)
        found = [next(grads).to(dtype) if wanted else None for wanted, dtype in both]
        return None, *found, *(None for _ in ctx.needs_input_grad[3:])


def relation_kl(
    namespace: str,
    scale_: Any,
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_keys: torch.Tensor | None,
    teacher_keys: torch.Tensor | None,
    exclude_self: bool,
    normalize: bool,
    divergence: str,
    parameter: torch.Tensor | float,
    temperature: torch.Tensor | float,
    teacher_temperature: torch.Tensor | float,
    mask: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> torch.Tensor:
    """The loss of :mod:`fastkd.functional`; the arguments have been checked there."""
    dtype, leading = compute_dtype(student, teacher, student_keys, teacher_keys), student.shape[:-1]
    if torch.compiler.is_compiling():
        temperature, teacher_temperature = (
            positive(changeable(x, student, dtype)) for x in (temperature, teacher_temperature)
        )
        if REGISTRY[divergence].parameter is not None:
            parameter = changeable(parameter, student, torch.float64)
    parameter, parameter_rows = number_or_rows(parameter, leading, torch.float64)
    temperature, temperature_rows = number_or_rows(temperature, leading, dtype)
    teacher_temperature, teacher_temperature_rows = number_or_rows(teacher_temperature, leading, dtype)
    weight = weight if weight is None else weight.to(dtype)
    options = Options(
        exclude_self, normalize, namespace, NUMBERS[divergence], parameter, parameter_rows, temperature,
        temperature_rows, teacher_temperature, teacher_temperature_rows, mask, key_mask, weight,
    )  # fmt: skip
    if student.dim() == 2 and student_keys is None and not torch.compiler.is_compiling():
        loss = of_few(scale_, student, teacher, options)
        if loss is not None:
            return loss
    return _of_batches(scale_, student, student_keys, teacher, teacher_keys, options)


def _of_batches(scale_, student, student_keys, teacher, teacher_keys, options):
    """With one dimension [B] for all that lead, as the op takes them."""
    leading = student.shape[:-1]
    keys = student if student_keys is None else student_keys
    B = math.prod(leading[:-1])

    def per_sample(x, shape):
        """[*, N] to [B, N]"""
        return None if x is None else x.expand(shape).reshape(B, shape[-1]).contiguous()

    def by_row(x):
        """[B N] to [B, N]; what is one for all rows stays so."""
        return x if x is None or x.dim() == 0 else x.reshape(B, leading[-1])

    def flat(x):
        return None if x is None else x.reshape(B, *x.shape[-2:])

    rows = ("parameter_rows", "temperature_rows", "teacher_temperature_rows")
    options = options._replace(
        **{name: by_row(getattr(options, name)) for name in rows},
        mask=per_sample(options.mask, leading),
        key_mask=per_sample(options.key_mask, keys.shape[:-1]),
        weight=per_sample(options.weight, leading),
    )
    embeddings = [flat(x) for x in (student, student_keys, teacher.detach(), teacher_keys)]
    if teacher_keys is not None:
        embeddings[3] = embeddings[3].detach()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in embeddings[:2]):
        return _RelationKL.apply(scale_, *embeddings, *options)
    student, student_keys, teacher, teacher_keys = embeddings
    return FWD(student, teacher, student_keys, teacher_keys, *options, False, False)[0]
