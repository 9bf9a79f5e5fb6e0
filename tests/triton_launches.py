"""Calls that launch every kernel of Triton, by name, as users' calls do: what tests/triton_compile.py compiles."""

import functools
import itertools

import torch

from fastkd._divergences import NON_TARGET, NUMBERS, TARGET_LOSSES
from fastkd._dtypes import compute_dtype
from fastkd.ops.numbers import as_tensor

KL_DIV, JS_DIV = 0, 3
ONE, BOTH = as_tensor(1.0), as_tensor(2.0, 1.0, 1.0, 1.0)
ONE_TILE, TILED = 4096, 128256


def rows_call(student, teacher, divergence, **changed):
    """What the ops of the rows schedule begin with."""
    from fastkd._calls import RowsCall

    return RowsCall(
        student, teacher, divergence, 0.5, None, 2.0, None, 2.0, None, True, None, None, 0.25, None
    )._replace(**changed)


def launches(rows, scale):
    """Calls by name: every kernel of the rows schedule, as users' calls launch them."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32):
        for V in (ONE_TILE, TILED):
            x, loss = torch.empty(1, V, dtype=dtype), torch.empty(())
            for divergence in (KL_DIV, JS_DIV):
                arguments = *rows_call(x, x, divergence), loss, torch.empty_like(x), None
                calls[f"{str(dtype)[6:]}/{V}/{divergence}/fwd"] = functools.partial(rows.rows_fwd, *arguments)
        stats, upstream = torch.empty(1, 7, dtype=torch.float64), torch.empty(1)
        y = torch.empty(1, ONE_TILE, dtype=dtype)
        arguments = *rows_call(y, y, KL_DIV), stats, upstream, torch.empty_like(y)
        calls[f"{str(dtype)[6:]}/{ONE_TILE}/0/bwd"] = functools.partial(rows.rows_bwd, *arguments)
        calls[f"{str(dtype)[6:]}/{ONE_TILE}/0/scale"] = lambda y=y, u=upstream: scale.scale_([y], u)
    return calls


def parted_launches(rows, whole, x, of_a_tile, maps):
    """Of a target that is parted from the other classes: rows that are walked along, and rows in one tile."""
    calls = {}
    for name, entry in TARGET_LOSSES.items():
        parted = {"divergence": NUMBERS[NON_TARGET.name], "target_numbers": None, "target_loss": entry.number}
        whole, of_a_tile = whole._replace(**parted), of_a_tile._replace(**parted)
        stats = torch.empty(3, 7, dtype=torch.float64)
        calls |= {
            name: (rows.rows_fwd, *whole, torch.empty(3), x, None),
            f"{name}_bwd": (rows.rows_bwd, *whole, stats, torch.empty(3), x),
            f"{name}_of_a_tile": (rows.rows_fwd, *of_a_tile, torch.empty(()), torch.empty_like(maps), None),
        }
    return calls


def other_launches(rows):
    """That they compile at all: every option a tensor, strides of every kind, half and double precision."""
    x = torch.empty(2, 3, 2, 200, dtype=torch.bfloat16)[:, 1:, :, :-1].movedim(-1, 1)
    teacher = torch.empty(x.shape, dtype=torch.float64)
    row = torch.empty(x.numel() // x.shape[-1], dtype=torch.float64)
    number, mask = torch.empty((), dtype=torch.float64), row > 0
    everything = rows_call(
        x, teacher, 1, temperature_rows=row, teacher_temperature_rows=row.clone(), weight=row, mask=mask,
        scale_tensor=number, t_squared=False,
    )  # fmt: skip
    stats, half = torch.empty(*x.shape[:-1], 7, dtype=torch.float64), torch.empty(3, 5000, dtype=torch.float16)
    masked = rows_call(half, half, 2, mask=torch.ones(3, dtype=torch.bool), scale_tensor=number)
    double = rows_call(half.double(), half, 3)
    maps = torch.empty(2, 19, 5, 13).movedim(1, -1)
    many = torch.empty(1, 2000, 4, 16).movedim(1, -1)
    side_by_side = rows_call(maps, maps, 3, parameter_rows=number, temperature_rows=number.float())
    numbers = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    targets = masked._replace(target=torch.zeros(3, dtype=torch.int64), target_numbers=numbers)
    targets_of_maps = side_by_side._replace(target=torch.zeros(130, dtype=torch.int64), target_numbers=numbers)
    calls = {
        "everything": (rows.rows_fwd, *everything, number, None, stats),
        "everything_bwd": (rows.rows_bwd, *everything, stats, row, x),
        "targets": (rows.rows_fwd, *targets, torch.empty(3), half, None),
        "parts": (rows.rows_fwd, *targets, torch.empty(3), half, None, torch.empty(3, 5, dtype=torch.float64)),
        "targets_bwd": (rows.rows_bwd, *targets, torch.empty(3, 7, dtype=torch.float64), torch.empty(3), half),
        "targets_of_a_tile": (rows.rows_fwd, *targets_of_maps, torch.empty(()), torch.empty_like(maps), None),
        **parted_launches(rows, targets, half, targets_of_maps, maps),
        "masked": (rows.rows_fwd, *masked, torch.empty(()), half, None),
        "double": (rows.rows_fwd, *double, torch.empty(3, dtype=torch.float64), None, None),
        "maps": (rows.rows_fwd, *side_by_side, torch.empty(2, 5, 13), torch.empty_like(maps), None),
        "maps_bwd": (
            rows.rows_bwd,
            *side_by_side,
            torch.empty(2, 5, 13, 7).double(),
            torch.empty(130),
            torch.empty_like(maps),
        ),
        "maps_of_many_classes": (
            rows.rows_fwd,
            *rows_call(many, many, 0),
            torch.empty(()),
            torch.empty_like(many),
            None,
        ),
        "divisor_of_rows": (rows.inverse_divisor, mask, None, len(mask), 200, number),
        "divisor_given": (rows.inverse_divisor, None, torch.empty(()), len(mask), 1, number),
    }
    return {f"other/{name}": functools.partial(*call) for name, call in calls.items()}


def phase_launches(phases):
    """The phases of the rows schedule by themselves: phase/dtype/V/call; and that they compile with targets and masks."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, stats, sums = torch.empty(1, TILED, dtype=dtype), torch.empty(1, 7).double(), torch.empty(1, 3).double()
        name, call = f"phase/{str(dtype)[6:]}/{TILED}", rows_call(x, x, KL_DIV)
        calls[f"{name}/statistics"] = functools.partial(phases.rows_statistics, *call, stats)
        calls[f"{name}/sums"] = functools.partial(phases.rows_sums, *call, stats, sums, torch.empty_like(x))
    maps, stats, sums = (
        torch.empty(2, 19, 5, 13).movedim(1, -1),
        torch.empty(130, 7).double(),
        torch.empty(130, 3).double(),
    )
    numbers = torch.tensor([0.3, 0.6, 0.1, 40.0], dtype=torch.float64)
    targets = rows_call(
        maps,
        maps.double(),
        JS_DIV,
        mask=stats[:, 0] > 0,
        target=torch.zeros(130, dtype=torch.int64),
        target_numbers=numbers,
    )
    calls["other/phase/statistics"] = functools.partial(phases.rows_statistics, *targets, stats)
    calls["other/phase/sums"] = functools.partial(phases.rows_sums, *targets, stats, sums, None)
    return calls


