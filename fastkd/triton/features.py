"""The ops of the features schedule in Triton: which layers are alike, and launches of features_kernels."""

import ctypes
import functools
from typing import Any

import torch
import triton
import triton.language as tl

from .._dtypes import compute_dtype
from .._feature_calls import LayersBackward, LayersCall, LayersForward, OneLayerCall
from ..ops.features import FEATURES
from ..ops.numbers import read
from .features_kernels import count_kernel, features_kernel, finish_kernel, flat_kernel
from .layout import UNFUSED, is_dense, programs, same_rows, tile_of
from .registers import limited

NONE, SUM, BATCHMEAN, MEAN = 0, 1, 2, 3  # reductions; the numbers are those of csrc/common/params.h
LAYERS = 32  # of a launch, at most
FLAT = 4096  # elements of a program, where rows do not matter
SUM_BLOCK = 1024


def _high_and_low(x):
    """As two float32 that add up to it."""
    high = ctypes.c_float(x).value
    return high, x - high


def _smooth_l1_numbers(beta, dtype):
    """As csrc/math/feature.h makes them."""
    range_of = torch.finfo(dtype)
    if beta < range_of.tiny:
        return {"beta": 0.0, "half_inverse": range_of.max}
    return {"beta": min(beta, range_of.max), "half_inverse": 0.5 / beta}


