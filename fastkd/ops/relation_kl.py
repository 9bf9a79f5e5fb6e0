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
from .._relation_calls import RelationKLCall, RelationKLSums, RelationKLWeights
from ..reference import gradient_dtype
from . import rows as rows_schedule
from ._relation_kl_few import BLOCK, FEW, fake_grad, few_call, of_few, relation_is_few, with_numbers, with_widths
from ._relation_sides import HALF, Side
from .gradient import forbid_double_backward, is_wanted, scaled
from .products import blocks_of, unit_backward
from .rows import changeable, number_or_rows, positive

MAX_SIMILARITY = 30.0  # of similarities whose exponentials, and sums of them, are numbers without more ado


def _check_shapes(call):
    """What the function has checked already; an op may be called past it."""
    student, teacher, student_keys, teacher_keys = call.student, call.teacher, call.student_keys, call.teacher_keys
    x = student if student_keys is None else student_keys
    right = student.dim() == x.dim() == teacher.dim() == 3 and student.shape[:2] == teacher.shape[:2]
    right = right and (student_keys is None) == (teacher_keys is None)
    if right:
        keys = len(student), x.shape[1]
        right = all(x is None or x.shape == student.shape[:2] for x in (call.mask, call.weight))
        right = right and (call.key_mask is None or call.key_mask.shape == keys)
        pairs = ((student, student_keys), (teacher, teacher_keys))
        right = right and all(k is None or k.shape == (*keys, x.shape[2]) for x, k in pairs)
    if not right:
        raise RuntimeError(
            "student, teacher, their keys, mask, weight and key_mask: "
            "shapes [B, N, D_s], [B, N, D_t], [B, M, D_s], [B, M, D_t], [B, N], [B, N] and [B, M] wanted"
        )


# What a call says of each sample.
_PER_SAMPLE = (
    "student", "teacher", "student_keys", "teacher_keys", "parameter_rows", "temperature_rows",
    "teacher_temperature_rows", "mask", "key_mask", "weight",
)  # fmt: skip


def _some(x, *at):
    """Of some samples; what is one for all has no dimensions."""
    return x if x is None or x.dim() == 0 else x[at]


