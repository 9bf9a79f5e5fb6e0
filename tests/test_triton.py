"""What Triton's compiler makes of the kernels, without a GPU; and the interpreter that runs them in the other tests.

The compiler and the interpreter exclude each other in one process: this file, run as a script, compiles.
"""

import functools
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from fastkd._divergences import NON_TARGET, NUMBERS, TARGET_LOSSES
from fastkd._dtypes import compute_dtype
from fastkd.ops.numbers import as_tensor

# Those that most calls are compiled for come first: they take longest, and the others fill what time they leave.
TARGETS = {
    "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64), "sm_120": ("cuda", 120, 32), "sm_100": ("cuda", 100, 32), "sm_80": ("cuda", 80, 32)
}  # fmt: skip
# What need not be compiled for each target: float16 has the bounds of bfloat16, and sizes between others their kernels;
# that all compile at all, also in float64, which has no bounds, is seen of two targets, one of each maker; beside
# products and rows that are walked along float32 takes the more registers, and smooth L1 beside squares.
LEFT_OUT = (
    r"/float16/|^relation/\w+/(256|1024)/|^relation/.*/(pairs|angles)$",
    r"/float64/|^other/|^(dist|standardize|complement|head)/bfloat16/|^feature/\w+/(rows|long|maps)/./None$",
)
LEFT_OUT_OF = {"sm_90": 0, "gfx942": 1}  # how many of these; of other targets all
KL_DIV, JS_DIV = 0, 3
ONE, BOTH = as_tensor(1.0), as_tensor(2.0, 1.0, 1.0, 1.0)
ONE_TILE, TILED = 4096, 128256
# Of 65536 registers 128 leave room for two programs of 256 threads, or one of 512: 8192 classes under way on each
# side. On gfx942, with 512 registers per lane of a SIMD, for four waves.
REGISTERS = 128
# Bytes. In loops over tiles ptxas prefers 64 registers (twice the programs) and keeps some of the row's constants,
# which a tile needs once or not at all, in memory; were the tile's values there, it would be hundreds.
STACK = {ONE_TILE: 0, TILED: 16}
STACK_OF_TARGETS = 32  # the same, of rows that have more constants
# What is not logits: the loss of a program; a row's statistics and the upstream gradient; the factor.
NARROW_LOADS = {"rows_fwd_kernel": 0, "rows_bwd_kernel": 6, "scale_kernel": 1}
NARROW_STORES = {"rows_fwd_kernel": 1, "rows_bwd_kernel": 0, "scale_kernel": 0}
# Of pairs and triples, float64 apart. A program is of 128 or 256 threads; where tensor cores do the work, one on a
# multiprocessor will do. Which addresses ptxas keeps in memory differs from version to version; a tile's values
# there would be hundreds of bytes.
RELATION_REGISTERS = {
    "distances_kernel": 255, "grad_kernel": 255, "loss_kernel": 128, "angles_kernel": 128, "squares_kernel": 128,
    "differences_kernel": 128, "prepare_kernel": 128, "centre_kernel": 128, "totals_kernel": 128,
}  # fmt: skip
RELATION_STACK = 32
FEATURE_STACK = 64  # of the sums of eight rows, in float64
# What is not features: a row's first values; its map and slope.
NARROW_FEATURES = {"flat_kernel": 0, "features_kernel": 4, "powers_kernel": 0, "slopes_kernel": 8}
MULTIPLYING = ("distances_kernel", "grad_kernel")


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
            if N == 64 and of_its_own:
                calls[name + "/pairs"] = lambda x=x: pairs.pairs_fwd(x, x, None, None, 0, ONE, True, True)
                calls[name + "/angles"] = lambda x=x, s=save: angles.angles_fwd(x, x, None, BOTH, s)
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