def standardize_launches(standardize):
    """Every kernel that standardizes logits: standardize/dtype/V/call."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for V in (ONE_TILE, TILED):
            x, moments = torch.empty(1, V, dtype=dtype), torch.empty(1, 3, dtype=torch.float64)
            wide = torch.empty(1, V, dtype=compute_dtype(x, x))
            name = f"standardize/{str(dtype)[6:]}/{V}"
            calls[f"{name}/fwd"] = functools.partial(standardize.standardize_fwd, x, None, wide, moments)
            calls[f"{name}/bwd"] = functools.partial(standardize.standardize_bwd, x, None, moments, wide, None, x)
    return calls


def complement_launches(complement):
    """What sums the classes beside K of them: complement/dtype/V/call; and that it compiles with masks and strides."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for V in (ONE_TILE, TILED):
            x, indices = torch.empty(1, V, dtype=dtype), torch.empty(1, 8, dtype=torch.int64)
            logits, sums = torch.empty(1, 9, dtype=torch.float64), torch.empty(1, 2, dtype=torch.float64)
            name, of = f"complement/{str(dtype)[6:]}/{V}", (x, indices, 1.0, None, None)
            calls[f"{name}/fwd"] = functools.partial(complement.complement_fwd, *of, logits, sums)
            calls[f"{name}/bwd"] = functools.partial(complement.complement_bwd, *of, sums, logits, None, x)
    x, mask = torch.empty(2, 400, dtype=torch.float16)[:, ::2], torch.ones(2, dtype=torch.bool)
    indices, logits, sums = (y.expand(2, -1).contiguous() for y in (indices, logits, sums))
    of = x, indices, 1.0, torch.ones(2), mask
    calls["other/complement"] = functools.partial(complement.complement_fwd, *of, logits, sums)
    calls["other/complement/bwd"] = functools.partial(
        complement.complement_bwd, *of, sums, logits, torch.empty(2, 200), torch.empty_like(x)
    )
    return calls


