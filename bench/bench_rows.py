"""The rows schedule: kl_div from logits to loss, and to the student's gradient.

Bytes by the minimal-traffic model: forward reads student and teacher once, forward+backward
writes the gradient as well. Their rate is shown as a share of what ``copy_`` of the student's
logits reaches in the same run.
"""

import pytest
import torch
import torch.nn.functional as F

from fastkd import _backend, functional
from fastkd.ops import rows

from .measure import Provider, interleave

TEMPERATURE = 2.0
SHAPES = {  # named after what has them
    "digits": (32, 10),
    "imagenet-256": (256, 1000),
    "imagenet-4096": (4096, 1000),
    "llama-2": (2048, 32000),
    "llama-3": (512, 128256),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def fast(student, teacher):
    return functional.kl_div(student, teacher, temperature=TEMPERATURE)


def fast_inplace(student, teacher):
    return functional.kl_div(student, teacher, temperature=TEMPERATURE, inplace=True)


def eager(student, teacher):
    """As most training scripts have it."""
    log_p, q = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2


def eager_log_target(student, teacher):
    """The same with the teacher's logarithms, which is often faster."""
    log_p, log_q = F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * TEMPERATURE**2


def kernel_alone(student, teacher):
    """Loss and gradient, written over the student: no autograd, nothing allocated."""
    ops = rows.OPS[_backend.namespace(_backend.select(student.device))]
    ops.fwd_(student, teacher, 0, 0.0, TEMPERATURE, None, TEMPERATURE, None, True, None, None, 2, None, None)


def providers(shape, dtype, mode):
    torch._dynamo.reset()
    compiled = torch.compile(eager_log_target, dynamic=False)
    student, teacher = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    target = torch.empty_like(student)

    def leaf():
        return student.detach().requires_grad_(), teacher

    def from_a_model():  # logits that are no leaf, as inplace wants them
        return leaf()[0].clone(), teacher

    def step(loss):
        return lambda *logits: loss(*logits).backward()

    def inference(loss):
        def call(*logits):
            with torch.no_grad():
                loss(*logits)

        return call

    losses = {"fastkd": fast, "eager": eager, "eager log_target": eager_log_target, "torch.compile": compiled}
    wrap = {"forward": inference, "forward+backward": step}[mode]
    found = [Provider(name, leaf, wrap(loss)) for name, loss in losses.items()]
    if mode == "forward+backward":
        found.append(Provider("fastkd inplace", from_a_model, step(fast_inplace)))
        found.append(Provider("fastkd kernel alone", lambda: (student.clone(), teacher), kernel_alone))
    found.append(Provider("copy", lambda: (target, student), lambda a, b: a.copy_(b)))
    return found


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", SHAPES)
def test_kl_div(benchmark, model, dtype, mode, rounds):
    shape = SHAPES[model]
    elements = shape[0] * shape[1]
    repeat = 50 if elements < 10_000 else 1
    results = interleave(
        benchmark, providers(shape, DTYPES[dtype], mode), rounds * (4 if elements < 10**7 else 1), repeat
    )
    unit = elements * DTYPES[dtype].itemsize
    copy_rate = 2 * unit / results["copy"]["median_s"]
    for name, result in results.items():
        units = 2 if name == "copy" or mode == "forward" else 3
        result["copy_share"] = units * unit / result["median_s"] / copy_rate
    benchmark.extra_info.update(
        case=f"kl_div {shape[0]}x{shape[1]} {dtype} {mode}", model=model, shape=shape, dtype=dtype, mode=mode,
        gradient_bytes=unit, providers=results,
    )  # fmt: skip