def compile_for(target_name):
    """Runs the calls with a driver that compiles and launches nothing; prints what came out as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget

    from fastkd.triton import (
        angles,
        attention,
        complement,
        dist,
        features,
        head,
        pairs,
        pkt,
        rows,
        scale,
        standardize,
        triplet,
    )

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget(*TARGETS[target_name])

    triton.runtime.driver.set_active(Driver())
    run, found = triton.runtime.jit.JITFunction.run, {}

    def compile_only(self, *args, **options):
        kernel = run(self, *args, **{**options, "warmup": True})
        found[name, self.fn.__name__] = report(kernel)

    triton.runtime.jit.JITFunction.run = compile_only
    calls = launches(rows, scale) | relation_launches(pairs, angles) | feature_launches(features, attention)
    calls |= strip_launches(pkt, triplet) | standardize_launches(standardize) | dist_launches(dist)
    calls |= complement_launches(complement) | head_launches(head)
    calls |= other_launches(rows) | other_feature_launches(features, attention)
    calls |= other_strip_launches(pkt, triplet) | other_standardize_launches(standardize)
    left_out = re.compile("|".join(LEFT_OUT[: LEFT_OUT_OF.get(target_name, len(LEFT_OUT))]) or "(?!)")
    calls = {name: call for name, call in calls.items() if not left_out.search(name)}
    for name, call in calls.items():  # noqa: B007 - compile_only reads it
        call()
    print(json.dumps([[*key, numbers] for key, numbers in found.items()]))


def report(kernel):
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        wide, load, store = "dwordx4", r"(?:global|buffer)_load_(\w+)", r"(?:global|buffer)_store_(\w+)"
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        stack = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    else:
        text = kernel.asm["ptx"]
        wide, load, store = "v4.b32", r"ld\.global(\S+)", r"st\.global(\S+)"
        usage = resource_usage(kernel.asm["cubin"])
        registers, stack = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
    widths = {
        what: [wide in width for width in re.findall(pattern, text)]
        for what, pattern in (("loads", load), ("stores", store))
    }
    products = re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma", text)
    numbers = {"registers": registers, "stack": stack, "products": len(products)}
    numbers["wide_copies"] = len(re.findall(r"cp\.async\.cg\S+ \[.*?\], \[.*?\], 0x10", text))
    for what, are_wide in widths.items():
        numbers |= {f"wide_{what}": sum(are_wide), f"narrow_{what}": len(are_wide) - sum(are_wide)}
    return numbers


def resource_usage(cubin):
    import triton

    cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """(dtype/V/divergence/call, kernel, numbers) for a target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = pathlib.Path(__file__).resolve().parents[1]
    environment["TRITON_CACHE_DIR"] = str(root / "build" / "triton")  # by the hash of what is compiled
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, request.param], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled_rows(compiled):
    return [entry for entry in compiled if entry[1] in NARROW_LOADS and not entry[0].startswith("other")]


@pytest.fixture(scope="module")
def compiled_relations(compiled):
    return [entry for entry in compiled if entry[0].startswith("relation") and "/float64/" not in entry[0]]


@pytest.mark.gates
def test_registers_suffice(compiled_rows):
    for name, kernel, numbers in compiled_rows:
        assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
        assert numbers["stack"] <= STACK[int(name.split("/")[1])], (name, kernel, numbers)


@pytest.mark.gates
def test_logits_move_in_128_bits(compiled_rows):
    for name, kernel, numbers in compiled_rows:
        assert numbers["wide_loads"] >= 1, (name, kernel, numbers)
        assert numbers["wide_stores"] >= 1, (name, kernel, numbers)
        assert numbers["narrow_loads"] <= NARROW_LOADS[kernel], (name, kernel, numbers)
        assert numbers["narrow_stores"] <= NARROW_STORES[kernel], (name, kernel, numbers)


@pytest.mark.gates
def test_standardized_logits_move_in_128_bits(compiled):
    """But for a row's three moments."""
    for name, kernel, numbers in compiled:
        if name.startswith("standardize") and "/float64/" not in name:
            assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
            assert numbers["stack"] == 0, (name, kernel, numbers)
            assert numbers["wide_loads"] >= 1, (name, kernel, numbers)
            assert numbers["wide_stores"] >= 1, (name, kernel, numbers)
            assert numbers["narrow_loads"] + numbers["narrow_stores"] <= 3, (name, kernel, numbers)


@pytest.mark.gates
def test_logits_beside_best_classes_move_in_128_bits(compiled):
    """But for what is K wide, and the numbers of a row."""
    for name, kernel, numbers in compiled:
        if name.startswith("complement") and "/float64/" not in name:
            assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
            assert numbers["stack"] == 0, (name, kernel, numbers)
            if kernel != "listed_kernel" and not name.startswith("other/"):
                assert numbers["wide_loads"] >= 1, (name, kernel, numbers)
                assert kernel == "complement_fwd_kernel" or numbers["wide_stores"] >= 1, (name, kernel, numbers)


@pytest.mark.gates
def test_weights_are_found_in_registers_and_logits_move_in_128_bits(compiled):
    for name, kernel, numbers in compiled:
        if name.startswith("head") and "/float64/" not in name:
            assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
            assert numbers["stack"] <= STACK[int(name.split("/")[2])], (name, kernel, numbers)
            assert numbers["wide_loads"] > 0, (name, kernel, numbers)
            assert numbers["narrow_loads"] == 0, (name, kernel, numbers)


