"""A teacher's K best classes, or its probabilities, beside whole logits of the student: the loss, of K + 1 classes or
of all, and its gradient.

Bytes by the minimal-traffic model: the student's logits, and probabilities, are read once and the gradient is written
(of the best classes fastkd reads the logits once more); what is K wide counts for nothing. Whole logits of the teacher
stand beside both, as what is saved is half of what the question is.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import Probabilities, TopKLogProbs, functional

from .bench_rows import DTYPES, SHAPES, STEP
from .measure import Provider, interleave
from .peers import judge, own_backends, with_backend
from .truth import ELEMENTS, wrong

K = 64
BEST, PROBABILITIES = f"best {K}", "probabilities"
CASES = {
    "cpu": [(what, "llama-2", dtype) for what in (BEST, PROBABILITIES) for dtype in ("float32", "bfloat16")],
    "cuda": [(what, "llama-3-8192", "bfloat16") for what in (BEST, PROBABILITIES)],
}


def best(teacher):
    """Of logits: indices and log-probabilities."""
    log_probs, indices = teacher.float().log_softmax(-1).topk(K)
    return indices, log_probs


def probabilities(teacher):
    """In the type of the logits, as they are stored."""
    return (teacher.float().softmax(-1).to(teacher.dtype),)


def eager_of_best(student, indices, log_probs):
    """As most training scripts have it: the bucket is 1 less the others."""
    known = F.log_softmax(student.float(), -1).gather(-1, indices), log_probs
    buckets = (torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)) for x in known)
    sides = [torch.cat(x, -1) for x in zip(known, buckets, strict=True)]
    return F.kl_div(*sides, reduction="batchmean", log_target=True)


def eager_of_probabilities(student, probabilities):
    return F.kl_div(F.log_softmax(student, -1), probabilities, reduction="batchmean")


KINDS = {  # what there is of the teacher, fastkd's form of it, and the loss by plain PyTorch
    BEST: (best, TopKLogProbs, eager_of_best),
    PROBABILITIES: (probabilities, Probabilities, eager_of_probabilities),
}


def own(form, inplace=False):
    """form: makes of what there is of the teacher what the loss takes; None: it is whole logits."""

    def loss(student, *of_teacher):
        return functional.kl_div(student, form(*of_teacher) if form else of_teacher[0], inplace=inplace)

    return loss


class Truth:
    """Over all rows in float64, and the gradient of the first."""

    def __init__(self, form, student, *of_teacher):
        step, total = max(ELEMENTS // student.shape[1], 1), 0.0
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            s = student[rows].detach().double().requires_grad_(start == 0)
            with fastkd.backend("torch"):
                given = (x[rows].double() if x.is_floating_point() else x[rows] for x in of_teacher)
                loss = functional.kl_div(s, form(*given), reduction="sum")
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


def providers(what, inputs, teacher):
    """All that can run here, and of the others why not. With whole logits the loss is another one."""
    torch._dynamo.reset()
    _, form, eager = KINDS[what]
    backends, missing = own_backends(teacher.device.type)
    found = [provide(label, with_backend(own(form), backend), inputs) for label, backend in backends.items()]
    for label, backend in backends.items():
        found.append(provide(f"{label} inplace", with_backend(own(form, True), backend), inputs, True))
        of_logits = functools.partial(provide, inputs=(inputs[0], teacher), answers=False)
        found.append(of_logits(f"{label} whole logits inplace", with_backend(own(None, True), backend), inplace=True))
    found.append(provide("eager", eager, inputs))
    found.append(provide("torch.compile", torch.compile(eager, dynamic=False), inputs))
    student, target = inputs[0], torch.empty_like(inputs[0])
    found.append(Provider("copy", lambda: (target, student), lambda target, x: target.copy_(x)))
    return found, missing


def test_teachers(benchmark, case, rounds, device):
    what, model, dtype = case
    N, V = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, V, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    given, form, _ = KINDS[what]
    inputs = student, *given(teacher)
    found, missing = providers(what, inputs, teacher)
    errors = judge(found, missing, Truth(form, *inputs))
    results = interleave(benchmark, found, rounds, 1, device)
    unit = N * V * DTYPES[dtype].itemsize
    rate = 2 * unit / results["copy"]["median_s"]
    for label, result in results.items():
        units = 2 if label == "copy" or (what == BEST and "whole" not in label) else 3
        result.update(copy_share=units * unit / result["median_s"] / rate, **errors.get(label, {}))
    name = f"kl_div of {what}"
    benchmark.extra_info.update(
        case=f"{name} {N}x{V} {dtype} {STEP}", family="rows", loss=name, shape=(N, V), dtype=dtype, mode=STEP,
        gradient_bytes=unit, copy_bytes_per_s=rate, providers=results, missing=missing, model=model,
    )  # fmt: skip
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and wrong(e, DTYPES[dtype])}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")
