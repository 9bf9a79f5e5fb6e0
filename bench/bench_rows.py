"""The rows schedule: the logit losses, and their gradient to the student.

Bytes by the minimal-traffic model: forward reads student and teacher once, forward+backward
writes the gradient as well. Their rate is shown as a share of what ``copy_`` of the student's
logits reaches in the same run.
"""

import contextlib
import functools
import itertools

import pytest
import torch

from fastkd import _backend, _check
from fastkd._calls import DistBackward, DistCall, RowsCall
from fastkd._divergences import BY_NAME, DERIVED, NON_TARGET, NUMBERS, REGISTRY, TARGET_LOSSES
from fastkd.ops import dist, head, rows
from fastkd.ops.numbers import as_tensor

from .measure import Provider, interleave
from .peers import judge, own_backends, peers, with_backend
from .rows_eager import EAGER, PARTS, STANDARDIZED, TEMPERATURE, targets
from .truth import DistTruth, Truth, function_of, wrong

SHAPES = {  # named after what has them
    "digits": (32, 10),
    "cifar": (256, 100),
    "imagenet-256": (256, 1000),
    "imagenet-4096": (4096, 1000),
    "imagenet-65536": (65536, 1000),
    "llama-2": (2048, 32000),
    "llama-2-4096": (4096, 32000),
    "llama-2-8192": (8192, 32000),
    "llama-3": (512, 128256),
    "llama-3-16": (16, 128256),
    "llama-3-8192": (8192, 128256),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEP = "forward+backward"
WITH_TARGETS = ("kd_loss", PARTS, *TARGET_LOSSES)
ON_CPU = ("digits", "imagenet-256", "imagenet-4096", "llama-2", "llama-3")
ON_GPU = (
    ("llama-3-8192", "bfloat16"),
    ("llama-2-8192", "bfloat16"),
    ("llama-2-4096", "float32"),
    ("imagenet-65536", "bfloat16"),
    ("llama-3-16", "bfloat16"),
    ("digits", "float32"),
)
CASES = {  # loss, shape, dtype, mode
    "cpu": [
        *itertools.product(["kl_div"], ON_CPU, DTYPES, ["forward", STEP]),
        *itertools.product([*list(BY_NAME)[1:], *WITH_TARGETS], ["llama-2"], ["float32"], [STEP]),
        *itertools.product(TARGET_LOSSES, ["cifar"], ["float32"], [STEP]),
        ("kd_loss", "imagenet-256", "float32", STEP),
        *itertools.product([STANDARDIZED], ["imagenet-4096", "llama-2"], ["float32"], [STEP]),
        *itertools.product(["dist_loss"], ["imagenet-256", "llama-2"], ["float32"], [STEP]),
    ],
    "cuda": [
        *(("kl_div", *at, mode) for at in ON_GPU for mode in ("forward", STEP)),
        *itertools.product(["reverse_kl_div", "js_div", *WITH_TARGETS], ["llama-3-8192"], ["bfloat16"], [STEP]),
        *itertools.product(TARGET_LOSSES, ["cifar"], ["float32"], [STEP]),
        (STANDARDIZED, "llama-3-8192", "bfloat16", STEP),
        ("dist_loss", "llama-3-8192", "bfloat16", STEP),
    ],
}


def own(name, backend, **options):
    if name in WITH_TARGETS:

        def loss(student, teacher):
            target = targets(*student.shape, student.device)
            return function_of(name)(student, teacher, target, temperature=TEMPERATURE, **options)

        return with_backend(loss, backend)
    return with_backend(functools.partial(function_of(name), temperature=TEMPERATURE, **options), backend)


def dist_alone(backend):
    ops = dist.OPS[_backend.namespace(backend)]

    def alone(student, teacher):
        call = DistCall(student, teacher, None, 1 / len(student), None, as_tensor(1.0, 1.0, TEMPERATURE, 1e-8))
        found = dist.new_outputs(call)
        ops.fwd(*call, *found)
        ops.bwd(*call, *DistBackward(found.rows, found.columns, torch.ones_like(found.loss), student))
        return found.loss

    return alone


def kernel_alone(name, backend):
    """Loss and gradient, written over the student: no autograd, nothing of its size allocated."""
    if name == "dist_loss":
        return dist_alone(backend)
    namespace, parted, derived = _backend.namespace(backend), TARGET_LOSSES.get(name), DERIVED.get(name)
    namespace = rows.standardized(namespace) if name == STANDARDIZED else namespace
    divergence = NON_TARGET.name if parted else derived.divergence if derived else name
    divergence = divergence if divergence in NUMBERS else "kl_div"
    entry = parted or REGISTRY[divergence]
    parameter, second = (0.0 if of is None else of.default for of in (entry.parameter, entry.second))

    def alone(student, teacher):
        scale = 1 / len(student)
        call = RowsCall(
            student, teacher, NUMBERS[divergence], parameter, None, TEMPERATURE, None, TEMPERATURE, None, True, None,
            None, scale, None,
        )  # fmt: skip
        if derived:
            options = _check.LogitsOptions(
                TEMPERATURE, TEMPERATURE, True, None, None, "batchmean", None, False, derived.parameter.default
            )
            call = call._replace(parameter_rows=head.student_weight(namespace, student, teacher, options))
        elif second:
            call = call._replace(second_parameter=second)
        if name in WITH_TARGETS:
            call = call._replace(target=targets(*student.shape, student.device))
            if parted:
                call = call._replace(target_loss=parted.number)
            else:
                call = call._replace(target_numbers=as_tensor(0.5, 0.5, 0.0))
        return rows.forward(namespace, call, grad=student, parts=rows.new_parts(call) if name == PARTS else None)

    return alone


def enough_sets(unit, device):
    """On a GPU inputs that would stay in its L2 from call to call are taken in turns."""
    if device == "cpu":
        return 1
    room = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return 1 if 2 * unit > room else min(max(2, -(-room // (2 * unit))), 16)


class Inputs:
    """Logits of student and teacher, and a place to copy to; what a provider is called with."""

    def __init__(self, shape, dtype, device):
        unit = shape[0] * shape[1] * dtype.itemsize

        def logits():
            return torch.randn(shape, device=device).to(dtype)

        sets = [(logits(), logits(), torch.empty(shape, dtype=dtype, device=device))
                for _ in range(enough_sets(unit, device))]  # fmt: skip
        self.first, self._next = sets[0][:2], functools.partial(next, itertools.cycle(sets))

    def leaf(self):
        student, teacher, _ = self._next()
        return student.detach().requires_grad_(), teacher

    def from_a_model(self):
        """Logits that are no leaf, as inplace wants them."""
        student, teacher = self.leaf()
        return student.clone(), teacher

    def overwritten(self):
        student, teacher, _ = self._next()
        return student.clone(), teacher

    def copied(self):
        student, _, target = self._next()
        return target, student


def provide(name, loss, inputs, mode, inplace=False):
    """A loss as it is used: with its backward, or without a gradient."""
    student, teacher = inputs.first

    def step(*logits):
        loss(*logits).backward()

    def inference(*logits):
        with torch.no_grad():
            loss(*logits)

    def answer():
        leaf = student.detach().requires_grad_()
        with contextlib.nullcontext() if mode == STEP else torch.no_grad():
            found = loss(leaf.clone() if inplace else leaf, teacher)
        if mode == STEP:
            found.backward()
        return found.detach(), leaf.grad

    call = step if mode == STEP else inference
    return Provider(name, inputs.from_a_model if inplace else inputs.leaf, call, answer)


def provide_kernel(name, kernel, inputs):
    def answer():
        grad = inputs.first[0].clone()
        return kernel(grad, inputs.first[1]), grad

    return Provider(name, inputs.overwritten, kernel, answer)


def providers(name, inputs, mode, device):
    """All that can run here, and of the others why not."""
    torch._dynamo.reset()
    backends, missing = own_backends(device)
    others = dict(EAGER[name])
    others["torch.compile"] = torch.compile(list(others.values())[-1], dynamic=False)
    theirs, without = peers(name, device, temperature=TEMPERATURE)
    others |= theirs
    missing |= without
    plain = {**{label: own(name, backend) for label, backend in backends.items()}, **others}
    found = [provide(label, loss, inputs, mode) for label, loss in plain.items()]
    if mode == STEP:
        for label, backend in backends.items():
            in_place = own(name, backend, inplace=True)
            found.append(provide(f"{label} inplace", in_place, inputs, mode, inplace=True))
            found.append(provide_kernel(f"{label} kernel alone", kernel_alone(name, backend), inputs))
    found.append(Provider("copy", inputs.copied, lambda target, x: target.copy_(x)))
    return found, missing


def measure(benchmark, name, shape, dtype, mode, rounds, device, left_out=(), **about):
    """Times all providers but those left out; ``about`` goes into the file."""
    elements = shape[0] * shape[1]
    inputs = Inputs(shape, DTYPES[dtype], device)
    found, missing = providers(name, inputs, mode, device)
    found = [provider for provider in found if provider.name not in left_out]
    target = targets(*shape, device) if name in WITH_TARGETS else None
    of_all_rows = name == "dist_loss"
    truth = (DistTruth if of_all_rows else functools.partial(Truth, name))(*inputs.first, TEMPERATURE, target)
    errors = judge(found, missing, truth)
    repeat = 50 if elements < 10_000 else 1
    results = interleave(benchmark, found, rounds * (4 if elements < 10**7 else 1), repeat, device)
    unit = elements * DTYPES[dtype].itemsize
    copy_rate = 2 * unit / results["copy"]["median_s"]
    for label, result in results.items():
        units = 2 if label == "copy" or mode == "forward" else 3
        result.update(copy_share=units * unit / result["median_s"] / copy_rate, **errors.get(label, {}))
    benchmark.extra_info.update(
        case=f"{name} {shape[0]}x{shape[1]} {dtype} {mode}", family="rows", loss=name, shape=shape, dtype=dtype,
        mode=mode, gradient_bytes=unit, copy_bytes_per_s=copy_rate, providers=results,
        missing={**missing, **dict(left_out)}, **about,
    )  # fmt: skip
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and wrong(e, DTYPES[dtype])}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")


def test_rows(benchmark, case, rounds, device):
    name, model, dtype, mode = case
    measure(benchmark, name, SHAPES[model], dtype, mode, rounds, device, model=model)
