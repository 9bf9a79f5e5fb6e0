"""Launches the kernels of the dist schedule."""

from typing import Any

import torch
import triton
import triton.language as tl

from .._calls import DistBackward, DistCall, DistForward
from .._dtypes import compute_dtype
from ..ops.dist import read_numbers
from .dist_kernels import dist_bwd_kernel, dist_columns_kernel, dist_rows_kernel, dist_slopes_kernel
from .registers import limited
from .rows import backward_configuration, layout_of, side_by_side

# Elements of a tile that goes down rows, by the bytes of an element: a thread adds up nine float64 of each class that
# it reads at once, 16 bytes of them.
TILE = {2: 512, 4: 1024, 8: 512}
PARTS, FEWEST_CHUNKS = 65536, 8  # chunks of rows times classes, as far as there are not fewer chunks
ROWS_OF_CHUNK = 64  # at least
SLOPES_BLOCK = 256


def _prepared(call, grad=None):
    """Layouts, the run of rows side by side, and the rest of what a kernel that walks along rows is launched with."""
    student, teacher = call.student, call.teacher
    dtype, V = compute_dtype(student, teacher), student.shape[-1]
    N = student.numel() // V
    layouts = [layout_of(x) for x in (student, teacher, grad) if x is not None]
    run = side_by_side(N, layouts)
    rows, block, warps = backward_configuration(V, max(student.element_size(), teacher.element_size()), run)
    if run is not None:  # p, q and p - q, and five sums of them: half as many in a thread fit
        warps = min(16, 2 * warps)
    programs = triton.cdiv(N, rows) if run is None else N // run * triton.cdiv(run, rows)
    arguments = [value for layout in layouts for value in layout]
    options = {"dtype": _triton(dtype), "ROWS": rows, "BLOCK": block, "num_warps": warps, **limited(dtype)}
    return arguments, programs, N, V, run, options


def _triton(dtype):
    return tl.float64 if dtype is torch.float64 else tl.float32


def _columns_launch(N, V, element_size, run):
    """Rows of a chunk, and the tile."""
    chunks = min(max(PARTS // V, FEWEST_CHUNKS), triton.cdiv(N, ROWS_OF_CHUNK))
    block = 16 if run is not None else max(16, min(128, triton.next_power_of_2(V)))
    rows = TILE[element_size] // block
    return triton.cdiv(triton.cdiv(N, chunks), rows) * rows, rows, block


def dist_fwd(*arguments: Any) -> None:
    call, out = DistCall(*arguments[: len(DistCall._fields)]), DistForward(*arguments[len(DistCall._fields) :])
    inter_weight, intra_weight, temperature, eps = read_numbers(call.numbers)
    tensors, programs, N, V, run, options = _prepared(call)
    dtype, padded = out.loss.dtype, out.columns.shape[1]
    row_losses = out.rows.new_empty(N)
    column_losses = out.rows.new_empty(V)
    t_squared = temperature**2
    chunks, parts = 0, column_losses
    with torch.cuda.device_of(call.student):
        if N > 0:
            dist_rows_kernel[(programs,)](
                *tensors, call.mask, call.scale_tensor, call.scale, inter_weight * t_squared, temperature, eps,
                row_losses, out.rows, N, V, run, **options,
            )  # fmt: skip
        if N > 0 and intra_weight != 0:
            narrowest = min(call.student.element_size(), call.teacher.element_size()) if dtype is torch.float32 else 8
            rows_of_chunk, rows, block = _columns_launch(N, V, narrowest, run)
            chunks = triton.cdiv(N, rows_of_chunk)
            parts = out.rows.new_empty(chunks, 9, V)
            dist_columns_kernel[(triton.cdiv(V, block), chunks)](
                *tensors, call.mask, temperature, out.rows, parts, N, V, rows_of_chunk,
                dtype=options["dtype"], ROWS=rows, BLOCK=block, num_warps=4,
            )  # fmt: skip
        dist_slopes_kernel[(triton.cdiv(padded, SLOPES_BLOCK),)](
            parts, intra_weight * t_squared / V, eps, column_losses, out.columns, chunks, V, padded,
            BLOCK=SLOPES_BLOCK, num_warps=4,
        )  # fmt: skip
        scale = call.scale if call.scale_tensor is None else call.scale_tensor
        loss = t_squared * (inter_weight * scale * row_losses.sum() + intra_weight / V * column_losses.sum())
        if N == 0:
            loss = torch.zeros_like(loss)
        elif call.scale_tensor is not None:
            loss = torch.where(call.scale_tensor == 0, 0.0, loss)
        out.loss.copy_(loss)


def dist_bwd(*arguments: Any) -> None:
    call, rest = DistCall(*arguments[: len(DistCall._fields)]), DistBackward(*arguments[len(DistCall._fields) :])
    _, _, temperature, _ = read_numbers(call.numbers)
    tensors, programs, N, V, run, options = _prepared(call, rest.grad)
    if N == 0:
        return
    with torch.cuda.device_of(call.student):
        dist_bwd_kernel[(programs,)](
            *tensors, call.mask, temperature, rest.rows, rest.columns, rest.upstream, N, V, rest.columns.shape[1], run,
            **options,
        )  # fmt: skip
