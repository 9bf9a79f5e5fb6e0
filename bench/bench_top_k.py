"""A teacher's K best classes beside whole logits of the student: the loss of K + 1 classes, and its gradient.

Bytes by the minimal-traffic model: the student's logits are read once and the gradient is written (fastkd reads
them once more); what is K wide counts for nothing. Whole logits of the teacher stand beside it, as what is saved is
half of what the question is.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import TopKLogProbs, functional

from .bench_rows import DTYPES, SHAPES, STEP
from .measure import Provider, interleave
from .peers import judge, own_backends, with_backend
from .truth import ELEMENTS, wrong

NAME = "kl_div of the best {}"
CASES = {
    "cpu": [("64", "llama-2", "float32"), ("64", "llama-2", "bfloat16")],
    "cuda": [("64", "llama-3-8192", "bfloat16")],
}


def eager(student, indices, log_probs, _):
    """As most training scripts have it: the bucket is 1 less the others."""
    known = F.log_softmax(student.float(), -1).gather(-1, indices), log_probs
    buckets = (torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)) for x in known)
    sides = [torch.cat(x, -1) for x in zip(known, buckets, strict=True)]
    return F.kl_div(*sides, reduction="batchmean", log_target=True)


def own(inplace=False):
    return lambda student, indices, log_probs, _: functional.kl_div(
        student, TopKLogProbs(indices, log_probs), inplace=inplace
    )


def whole(inplace=False):
    return lambda student, _, __, teacher: functional.kl_div(student, teacher, inplace=inplace)


class Truth:
    """Over all rows in float64, and the gradient of the first."""

    def __init__(self, student, indices, log_probs, _):
        step, total = max(ELEMENTS // student.shape[1], 1), 0.0
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            s = student[rows].detach().double().requires_grad_(start == 0)
            with fastkd.backend("torch"):
                few = TopKLogProbs(indices[rows], log_probs[rows].double())
                loss = functional.kl_div(s, few, reduction="sum")
            if start == 0:
                loss.backward()
                self.grad = s.grad / len(student)
            total += loss.item()
        self.loss = total / len(student)

    def errors(self, loss, grad):
        difference = grad[: len(self.grad)].double() - self.grad
        return {
            "loss_error": abs(loss.item() - self.loss) / abs(self.loss),
            "gradient_error": (difference.norm() / self.grad.norm()).item(),
        }


def provide(label, loss, inputs, inplace=False, answers=True):
    student, *others = inputs

    def leaf():
        x = student.detach().requires_grad_()
        return (x.clone() if inplace else x), *others

    def answer():
        x = student.detach().requires_grad_()
        found = loss(x.clone() if inplace else x, *others)
        found.backward()
        return found.detach(), x.grad

    return Provider(label, leaf, lambda *given: loss(*given).backward(), answer if answers else None)


def providers(inputs, device):
    """All that can run here, and of the others why not. With whole logits the loss is another one."""
    torch._dynamo.reset()
    backends, missing = own_backends(device)
    found = [provide(label, with_backend(own(), backend), inputs) for label, backend in backends.items()]
    for label, backend in backends.items():
        found.append(provide(f"{label} inplace", with_backend(own(True), backend), inputs, True))
        of_logits = functools.partial(provide, inputs=inputs, answers=False)
        found.append(of_logits(f"{label} whole logits inplace", with_backend(whole(True), backend), inplace=True))
    found.append(provide("eager", eager, inputs))
    found.append(provide("torch.compile", torch.compile(eager, dynamic=False), inputs))
    student, target = inputs[0], torch.empty_like(inputs[0])
    found.append(Provider("copy", lambda: (target, student), lambda target, x: target.copy_(x)))
    return found, missing


def test_top_k(benchmark, case, rounds, device):
    K, model, dtype = case
    N, V = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, V, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    log_probs, indices = teacher.float().log_softmax(-1).topk(int(K))
    inputs = student, indices, log_probs, teacher
    found, missing = providers(inputs, device)
    errors = judge(found, missing, Truth(*inputs))
    results = interleave(benchmark, found, rounds, 1, device)
    unit = N * V * DTYPES[dtype].itemsize
    rate = 2 * unit / results["copy"]["median_s"]
    for label, result in results.items():
        units = 3 if "whole" in label else 2
        result.update(copy_share=units * unit / result["median_s"] / rate, **errors.get(label, {}))
    name = NAME.format(K)
    benchmark.extra_info.update(
        case=f"{name} {N}x{V} {dtype} {STEP}", family="rows", loss=name, shape=(N, V), dtype=dtype, mode=STEP,
        gradient_bytes=unit, copy_bytes_per_s=rate, providers=results, missing=missing, model=model,
    )  # fmt: skip
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and wrong(e, DTYPES[dtype])}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")