class _Strips:
    """The sum of the rows' losses of a few samples, strip by strip; and its gradients."""

    def __init__(self, call, M, dtype):
        like = call.student
        B, N = like.shape[:2]
        self.samples, self.rows = (blocks_of(BLOCK, *sizes, like.device) for sizes in ((B, N * M), (N, M)))
        together = self.samples[0].stop
        if together > 1:
            self.rows = [slice(0, N)]
        self.strips = [like.new_empty(together * self.rows[0].stop * M, dtype=dtype) for _ in range(2)]
        self.call, self.M = call, M
        # 1 / the number of all rows that count: a number, or a tensor
        self.scale = 1.0 / (B * N), None
        if call.mask is not None:
            scale = like.new_empty((), dtype=torch.float64)
            divisor = InverseDivisor(call.mask.reshape(-1).contiguous(), None, B * N, 1, scale)
            rows_schedule.OPS[call.rows].inverse_divisor(*divisor)
            self.scale = 1.0, scale

    def of(self, s, t, call, grad, keys_grad):
        """Of the sides of some samples, and the call of them alone."""
        if len(self.rows) > 1 and self._both_orders(s, t, call):
            return self._of_pairs(s, t, call, grad)
        loss = 0.0
        for rows in self.rows:
            shape = len(s.x), rows.stop - rows.start, self.M
            strips = (x[: math.prod(shape)].view(shape) for x in self.strips)
            S, T = (side.similarities(rows, strip) for side, strip in zip((s, t), strips, strict=True))
            for x in (S, T):
                if call.exclude_self:
                    x.diagonal(rows.start, 1, 2).fill_(-math.inf)
                if call.key_mask is not None:
                    x.masked_fill_(~call.key_mask[:, None], -math.inf)
            logits = S.view(-1, self.M), T.view(-1, self.M)
            wanted = grad is not None or keys_grad is not None
            of_strip = self._call(*logits, call, rows)
            loss += rows_schedule.forward(call.rows, of_strip, grad=logits[0] if wanted else None).double()
            if wanted:
                s.add_gradients(rows, S, grad, grad if s.own_keys else keys_grad)
        return loss

    def _both_orders(self, s, t, call):
        """Whether the products are symmetric, and all exponentials of them in range, which the host may look at."""
        like = s.own_keys and t.own_keys and self.call.key_mask is self.call.mask
        simple = call.temperature_rows is None and call.teacher_temperature_rows is None
        if not (like and simple and call.rows == "fastkd" and s.x.device.type == "cpu"):
            return False
        if call.divergence != NUMBERS["kl_div"]:
            return False
        pairs = (s.x, call.temperature), (t.x, call.teacher_temperature)
        return all(torch.linalg.vecdot(x, x).max() <= MAX_SIMILARITY * T for x, T in pairs)  # false of NaN

    def _of_pairs(self, s, t, call, grad):
        """Of one sample: strips from the diagonal on."""
        x, y = s.x[0], t.x[0]
        N = len(x)
        valid = x.new_ones(N) if call.mask is None else call.mask[0].to(x.dtype)
        scale, teacher_scale = 1 / call.temperature, 1 / call.teacher_temperature
        of_all = {"valid": valid, "student_scale": scale, "teacher_scale": teacher_scale}
        sums = torch.zeros(N, 2, dtype=torch.float64)

        def strips():
            for rows in self.rows:
                shape = rows.stop - rows.start, N - rows.start
                S, T = (memory[: math.prod(shape)].view(shape) for memory in self.strips)
                for z, out in ((x, S), (y, T)):
                    torch.mm(z[rows], z[rows.start :].T, out=out)
                    if call.exclude_self:
                        out.diagonal().fill_(-math.inf)
                yield rows, S, T

        for rows, S, T in strips():
            strip = RelationKLSums(student=S, teacher=T, **of_all, row=rows.start, sums=sums)
            torch.ops.fastkd.relation_kl_sums.default(*strip)
        inverses = torch.where((sums > 0) & (valid[:, None] > 0), 1 / sums, 0.0)
        logarithms = torch.where(sums > 0, sums, 1.0).log()
        number, tensor = self.scale
        weight = valid * (number if tensor is None else tensor)
        if call.weight is not None:
            weight = torch.where(valid > 0, weight * call.weight[0], 0.0)
        student_inverse, teacher_inverse = inverses.T.contiguous().to(x.dtype)
        weight = weight.to(x.dtype)
        of_samples = {
            "student_inverse": student_inverse, "teacher_inverse": teacher_inverse,
            "difference": (logarithms[:, 0] - logarithms[:, 1]).to(x.dtype), "weight": weight,
            "scale": weight * scale,
        }  # fmt: skip
        loss = torch.zeros((), dtype=torch.float64)
        for rows, S, T in strips():
            strip = RelationKLWeights(student=S, teacher=T, **of_all, row=rows.start, **of_samples)
            loss += torch.ops.fastkd.relation_kl_weights_.default(*strip)
            if grad is not None:
                grad[0, rows].addmm_(S, x[rows.start :])
                grad[0, rows.stop :].addmm_(S[:, rows.stop - rows.start :].T, x[rows])
        return loss

    def _call(self, student, teacher, call, rows):
        """Of the rows schedule, for the logits of some rows."""
        names = ("parameter_rows", "temperature_rows", "teacher_temperature_rows", "mask", "weight")
        parameters, temperatures, teacher_temperatures, mask, weight = (
            x if x is None or x.dim() == 0 else x[:, rows].reshape(-1) for x in (getattr(call, name) for name in names)
        )
        return RowsCall(
            student, teacher, call.divergence, call.parameter, parameters, call.temperature, temperatures,
            call.teacher_temperature, teacher_temperatures, False, mask, weight, *self.scale,
        )  # fmt: skip


@torch.no_grad()
def _relation_kl_fwd(*arguments):
    call = RelationKLCall(*arguments)
    _check_shapes(call)
    student, teacher, student_keys, teacher_keys = call.student, call.teacher, call.student_keys, call.teacher_keys
    dtype = compute_dtype(student, teacher, student_keys, teacher_keys)
    keys = student if student_keys is None else student_keys
    (B, N), M = student.shape[:2], keys.shape[1]
    if B * N * M > 0:
        if student_keys is None and call.key_mask is None:
            call = call._replace(key_mask=call.mask)
        if student_keys is None and B == 1 and relation_is_few(student[0], call):
            own = call._replace(**{name: _some(getattr(call, name), 0) for name in _PER_SAMPLE})
            loss, grad = FEW(*few_call(own))
            return loss, grad[None] if call.save else grad, grad.new_empty(0)
        call = with_widths(with_numbers(call), dtype)
    grad = torch.zeros(student.shape if call.save else (0,), dtype=gradient_dtype(student), device=student.device)
    keys_grad = torch.zeros(keys.shape if call.save_keys else (0,), dtype=gradient_dtype(keys), device=keys.device)
    loss = student.new_zeros((), dtype=torch.float64)
    if B * N * M == 0:
        return loss.to(dtype), grad, keys_grad
    strips = _Strips(call, M, dtype)
    halves = HALF[1:] if call.save or call.save_keys else HALF
    with without_autocast(student.device):
        for some in strips.samples:
            here = call._replace(**{name: _some(getattr(call, name), some) for name in _PER_SAMPLE})
            s = Side(here.student, here.student_keys, here, dtype, halves)
            t = Side(here.teacher, here.teacher_keys, here, dtype, HALF)
            # in their own memory where the dtype is that which is computed in
            both = (grad, call.save), (keys_grad, call.save_keys)
            to, to_keys = (x[some].to(dtype) if wanted else None for x, wanted in both)
            loss += strips.of(s, t, here, to, to_keys)
            for x, g, through in ((grad, to, s.through), (keys_grad, to_keys, s.keys_through)):
                if g is not None:
                    if through is not None:
                        unit_backward(g, *through)
                    if x.dtype is not dtype:
                        x[some] = g
    return loss.to(dtype), grad, keys_grad


