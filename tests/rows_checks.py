"""What the tests of the logit losses share: a loss with its gradient, what they should be, and how far they may be off."""

import math

import cases
import torch
import torch.nn.functional as F
from tolerances import FLOOR, error
from truth import truth as truth_of
from truth import upstream_like

from fastkd import reference
from fastkd._divergences import DERIVED, REGISTRY

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "sum", "batchmean", "mean"]


def run(loss_function, student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student, upstream_like(loss))
    return loss.detach(), grad


def eager(name, student, teacher, temperature=1.0):
    """What people write, in the dtype that they have: one value per row."""
    log_p, log_q = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)

    def kl(a, b):  # of b from a, as F.kl_div has it
        return F.kl_div(a, b, reduction="none", log_target=True).sum(-1)

    name, _, beta = name.partition("-")
    beta = float(beta or 0.5)
    if name == "kl_div":
        rows = kl(log_p, log_q)
    elif name == "reverse_kl_div":
        rows = kl(log_q, log_p)
    elif name == "soft_cross_entropy":
        rows = -(log_q.exp() * log_p).sum(-1)
    elif name == "symmetric_kl_div":
        rows = (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    elif name == "adaptive_kl_div":
        (q, order), p = log_q.exp().sort(-1, descending=True), log_p.exp()
        in_head = torch.zeros_like(p).scatter(-1, order, (q.cumsum(-1) <= 0.5).to(p.dtype)) > 0
        in_head |= log_q == log_q.amax(-1, keepdim=True)
        difference = (p - log_q.exp()).abs()
        share = ((difference * in_head).sum(-1) / difference.sum(-1)).detach()
        rows = share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)
    elif name == "total_variation":
        rows = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    elif name == "negative_log_acceptance":
        rows = -torch.minimum(log_p.exp(), log_q.exp()).sum(-1).log()
    elif name == "alpha_beta_div":
        rows = -((0.2 * log_q + 0.7 * log_p).exp() - ((0.9 * log_q).exp() * 0.2 + (0.9 * log_p).exp() * 0.7) / 0.9)
        rows = rows.sum(-1) / 0.14
    elif name.startswith("skew"):
        own, other = (log_q, log_p) if name == "skew_kl_div" else (log_p, log_q)
        rows = kl(torch.logaddexp(own + math.log(0.1), other + math.log(0.9)), own)
    else:
        log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        rows = beta * kl(log_m, log_q) + (1 - beta) * kl(log_m, log_p)
    return rows * temperature**2


def right(name, student, teacher, **options):
    """The truth for one of cases.LOSSES."""
    name, _, beta = name.partition("-")
    return truth_of(name, student, teacher, **options, **({"beta": float(beta)} if beta else {}))


SKEWED = 5  # js_div at beta = 0.1: its two terms, and log(m / p), are 1 / beta times what they leave


def check(name, case, dtype, reduction, plain_pytorch, loss_function=None):
    loss_function = loss_function or cases.LOSSES[name]
    student, teacher, options = case.inputs(dtype)
    if reduction == "none":
        options.pop("normalizer", None)
    loss, grad = run(loss_function, student, teacher, reduction=reduction, **options)
    loss_ref, grad_ref = right(name, student, teacher, reduction=reduction, **options)

    compute = reference.compute_dtype(student, teacher)
    assert loss.dtype == compute
    assert grad.dtype == dtype
    assert grad.shape == student.shape
    if (name, case.name) == ("negative_log_acceptance", "huge_logits"):  # a rate of e^-1000 is 0, as its docstring says
        assert loss.isinf().all()
        assert not grad.any()
        return
    tolerance = 4 * FLOOR[compute] * logit_size(student)
    if name == "js_div-0.1":
        tolerance *= SKEWED
    assert error(loss, loss_ref) <= tolerance * (cancellation(name, student, teacher, options) if plain_pytorch else 1)
    tolerance *= what_cancels(name, student, teacher, reduction=reduction, **options)
    assert error(grad, grad_ref) <= tolerance + 2 * storage_error(grad, grad_ref)


def what_cancels(name, student, teacher, **options):
    """How large the two terms of the gradient are beside itself: they cancel where p is all on one class."""
    name = name.partition("-")[0]
    if name not in DERIVED and REGISTRY[name].centred:
        return 1.0
    terms, grad = (right(name, student, teacher, terms_of_gradient=x, **options)[1] for x in (True, False))
    return max(1.0, (terms.norm() / grad.norm()).nan_to_num(1.0, posinf=1e300).item())


def logit_size(student):
    """A logit of size z is known to z units in the last place, and so is its exponential."""
    finite = student[student.isfinite()].double()
    return max(1.0, finite.abs().max().item() / 8) if finite.numel() else 1.0


def cancellation(name, student, teacher, options):
    """Plain PyTorch subtracts logarithms of size log V, and is off by that much more."""
    rows = right(name, student, teacher, **{**options, "reduction": "none", "normalizer": None, "t_squared": False})[0]
    rows = rows[(rows > 0) & rows.isfinite()]
    return max(1.0, math.log(student.shape[-1]) / rows.min().item()) if rows.numel() else 1.0


def storage_error(grad, ref):
    """One rounding to the gradient's dtype, relative to the gradient's norm; in float16 many
    gradients are so small that its smallest step, 2^-24, is what limits them."""
    if grad.dtype in (torch.float32, torch.float64) or not ref.numel():
        return 0.0
    step = 2.0**-25 if grad.dtype == torch.float16 else 0.0
    return FLOOR[grad.dtype] + step * math.sqrt(ref.numel()) / max(ref.norm().item(), 1e-30)
