"""What the tests of the relational losses share: a loss with its gradient, and how far they may be off."""

import functools

import relation_cases as cases
import torch
from relation_cases import LOSSES
from tolerances import FLOOR, error

import fastkd
from fastkd._dtypes import compute_dtype

# A BLAS may add up D products in any order: the sum is off by at most D u times their magnitudes, u = 2^-24 or 2^-53,
# and by about sqrt(D) u, as roundings fall on both sides. The widths here are at most 130, so that this is 130 u and 11 u;
# each step after it adds a few u. 5e-6 is 80 u: seven times what any order gives, and less than the worst that one could.
# In float64 1e-12 is 9000 u, as d^2 of pairs that are just not near is off by up to 2^8 times more: 11 u 2^8 = 2800 u.
PROMISED = {torch.float32: 5e-6, torch.float64: 1e-12}
# The loss is a square of differences: of a loss of 1e-6 they are 1e-3 of the relations, whose own 11 u and more count
# 1000 times: 7e-4 in float32, and 1e-12 (and 3e-10 of a pair that is just not near, as few are) in float64.
NEAR_CONVERGENCE = {torch.float32: 1e-3, torch.float64: 1e-10}
NOTHING = {torch.float32: 1e-6, torch.float64: 1e-14}
# Of a loss: kernels for GPUs multiply what half precision holds of centred embeddings.
HALF_OPERANDS = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def run(loss_function, student, teacher, upstream=1.0, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    return loss.detach(), grad


def rounding(grad, ref, compute):
    """Of a gradient to its dtype, relative to its norm: twice, and float16's smallest step."""
    if grad.dtype == compute or not ref.numel():
        return 0.0
    step = 2.0**-25 if grad.dtype == torch.float16 else 0.0
    return 2 * FLOOR[grad.dtype] + step * ref.numel() ** 0.5 / max(ref.norm().item(), 1e-30)


def check(backend, name, case, dtype, promised=PROMISED):
    student, teacher = case.inputs(dtype)
    loss, grad = run(LOSSES[name], student, teacher, **case.options_of(name))
    loss_ref, grad_ref = case.truth(name, dtype)
    compute = compute_dtype(student, teacher)
    assert (loss.dtype, loss.shape) == (compute, ())
    assert (grad.dtype, grad.shape) == (dtype, student.shape)
    promised = promised[compute]
    if name == "rkd_angle" and compute == torch.float64:
        promised *= case.spread
    on_gpu = backend.startswith(("cuda", "triton")) and name not in cases.SIMILARITIES
    assert error(loss, loss_ref) <= promised + (HALF_OPERANDS.get(dtype, 0.0) if on_gpu else 0.0)
    assert error(grad, grad_ref) <= promised + rounding(grad, grad_ref, compute)


# The module of each loss, with other options than its defaults.
MODULES = {
    "rkd_distance": functools.partial(fastkd.RKDDistanceLoss, normalize=None, delta=0.3),
    "rkd_angle": functools.partial(fastkd.RKDAngleLoss, delta=0.3),
    "rkd_loss": functools.partial(
        fastkd.RKDLoss, distance_weight=2.0, angle_weight=3.0, distance_delta=0.3, angle_delta=0.4
    ),
    "similarity_preserving": fastkd.SimilarityPreservingLoss,
    "gram_mse": functools.partial(fastkd.GramMSELoss, normalize=False, clamp="both"),
    "pkt": fastkd.PKTLoss,
    "relational_triplet": functools.partial(fastkd.RelationalTripletLoss, margin=0.5, positives=3),
    "relation_kl": functools.partial(
        fastkd.RelationKLLoss, temperature=0.5, teacher_temperature=0.7, divergence="js_div", beta=0.3, normalize=True
    ),
}