@pytest.mark.gates
def test_registers_suffice_for_dist(compiled):
    for name, kernel, numbers in compiled:
        if name.startswith("dist") and "/float64/" not in name:
            # nine float64 of each class that a thread has going down rows
            most = 255 if kernel == "dist_columns_kernel" else REGISTERS
            assert numbers["registers"] <= most, (name, kernel, numbers)
            assert numbers["stack"] == 0, (name, kernel, numbers)


@pytest.mark.gates
def test_maps_are_read_across_their_pixels(compiled):
    """64 pixels in a run: in 128 bits too."""
    others = [(name, numbers) for name, kernel, numbers in compiled if name.startswith("other/") and "rows" in kernel]
    found = [numbers for name, numbers in others if name == "other/maps_of_many_classes"]
    assert bool(found) == bool(others)  # these are compiled for some of the targets
    for numbers in found:
        assert numbers["registers"] <= REGISTERS
        assert numbers["stack"] == 0
        assert numbers["wide_loads"] >= 1
        assert numbers["wide_stores"] >= 1
        assert numbers["narrow_loads"] == 0


@pytest.mark.gates
def test_registers_suffice_for_targets(compiled):
    for name, kernel, numbers in compiled:
        if name.startswith("other/") and name.removeprefix("other/").startswith(("targets", *TARGET_LOSSES)):
            assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
            assert numbers["stack"] <= STACK_OF_TARGETS, (name, kernel, numbers)


@pytest.mark.gates
def test_registers_suffice_for_relations(compiled_relations):
    for name, kernel, numbers in compiled_relations:
        assert numbers["registers"] <= RELATION_REGISTERS[kernel], (name, kernel, numbers)
        assert numbers["stack"] <= RELATION_STACK, (name, kernel, numbers)


@pytest.mark.gates
def test_features_stay_in_registers_and_move_in_128_bits(compiled):
    for name, kernel, numbers in compiled:
        if name.startswith("feature") and "/float64/" not in name:
            assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
            assert numbers["stack"] <= FEATURE_STACK, (name, kernel, numbers)
            if kernel in NARROW_FEATURES:
                assert numbers["wide_loads"] > 0, (name, kernel, numbers)
                assert numbers["narrow_loads"] <= NARROW_FEATURES[kernel], (name, kernel, numbers)
                assert (numbers["wide_stores"] > 0) == (kernel != "powers_kernel"), (name, kernel, numbers)


@pytest.mark.gates
def test_strips_stay_in_registers_and_move_in_128_bits(compiled):
    for name, kernel, numbers in compiled:
        if name.startswith("strip"):
            single = "/float32/" in name
            assert numbers["registers"] <= (REGISTERS if single else 255), (name, kernel, numbers)
            assert numbers["stack"] <= RELATION_STACK, (name, kernel, numbers)
            if single and kernel in ("pkt_kernel", "distances_kernel"):
                assert numbers["wide_loads"] > 0, (name, kernel, numbers)
                assert numbers["wide_stores"] > 0, (name, kernel, numbers)


@pytest.mark.gates
def test_tensor_cores_multiply_embeddings(compiled_relations):
    for name, kernel, numbers in compiled_relations:
        assert (numbers["products"] > 0) == (kernel in MULTIPLYING), (name, kernel, numbers)
        if kernel in MULTIPLYING:
            assert numbers["wide_loads"] + numbers["wide_copies"] > 0, (name, kernel, numbers)


if __name__ == "__main__":
    compile_for(sys.argv[1])
    sys.exit()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
import triton_interpreter  # noqa: E402, F401 - before any kernel

from fastkd.triton import angles, pairs, rows, scale  # noqa: E402


@triton.jit
def copy_kernel(source, target, n, offset, BLOCK: tl.constexpr):
    at = offset + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < n, other=0.0).to(target.dtype.element_ty), mask=at < n)


