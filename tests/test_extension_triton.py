"""A relation of one's own, in a few lines of Triton, in the schedule of pairs."""

import pytest
import torch
from tolerances import error

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastkd import _backend  # noqa: E402
from fastkd._relation_calls import PairsCall  # noqa: E402
from fastkd.ops.numbers import as_tensor  # noqa: E402
from fastkd.triton.pairs import pairs_fwd  # noqa: E402
from fastkd.triton.relations import RELATIONS, Relation  # noqa: E402

PROMISED = {torch.float32: 5e-6, torch.float64: 1e-12}
DELTA = 0.7
DEVICE = "cpu" if _backend.interpreted() else "cuda"


@triton.jit
def squared_logarithms(s, t, w, by_mu, by_tau, delta):
    """w log(s / t)^2: of no pair, where both are 0, NaN."""
    difference = tl.log(s) - tl.log(t)
    return w * difference * difference, tl.zeros_like(s)


@triton.jit
def squared_logarithms_weight(s, t, w, by_mu, by_tau, slope, delta):
    return w * 2.0 * (tl.log(s) - tl.log(t)) / (s * s)


@triton.jit
def scaled_ratio(s, t, w, by_mu, by_tau, delta):
    """w delta u^2 / v: with means, so that the gradient has a slope."""
    u = s * by_mu
    ratio = w * delta * u / (t * by_tau)
    return ratio * u, 2.0 * ratio * u


@triton.jit
def scaled_ratio_weight(s, t, w, by_mu, by_tau, slope, delta):
    return by_mu * (2.0 * w * delta * s * by_mu / (t * by_tau) - slope) / s


TERMS = {
    "logarithms": lambda s, t: (s / t).log().square(),
    "ratio": lambda s, t: DELTA * (s / s.mean()).square() / (t / t.mean()),
}


def naive(name, student, teacher, weight):
    """In float64, with the gradient of autograd."""
    x, n = student.double().requires_grad_(), len(student)
    i, j = torch.triu_indices(n, n, 1)
    s, t = (y[i] - y[j] for y in (x, teacher.double()))
    s, t = s.square().sum(1).sqrt(), t.square().sum(1).sqrt()
    loss = 2 * (TERMS[name](s, t) * (weight[i] + weight[j]) / 2).sum() / n**2
    return loss.detach(), torch.autograd.grad(loss, x)[0]


RELATIONS_OF_ONES_OWN = {
    "logarithms": (Relation(squared_logarithms, squared_logarithms_weight), False),
    "ratio": (Relation(scaled_ratio, scaled_ratio_weight), True),
}


@pytest.mark.parametrize("options", ["plain", "weighted", "counted"])
@pytest.mark.parametrize("dtype", PROMISED, ids=str)
@pytest.mark.parametrize("N", [9, 150])  # of one tile, of several
@pytest.mark.parametrize("name", RELATIONS_OF_ONES_OWN)
def test_a_relation_of_ones_own(monkeypatch, name, N, dtype, options):
    relation, normalize = RELATIONS_OF_ONES_OWN[name]
    monkeypatch.setitem(RELATIONS, 7, relation)
    generator = torch.Generator().manual_seed(N)
    student, teacher = (torch.randn(N, width, generator=generator).to(DEVICE, dtype) for width in (12, 20))
    weight, n = torch.ones(N), N
    of_op = {"count": None, "weight": None}
    if options == "weighted":
        weight = torch.rand(N, generator=generator)
        of_op["weight"] = weight.to(DEVICE, dtype)
    if options == "counted":
        n = N // 2
        of_op["count"] = torch.tensor(n, device=DEVICE)
    call = PairsCall(student, teacher, **of_op, relation=7, delta=as_tensor(DELTA), normalize=normalize, save=True)
    loss, grad = pairs_fwd(*call)
    expected, expected_grad = naive(name, student[:n].cpu(), teacher[:n].cpu(), weight[:n].double())
    assert error(loss.cpu(), expected) <= PROMISED[dtype]
    assert error(grad[:n].cpu(), expected_grad) <= PROMISED[dtype]
    assert not grad[n:].any()
