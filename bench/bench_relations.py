"""The relational losses, and their gradient to the student.

Beside them stands the published code. Rates are of the least work: every pair's inner products once
per side, the products that make the gradient, 30 operations a triple of the angles; what a schedule
computes again, because it holds no N x N matrix, does not count. They are shown as a share of the rate
that ``torch.mm`` reaches in the same run.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from fastkd import functional

from .measure import Provider, interleave
from .peers import judge, own_backends, peers, with_backend
from .relations_truth import Truth, wrong

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = {  # loss, N x D or B x N x D, dtype
    "cpu": [
        *(("rkd_distance", shape, "float32") for shape in ("256x512", "1024x512", "4096x512", "8192x256")),
        ("rkd_distance", "4096x512", "bfloat16"),
        ("rkd_distance", "32768x128", "float32"),
        *(("rkd_angle", shape, "float32") for shape in ("256x512", "512x512")),
        ("rkd_loss", "256x512", "float32"),
        *(("similarity_preserving", shape, "float32") for shape in ("256x512", "8192x256")),
        *(("gram_mse", shape, "float32") for shape in ("256x512", "8192x256", "8x1024x384")),
        *(("relation_kl", shape, "float32") for shape in ("256x512", "4096x256", "96x512x64")),
        *(("pkt", shape, "float32") for shape in ("256x512", "4096x256")),
        *(("relational_triplet", shape, "float32") for shape in ("512x256", "4096x256")),
        *((name, "32x128", "float32") for name in ("similarity_preserving", "gram_mse", "relation_kl", "pkt")),
    ],
    "cuda": [
        *(("rkd_distance", shape, "bfloat16") for shape in ("1024x512", "16384x512", "65536x512")),
        *(("rkd_distance", shape, "float32") for shape in ("256x512", "4096x512")),
        *(("rkd_angle", shape, "float32") for shape in ("256x512", "512x512", "1024x512")),
        ("rkd_loss", "256x512", "float32"),
        *(("similarity_preserving", shape, "float32") for shape in ("256x512", "8192x256")),
        *(("gram_mse", shape, "float32") for shape in ("8192x256", "8x1024x384")),
        *(("relation_kl", shape, "bfloat16") for shape in ("16384x512", "96x512x64")),
        *((name, "4096x256", "float32") for name in ("relation_kl", "pkt", "relational_triplet")),
        ("relational_triplet", "512x256", "float32"),
    ],
}
CLASSES = 16  # of relational_triplet
PRODUCT = 2048  # torch.mm of two matrices of this size
MOST_BYTES = 12 << 30  # that the published code may hold


def distances(x):
    squares = x.square().sum(1)
    d = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
    return d * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def eager_distance(student, teacher):
    with torch.no_grad():
        t = distances(teacher)
        t = t / t[t > 0].mean()
    s = distances(student)
    return F.smooth_l1_loss(s / s[s > 0].mean(), t)


def cosines(x):
    """[N, N, N]"""
    unit = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(unit, unit.transpose(1, 2))


def eager_angle(student, teacher):
    with torch.no_grad():
        t = cosines(teacher)
    return F.smooth_l1_loss(cosines(student), t)


def eager_both(student, teacher):
    return 25 * eager_distance(student, teacher) + 50 * eager_angle(student, teacher)


def eager_similarity(student, teacher):
    with torch.no_grad():
        t = F.normalize(teacher @ teacher.T, dim=1)
    return (F.normalize(student @ student.T, dim=1) - t).square().sum() / len(student) ** 2


def eager_gram(student, teacher):
    with torch.no_grad():
        t = F.normalize(teacher, dim=-1)
        t = t @ t.mT
    s = F.normalize(student, dim=-1)
    return F.mse_loss(s @ s.mT, t)


def eager_relation_kl(student, teacher):
    itself = torch.eye(student.shape[-2], dtype=torch.bool, device=student.device)

    def similarities(x):  # -inf would be NaN in F.kl_div
        return (x @ x.mT / x.shape[-1] ** 0.5).masked_fill(itself, torch.finfo(x.dtype).min).flatten(0, -2)

    with torch.no_grad():
        q = F.softmax(similarities(teacher), dim=-1)
    return F.kl_div(F.log_softmax(similarities(student), dim=-1), q, reduction="batchmean")


def eager_pkt(student, teacher, eps=1e-7):
    def probabilities(x):
        x = x / (x.norm(dim=1, keepdim=True) + eps)
        k = (x @ x.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    with torch.no_grad():
        t = probabilities(teacher)
    return (t * torch.log((t + eps) / (probabilities(student) + eps))).mean()


def class_of(x):
    """Of each sample, one of CLASSES."""
    return torch.arange(len(x), device=x.device) % CLASSES


def eager_triplet(student, teacher):
    labels, d = class_of(student), distances(student)
    alike = labels[:, None] == labels
    itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
    triplets = (alike & ~itself)[:, :, None] & ~alike[:, None, :]
    e = torch.relu(1 + d[:, :, None] - d[:, None, :]) * triplets
    return (e.sum((1, 2)) / (~alike).sum(1)).sum() / len(student)


EAGER = {
    "rkd_distance": eager_distance,
    "rkd_angle": eager_angle,
    "rkd_loss": eager_both,
    "similarity_preserving": eager_similarity,
    "gram_mse": eager_gram,
    "relation_kl": eager_relation_kl,
    "pkt": eager_pkt,
    "relational_triplet": eager_triplet,
}


def eager_bytes(name, shape, itemsize):
    """Of the largest tensors that the published code holds at once."""
    *B, N, D = shape
    pairs, triples = 10 * math.prod(B) * N * N, 3 * N * N * D + 3 * N**3
    if name == "relational_triplet":
        triples = 4 * N**3
    return itemsize * (triples if name in ("rkd_angle", "rkd_loss", "relational_triplet") else pairs)


def least_flops(name, shape):
    *B, N, D = shape
    distance, angle = 4 * N * N * D, 4 * N * N * D + 15 * N**3
    samples, features = 2 * N * N * 4 * D, 20 * N * D * D
    return (
        math.prod(B)
        * {
            "rkd_distance": distance,
            "rkd_angle": angle,
            "rkd_loss": distance + angle,
            "similarity_preserving": min(samples // 2, features),
            "gram_mse": min(samples // 2, features // 2),
            "relation_kl": samples // 2,
            "pkt": samples // 2,
            "relational_triplet": 3 * N * N * D,
        }[name]
    )


def by_classes(student, teacher):
    return functional.relational_triplet(student, labels=class_of(student))


def own(name, backend):
    return with_backend(by_classes if name == "relational_triplet" else getattr(functional, name), backend)


def provide(name, loss, student, teacher):
    def leaf():
        return student.detach().requires_grad_(), teacher

    def answer():
        x, _ = leaf()
        found = loss(x, teacher)
        found.backward()
        return found.detach(), x.grad

    return Provider(name, leaf, lambda x, y: loss(x, y).backward(), answer)


def settings_of(name, student):
    """What other libraries' losses take."""
    if name != "relational_triplet":
        return {}
    labels = class_of(student)
    return {"labels": labels, "negatives": (labels != 0).sum().item()}


