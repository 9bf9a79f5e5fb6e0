"""What the tests of TopKLogProbs share: inputs, the loss of these classes by hand, and a comparison of both."""

import functools

import torch
from rows_checks import storage_error
from tolerances import FLOOR, error

import fastkd
from fastkd import TopKLogProbs, functional
from fastkd._divergences import BY_NAME

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEADING, V, K = (3, 7), 60, 6
TARGET = torch.arange(21).reshape(LEADING) * 17 % (V - 8)
TARGET[1, 2] = -100
ROWS = torch.rand(LEADING, generator=torch.Generator().manual_seed(0))
MASK = ROWS < 0.6
NAMES = [name for name in BY_NAME if name != "bernoulli_kl_div"]
LOSSES = {name: getattr(functional, name) for name in NAMES}
LOSSES |= {
    f"kd_loss of {name}": functools.partial(functional.kd_loss, target=TARGET, divergence=name)
    for name in ("kl_div", "js_div")
}
TAILS = ("bucket", "renormalize")
OPTIONS = {
    "plain": {},
    "masked": {"mask": MASK, "reduction": "none"},
    "of_rows": {"temperature": 0.5 + ROWS, "teacher_temperature": 2.0, "weight": 1 + ROWS},
    "num_classes": {"num_classes": V - 8, "mask": MASK, "normalizer": 3.0},
}


def inputs(dtype=torch.float32, leading=LEADING, classes=V - 8, V=V, K=K, padded=True):
    """A student's logits, and a teacher's best classes with log-probabilities; of some rows padding, in any order."""
    generator = torch.Generator().manual_seed(V + K)
    student = 2 * torch.randn(*leading, V, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(*leading, classes, generator=generator, dtype=torch.float64)
    log_probs, indices = teacher.log_softmax(-1).topk(K)
    order = torch.randperm(K, generator=generator)
    log_probs, indices = log_probs[..., order], indices[..., order]
    if padded and len(leading) == 2:
        indices[0, 1, ::2] = -1
        indices[2, 2] = -5  # a row of padding
        log_probs[0, 1, 0] = torch.nan  # which may hold anything
    return student.to(dtype), indices, log_probs.to(dtype)


def dense(student, indices, log_probs, tail, T, scale=1.0, log_tail=None):
    """By hand: logits of both sides over the classes that are known, and the bucket, class by class."""
    rows = []
    T = (
        T.expand(student.shape[:-1]).reshape(-1)
        if isinstance(T, torch.Tensor)
        else [T] * (student.numel() // student.shape[-1])
    )
    tails = [None] * len(T) if log_tail is None else log_tail.reshape(-1)
    flat = (x.reshape(-1, x.shape[-1]) for x in (student, indices, log_probs))
    for z, index, log_q, t, rest in zip(*flat, T, tails, strict=True):
        there = index >= 0
        known = index[there]
        s, q = z[known], log_q[there] * scale
        if tail == "bucket":
            others = torch.ones(len(z), dtype=torch.bool)
            others[known] = False
            left = 1 - log_q[there].exp().sum() if rest is None else rest.exp()
            s = torch.cat([s, t * torch.logsumexp(z[others] / t, 0, keepdim=True)])
            q = torch.cat([q, scale * left.clamp(min=0).log()[None]])
        lacking = len(index) + (tail == "bucket") - len(s)
        nothing = torch.full((lacking,), -torch.inf, dtype=s.dtype)
        rows.append([torch.cat([s, nothing]), torch.cat([q, nothing])])
    return [torch.stack(x).view(*student.shape[:-1], -1) for x in zip(*rows, strict=True)]


def truth(name, student, indices, log_probs, tail, scale=1.0, upstream=None, log_tail=None, **options):
    """Loss and gradient in float64."""
    student = student.detach().double().requires_grad_()
    counted = student[..., : options.pop("num_classes", None)]
    z = torch.where(options["mask"][..., None], counted, 0.0) if "mask" in options else counted
    s, t = dense(z, indices, log_probs.double(), tail, options.get("temperature", 1.0), scale, log_tail)
    _, _, divergence = name.rpartition("kd_loss of ")
    with fastkd.backend("torch"):
        loss = getattr(functional, divergence)(s, t.detach(), **options)
        if "kd_loss" in name:
            of_rows = {
                key: x for key, x in options.items() if key not in ("temperature", "teacher_temperature", "weight")
            }
            mask = options.get("mask", torch.ones(LEADING, dtype=torch.bool)) & (TARGET != -100)
            loss = getattr(functional, divergence)(s, t.detach(), **options | {"mask": mask})
            loss = 0.5 * loss + functional.kd_loss(
                z, z.detach(), TARGET, soft_weight=0.0, weight=options.get("weight"), **of_rows
            )
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def run(
    name, student, indices, log_probs, tail="bucket", scale=1.0, upstream=None, log_tail=None, least=None, **options
):
    leaf = student.detach().clone().requires_grad_()
    few = TopKLogProbs(indices, log_probs, tail=tail, temperature=scale, log_tail=log_tail, log_prob_min=least)
    loss = LOSSES[name](leaf, few, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def check(name, student, *few, times=16, **options):
    loss, grad = run(name, student, *few, **options)
    right, of_right = truth(name, student, *few, **options)
    compute = torch.float64 if student.dtype is torch.float64 else torch.float32
    assert loss.dtype == compute
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert error(loss, right) <= times * FLOOR[compute]
    assert error(grad, of_right) <= times * FLOOR[compute] + storage_error(grad, of_right)
    return loss, grad
