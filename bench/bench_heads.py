"""A language model's head and the divergence of its logits: from hidden states ``[N, H]`` and the head's weight
``[V, H]``, both of which get a gradient, and the teacher's logits ``[N, V]``; or from those of the student and those of
the teacher ("two heads").

fastkd takes the heads in place of logits (``LinearLogits``), or its loss follows a plain linear layer; other libraries
fuse both, in chunks of rows. Rates are of the three products, or four, as a share of the rate that ``torch.mm`` reaches
in the same run. With labels beside the teacher ("head + kd_loss") PyTorch's own loss of a head is measured too, which
is that of the labels alone.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastkd import LinearLogits, functional

from .measure import Provider, interleave
from .peers import judge, own_backends, peers, with_backend
from .rows_eager import TEMPERATURE, eager_jensen_shannon, eager_log_target, eager_with_targets, targets

ONE, TWO = "head + kl_div", "two heads + kl_div"
TWO_OF_JS = "two heads + js_div"
LABELLED = "head + kd_loss"
ONE_HEAD = ONE, LABELLED
NAMES = *ONE_HEAD, TWO, TWO_OF_JS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {  # N x H x V
    "cpu": [(name, "1024x512x32000", "float32") for name in NAMES],
    "cuda": [(name, "8192x4096x128256", "bfloat16") for name in NAMES],
}
LABELS_ALONE = "F.linear_cross_entropy, of labels alone"
PRODUCT = 2048  # torch.mm of two matrices of this size
BLOCK = 2**23  # logits held in float64 at a time
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}  # logits in bfloat16 are rounded before the loss


def logits_of(teacher):
    """Of a teacher that is logits, or hidden states and a head."""
    return F.linear(*teacher) if isinstance(teacher, tuple) else teacher


def own(loss, inplace):
    return lambda hidden, weight, teacher: loss(F.linear(hidden, weight), logits_of(teacher), inplace=inplace)


def of_heads(loss):
    def call(hidden, weight, teacher):
        return loss(LinearLogits(hidden, weight), LinearLogits(*teacher) if isinstance(teacher, tuple) else teacher)

    return call


def eager_of(loss):
    def call(hidden, weight, teacher):
        return loss(F.linear(hidden, weight), logits_of(teacher))

    return call


class Truth:
    """In float64, in blocks of rows."""

    def __init__(self, loss, hidden, weight, teacher, labels=None):
        h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
        step, self.loss = max(BLOCK // len(w), 1), 0.0
        for start in range(0, len(h), step):
            rows = slice(start, start + step)
            if isinstance(teacher, tuple):
                target = teacher[0][rows].double() @ teacher[1].double().T
            else:
                target = teacher[rows].double()
            of_labels = () if labels is None else (labels[rows],)
            part = loss(h[rows] @ w.T, target, *of_labels) * len(target) / len(h)
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
        # a cross-entropy is judged as the divergence that it differs from by what nothing can change
        beside = loss.beside(teacher) if hasattr(loss, "beside") else 0
        return found.detach() - beside, (h.grad, w.grad)

    return Provider(label, leaves, lambda *inputs: loss(*inputs).backward(), answer)


def of_labels(student, teacher, **options):
    """kd_loss of logits, or of what stands in their place."""
    return functional.kd_loss(student, teacher, targets(*teacher.shape, teacher.device), **options)


LOSSES = {  # fastkd's, and by plain PyTorch
    "kl_div": (functional.kl_div, eager_log_target),
    "js_div": (functional.js_div, eager_jensen_shannon),
    "kd_loss": (of_labels, eager_with_targets),
}


def labels_alone(hidden, weight, labels):
    """PyTorch's own, in its chunks."""
    options = torch.nn.LinearCrossEntropyOptions()

    def leaves():
        return hidden.detach().requires_grad_(), weight.detach().requires_grad_()

    def run(h, w):
        F.linear_cross_entropy(h, w, labels, options=options).backward()

    return Provider(LABELS_ALONE, leaves, run)


def providers(name, hidden, weight, teacher):
    """All that can run here, and of the others why not."""
    torch._dynamo.reset()
    backends, missing = own_backends(hidden.device.type)
    ours, eager = LOSSES[name.split()[-1]]
    ours, eager = functools.partial(ours, temperature=TEMPERATURE), eager_of(eager)
    losses = {label: with_backend(of_heads(ours), backend) for label, backend in backends.items()}
    losses |= {
        f"{label} of logits inplace": with_backend(own(ours, True), backend) for label, backend in backends.items()
    }
    theirs, without = peers(name, hidden.device.type, temperature=TEMPERATURE)
    losses |= {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False), **theirs}
    found = [provide(label, loss, hidden, weight, teacher) for label, loss in losses.items()]
    if name == LABELLED and hasattr(F, "linear_cross_entropy"):
        found.append(labels_alone(hidden, weight, targets(*teacher.shape, teacher.device)))
    elif name == LABELLED:
        without[LABELS_ALONE] = f"torch {torch.__version__} has none: it is there from 2.13 on"
    a, b = (torch.randn(PRODUCT, PRODUCT, device=hidden.device).to(hidden.dtype) for _ in range(2))
    found.append(Provider("mm", lambda: (a, b), torch.mm))
    return found, missing | without


def test_heads(benchmark, case, rounds, device):
    name, shape, dtype = case
    N, H, V = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)

    def drawn(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(device, DTYPES[dtype])

    hidden, weight = drawn(N, H), drawn(V, H, scale=H**-0.5)
    teacher = drawn(N, V) if name in ONE_HEAD else (drawn(N, H), drawn(V, H, scale=H**-0.5))
    found, missing = providers(name, hidden, weight, teacher)
    labels = targets(N, V, hidden.device) if name == LABELLED else None
    errors = judge(found, missing, Truth(LOSSES[name.split()[-1]][1], hidden, weight, teacher, labels))
    results = interleave(benchmark, found, rounds, 1, device)
    rate, flops = 2 * PRODUCT**3 / results["mm"]["median_s"], (6 if name in ONE_HEAD else 8) * N * H * V
    for label, result in results.items():
        result.update(
            product_share=(2 * PRODUCT**3 if label == "mm" else flops) / result["median_s"] / rate,
            **errors.get(label, {}),
        )
    benchmark.extra_info.update(
        case=f"{name} {shape} {dtype}", family="heads", loss=name, shape=[N, H, V], dtype=dtype,
        mode="forward+backward", gradient_bytes=(N + V) * H * DTYPES[dtype].itemsize, flops=flops,
        product_flops_per_s=rate, providers=results, missing=missing,
    )  # fmt: skip
    worst = TOLERANCE[DTYPES[dtype]]
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and not max(e.values()) <= worst}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")