def providers(name, student, teacher):
    """All that can run here, and of the others why not."""
    torch._dynamo.reset()
    backends, missing = own_backends(student.device.type)
    losses = {label: own(name, backend) for label, backend in backends.items()}
    held = eager_bytes(name, student.shape, student.element_size())
    work = student.shape[-2] * student.numel()
    theirs, without = peers(name, student.device.type, held, MOST_BYTES, work, **settings_of(name, student))
    if student.dim() > 2 or student.dtype is not torch.float32:  # written for one batch, and float32
        without |= dict.fromkeys(theirs, "compared in float32, of one batch")
        theirs = {}
    if held <= MOST_BYTES:
        losses |= {"eager": EAGER[name], "torch.compile": torch.compile(EAGER[name], dynamic=False)}
    else:
        missing |= dict.fromkeys(("eager", "torch.compile"), f"would hold {held / 2**30:.0f} GiB")
    found = [provide(label, loss, student, teacher) for label, loss in (losses | theirs).items()]
    a, b = (torch.randn(PRODUCT, PRODUCT, device=student.device).to(student.dtype) for _ in range(2))
    found.append(Provider("mm", lambda: (a, b), torch.mm))
    return found, missing | without


def measure(benchmark, name, sizes, dtype, rounds, device, left_out=(), **about):
    """Times all providers but those left out; ``about`` goes into the file."""
    N = math.prod(sizes[:-1])
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(sizes, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    found, missing = providers(name, student, teacher)
    found = [provider for provider in found if provider.name not in left_out]
    labels = class_of(student) if name == "relational_triplet" else None
    truth = Truth(name, student, teacher, labels)
    errors = judge(found, missing, truth)
    flops, heavy = least_flops(name, sizes), device == "cpu" and (N > 2048 or ("distance" not in name and N > 256))
    results = interleave(benchmark, found, min(rounds, 3) if heavy else rounds, 1, device)
    rate = 2 * PRODUCT**3 / results["mm"]["median_s"]
    for label, result in results.items():
        result.update(
            product_share=(2 * PRODUCT**3 if label == "mm" else flops) / result["median_s"] / rate,
            **errors.get(label, {}),
        )
    itemsize = DTYPES[dtype].itemsize
    benchmark.extra_info.update(
        case=f"{name} {'x'.join(map(str, sizes))} {dtype}", family="relations", loss=name, shape=sizes, dtype=dtype,
        mode="forward+backward", gradient_bytes=N * sizes[-1] * itemsize, flops=flops, product_flops_per_s=rate,
        providers=results, missing={**missing, **dict(left_out)}, **about,
    )  # fmt: skip
    kinks = 0.0
    if name == "relational_triplet":
        plain = Truth(name, student, teacher, labels, torch.float32)
        kinks = truth.errors(plain.loss, plain.grad)["gradient_error"]
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and wrong(e, DTYPES[dtype], kinks)}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")


def test_relations(benchmark, case, rounds, device):
    name, shape, dtype = case
    measure(benchmark, name, [int(x) for x in shape.split("x")], dtype, rounds, device)
