"""The rows schedule: the logit losses, and their gradient to the student.

Bytes by the minimal-traffic model: forward reads student and teacher once, forward+backward
writes the gradient as well. Their rate is shown as a share of what ``copy_`` of the student's
logits reaches in the same run.
"""

import contextlib
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastkd import _backend, _check
from fastkd._calls import DistBackward, DistCall, RowsCall
from fastkd._divergences import BY_NAME, DERIVED, NON_TARGET, NUMBERS, REGISTRY, TARGET_LOSSES
from fastkd.ops import dist, head, rows
from fastkd.ops.numbers import as_tensor

from .measure import Provider, interleave
from .peers import judge, own_backends, peers, with_backend
from .truth import DistTruth, Truth, function_of, wrong

TEMPERATURE = 2.0
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
PARTS = "kd_loss parts"
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
STANDARDIZED = "kl_div standardized"
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


def logarithms(student, teacher):
    return F.log_softmax(student / TEMPERATURE, -1), F.log_softmax(teacher / TEMPERATURE, -1)


def eager(student, teacher):
    """As most training scripts have it."""
    log_p, q = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return F.kl_div(log_p, q, reduction="batchmean") * TEMPERATURE**2


def eager_log_target(student, teacher):
    """The same with the teacher's logarithms, which is often faster."""
    log_p, log_q = logarithms(student, teacher)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_soft_cross_entropy(student, teacher):
    return F.cross_entropy(student / TEMPERATURE, F.softmax(teacher / TEMPERATURE, -1)) * TEMPERATURE**2


def eager_reverse(student, teacher):
    log_p, log_q = logarithms(student, teacher)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_jensen_shannon(student, teacher):
    log_p, log_q = logarithms(student, teacher)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergences = (F.kl_div(log_m, x, reduction="batchmean", log_target=True) for x in (log_q, log_p))
    return sum(divergences) / 2 * TEMPERATURE**2


def eager_symmetric(student, teacher):
    log_p, log_q = logarithms(student, teacher)
    both = ((log_p, log_q), (log_q, log_p))
    return sum(F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in both) / 2 * TEMPERATURE**2


def eager_adaptive(student, teacher, mu=0.5):
    log_p, log_q = logarithms(student, teacher)
    with torch.no_grad():
        difference, (q, order) = (log_p.exp() - log_q.exp()).abs(), log_q.exp().sort(-1, descending=True)
        in_head = q.cumsum(-1) <= mu
        in_head[:, 0] = True
        head = torch.where(in_head, difference.gather(-1, order), 0.0).sum(-1) / difference.sum(-1)
    forward, reverse = (
        F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b in ((log_p, log_q), (log_q, log_p))
    )
    return (head * forward + (1 - head) * reverse).mean() * TEMPERATURE**2


def eager_skew(student, teacher, own=1):
    sides = logarithms(student, teacher)
    log_m = torch.logaddexp(sides[own] + math.log(0.1), sides[1 - own] + math.log(0.9))
    return F.kl_div(log_m, sides[own], reduction="batchmean", log_target=True) * TEMPERATURE**2


def eager_skew_reverse(student, teacher):
    return eager_skew(student, teacher, own=0)


def eager_total_variation(student, teacher):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return (p - q).abs().sum(-1).mean() / 2 * TEMPERATURE**2


def eager_acceptance(student, teacher):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    return -torch.minimum(p, q).sum(-1).log().mean() * TEMPERATURE**2


def eager_alpha_beta(student, teacher, alpha=0.2, beta=0.7):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    both, total = q**alpha * p**beta, alpha + beta
    rows = (both - alpha / total * q**total - beta / total * p**total).sum(-1)
    return -rows.mean() / (alpha * beta) * TEMPERATURE**2


def eager_bernoulli(student, teacher):
    """Cross-entropy less the teacher's entropy."""
    q = torch.sigmoid(teacher / TEMPERATURE)
    both, own = (F.binary_cross_entropy_with_logits(x / TEMPERATURE, q, reduction="sum") for x in (student, teacher))
    return (both - own) / len(student) * TEMPERATURE**2


