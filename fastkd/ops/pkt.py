"""pkt on every device: strips of cosines, from the diagonal on.

    x_i = z_i / (|z_i| + eps) of the rows z that are given, cos_ij = <x_i, x_j>
    k_ij = (cos_ij + 1) / 2, r_i = sum_j k_ij = (<x_i, sum_j x_j> + N) / 2: no pass of its own
    s_ij = k_ij / r_i of the student, t_ij of the teacher, loss = 1/N^2 sum_ij t_ij log((t_ij + eps) / (s_ij + eps))
    a_ij = 1 - t_ij / (s_ij + eps), q_i = sum_j s_ij a_ij, c_i = 1 / (2 N^2 r_i)
    dL/dx_i = sum_j (c_i a_ij + c_j a_ji) x_j - c_i q_i sum_j x_j - sum_j c_j q_j x_j
    dL/dz_i = (g - (|z_i| + eps) / |z_i| <g, x_i> x_i) / (|z_i| + eps) of g = dL/dx_i

The weights of both orders of a pair come from the same two cosines, so half of the pairs are enough; what q adds is of
rank 1, so that one sweep does. 2 N^2 (D_s + D_t) / 2 flops for the loss and 2 N^2 D_s for the gradient. A kernel makes
the weights out of a strip of cosines, in its memory.

Saved for backward: the gradient. Beside it the rows x and two strips.
"""

import torch

from .. import _library
from .._check import SMALLEST_EPS
from .._dtypes import compute_dtype, without_autocast
from .._relation_calls import PktCall, PktStripCall
from ..reference import gradient_dtype
from .numbers import read
from .products import blocks_of, check_embeddings
from .samples import PKT, are_few, few_samples

BLOCK = {"cpu": 2**21, "cuda": 2**23}  # elements of a strip [rows, N]


def _shortened(z, eps):
    """Rows z / (|z| + eps), with 1 / (|z| + eps), and (|z| + eps) / |z|; both are 0 of a row of zeros, which has no
    gradient. A row is divided by its largest element before it is squared, unless the host can see that its square
    is in range."""
    if z.device.type == "cpu" and z.dtype is torch.float32:
        length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        if length.min() > 1e-12 and length.max() < 1e18:  # false of NaN
            longer = length + eps
            return z / longer, 1 / longer, longer / length
    x = torch.abs(z)
    largest = x.amax(1, keepdim=True)
    largest = torch.where(largest == 0, 1.0, largest)
    torch.div(z, largest, out=x)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    longer = length + eps / largest
    inverse = torch.where(length == 0, 0.0, 1 / longer)
    ratio = torch.where(inverse == 0, 0.0, longer / length)
    return x.mul_(inverse), inverse / largest, ratio


def _through_length(grad, x, inverse, ratio):
    """dL/dZ from dL/dX, in its memory."""
    grad.addcmul_(x, torch.linalg.vecdot(grad, x)[:, None] * ratio, value=-1)
    grad *= inverse


@torch.no_grad()
def _pkt_fwd(*arguments):
    call = PktCall(*arguments)
    student, teacher, mask, weight, save = call.student, call.teacher, call.mask, call.weight, call.save
    check_embeddings(student, teacher, (2,))
    eps = read("eps", call.eps, SMALLEST_EPS)
    if len(student) > 1 and call.strips == "fastkd" and are_few(student, BLOCK):
        return few_samples(student, teacher, PKT, mask, weight, save, eps=call.eps)
    dtype = compute_dtype(student, teacher)
    N = len(student)
    grad = student.new_empty(student.shape if save else (0,), dtype=gradient_dtype(student))
    loss = student.new_zeros((), dtype=torch.float64)
    if N < 2:  # a sample is itself with probability 1
        return loss.to(dtype), grad.zero_()
    with without_autocast(student.device):
        x, y = student.to(dtype), teacher.to(dtype)
        valid = x.new_ones(N)
        if mask is not None:
            x, y = (torch.where(mask[:, None], z, 0.0) for z in (x, y))
            valid = mask.to(dtype)
        (x, *through), (y, *_) = _shortened(x, eps), _shortened(y, eps)
        count = valid.sum()
        rows = torch.where(count < 2, 0.0, valid / (count * count))  # one alone has no pair
        if weight is not None:
            rows = rows * torch.where(valid > 0, weight.to(dtype), 0.0)
        everyone, teachers = x.sum(0), y.sum(0)
        # an error of a sum is one of all a row's probabilities: what it does to the loss is of second order
        inverses = [torch.where(valid > 0, 2 / (z @ sums + count), 0.0) for z, sums in ((x, everyone), (y, teachers))]
        slopes = torch.zeros_like(valid, dtype=torch.float64)
        of_samples = {
            "slopes": slopes, "valid": valid, "student_inverse": inverses[0], "teacher_inverse": inverses[1],
            "weight": rows, "scale": 0.5 * rows * inverses[0],
        }  # fmt: skip
        direct = grad.dtype is dtype
        to = (grad.zero_() if direct else torch.zeros_like(x)) if save else None
        blocks = blocks_of(BLOCK, N, N, x.device)
        memory = [x.new_empty(blocks[0].stop * N) for _ in range(2)]
        strip_ = getattr(torch.ops, call.strips).pkt_strip_.default
        for some in blocks:
            n, columns = some.stop - some.start, N - some.start
            s, t = (
                torch.mm(z[some], z[some.start :].T, out=m[: n * columns].view(n, columns))
                for z, m in zip((x, y), memory, strict=True)
            )
            loss += strip_(*PktStripCall(student=s, teacher=t, **of_samples, eps=eps, row=some.start))
            if save:
                to[some].addmm_(s, x[some.start :])
                to[some.stop :].addmm_(s[:, n:].T, x[some])
        if save:
            q = slopes.to(dtype) * of_samples["scale"]
            to.addr_(q, everyone, alpha=-1)
            to -= q @ x
            if mask is not None:
                to.masked_fill_(~mask[:, None], 0.0)
            _through_length(to, x, *through)
            if not direct:
                grad.copy_(to)
    return loss.to(dtype), grad


_library.fastkd.impl("pkt_fwd", _pkt_fwd, "CompositeExplicitAutograd")
FWD = torch.ops.fastkd.pkt_fwd.default
