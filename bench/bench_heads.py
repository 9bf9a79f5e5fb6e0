"""A language model's head and the divergence of its logits: from hidden states ``[N, H]`` and the head's weight
``[V, H]``, both of which get a gradient, and the teacher's logits ``[N, V]``.

fastkd's loss follows a plain linear layer; other libraries fuse both, in chunks of rows. Rates are of the
three products, as a share of the rate that ``torch.mm`` reaches in the same run.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastkd import functional

from .bench_rows import TEMPERATURE, eager_log_target
from .measure import Provider, interleave
from .peers import judge, own_backends, peers, with_backend

NAME = "head + kl_div"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {"cpu": [("1024x512x32000", "float32")], "cuda": [("8192x4096x128256", "bfloat16")]}  # N x H x V
PRODUCT = 2048  # torch.mm of two matrices of this size
BLOCK = 2**23  # logits held in float64 at a time
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}  # logits in bfloat16 are rounded before the loss


def own(inplace):
    loss = functools.partial(functional.kl_div, temperature=TEMPERATURE, inplace=inplace)
    return lambda hidden, weight, teacher: loss(F.linear(hidden, weight), teacher)


def eager(hidden, weight, teacher):
    return eager_log_target(F.linear(hidden, weight), teacher)


class Truth:
    """In float64, in blocks of rows."""

    def __init__(self, hidden, weight, teacher):
        h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
        step, self.loss = max(BLOCK // len(w), 1), 0.0
        for start in range(0, len(h), step):
            rows = slice(start, start + step)
            log_p = F.log_softmax(h[rows] @ w.T / TEMPERATURE, -1)
            log_q = F.log_softmax(teacher[rows].double() / TEMPERATURE, -1)
            part = F.kl_div(log_p, log_q, reduction="sum", log_target=True) * TEMPERATURE**2 / len(h)
            part.backward()
            self.loss += part.item()
        self.grads = h.grad, w.grad

    def errors(self, loss, grads):
        """The gradient's is the larger of the two."""
        found = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads, self.grads, strict=True)]
        return {"loss_error": abs(float(loss) - self.loss) / abs(self.loss), "gradient_error": max(found)}


def provide(label, loss, hidden, weight, teacher):
    def leaves():
        return hidden.detach().requires_grad_(), weight.detach().requires_grad_(), teacher

    def answer():
        h, w, _ = leaves()
        found = loss(h, w, teacher)
        found.backward()
        return found.detach(), (h.grad, w.grad)

    return Provider(label, leaves, lambda *inputs: loss(*inputs).backward(), answer)


def providers(hidden, weight, teacher):
    """All that can run here, and of the others why not."""
    torch._dynamo.reset()
    backends, missing = own_backends(hidden.device.type)
    losses = {label: with_backend(own(False), backend) for label, backend in backends.items()}
    losses |= {f"{label} inplace": with_backend(own(True), backend) for label, backend in backends.items()}
    theirs, without = peers(NAME, hidden.device.type, temperature=TEMPERATURE)
    losses |= {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False), **theirs}
    found = [provide(label, loss, hidden, weight, teacher) for label, loss in losses.items()]
    a, b = (torch.randn(PRODUCT, PRODUCT, device=hidden.device).to(hidden.dtype) for _ in range(2))
    found.append(Provider("mm", lambda: (a, b), torch.mm))
    return found, missing | without


def test_heads(benchmark, case, rounds, device):
    shape, dtype = case
    N, H, V = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        (torch.randn(*size, generator=generator) * scale).to(device, DTYPES[dtype])
        for size, scale in (((N, H), 1.0), ((V, H), H**-0.5), ((N, V), 1.0))
    )
    found, missing = providers(hidden, weight, teacher)
    errors = judge(found, missing, Truth(hidden, weight, teacher))
    results = interleave(benchmark, found, rounds, 1, device)
    rate, flops = 2 * PRODUCT**3 / results["mm"]["median_s"], 6 * N * H * V
    for label, result in results.items():
        result.update(
            product_share=(2 * PRODUCT**3 if label == "mm" else flops) / result["median_s"] / rate,
            **errors.get(label, {}),
        )
    benchmark.extra_info.update(
        case=f"{NAME} {shape} {dtype}", family="heads", loss=NAME, shape=[N, H, V], dtype=dtype,
        mode="forward+backward", gradient_bytes=(N + V) * H * DTYPES[dtype].itemsize, flops=flops,
        product_flops_per_s=rate, providers=results, missing=missing,
    )  # fmt: skip
    worst = TOLERANCE[DTYPES[dtype]]
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and not max(e.values()) <= worst}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")
