"""Few samples on the CPU, in one op: what the tests of each loss do not reach."""

import pytest
import torch
from conftest import KERNELS
from tolerances import error

import fastkd
from fastkd import _library, functional
from fastkd.ops import samples
from fastkd.ops.numbers import as_tensor

pytestmark = pytest.mark.skipif(bool(_library.cpu_missing), reason="the CPU's kernels are not there")

LOSSES = {
    "similarity_preserving": functional.similarity_preserving,
    "gram_mse": functional.gram_mse,
    "pkt": functional.pkt,
}
S, T = torch.randn(9, 6), torch.randn(9, 4)


def run(loss_function, student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("N", [32, 300])
def test_is_one_op(name, N):
    with torch.profiler.profile() as profiled, fastkd.backend("cpu"):
        run(LOSSES[name], torch.randn(N, 400), torch.randn(N, 300))
    calls = [event.name for event in profiled.events()]
    assert calls.count("fastkd::samples_fwd") == 1
    assert not {"aten::mm", "aten::bmm", "aten::matmul"} & set(calls)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name.startswith("cpu")], indirect=True)
@pytest.mark.parametrize("name", LOSSES)
def test_huge_and_tiny_embeddings(kernel, name):
    """Of float64, whose squares leave its range; gram_mse and pkt compare directions."""
    student, teacher = S.double(), T.double()
    options = {"eps": 1e-37} if name == "pkt" else {}
    expected = run(LOSSES[name], student, teacher, **options)
    for size in (1e-7, 1e180) if name != "similarity_preserving" else (1e-7, 1e60):
        loss, grad = run(LOSSES[name], student * size, teacher, **options)
        assert error(loss, expected[0]) <= 1e-10
        assert error(grad * size, expected[1]) <= 1e-10


def test_the_op_checks_what_it_is_given():
    """The functions have checked before; an op may be called past them."""
    right = [S, T, 0, False, 0, as_tensor(1e-3), None, None, True]
    torch.ops.fastkd.samples_fwd(*right)
    for at, wrong, message in (
        (0, S[None], "student and teacher: embeddings"),
        (1, T[:8], "student and teacher: embeddings"),
        (1, T.long(), "teacher: float16, "),
        (2, 3, "relation: "),
        (4, 3, "clamp: "),
        (5, torch.zeros(2, dtype=torch.float64), "eps: "),
        (6, torch.ones(9), "mask: "),
        (6, torch.ones(8, dtype=torch.bool), "mask: "),
        (7, torch.ones(8), "weight: "),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastkd.samples_fwd(*right[:at], wrong, *right[at + 1 :])
    with pytest.raises(RuntimeError, match="eps: a positive finite number"):
        torch.ops.fastkd.samples_fwd(S, T, samples.PKT, *right[3:5], as_tensor(0.0), *right[6:])
