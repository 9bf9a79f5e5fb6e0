"""What Triton's compiler makes of the kernels, without a GPU: registers, stack, and how wide it loads and stores."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from triton_compile import TARGETS
from triton_launches import ONE_TILE, TILED

from fastkd._divergences import TARGET_LOSSES

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


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    """(dtype/V/divergence/call, kernel, numbers) for a target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = pathlib.Path(__file__).resolve().parents[1]
    environment["TRITON_CACHE_DIR"] = str(root / "build" / "triton")  # by the hash of what is compiled
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    script = root / "tests" / "triton_compile.py"
    done = subprocess.run(
        [sys.executable, script, request.param], env=environment, capture_output=True, text=True, check=False
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
def test_phases_stay_in_registers_and_move_in_128_bits(compiled):
    """But for a row's numbers."""
    for name, kernel, numbers in compiled:
        if name.startswith("phase"):
            assert numbers["registers"] <= REGISTERS, (name, kernel, numbers)
            assert numbers["stack"] == 0, (name, kernel, numbers)
            assert numbers["wide_loads"] >= 1, (name, kernel, numbers)
            assert (numbers["wide_stores"] >= 1) == name.endswith("sums"), (name, kernel, numbers)
            assert numbers["narrow_loads"] <= 5, (name, kernel, numbers)


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