@functools.cache
def targets(N, V, device):
    """A class for each row, always the same."""
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(V)).to(device)


def eager_with_targets(student, teacher, labels=None):
    hard = F.cross_entropy(student, targets(*student.shape, student.device) if labels is None else labels)
    return 0.5 * hard + 0.5 * eager_log_target(student, teacher)


def eager_with_parts(student, teacher):
    """What people log beside it: both entropies, and how often the best class is the same."""
    with torch.no_grad():
        for logits in (student, teacher):
            log_p = F.log_softmax(logits / TEMPERATURE, -1)
            (log_p.exp() * log_p).sum(-1).mean()
        (student.argmax(-1) == teacher.argmax(-1)).float().mean()
    return eager_with_targets(student, teacher)


def eager_decoupled(student, teacher):
    """As published code has it: two masks, two classes of their sums, and 1000 less for the target."""
    index = targets(*student.shape, student.device)[:, None]
    of_target = torch.zeros_like(student).scatter_(1, index, 1).bool()
    p, q = (
        torch.cat([(x * of_target).sum(1, keepdim=True), (x * ~of_target).sum(1, keepdim=True)], 1)
        for x in (F.softmax(logits / TEMPERATURE, 1) for logits in (student, teacher))
    )
    log_others, others = (x / TEMPERATURE - 1000.0 * of_target for x in (student, teacher))
    log_others, others = F.log_softmax(log_others, 1), F.softmax(others, 1)
    target_class = F.kl_div(p.log(), q, reduction="batchmean")
    other_classes = F.kl_div(log_others, others, reduction="batchmean")
    return (1.0 * target_class + 8.0 * other_classes) * TEMPERATURE**2


def eager_normalized(student, teacher):
    """As published code has it: the other classes are copied out of the logits."""
    index = targets(*student.shape, student.device)[:, None]
    log_p, q = F.log_softmax(student, 1).gather(1, index), F.softmax(teacher, 1).gather(1, index)
    others = torch.ones_like(student).scatter_(1, index, 0).bool()
    s, t = (x[others].reshape(len(x), -1) / TEMPERATURE for x in (student, teacher))
    other_classes = (F.softmax(t, 1) * F.log_softmax(s, 1)).sum(1).mean()
    return -(q * log_p).mean() - 1.5 * TEMPERATURE**2 * other_classes


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)


def eager_standardized(student, teacher):
    return eager_log_target(standardized(student), standardized(teacher))


def correlation(x, y, eps=1e-8):
    """As published: cosines of rows less their means."""
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + eps)


def eager_dist(student, teacher):
    p, q = F.softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
    inter, intra = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
    return TEMPERATURE**2 * (inter + intra)


EAGER = {  # the last one is compiled
    "kd_loss": {"eager": eager_with_targets},
    PARTS: {"eager": eager_with_parts},
    "dkd_loss": {"eager": eager_decoupled},
    "nkd_loss": {"eager": eager_normalized},
    "dist_loss": {"eager": eager_dist},
    "kl_div": {"eager": eager, "eager log_target": eager_log_target},
    "soft_cross_entropy": {"eager": eager_soft_cross_entropy},
    "reverse_kl_div": {"eager": eager_reverse},
    "js_div": {"eager": eager_jensen_shannon},
    "symmetric_kl_div": {"eager": eager_symmetric},
    "skew_kl_div": {"eager": eager_skew},
    "skew_reverse_kl_div": {"eager": eager_skew_reverse},
    "total_variation": {"eager": eager_total_variation},
    "negative_log_acceptance": {"eager": eager_acceptance},
    "alpha_beta_div": {"eager": eager_alpha_beta},
    "bernoulli_kl_div": {"eager": eager_bernoulli},
    STANDARDIZED: {"eager": eager_standardized},
    "adaptive_kl_div": {"eager": eager_adaptive},
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
