"""Liger's losses of a head under their names: each against its formula. Beside Liger itself: hosts/test_liger.py."""

import doctest

import pytest
import torch
import torch.nn.functional as F

from fastkd.integrations import liger, trl
from fastkd.integrations.liger import LigerFusedLinearJSD, LigerFusedLinearJSDLoss, LigerFusedLinearKLDivLoss

N, V = 9, 30
LABELS = torch.tensor([3, -100, 5, 7, -100, 29, 0, 1, 2])


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = ((N, 6), (V, 6), (N, 4), (V, 4), (V,), (V,))
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def jsd(z, t, beta, T):
    """Of each row, in plain PyTorch."""
    p, q = (z / T).log_softmax(-1), (t / T).log_softmax(-1)

    def kl(of, to):
        return (of.exp() * (of - to)).sum(-1)

    if beta in (0, 1):
        return kl(q, p) if beta == 0 else kl(p, q)
    middle = (beta * q.exp() + (1 - beta) * p.exp()).log()
    return beta * kl(q, middle) + (1 - beta) * kl(p, middle)


def agree(found, right, leaves):
    torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-6)
    ours, of_right = (torch.autograd.grad(x, leaves) for x in (found, right))
    for one, other in zip(ours, of_right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all rows", "labels"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_jsd(labels, beta, T):
    x, w, tx, tw, *_ = inputs()
    rows = jsd(x @ w.T, (tx @ tw.T).detach(), beta, T)
    right = rows.mean() if labels is None else rows[labels != -100].mean()
    agree(LigerFusedLinearJSD(beta, -100, T, torch.float32)(x, w, tx, tw, labels), right, (x, w))
    assert LigerFusedLinearJSD()(x, w, tx, tw, torch.full((N,), -100)) == 0


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all rows", "labels"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_kl(labels, reduction, T):
    x, w, *_ = inputs()
    q = torch.rand(N, V, generator=torch.Generator().manual_seed(1))
    q[0, :7] = 0
    rows = (torch.xlogy(q, q) - q * (x @ w.T / T).log_softmax(-1)).sum(-1)
    rows = rows if labels is None else rows[labels != -100]
    right = rows.sum() / {"batchmean": len(rows), "mean": len(rows) * V, "sum": 1}[reduction]
    agree(LigerFusedLinearKLDivLoss(reduction, temperature=T)(x, w, q.requires_grad_(), labels), right, (x, w))


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (0.7, 0.2)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [2, 1024])
def test_jsd_beside_labels(weights, bias, chunk_size):
    x, w, tx, tw, b, tb = inputs()
    given = (b, tb) if bias else ()
    z = F.linear(x, w, *given[:1])
    soft = jsd(z, F.linear(tx, tw, *given[1:]).detach(), 0.3, 2.0)[LABELS != -100].mean()
    hard = F.cross_entropy(z, LABELS)
    loss = LigerFusedLinearJSDLoss(*weights, beta=0.3, temperature=2.0, chunk_size=chunk_size)
    right, leaves = weights[0] * hard + weights[1] * soft, (x, w, *given[:1])
    agree(loss(x, w, tx, tw, LABELS, *given), right, leaves)
    loss.return_soft_hard_loss = True
    found = loss(x, w, tx, tw, LABELS, *given)
    torch.testing.assert_close(torch.stack(found), torch.stack([right, soft, hard]), rtol=1e-5, atol=1e-6)


def test_bad_input():
    x, w, tx, tw, *_ = inputs()
    for kind, options, message in (
        (LigerFusedLinearJSD, {"jsd_beta": 1.5}, "jsd_beta: a number from 0 to 1 wanted, got 1.5"),
        (LigerFusedLinearJSD, {"temperature": 0}, "temperature: a positive finite number wanted, got 0"),
        (LigerFusedLinearJSDLoss, {"beta": -1}, "beta: a number from 0 to 1 wanted, got -1"),
        (LigerFusedLinearJSDLoss, {"chunk_size": 0}, "chunk_size: a whole number of at least 1 wanted, got 0"),
        (
            LigerFusedLinearKLDivLoss,
            {"reduction": "none"},
            "reduction: 'batchmean', 'mean' or 'sum' wanted, got 'none'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**options)
    for loss in (LigerFusedLinearJSD(), LigerFusedLinearJSDLoss()):
        with pytest.raises(ValueError, match="teacher_weight: as many classes as the student's 29 wanted, got 30"):
            loss(x, w[:29], tx, tw, LABELS)


@pytest.mark.parametrize("module", [liger, trl], ids=["liger", "trl"])
def test_examples(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0
