"""Every logit loss forward and backward on the CUDA backend, on small shapes: what compute-sanitizer watches.

Inputs are made and results looked at on the CPU, so that next to nothing runs on the GPU but our kernels.
"""

import itertools
import time

import torch

import fastkd
from fastkd import functional, reference

CLASSES = (10, 1000, 1025, 40001)  # less than a block, vectors that fit, rows off their alignment, long rows
ROWS = (3, 300)  # several blocks a row, and more rows than blocks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ({}, {"inplace": True}, {"reduction": "none"})


def run(loss, student, teacher, mask, form):
    leaf = student.cuda().requires_grad_()
    logits = leaf.clone() if "inplace" in form else leaf
    out = loss(logits, teacher.cuda(), temperature=2.0, mask=mask, **form)
    out.backward(torch.ones(out.shape).cuda())
    if not (out.detach().cpu().isfinite().all() and leaf.grad.cpu().isfinite().all()):
        raise SystemExit(f"not finite: {loss.__name__} {list(student.shape)} {student.dtype} {form}")


def main():
    count, start = 0, time.perf_counter()
    for N, V, dtype in itertools.product(ROWS, CLASSES, DTYPES):
        student, teacher = torch.randn(N, V).to(dtype), torch.randn(N, V).to(dtype)
        mask = (torch.arange(N) % 3 > 0).cuda()
        # the largest in one form only: under the sanitizer it takes its time
        forms = FORMS if N * V < 10**6 else FORMS[:1]
        for name, rows, form in itertools.product(reference.DIVERGENCES, (None, mask), forms):
            run(getattr(functional, name), student, teacher, rows, form)
            count += 1
    print(f"{count} losses, forward and backward, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    torch.manual_seed(0)
    with fastkd.backend("cuda"):
        main()
