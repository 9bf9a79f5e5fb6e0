"""The losses with kernels, forward and backward on the CUDA backend, on small shapes: for compute-sanitizer.

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
# (N, D of the student): less than a tile, several with a rest, several blocks' features
EMBEDDINGS = ((5, 3), (150, 33), (70, 600))
RELATIONS = ("rkd_distance", "rkd_angle", "rkd_loss")
FORMS = ({}, {"inplace": True}, {"reduction": "none"})


def run(name, student, teacher, **options):
    leaf = student.cuda().requires_grad_()
    given = leaf.clone() if "inplace" in options else leaf
    out = getattr(functional, name)(given, teacher.cuda(), **options)
    out.backward(torch.ones(out.shape, dtype=out.dtype).cuda())
    if not (out.detach().cpu().isfinite().all() and leaf.grad.cpu().isfinite().all()):
        raise SystemExit(f"not finite: {name} {list(student.shape)} {student.dtype} {options}")


def rows():
    count = 0
    for N, V, dtype in itertools.product(ROWS, CLASSES, DTYPES):
        student, teacher = torch.randn(N, V).to(dtype), torch.randn(N, V).to(dtype)
        mask = (torch.arange(N) % 3 > 0).cuda()
        # the largest in one form only: under the sanitizer it takes its time
        forms = FORMS if N * V < 10**6 else FORMS[:1]
        for name, rows_used, form in itertools.product(reference.DIVERGENCES, (None, mask), forms):
            run(name, student, teacher, temperature=2.0, mask=rows_used, **form)
            count += 1
    return count


def relations():
    count = 0
    for (N, D), dtype in itertools.product(EMBEDDINGS, (*DTYPES, torch.float64)):
        student, teacher = torch.randn(N, D), torch.randn(N, D // 2 + 1)
        student[-2:] = student[:2]  # equal samples, whose distances are computed another way
        for name in RELATIONS:
            run(name, student.to(dtype), teacher.to(dtype))
            count += 1
    return count


def main():
    start = time.perf_counter()
    count = rows() + relations()
    print(f"{count} losses, forward and backward, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    torch.manual_seed(0)
    with fastkd.backend("cuda"):
        main()
