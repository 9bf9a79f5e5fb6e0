"""Launches the phases of the rows schedule by themselves."""

from typing import Any

import torch
import triton.language as tl

from .._calls import RowsCall, RowsStatistics, RowsSums
from .._divergences import ENTRIES
from .._dtypes import compute_dtype
from .divergences import FUNCTIONS
from .registers import limited
from .rows import (
    arguments_of,
    configuration,
    given,
    hard_of,
    layouts_of,
    programs,
    same_temperature,
    side_by_side,
    sizes,
)
from .rows_phases_kernels import rows_statistics_kernel, rows_sums_kernel

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _launch(kernel, call, grad, outputs, **options):
    N, V, element_size = sizes(call)
    if N == 0:
        return
    dtype = compute_dtype(call.student, call.teacher)
    layouts = layouts_of(call, grad)
    run = side_by_side(N, layouts)
    rows, block, warps = configuration(V, element_size, run)
    with torch.cuda.device_of(call.student):
        kernel[(programs(N, run, rows),)](
            *arguments_of(call, layouts), *outputs, N, V, run, dtype=_TYPES[dtype],
            SAME_TEMPERATURE=same_temperature(call), HARD=hard_of(call), ROWS=rows, BLOCK=block, num_warps=warps,
            **options, **limited(dtype),
        )  # fmt: skip


def rows_statistics(*arguments: Any) -> None:
    call, out = RowsCall(*arguments[: len(RowsCall._fields)]), RowsStatistics(*arguments[len(RowsCall._fields) :])
    _launch(rows_statistics_kernel, call, None, (out.stats,))


def rows_sums(*arguments: Any) -> None:
    call, rest = RowsCall(*arguments[: len(RowsCall._fields)]), RowsSums(*arguments[len(RowsCall._fields) :])
    entry = ENTRIES[call.divergence]
    _launch(
        rows_sums_kernel, call, rest.grad, (rest.stats, rest.sums), DIVERGENCE=FUNCTIONS[call.divergence],
        IS_CENTRED=entry.centred, ENTROPY=entry.teacher_entropy, GIVEN=given(entry), T_SQUARED=call.t_squared,
    )  # fmt: skip
