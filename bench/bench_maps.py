"""The rows schedule over maps ``[B, V, H, W]``, whose pixels are the rows: ``kl_div`` with ``dim=1``.

Rates are as in bench_rows: of the bytes that must move, as a share of what ``copy_`` reaches in the same run.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from fastkd import functional

from .bench_rows import DTYPES, STEP
from .measure import Provider, interleave
from .peers import judge, own_backends, with_backend
from .rows_eager import TEMPERATURE
from .rows_eager import eager_log_target as eager_of_rows
from .truth import Truth, wrong

NAME = "kl_div"
SHAPES = {  # [B, V, H, W], named after the data whose classes they have
    "cityscapes": (2, 19, 256, 256),
    "ade20k": (2, 150, 96, 96),
    "cityscapes-8": (8, 19, 512, 1024),
    "ade20k-8": (8, 150, 256, 256),
}
CASES = {  # shape, dtype
    "cpu": [*itertools.product(("cityscapes", "ade20k"), DTYPES)],
    "cuda": [*itertools.product(("cityscapes-8", "ade20k-8"), ("bfloat16",))],
}


def eager(student, teacher):
    """With the softmax over dimension 1, as segmentation codes have it."""
    log_p, log_q = F.log_softmax(student / TEMPERATURE, 1), F.log_softmax(teacher / TEMPERATURE, 1)
    rows = student.numel() // student.shape[1]
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * (TEMPERATURE**2 / rows)


def rows_of(x):
    """Pixels as rows ``[N, V]``."""
    return x.movedim(1, -1).flatten(0, -2)


def eager_permuted(student, teacher):
    return eager_of_rows(rows_of(student), rows_of(teacher))


def provide(label, loss, student, teacher):
    def leaf():
        return student.detach().requires_grad_(), teacher

    def answer():
        s, t = leaf()
        found = loss(s, t)
        found.backward()
        return found.detach(), rows_of(s.grad)

    return Provider(label, leaf, lambda s, t: loss(s, t).backward(), answer)


def providers(student, teacher):
    """All that can run here, and of the others why not."""
    torch._dynamo.reset()
    backends, missing = own_backends(student.device.type)
    own = functools.partial(functional.kl_div, temperature=TEMPERATURE, dim=1)
    losses = {label: with_backend(own, backend) for label, backend in backends.items()}
    losses |= {"eager": eager, "eager permuted": eager_permuted, "torch.compile": torch.compile(eager, dynamic=False)}
    found = [provide(label, loss, student, teacher) for label, loss in losses.items()]
    found.append(Provider("copy", lambda: (torch.empty_like(student), student), lambda target, x: target.copy_(x)))
    return found, missing


def test_maps(benchmark, case, rounds, device):
    model, dtype = case
    shape = SHAPES[model]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    found, missing = providers(student, teacher)
    errors = judge(found, missing, Truth(NAME, rows_of(student), rows_of(teacher), TEMPERATURE))
    results = interleave(benchmark, found, rounds * 4, 1, device)
    unit = math.prod(shape) * DTYPES[dtype].itemsize
    copy_rate = 2 * unit / results["copy"]["median_s"]
    for label, result in results.items():
        moved = (2 if label == "copy" else 3) * unit
        result.update(copy_share=moved / result["median_s"] / copy_rate, **errors.get(label, {}))
    benchmark.extra_info.update(
        case=f"{NAME} maps {'x'.join(map(str, shape))} {dtype} {STEP}", family="rows", loss=NAME, shape=shape,
        dtype=dtype, mode=STEP, gradient_bytes=unit, copy_bytes_per_s=copy_rate, providers=results, missing=missing,
        model=model,
    )  # fmt: skip
    bad = {k: e for k, e in errors.items() if k.startswith("fastkd") and wrong(e, DTYPES[dtype])}
    if bad:  # measured all the same, to be seen in the file
        pytest.fail(f"wrong beyond what a kernel may be: {bad}")
