"""The feature losses, and their gradient to the student.

Bytes by the minimal-traffic model: student and teacher are read once and the gradient is written.
Their rate is shown as a share of what ``copy_`` of the student's features reaches in the same run.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastkd import _backend, functional
from fastkd.ops import features
from fastkd.ops.numbers import as_tensor

from .measure import Provider, interleave
from .peers import judge, own_backends, peers, with_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ON_CPU = [  # loss, layers x shape, dtype
    ("feature_mse", "1x65536x1024", "float32"),
    ("feature_mse l2", "1x65536x1024", "float32"),
    ("feature_mse standardize", "1x65536x1024", "float32"),
    ("feature_smooth_l1", "1x65536x1024", "float32"),
    ("feature_smooth_l1 l2", "1x65536x1024", "float32"),
    ("feature_smooth_l1 standardize", "1x65536x1024", "float32"),
    ("feature_smooth_l1", "1x65536x1024", "bfloat16"),
    ("feature_smooth_l1", "24x8x128x768", "bfloat16"),
    ("feature_smooth_l1 l2", "1x64x256x56x56", "float32"),
    ("feature_cosine", "1x65536x1024", "bfloat16"),
    ("feature_mse", "24x8x128x768", "bfloat16"),
    ("feature_mse l2", "1x64x256x56x56", "float32"),
    ("attention_transfer", "1x64x256x56x56", "float32"),
]
CASES = {"cpu": ON_CPU, "cuda": [*ON_CPU, ("feature_mse", "48x8x128x768", "bfloat16")]}
BETA = 0.05  # of smooth L1: of rows that are normalised, too, some differences are smaller and some larger
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}


def channels(x):
    """Where the features are."""
    return 1 if x.dim() == 4 else -1


def standardized(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def attention(x):
    return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))


EAGER = {  # of one layer
    "feature_mse": F.mse_loss,
    "feature_mse l2": lambda s, t: F.mse_loss(F.normalize(s, dim=channels(s)), F.normalize(t, dim=channels(s))),
    "feature_mse standardize": lambda s, t: F.mse_loss(standardized(s), standardized(t)),
    "feature_smooth_l1": functools.partial(F.smooth_l1_loss, beta=BETA),
    "feature_smooth_l1 l2": lambda s, t: F.smooth_l1_loss(
        F.normalize(s, dim=channels(s)), F.normalize(t, dim=channels(s)), beta=BETA
    ),
    "feature_smooth_l1 standardize": lambda s, t: F.smooth_l1_loss(standardized(s), standardized(t), beta=BETA),
    "feature_cosine": lambda s, t: (1 - F.cosine_similarity(s, t, dim=channels(s))).mean(),
    "attention_transfer": lambda s, t: (attention(s) - attention(t)).pow(2).mean(),
}


def eager(name):
    one = EAGER[name]
    return lambda students, teachers: sum(one(s, t) for s, t in zip(students, teachers, strict=True))


def own(name, backend):
    function, _, normalize = name.partition(" ")
    options = {"normalize": normalize} if normalize else {}
    if function == "feature_smooth_l1":
        options["beta"] = BETA
    loss = functools.partial(getattr(functional, function), **options)
    if function == "attention_transfer":  # takes no lists
        return with_backend(lambda students, teachers: loss(students[0], teachers[0]), backend)
    return with_backend(loss, backend)


class Truth:
    """Eager code in float64, layer by layer."""

    def __init__(self, name, students, teachers):
        self.loss, self.grads = 0.0, []
        for student, teacher in zip(students, teachers, strict=True):
            x = student.detach().double().requires_grad_()
            loss = EAGER[name](x, teacher.double())
            loss.backward()
            self.loss += loss.item()
            self.grads.append(x.grad)

    def errors(self, loss, grads):
        pairs = list(zip(grads, self.grads, strict=True))
        difference = sum((a.double() - b).square().sum() for a, b in pairs).sqrt()
        return {
            "loss_error": abs(loss.item() - self.loss) / abs(self.loss),
            "gradient_error": (difference / sum(b.square().sum() for _, b in pairs).sqrt()).item(),
        }


def provide(label, loss, students, teachers):
    def leaves():
        return [x.detach().requires_grad_() for x in students], teachers

    def answer():
        leaf, _ = leaves()
        found = loss(leaf, teachers)
        found.backward()
        return found.detach(), [x.grad for x in leaf]

    return Provider(label, leaves, lambda s, t: loss(s, t).backward(), answer)


def kernel_alone(name, backend, student, teacher):
    """Loss and gradient, written over the student: no autograd, nothing allocated."""
    op = features.OPS[_backend.namespace(backend)].fwd_
    feature = features.FEATURES[name.partition(" ")[2] or {"feature_cosine": "cosine"}.get(name, "plain")]
    beta = as_tensor(BETA) if name.startswith("feature_smooth_l1") else None
    dim = channels(student) % student.dim()
    # it makes sums, of which the losses are means: over elements, of cosines over rows
    terms = student.numel() // (student.shape[dim] if name == "feature_cosine" else 1)

    def call(s, t):
        return op(s, t, dim, feature, None, None, features.REDUCTION_NUMBERS["sum"], beta)

    def answer():
        grad = student.clone()
        return call(grad, teacher).detach() / terms, [grad.double() / terms]

    label = "fastkd kernel alone" if backend == "cpu" else f"fastkd {backend} kernel alone"
    return Provider(label, lambda: (student.clone(), teacher), call, answer)


def providers(name, students, teachers):
    """All that can run here, and of the others why not."""
    torch._dynamo.reset()
    backends, missing = own_backends(students[0].device.type)
    losses = {label: own(name, backend) for label, backend in backends.items()}
    theirs, without = peers(name, students[0].device.type)
    losses |= {"eager": eager(name), "torch.compile": torch.compile(eager(name), dynamic=False), **theirs}
    missing |= without
    found = [provide(label, loss, students, teachers) for label, loss in losses.items()]
    if len(students) == 1 and name != "attention_transfer":
        found += [kernel_alone(name, backend, students[0], teachers[0]) for backend in backends.values()]
    targets = [torch.empty_like(x) for x in students]
    found.append(Provider("copy", lambda: (targets, students), torch._foreach_copy_))
    return found, missing


def test_features(benchmark, case, rounds, device):
    name, shape, dtype = case
    layers, *shape = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    students, teachers = (
        [torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(layers)] for _ in range(2)
    )
    found, missing = providers(name, students, teachers)
    errors = judge(found, missing, Truth(name, students, teachers))
    results = interleave(benchmark, found, rounds, 1, device)
    unit = sum(x.numel() * x.element_size() for x in students)
    copy_rate = 2 * unit / results["copy"]["median_s"]
    for label, result in results.items():
        units = 2 if label == "copy" else 3
        result.update(copy_share=units * unit / result["median_s"] / copy_rate, **errors.get(label, {}))
    benchmark.extra_info.update(
        case=f"{name} {case[1]} {dtype}", family="features", loss=name, shape=[layers, *shape], dtype=dtype,
        mode="forward+backward", gradient_bytes=unit, copy_bytes_per_s=copy_rate, layers=layers, providers=results,
        missing=missing,
    )  # fmt: skip
    worst = TOLERANCE[DTYPES[dtype]]
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and not max(e.values()) <= worst}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")
