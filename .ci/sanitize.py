"""The losses with kernels, forward and backward on the CUDA backend, on small shapes: for compute-sanitizer.

Inputs are made and results looked at on the CPU, so that next to nothing runs on the GPU but our kernels.
"""

import itertools
import math
import time

import torch

import fastkd
from fastkd import functional, reference

CLASSES = (10, 1000, 1025, 40001)  # less than a block, vectors that fit, rows off their alignment, long rows
ROWS = (3, 300)  # several blocks a row, and more rows than blocks
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, D of the student): less than a tile, several with a rest, several blocks' features
EMBEDDINGS = ((5, 3), (150, 33), (70, 600))
# a row a block, rows off their alignment, maps whose positions fill packs and such that do not
FEATURES = ((9, 33), (3, 5003), (5, 64), (2, 12, 4, 8), (3, 70, 7, 7))
RELATIONS = ("rkd_distance", "rkd_angle", "rkd_loss", "pkt", "relational_triplet")
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
        mask = (torch.arange(N) % 3 > 0).cuda()
        for name, rows_used in itertools.product(RELATIONS, (None, mask)):
            run(name, student.to(dtype), teacher.to(dtype), mask=rows_used)
            count += 1
        weight = torch.rand(N).cuda()
        run("rkd_distance", student.to(dtype), teacher.to(dtype), mask=mask, weight=weight)
        run(
            "relational_triplet",
            student.to(dtype),
            teacher.to(dtype),
            labels=(torch.arange(N) % 4).cuda(),
            weight=weight,
        )
        count += 2
    return count


def features():
    count = 0
    for shape, dtype in itertools.product(FEATURES, (*DTYPES, torch.float64)):
        student, teacher = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        student[0] = 0  # squares out of range, which are computed another way
        rows = (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]
        mask = (torch.arange(math.prod(rows)) % 3 > 0).view(rows).cuda()
        forms = ({}, {"mask": mask}, {"reduction": "none"})
        for normalize, form in itertools.product((None, "l2", "standardize"), forms):
            run("feature_mse", student, teacher, normalize=normalize, **form)
            run("feature_smooth_l1", student, teacher, normalize=normalize, **form)
            count += 2
        if len(shape) == 4:
            run("attention_transfer", student, teacher, p=3)
            count += 1
    return count


def main():
    start = time.perf_counter()
    count = rows() + relations() + features()
    print(f"{count} losses, forward and backward, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    torch.manual_seed(0)
    with fastkd.backend("cuda"):
        main()
