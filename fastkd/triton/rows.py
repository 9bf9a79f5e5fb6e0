"""Launches the kernels of the rows schedule."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from .._calls import HeadWeight, InverseDivisor, RowsBackward, RowsCall, RowsForward
from .._divergences import ENTRIES
from .._dtypes import compute_dtype
from .divergences import FUNCTIONS
from .registers import limited
from .rows_kernels import inverse_divisor_kernel, rows_bwd_kernel, rows_fwd_kernel, sum_kernel

# By the bytes of the wider of student's and teacher's elements. The first: a row of 8192 takes 128 registers of
# each of 512 threads. The second: a longer row is walked in 59 to 101, few rows sharing the L2 cache.
ONE_TILE = {2: 8192, 4: 8192, 8: 2048}  # the longest row that is kept in registers
TILE = {2: 8192, 4: 8192, 8: 2048}  # of a longer row
TILE_OF_BACKWARD = {2: 4096, 4: 4096, 8: 1024}  # of any row: tiles do not wait for each other
PER_THREAD = {2: 16, 4: 16, 8: 8}  # elements: with fewer, too little is under way; with more, registers run out
ELEMENTS = 2048  # of a program, as far as rows are shorter
FEW_NEIGHBOURS = 16  # rows side by side, of a program: with fewer, lines are read in parts
SUM_BLOCK = 4096


class Configuration(NamedTuple):
    rows: int  # of a program
    block: int  # classes of a tile
    warps: int


def configuration(V: int, element_size: int, side_by_side: int | None = None) -> Configuration:
    """The schedule of the forward pass; all in one tile where block >= V."""
    if side_by_side is not None:
        return _neighbours(V, element_size, side_by_side)
    if ONE_TILE[element_size] >= V:
        return _whole_rows(V, element_size)
    block = TILE[element_size]
    return Configuration(1, block, _warps(block, element_size))


def backward_configuration(V: int, element_size: int, side_by_side: int | None = None) -> Configuration:
    if side_by_side is not None:
        return _neighbours(V, element_size, side_by_side)
    block = TILE_OF_BACKWARD[element_size]
    if block >= V:
        return _whole_rows(V, element_size)
    return Configuration(1, block, _warps(block, element_size))


def _whole_rows(V, element_size):
    block = max(16, triton.next_power_of_2(V))
    rows = max(1, ELEMENTS // block)
    return Configuration(rows, block, _warps(rows * block, element_size))


def _neighbours(V, element_size, side_by_side):
    """Of rows side by side as many as make whole lines, and no more classes than registers hold: half as many elements
    a thread as of other rows, as sums go over threads that a row's classes are dealt to."""
    most, block = ONE_TILE[element_size] // 2, max(16, triton.next_power_of_2(V))
    rows = max(FEW_NEIGHBOURS, min(64, triton.next_power_of_2(side_by_side)))
    while rows > FEW_NEIGHBOURS and rows * block > most:
        rows //= 2
    block = min(block, most // rows)
    return Configuration(rows, block, _warps(2 * rows * block, element_size))


def _warps(elements, element_size):
    return min(16, max(1, elements // (32 * PER_THREAD[element_size])))


class Layout(NamedTuple):
    """Where the rows of a tensor [*, V] are, in elements: row n begins at index[n] * stride, where
    there is an index; else at n // inner * outer_stride + n % inner * stride, where there is an
    inner; else at n * stride. So the compiler sees by which powers of 2 the strides divide."""

    data: torch.Tensor | None
    index: torch.Tensor | None = None  # [N]
    inner: int | None = None
    outer_stride: int | None = None
    stride: int = 0
    step: int = 1  # between classes


def layout_of(x: torch.Tensor) -> Layout:
    dims = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if dims and dims[-1][1] == size * stride:  # dimensions that lie one after the other in memory are one
            dims[-1] = (dims[-1][0] * size, stride)
        elif size != 1:
            dims.append((size, stride))
    step = x.stride(-1)
    if not dims:
        return Layout(x, step=step)
    if len(dims) == 1:
        return Layout(x, stride=dims[0][1], step=step)
    if len(dims) == 2:
        return Layout(x, None, dims[1][0], dims[0][1], dims[1][1], step)
    unit = math.gcd(*(stride for _, stride in dims)) or 1
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for size, stride in dims:
        index = index[..., None] + torch.arange(size, device=x.device) * (stride // unit)
    return Layout(x, index.reshape(-1), stride=unit, step=step)


NO_LAYOUT = Layout(None)


def side_by_side(N: int, layouts: Sequence[Layout]) -> int | None:
    """How many rows lie side by side in every tensor, their elements of a class one after the other; or None."""
    layouts = [x for x in layouts if x.data is not None]
    if any(x.index is not None or x.stride != 1 or x.step == 1 for x in layouts):
        return None
    runs = {x.inner or N for x in layouts}
    run = runs.pop()
    return run if not runs and run >= FEW_NEIGHBOURS // 2 else None


def same_temperature(call: RowsCall | HeadWeight) -> bool:
    if call.temperature_rows is None and call.teacher_temperature_rows is None:
        return call.temperature == call.teacher_temperature
    return call.temperature_rows is call.teacher_temperature_rows


def sizes(call: RowsCall | HeadWeight) -> tuple[int, int, int]:
    """N, V and the bytes of the wider of both sides' elements."""
    V = call.student.shape[-1]
    return call.student.numel() // V, V, max(call.student.element_size(), call.teacher.element_size())


def layouts_of(call: RowsCall, grad: torch.Tensor | None) -> tuple[Layout, ...]:
    """Of student, teacher and gradient."""
    return layout_of(call.student), layout_of(call.teacher), NO_LAYOUT if grad is None else layout_of(grad)


def number(rows: torch.Tensor | None, of_all: float) -> tuple[torch.Tensor | None, int, float]:
    """As a kernel takes it: what lies in memory, the step there from row to row, and the number where nothing does."""
    return rows, int(rows is not None and rows.dim() > 0), of_all


def arguments_of(call: RowsCall, layouts: Sequence[Layout]) -> tuple[Any, ...]:
    """Those that all kernels begin with."""
    return (
        *(value for layout in layouts for value in layout),
        *number(call.temperature_rows, call.temperature),
        *number(call.teacher_temperature_rows, call.teacher_temperature),
        call.mask,
        call.weight,
        call.scale_tensor,
        call.scale,
        *number(call.parameter_rows, call.parameter),
        *number(call.second_parameter_rows, call.second_parameter),
        call.target,
        *_target_numbers(call),
    )


def _target_numbers(call):
    """hard_weight, soft_weight, smoothing, and how many classes a row has in all."""
    numbers = (0.0, 1.0, 0.0) if call.target_numbers is None else call.target_numbers.tolist()
    return (*numbers, float(call.student.shape[-1]))[:4]


def given(entry: Any) -> int:
    """See rows_tile."""
    return 3 if entry.two_sums else ("Probabilities", "Logs", "LogOdds").index(entry.given)


def hard_of(call: RowsCall) -> int:
    """See rows_tile."""
    return 0 if call.target is None else 1 + call.target_loss


def programs(N: int, run: int | None, rows: int) -> int:
    """Of so many rows each, which take no more than one run."""
    return triton.cdiv(N, rows) if run is None else N // run * triton.cdiv(run, rows)


def rows_fwd(*arguments: Any) -> None:
    call, out = RowsCall(*arguments[: len(RowsCall._fields)]), RowsForward(*arguments[len(RowsCall._fields) :])
    N, V, element_size = sizes(call)
    dtype, per_row = compute_dtype(call.student, call.teacher), out.loss.dim() > 0
    entry = ENTRIES[call.divergence]
    if N == 0:
        out.loss.zero_()
        return
    layouts = layouts_of(call, out.grad)
    run = side_by_side(N, layouts)
    rows, block, warps = configuration(V, element_size, run)
    limits = limited(dtype)
    if limits and entry.parameter is not None:  # js_div holds more of each class: half as many in a thread fit
        warps = min(16, 2 * warps)
    count = programs(N, run, rows)
    parts = out.loss if per_row else out.loss.new_empty(count)
    soft_losses = None
    if out.parts is not None:  # before the gradient is written, perhaps over the student
        from .parts import rows_parts

        rows_parts(call, out.parts)
        soft_losses = out.parts.view(N, -1)[:, 1]
    with torch.cuda.device_of(call.student):
        rows_fwd_kernel[(count,)](
            *arguments_of(call, layouts), parts, out.stats, soft_losses, 5, N, V, run,
            DIVERGENCE=FUNCTIONS[call.divergence], IS_CENTRED=entry.centred,
            ENTROPY=entry.teacher_entropy and hard_of(call) != 2, GIVEN=given(entry), HARD=hard_of(call),
            SAME_TEMPERATURE=same_temperature(call), T_SQUARED=call.t_squared, PER_ROW=per_row,
            ONE_TILE=block >= V, ROWS=rows, BLOCK=block, num_warps=warps, **limits,
        )  # fmt: skip
        if not per_row:
            sum_kernel[(1,)](
                parts, call.scale_tensor, call.scale, out.loss, count, BLOCK=SUM_BLOCK, num_warps=8
            )  # fmt: skip


def rows_bwd(*arguments: Any) -> None:
    call, rest = RowsCall(*arguments[: len(RowsCall._fields)]), RowsBackward(*arguments[len(RowsCall._fields) :])
    N, V, element_size = sizes(call)
    if N == 0:
        return
    layouts = layouts_of(call, rest.grad)
    run = side_by_side(N, layouts)
    rows, block, warps = backward_configuration(V, element_size, run)
    with torch.cuda.device_of(call.student):
        rows_bwd_kernel[(programs(N, run, rows), triton.cdiv(V, block))](
            *arguments_of(call, layouts), rest.stats, rest.upstream, int(rest.upstream.numel() > 1), N, V, run,
            DIVERGENCE=FUNCTIONS[call.divergence], GIVEN=given(ENTRIES[call.divergence]),
            SAME_TEMPERATURE=same_temperature(call), T_SQUARED=call.t_squared, HARD=hard_of(call),
            ROWS=rows, BLOCK=block, num_warps=warps,
            **limited(compute_dtype(call.student, call.teacher)),
        )  # fmt: skip


def inverse_divisor(*arguments: Any) -> None:
    call = InverseDivisor(*arguments)
    with torch.cuda.device_of(call.scale):
        inverse_divisor_kernel[(1,)](
            call.mask, call.normalizer, call.scale, float(call.each), call.rows, BLOCK=SUM_BLOCK, num_warps=8
        )  # fmt: skip