def head_launches(head):
    """What finds the weights of adaptive_kl_div: head/dtype/V; and that it compiles with masks, strides and tensors."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for V in (ONE_TILE, TILED):
            x, weight = torch.empty(1, V, dtype=dtype), torch.empty(1, dtype=torch.float64)
            calls[f"head/{str(dtype)[6:]}/{V}"] = functools.partial(
                head.head_weight, x, x, 2.0, None, 2.0, None, None, 0.5, None, weight
            )
    maps, weight = torch.empty(2, 19, 5, 13, dtype=torch.float16).movedim(1, -1), torch.empty(130, dtype=torch.float64)
    calls["other/head"] = functools.partial(
        head.head_weight, maps, maps.float(), 2.0, weight, 1.0, None, weight > 0, 0.5, weight[0], weight.clone()
    )
    return calls


def other_standardize_launches(standardize):
    """That they compile at all: maps, masks, strides, an addend."""
    maps = torch.empty(2, 19, 5, 13, dtype=torch.float16).movedim(1, -1)
    apart = torch.empty(2, 3, 2, 200)[:, 1:, :, :-1].movedim(-1, 1)
    calls = {}
    for name, x in (("maps", maps), ("apart", apart)):
        wide, N = torch.empty_like(x, dtype=torch.float32), x.numel() // x.shape[-1]
        mask, moments = torch.ones(N, dtype=torch.bool), torch.empty(N, 3, dtype=torch.float64)
        calls[f"other/standardize/{name}"] = functools.partial(standardize.standardize_fwd, x, mask, wide, None)
        arguments = x, mask, moments, wide, torch.empty_like(wide), torch.empty_like(x)
        calls[f"other/standardize/{name}/bwd"] = functools.partial(standardize.standardize_bwd, *arguments)
    return calls


def relation_launches(pairs, angles):
    """Every kernel of the pairs and angles schedules: relation/dtype/N/save. Counted and weighted, programs have all that
    they have without, and more; the fewest samples and the most have the smallest tiles and the largest."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        of_its_own = dtype in (torch.bfloat16, torch.float32)
        for N in (64, 256, 1024, 2176) if of_its_own else (64, 2176):
            x, save = torch.empty(N, 512, dtype=dtype), dtype is not torch.float16
            count, weight = torch.empty((), dtype=torch.int64), torch.empty(N, dtype=compute_dtype(x, x))
            name = f"relation/{str(dtype)[6:]}/{N}/{int(save)}"
            calls[name + "/pairs/both"] = lambda x=x, c=count, w=weight: pairs.pairs_fwd(x, x, c, w, 0, ONE, True, True)
            calls[name + "/angles/counted"] = lambda x=x, c=count, s=save: angles.angles_fwd(x, x, c, BOTH, s)
    x, teacher = torch.empty(33, 70)[:, 1:], torch.empty(33, 30, dtype=torch.bfloat16)
    calls["other/pairs"] = lambda: pairs.pairs_fwd(x, teacher, None, None, 0, ONE, False, True)
    calls["other/pairs/weighted"] = lambda: pairs.pairs_fwd(x, teacher, None, torch.empty(33), 0, ONE, False, True)
    calls["other/angles"] = lambda: angles.angles_fwd(teacher, x, None, as_tensor(2.0, 1.0, 0.0, 1.0), True)
    return calls


def strip_launches(pkt, triplet):
    """Every kernel of strips of pairs: strip/dtype/N."""
    calls = {}
    for dtype in (torch.float32, torch.float64):
        for N in (256, 2048):
            strip, x, row = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((N, N), (N, 512), (N,)))
            sums, numbers, here = row.double(), row.long(), row > 0
            name = f"strip/{str(dtype)[6:]}/{N}"
            calls[name + "/pkt"] = lambda s=strip, q=sums, r=row: pkt.pkt_strip_(s, s, q, r, r, r, r, r, 1e-7, 0)
            calls[name + "/triplet"] = lambda s=strip, x=x, r=row, n=numbers, h=here: triplet.triplet_strip_(
                s, x, r, n, n, n, h, n[0], r, 1.0, 0, x
            )
    return calls


