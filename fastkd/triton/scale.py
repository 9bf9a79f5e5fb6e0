"""What backward does with gradients that forward has computed: x *= factor, which is read on the device."""

from typing import Any

import torch
import triton
import triton.language as tl

from .._calls import ScaleCall
from .layout import is_dense, one_of

BLOCK = 4096
PROGRAMS = 4096  # of one tensor, at most
TENSORS = 32  # of a launch, at most


@triton.jit
def scale_kernel(
    tensors,  # COUNT of them, [n]
    factor,  # [1]
    n,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x = one_of(tensors, tl.program_id(1), COUNT)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    by = tl.load(factor).to(dtype)
    if by != 1.0:  # NaN is not
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            values = tl.load(x + at, mask=at < n, other=0.0).to(dtype) * by
            tl.store(x + at, values.to(x.dtype.element_ty), mask=at < n)


def scale_(*arguments: Any) -> None:
    """Those of one size and dtype are one launch."""
    call = ScaleCall(*arguments)
    factor = call.factor
    alike = {}
    for x in call.x:
        if not is_dense(x):
            x.mul_(factor.reshape(()))
        elif x.numel():
            alike.setdefault((x.numel(), x.dtype), []).append(x)
    for (n, _), found in alike.items():
        for first in range(0, len(found), TENSORS):
            part = tuple(found[first : first + TENSORS])
            grid = (min(triton.cdiv(n, BLOCK), PROGRAMS), len(part))
            with torch.cuda.device_of(factor):
                scale_kernel[grid](part, factor, n, COUNT=len(part), BLOCK=BLOCK, num_warps=8)
