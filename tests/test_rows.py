"""Values and gradients of the logit losses, against the reference in float64."""

import math

import cases
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from rows_checks import DTYPES, REDUCTIONS, SKEWED, check, eager, right, run, what_cancels
from tolerances import FLOOR, NEAR_CONVERGENCE, TIMES_EAGER, error
from truth import kl_div as truth

from fastkd import functional, reference


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FINITE, ids=str)
def test_kl_div_matches_float64(backend, case, dtype, reduction):
    check("kl_div", case, dtype, reduction, backend == "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FINITE, ids=str)
@pytest.mark.parametrize("name", list(cases.LOSSES)[1:])
@pytest.mark.of_each_kind
def test_others_match_float64(backend, name, case, dtype):
    for reduction in ("none", "batchmean"):
        check(name, case, dtype, reduction, backend == "torch")


@pytest.mark.parametrize("shift", [(100.0, -100.0), (1000.0, 0.0), (-1e4, 1e4)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", cases.LOSSES)
@pytest.mark.of_each_kind
def test_no_worse_than_eager_when_shifted(kernel, name, shift, temperature):
    """A constant between student and teacher must not be what the difference is rounded by."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3 * torch.randn(64, 1000, generator=generator) + c for c in shift)
    ours = run(cases.LOSSES[name], student, teacher, temperature=temperature, reduction="none")
    ref = right(name, student, teacher, temperature=temperature, reduction="none")
    theirs = run(lambda s, t: eager(name, s, t, temperature), student, teacher)
    floor = FLOOR[torch.float32]
    if name == "skew_kl_div":  # which eager code sums up without a multiple of p, far better here and worse near q = p
        floor *= what_cancels(name, student, teacher, temperature=temperature, reduction="none")
    for out, eager_out, exact in zip(ours, theirs, ref, strict=True):
        assert error(out, exact) <= max(TIMES_EAGER * error(eager_out, exact), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("shape", [(64, 10), (32, 1000), (4, 32000)], ids=str)
@pytest.mark.parametrize("name", cases.LOSSES)
@pytest.mark.of_each_kind
def test_no_worse_than_eager(backend, name, shape, temperature, dtype):
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    ours = run(cases.LOSSES[name], student, teacher, temperature=temperature, reduction="none")
    ref = right(name, student, teacher, temperature=temperature, reduction="none")
    theirs = run(lambda s, t: eager(name, s, t, temperature), student, teacher)
    floor = FLOOR[reference.compute_dtype(student, teacher)], FLOOR[dtype]
    for out, eager_out, exact, least in zip(ours, theirs, ref, floor, strict=True):
        skewed = SKEWED if name == "js_div-0.1" else 1
        assert error(out, exact) <= max(TIMES_EAGER * error(eager_out, exact), least * skewed)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("V", [100, 5000])
# The loss of the first does not go to 0, and those of the others go there with the difference and not with its square.
@pytest.mark.parametrize(
    "name",
    [name for name in cases.LOSSES if name not in ("soft_cross_entropy", "total_variation", "negative_log_acceptance")],
)
def test_near_convergence(backend, name, V, shift, temperature):
    """A loss of 5e-7: F.kl_div in float32 has lost it, the fused form has not."""
    generator = torch.Generator().manual_seed(3)
    size = 2e-3 if "js" in name else 1e-3  # a Jensen-Shannon divergence is 4 times as small, and more
    size *= 0.6 if name == "alpha_beta_div" else 1  # of many classes with a power below 1 it is larger
    teacher = 2 * torch.randn(64, V, generator=generator)
    student = teacher + size * torch.randn(64, V, generator=generator) + shift
    options = {"temperature": temperature, "t_squared": True}
    loss, grad = run(cases.LOSSES[name], student, teacher, **options)
    loss_ref, grad_ref = right(name, student, teacher, **options)
    assert loss_ref < 6e-7
    assert error(loss, loss_ref) <= NEAR_CONVERGENCE
    eager_loss, eager_grad = run(lambda s, t: eager(name, s, t, temperature).mean(), student, teacher)
    if name not in (
        "symmetric_kl_div",
        "adaptive_kl_div",
    ):  # the first-order terms of its two halves cancel, in eager code too
        assert error(eager_loss, loss_ref) > 5 * NEAR_CONVERGENCE  # or this test is too easy
    assert error(grad, grad_ref) <= TIMES_EAGER * error(eager_grad, grad_ref)


@pytest.mark.parametrize("V", [100, 5000])
def test_total_variation_near_convergence(backend, V):
    """Every class is on its side of p = q by far more than a rounding: so is the gradient's sign."""
    generator = torch.Generator().manual_seed(3)
    teacher = 2 * torch.randn(64, V, generator=generator)
    signs = torch.where(torch.arange(V) % 2 == 0, 1.0, -1.0)
    student = teacher + 1e-3 * signs * (1 + torch.rand(64, V, generator=generator))
    loss, grad = run(functional.total_variation, student, teacher)
    loss_ref, grad_ref = right("total_variation", student, teacher)
    assert error(loss, loss_ref) <= NEAR_CONVERGENCE
    assert error(grad, grad_ref) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_may_differ(backend, dtype, teacher_dtype):
    student, teacher, _ = cases.Case("mixed", "", (5, 300)).inputs(dtype, teacher_dtype)
    loss, grad = run(functional.kl_div, student, teacher, temperature=2.0)
    loss_ref, grad_ref = truth(student, teacher, temperature=2.0)
    compute = reference.compute_dtype(student, teacher)
    assert (loss.dtype, grad.dtype) == (compute, dtype)
    assert error(loss, loss_ref) <= 2 * FLOOR[compute]
    assert error(grad, grad_ref) <= 2 * FLOOR[compute] + (FLOOR[dtype] if dtype != compute else 0)


def strided(kind, x):
    """The same values, laid out differently."""
    if kind == "shifted":  # logits[:, :-1], as every language model's loss has it
        return torch.cat([x, x[:, :1]], 1)[:, :-1]
    if kind == "transposed":
        return x.transpose(-1, 0).contiguous().transpose(-1, 0)
    if kind == "every_other_class":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    if kind == "channels_first":
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if kind == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("kind", ["shifted", "transposed", "every_other_class", "channels_first", "misaligned"])
def test_any_strides(backend, kind, reduction, dtype):
    student, teacher, _ = cases.Case("strided", "", (3, 4, 70)).inputs(dtype)
    plain = run(functional.kl_div, student, teacher, reduction=reduction, temperature=2.0)
    for s, t in ((kind, ""), ("", kind), (kind, kind)):
        loss, grad = run(
            functional.kl_div, strided(s, student), strided(t, teacher), reduction=reduction, temperature=2.0
        )
        if backend.startswith(("cuda", "triton")):  # the order of a sum follows the alignment
            assert error(loss, plain[0]) <= 2 * FLOOR[loss.dtype]
            assert error(grad, plain[1]) <= 2 * FLOOR[dtype]
        else:
            assert torch.equal(loss, plain[0])
            assert torch.equal(grad, plain[1])


def test_expanded_teacher(backend):
    """One teacher row for all students: stride 0."""
    student, teacher = torch.randn(8, 40), torch.randn(40)
    loss, grad = run(functional.kl_div, student, teacher.expand(8, 40))
    loss2, grad2 = run(functional.kl_div, student, teacher.repeat(8, 1))
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)


def test_offsets_beyond_32_bits(backend):
    """A row that begins more than 2^31 elements into its storage. The pages between are never touched."""
    V, far = 40, 2**31 + 100
    values = torch.randn(4, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    student = torch.empty(far + V, dtype=torch.bfloat16).as_strided((2, V), (far, 1))
    student.copy_(values[:2])
    teacher = values[2:]
    loss, grad = run(functional.kl_div, student, teacher)
    loss_compact, grad_compact = run(functional.kl_div, values[:2], teacher)
    assert loss == loss_compact
    assert torch.equal(grad, grad_compact)


@pytest.mark.parametrize("name", [name for name in cases.LOSSES if name != "soft_cross_entropy"])
def test_equal_logits_give_nothing(kernel, name):
    """Student = teacher: exactly 0, loss and gradient; plain PyTorch is off by a rounding."""
    x = torch.randn(5, 3000)
    loss, grad = run(cases.LOSSES[name], x, x.clone(), temperature=3.0)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(64, 1000), (3, 50000), (1, 128256)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_same_bits_whatever_the_threads(threads, name, shape, reduction):
    student, teacher = torch.randn(shape), torch.randn(shape)
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        results.append(run(cases.LOSSES[name], student, teacher, reduction=reduction))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_published_value():
    """Two classes at T = 1, by hand: q = (3/4, 1/4), p = (1/2, 1/2)."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    loss = functional.kl_div(torch.zeros(1, 2), teacher)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape_and_stride(data):
    """Slices of a larger tensor, whatever their shape, steps and order of dimensions."""
    dims = data.draw(st.integers(1, 4))
    order = data.draw(st.permutations(range(dims)))
    slices = [
        (data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20 if d == 0 else 4)))
        for d in range(dims)
    ]

    def view(seed):
        sizes = [start + step * n for start, step, n in slices]
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
        return x[tuple(slice(start, start + step * n, step) for start, step, n in slices)].permute(order)

    student, teacher = view(0), view(1)
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction)
    loss_ref, grad_ref = truth(student, teacher, reduction=reduction)
    # a row of one class has loss 0 and gradient 0: measured against 1
    assert (loss.double() - loss_ref).norm() <= 8 * FLOOR[torch.float32] * max(loss_ref.norm(), 1)
    assert (grad.double() - grad_ref).norm() <= 8 * FLOOR[torch.float32] * max(grad_ref.norm(), 1)