def _fake_fwd(*arguments):
    call = RelationKLCall(*arguments)
    keys = call.student if call.student_keys is None else call.student_keys
    dtype = compute_dtype(call.student, call.teacher, call.student_keys, call.teacher_keys)
    grads = fake_grad(call.student, call.save), fake_grad(keys, call.save_keys)
    return call.student.new_empty((), dtype=dtype), *grads


def _fake_weights_(*arguments):
    return RelationKLWeights(*arguments).student.new_empty((), dtype=torch.float64)


_library.fastkd.impl("relation_kl_fwd", _relation_kl_fwd, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::relation_kl_fwd", _fake_fwd)
torch.library.register_fake("fastkd::relation_kl_sums", lambda *_: None)
torch.library.register_fake("fastkd::relation_kl_weights_", _fake_weights_)
FWD = torch.ops.fastkd.relation_kl_fwd.default
_NONE = RelationKLCall(*[None] * len(RelationKLCall._fields))  # gradients


class _RelationKL(torch.autograd.Function):
    """The loss of rows or keys that want a gradient, which is computed in forward and saved."""

    @staticmethod
    def forward(ctx, scale_, *fields):
        call = RelationKLCall(*fields)
        ctx.scale_, ctx.wanted = scale_, (call.save, call.save_keys)
        loss, *grads = FWD(*call)
        ctx.dtypes = call.student.dtype, None if call.student_keys is None else call.student_keys.dtype
        ctx.save_for_backward(*(grad for grad, wanted in zip(grads, ctx.wanted, strict=True) if wanted))
        return loss

    @staticmethod
    def backward(ctx, upstream):
        grads = iter([forbid_double_backward(scaled, ctx.scale_, grad, upstream) for grad in ctx.saved_tensors])
        both = zip(ctx.wanted, ctx.dtypes, strict=True)
        to_rows, to_keys = [next(grads).to(dtype) if wanted else None for wanted, dtype in both]
        return None, *_NONE._replace(student=to_rows, student_keys=to_keys)


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
    call = RelationKLCall(
        student=student, teacher=teacher.detach(), student_keys=student_keys,
        teacher_keys=teacher_keys if teacher_keys is None else teacher_keys.detach(), exclude_self=exclude_self,
        normalize=normalize, rows=namespace, divergence=NUMBERS[divergence], parameter=parameter,
        parameter_rows=parameter_rows, temperature=temperature, temperature_rows=temperature_rows,
        teacher_temperature=teacher_temperature, teacher_temperature_rows=teacher_temperature_rows, mask=mask,
        key_mask=key_mask, weight=weight, save=is_wanted(student),
        save_keys=student_keys is not None and is_wanted(student_keys),
    )  # fmt: skip
    if student.dim() == 2 and student_keys is None and not torch.compiler.is_compiling():
        loss = of_few(scale_, call)
        if loss is not None:
            return loss
    call = _of_batches(call)
    return _RelationKL.apply(scale_, *call) if call.save or call.save_keys else FWD(*call)[0]


def _of_batches(call):
    """With one dimension [B] for all that lead, as the op takes them."""
    leading = call.student.shape[:-1]
    keys = call.student if call.student_keys is None else call.student_keys
    B = math.prod(leading[:-1])

    def per_sample(x, shape):
        """[*, N] to [B, N]"""
        return None if x is None else x.expand(shape).reshape(B, shape[-1]).contiguous()

    def by_row(x):
        """[B N] to [B, N]; what is one for all rows stays so."""
        return x if x is None or x.dim() == 0 else x.reshape(B, leading[-1])

    def flat(x):
        return None if x is None else x.reshape(B, *x.shape[-2:])

    embeddings = ("student", "teacher", "student_keys", "teacher_keys")
    numbers = ("parameter_rows", "temperature_rows", "teacher_temperature_rows")
    return call._replace(
        **{name: flat(getattr(call, name)) for name in embeddings},
        **{name: by_row(getattr(call, name)) for name in numbers},
        mask=per_sample(call.mask, leading),
        key_mask=per_sample(call.key_mask, keys.shape[:-1]),
        weight=per_sample(call.weight, leading),
    )
