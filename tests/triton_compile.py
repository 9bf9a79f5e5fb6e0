"""Compiles Triton's kernels for a target, without a GPU, and prints what came out: python tests/triton_compile.py sm_90.

The compiler and the interpreter exclude each other in one process: tests run this in another.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile

from triton_launches import (
    complement_launches,
    dist_launches,
    feature_launches,
    head_launches,
    launches,
    other_feature_launches,
    other_launches,
    other_standardize_launches,
    other_strip_launches,
    phase_launches,
    relation_launches,
    standardize_launches,
    strip_launches,
)

# Those that most calls are compiled for come first: they take longest, and the others fill what time they leave.
TARGETS = {
    "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64), "sm_120": ("cuda", 120, 32), "sm_100": ("cuda", 100, 32), "sm_80": ("cuda", 80, 32)
}  # fmt: skip
# What need not be compiled for each target: float16 has the bounds of bfloat16, and sizes between others their kernels,
# and smooth L1 takes more registers than squares; that all compile at all, also in float64, which has no bounds, is seen
# of two targets, one of each maker; beside products and rows that are walked along float32 takes the more registers.
LEFT_OUT = (
    r"/float16/|^relation/\w+/(256|1024)/|^feature/(bfloat16|float64)/(rows|long|maps)/./None$",
    r"/float64/|^other/|^(dist|standardize|complement|head)/bfloat16/|^feature/\w+/(rows|long|maps)/./None$",
)
LEFT_OUT_OF = {"sm_90": 0, "gfx942": 1}  # how many of these; of other targets all


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
        rows_phases,
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
    calls |= complement_launches(complement) | head_launches(head) | phase_launches(rows_phases)
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


if __name__ == "__main__":
    compile_for(sys.argv[1])
