"""The interpreter that runs Triton's kernels in the other tests, and what of the kernels is seen by calling them alone."""

import itertools
import pathlib
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter  # noqa: F401 - before any kernel

from fastkd.ops.numbers import as_tensor
from fastkd.triton import angles, pairs, rows, scale


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