@triton.jit
def dot_kernel(a, b, out):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(out + i * 16 + j, tl.dot(tl.load(a + i * 16 + j), tl.load(b + i * 16 + j)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_interpreter_rounds_to_bfloat16(dtype):
    """To the nearest, ties to even; not towards 0, and a float64's bits are no bfloat16."""
    tie = 2.0**-8
    values = [1 + tie, 1 + 3 * tie, 1 + 1.25 * tie, -1 - 3 * tie, 0.1, 6e4, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(values, dtype=dtype)
    out = torch.empty(len(x), dtype=torch.bfloat16)
    copy_kernel[(1,)](x, out, len(x), 0, 16)
    assert torch.equal(out.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


def test_interpreter_multiplies_bfloat16_as_numbers():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out)
    torch.testing.assert_close(out, a.float() @ b.float())


@pytest.mark.parametrize("offset", [-16, 10])
@pytest.mark.parametrize("short", ["source", "target"])
def test_interpreter_raises_out_of_bounds(short, offset):
    memory = torch.zeros(96)  # the neighbours are the process's own
    inside, beyond = torch.zeros(64), memory[32:48]
    source, target = (beyond, inside) if short == "source" else (inside, beyond)
    with pytest.raises(Exception, match="out of bounds"):
        copy_kernel[(1,)](source, target, 64, offset, 16)
    copy_kernel[(1,)](source, target, 64, 0, 16)


@pytest.mark.parametrize("version", ["3.5.0", "4.0.0"])
def test_interpreter_of_an_unknown_triton_is_refused(version):
    code = f"import triton; triton.__version__ = {version!r}; import triton_interpreter"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert f"not that of {version}" in done.stderr


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_scale(dtype, factor, contiguous):
    x = torch.randn(7, 1300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x = x if contiguous else x.t()
    expected = x * factor
    scale.scale_([x], torch.tensor([factor], dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    assert torch.equal(x.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_scale_in_several_rounds(monkeypatch):
    """More elements than one round of all programs takes."""
    monkeypatch.setattr(scale, "PROGRAMS", 2)
    x = torch.randn(5 * scale.BLOCK + 3)
    expected = x * 0.5
    scale.scale_([x], torch.tensor([0.5]))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("side_by_side", [None, 9, 65536])
@pytest.mark.parametrize("V", [1, 100, 8192, 8193, 128256])
@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_configurations_fit_the_hardware(element_size, V, side_by_side):
    for rows_of_program, block, warps in (
        rows.configuration(V, element_size, side_by_side),
        rows.backward_configuration(V, element_size, side_by_side),
    ):
        assert warps in (1, 2, 4, 8, 16)  # 16 warps of 64 are what a CDNA program may have
        assert block & (block - 1) == 0
        assert rows_of_program * block <= 32 * warps * 32  # classes a thread: more do not fit its registers


@pytest.fixture
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# strips have 128 rows of pairs and 64 of triples, which take minutes at many samples
@pytest.mark.parametrize(
    ("schedule", "share"),
    [
        *itertools.product(["pairs"], [0.0, 0.02, 0.5, 0.9]),
        *itertools.product(["angles"], [0.02, 0.5]),
        ("angles", 0.0),
        ("angles", 0.95),
    ],
)
@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_rows_that_are_not_there(monkeypatch, schedule, share):
    """In several strips, of which the last may hold no row; nothing that such rows left unwritten is read."""
    N = 270 if schedule == "pairs" else 70
    count = int(share * N)
    monkeypatch.setattr(pairs, "STRIP", 1)
    monkeypatch.setattr(angles, "STRIP", 1)
    generator = torch.Generator().manual_seed(count)
    student, teacher = (torch.randn(N, 3, generator=generator) for _ in range(2))
    student[count:], teacher[count:] = 1e4, -1e4

    def run(student, teacher, count):
        if schedule == "pairs":
            return pairs.pairs_fwd(student, teacher, count, None, 0, as_tensor(0.5), True, True)
        numbers = as_tensor(2.0, 0.5, float(schedule == "angles"), 0.5)
        return angles.angles_fwd(student, teacher, count, numbers, True)

    loss, grad = run(student, teacher, torch.tensor(count))
    expected, expected_grad = run(student[:count], teacher[:count], None)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[:count], expected_grad)
    assert not grad[count:].any()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_the_ops_refuse_a_bad_number(bad):
    """One that torch.compile had made a symbol is seen first here."""
    from fastkd.triton import attention, features

    x, maps = torch.randn(4, 3), torch.randn(2, 3, 2, 2)
    calls = {
        "delta": lambda: pairs.pairs_fwd(x, x, None, None, 0, as_tensor(bad), True, False),
        "weight": lambda: angles.angles_fwd(x, x, None, as_tensor(bad, 1.0, 1.0, 1.0), False),
        "layer_weights": lambda: features.features_fwd([x], [x], [1], 0, [], [], 3, as_tensor(bad), None, False),
        "beta": lambda: features.features_fwd([x], [x], [1], 0, [], [], 3, as_tensor(1.0), as_tensor(bad), False),
        "p": lambda: attention.attention_fwd(maps, maps, as_tensor(bad), False),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{name}: a .*number.* wanted, got"):
            call()