def other_strip_launches(pkt, triplet):
    """That they compile at all: rows that begin anywhere, a strip below the first, no gradient."""
    strip, x, row = (torch.empty(shape, device="meta") for shape in ((3, 33), (33, 7), (40,)))
    numbers, here = row[:33].long(), row[:33] > 0
    return {
        "other/pkt": lambda: pkt.pkt_strip_(strip, strip, row.double(), *(row for _ in range(5)), 1e-7, 7),
        "other/triplet": lambda: triplet.triplet_strip_(
            strip, x, row[:33], numbers, numbers, numbers, here, numbers[0], row[:33], 0.5, 1, None
        ),
    }


def dist_launches(dist):
    """Every kernel of the dist schedule: dist/dtype/shape."""
    from fastkd._calls import DistCall

    calls = {}
    numbers, scale = as_tensor(1.0, 1.0, 2.0, 1e-8), torch.empty((), dtype=torch.float64, device="meta")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for kind, shape in {"rows": (1024, 1000), "long": (256, 32000), "maps": (4, 21, 64, 64)}.items():
            x = torch.empty(shape, dtype=dtype, device="meta")
            x = x.movedim(1, -1) if kind == "maps" else x
            mask = torch.empty(x.shape[:-1], dtype=torch.bool, device="meta").reshape(-1)
            call = DistCall(x, x, mask if kind == "rows" else None, 0.1, scale if kind == "rows" else None, numbers)
            compute = compute_dtype(x, x)
            loss, columns = (
                torch.empty(s, dtype=compute, device="meta") for s in ((), (3, -(-x.shape[-1] // 16) * 16))
            )
            saved = torch.empty((*x.shape[:-1], 6), dtype=torch.float64, device="meta"), columns
            name = f"dist/{str(dtype)[6:]}/{kind}"
            calls[name + "/fwd"] = functools.partial(dist.dist_fwd, *call, loss, *saved)
            calls[name + "/bwd"] = functools.partial(dist.dist_bwd, *call, *saved, loss, torch.empty_like(x))
    return calls


def feature_launches(features, attention):
    """Layers of every layout: feature/dtype/shape/loss."""
    calls = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        shapes = {"flat": (4096, 1024), "rows": (4096, 1024), "long": (64, 16384), "maps": (16, 256, 56, 56)}
        for kind, shape in shapes.items():
            x = torch.empty(shape, dtype=dtype, device="meta")
            dim = 1 if len(shape) == 4 else len(shape) - 1
            for feature, beta in itertools.product((0,) if kind == "flat" else (1, 2), (None, 0.5)):
                reduction, tail = 3 if kind == "flat" else 0, (as_tensor(1.0, 0.5), beta and as_tensor(beta), True)
                calls[f"feature/{str(dtype)[6:]}/{kind}/{feature}/{beta}"] = functools.partial(
                    features.features_fwd, [x, x], [x, x], [dim, dim], feature, [], [], reduction, *tail
                )
        maps = torch.empty(16, 256, 56, 56, dtype=dtype, device="meta")
        for p in (2.0, 3.0, 2.5):
            calls[f"feature/{str(dtype)[6:]}/attention/{p}"] = lambda x=maps, p=p: attention.attention_fwd(
                x, x, as_tensor(p), True
            )
    return calls


def other_feature_launches(features, attention):
    """That they compile at all: masks, weights, upstream per row, strides of every kind, one feature, mixed dtypes."""
    x = torch.empty(2, 3, 2, 200, dtype=torch.bfloat16, device="meta")[:, 1:, :, :-1].movedim(-1, 1)
    t, row = (
        torch.empty(x.shape, dtype=torch.float64, device="meta"),
        torch.empty(8, dtype=torch.float64, device="meta"),
    )
    single = torch.empty(5, 1, device="meta")
    calls = {}
    for f, beta in [*itertools.product(range(4), (None,)), *itertools.product(range(3), (as_tensor(0.5),))]:
        calls[f"other/everything/{f}/{beta is not None}"] = lambda f=f, beta=beta: features.features_bwd(
            [x], [t], [1], f, [row > 0], [row], 0, as_tensor(0.1), beta, row
        )
        calls[f"other/one_feature/{f}/{beta is not None}"] = lambda f=f, beta=beta: features.features_fwd_(
            single, single, 1, f, None, None, 1, beta
        )
    calls["other/upstream"] = lambda: features.features_bwd(
        [single], [single], [1], 0, [single[:, 0] > 0], [], 3, as_tensor(0.1), None, single[:1, 0]
    )
    calls["other/attention"] = lambda: attention.attention_bwd(x, t, as_tensor(2.0), row[:1])
    return calls
