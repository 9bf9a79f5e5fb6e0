"""fastkd.integrations.liger beside Liger itself: the losses that run without a GPU."""

import pytest
import torch
from liger_kernel import chunked_loss

from fastkd.integrations import liger

N, V = 70, 90


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = ((N, 16), (V, 16), (N, 24), (V, 24), (V,), (V,))
    parts = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    labels = torch.randint(V, (N,), generator=generator)
    labels[::3] = -100
    return parts, labels


@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (0.3, 0.8)], ids=str)
def test_jsd_beside_labels(beta, bias, weights):
    (x, w, tx, tw, b, tb), labels = inputs(torch.float32)
    options = {"beta": beta, "temperature": 2.0, "compiled": False, "chunk_size": 32, "return_soft_hard_loss": True}
    given, found = (x, w, tx, tw, labels, *((b, tb) if bias else ())), []
    for of in (liger, chunked_loss):
        parts = of.LigerFusedLinearJSDLoss(*weights, **options)(*given)
        found.append([*parts, *torch.autograd.grad(3 * parts[0], (x, w, b) if bias else (x, w))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_constructors_have_the_same_arguments():
    import inspect

    from liger_kernel.transformers import LigerFusedLinearJSD
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    for theirs in (chunked_loss.LigerFusedLinearJSDLoss, LigerFusedLinearJSD, LigerFusedLinearKLDivLoss):
        ours = getattr(liger, theirs.__name__)
        for name in ("__init__", "forward"):
            of = [inspect.signature(getattr(x, name)).parameters for x in (ours, theirs)]
            assert list(of[0]) == list(of[1])
            if name == "__init__":
                assert [x.default for x in of[0].values()] == [x.default for x in of[1].values()]