class _Call:
    """One call of the ops: launches for the layers that are alike."""

    def __init__(self, call):
        self.student, self.teacher, self.dims, self.feature = call.student, call.teacher, call.feature_dim, call.feature
        self.mask, self.weight, self.reduction = call.mask, call.weight, call.reduction
        self.layer_weights = [read("layer_weights", x, 0.0) for x in call.layer_weights]
        beta = None if call.beta is None else read("beta", call.beta, 0.0)
        self.dtype = compute_dtype(*call.student, *call.teacher)
        self.smooth_l1 = {"SMOOTH_L1": beta is not None, **_smooth_l1_numbers(beta or 0.0, self.dtype)}
        self.counts = [x.numel() // x.shape[dim] for x, dim in zip(self.student, self.dims, strict=True)]
        self.triton_dtype = tl.float64 if self.dtype is torch.float64 else tl.float32

    def run(self, grads, upstream=None, reduce=True):
        """Loss and layers, and the gradients where there is a place for them."""
        per_row = self.reduction == NONE
        empty = functools.partial(self.student[0].new_empty, dtype=self.dtype)
        rows, layers = empty(sum(self.counts)) if per_row and reduce else None, empty(len(self.student))
        weighted = layers.new_empty(len(self.student), dtype=torch.float64)
        with torch.cuda.device_of(layers):
            for which, tensors, launch in self.groups(grads):
                partials, scale, scales = launch(which, tensors, self.part(rows, which), upstream)
                for i, written in zip(which, tensors[2] if grads else (), strict=bool(grads)):
                    if written is not grads[i]:  # it lay in more steps than the kernels know
                        grads[i].copy_(written)
                if reduce:
                    self.finish(which, partials, scale, scales, layers, weighted)
        if not reduce:
            return None
        return rows if per_row else weighted.sum().to(self.dtype), layers

    def groups(self, grads):
        """(layers that are alike, their tensors, what launches them)."""
        found = {}
        for i, (s, t, dim) in enumerate(zip(self.student, self.teacher, self.dims, strict=True)):
            tensors = (s, t, grads[i]) if grads else (s, t)
            plain = self.feature == FEATURES["plain"] and not self.mask and not self.weight and self.reduction != NONE
            if plain and is_dense(s) and all(x.stride() == s.stride() for x in tensors):
                key, launch = s.numel(), self.flat
            else:
                tensors, key = same_rows(dim, *tensors)
                launch = self.rows
            found.setdefault((launch.__name__, key, s.shape[dim], s.dtype, t.dtype), (launch, key, [], []))
            _, _, which, given = found[launch.__name__, key, s.shape[dim], s.dtype, t.dtype]
            which.append(i)
            given.append(tensors)
        for launch, key, which, given in found.values():
            for first in range(0, len(which), LAYERS):
                part = slice(first, first + LAYERS)
                yield which[part], list(zip(*given[part], strict=True)), functools.partial(launch, key)

    def part(self, rows, which):
        """Of a tensor with one element for each row of all layers, those of some."""
        if rows is None:
            return None
        firsts = [sum(self.counts[:i]) for i in which]
        return tuple(rows[first : first + self.counts[i]] for first, i in zip(firsts, which, strict=True))

    def weights(self, which):
        return tuple(_high_and_low(self.layer_weights[i]) for i in which)

    def divisor(self, D):
        """Of a layer's sum, by row; 0: it has none."""
        if self.reduction == BATCHMEAN:
            return 1
        if self.reduction == MEAN:
            return 1 if self.feature == FEATURES["cosine"] else D
        return 0

    def scale(self, which):
        """What their sums are multiplied by: a number, or where rows must be counted a tensor."""
        first = which[0]
        N, each = self.counts[first], self.divisor(self.student[first].shape[self.dims[first]])
        if N == 0:
            return 0.0, None
        if each == 0:
            return 1.0, None
        if not self.mask:
            return 1.0 / (N * each), None
        scales = self.student[0].new_empty(len(which), dtype=torch.float64)
        masks = tuple(self.mask[i] for i in which)
        count_kernel[(len(which),)](masks, scales, N, float(each), LAYERS=len(which), BLOCK=SUM_BLOCK)
        return 0.0, scales

    def flat(self, n, which, tensors, row_losses, upstream):
        scale, scales = self.scale(which)
        students, teachers, *grads = tensors
        partials = students[0].new_empty(len(which), triton.cdiv(n, FLAT), dtype=torch.float64)
        if n:
            flat_kernel[(partials.shape[1], len(which))](
                students, teachers, grads[0] if grads else None, self.weights(which), upstream, partials, scale, n,
                LAYERS=len(which), BLOCK=FLAT, dtype=self.triton_dtype, num_warps=8, **self.smooth_l1, **UNFUSED,
            )  # fmt: skip
        return partials, scale, scales

    def rows(self, rows, which, tensors, row_losses, upstream):
        scale, scales = self.scale(which)
        students, teachers, *grads = tensors
        tile = tile_of(rows, self.dtype.itemsize, kept=self.feature != FEATURES["plain"])
        partials = students[0].new_empty(len(which), programs(rows, tile), dtype=torch.float64)
        per_row = upstream is not None and upstream.numel() != 1
        upstreams = self.part(upstream, which) if per_row else None if upstream is None else (upstream,)
        places = rows.places if grads else (*rows.places, rows.places[0])
        if partials.numel():
            features_kernel[(partials.shape[1], len(which))](
                students, teachers, grads[0] if grads else None,
                tuple(self.mask[i] for i in which) if self.mask else None,
                tuple(self.weight[i] for i in which) if self.weight else None,
                self.weights(which), row_losses, upstreams, scales, partials, scale,
                *places, rows.middle, rows.inner, rows.D,
                FEATURE=self.feature, LAYERS=len(which), ROWS=tile.rows, BLOCK=tile.features, WHOLE=tile.whole,
                PER_ROW=per_row, dtype=self.triton_dtype, num_warps=tile.warps,
                **self.smooth_l1, **UNFUSED, **limited(self.dtype),
            )  # fmt: skip
        return partials, scale, scales

    def finish(self, which, partials, scale, scales, layers, weighted):
        finish_kernel[(len(which),)](
            partials, scales, scale, self.weights(which), tuple(which), layers, weighted, partials.shape[1],
            LAYERS=len(which), BLOCK=SUM_BLOCK,
        )  # fmt: skip


def _empty_grads(student):
    return [torch.empty_like(x) for x in student]


def features_fwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Loss, the layers' losses and, where they are saved, the gradients."""
    call = LayersCall(*arguments[: len(LayersCall._fields)])
    save = LayersForward(*arguments[len(LayersCall._fields) :]).save
    grads = _empty_grads(call.student) if save else []
    return *_Call(call).run(grads), grads


def features_fwd_(*arguments: Any) -> torch.Tensor:
    """Loss of one layer; the gradient is written over the student."""
    one = OneLayerCall(*arguments)
    mask, weight = ([] if x is None else [x] for x in (one.mask, one.weight))
    call = LayersCall(
        student=[one.student], teacher=[one.teacher], feature_dim=[one.feature_dim], feature=one.feature, mask=mask,
        weight=weight, reduction=one.reduction, layer_weights=torch.ones(1), beta=one.beta,
    )  # fmt: skip
    return _Call(call).run(call.student)[0]


def features_bwd(*arguments: Any) -> list[torch.Tensor]:
    call = LayersCall(*arguments[: len(LayersCall._fields)])
    grads = _empty_grads(call.student)
    _Call(call).run(grads, LayersBackward(*arguments[len(LayersCall._fields) :]).upstream, reduce=False)
    return grads
