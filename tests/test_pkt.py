"""pkt beyond what every relational loss is tested for: strips, masks and weights."""

import math

import pytest
import relation_cases as cases
import torch
from conftest import KERNELS, gradcheck
from relation_checks import PROMISED, check, run
from relation_truth import TRUTH, published
from tolerances import FLOOR, error

import fastkd
from fastkd import functional
from fastkd.ops import pkt
from fastkd.ops.numbers import as_tensor

pytestmark = pytest.mark.products

S, T = torch.randn(40, 6), torch.randn(40, 9)


@pytest.mark.parametrize("block", [1, 250])
@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("dtype", cases.DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", ["odd", "tile_and_one", "zero_rows"])
def test_strips(backend, monkeypatch, case, dtype, block):
    monkeypatch.setattr(pkt, "BLOCK", {"cpu": block, "cuda": block})
    check(backend, "pkt", next(c for c in cases.CASES if c.name == case), dtype)


@pytest.mark.parametrize("block", [1, 700, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_masked_rows_are_not_there(backend, monkeypatch, dtype, block):
    monkeypatch.setattr(pkt, "BLOCK", {"cpu": block, "cuda": block})
    student, teacher = S.to(dtype), T.to(dtype)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.6
    hidden = student.masked_fill(~mask[:, None], torch.nan), teacher.masked_fill(~mask[:, None], torch.inf)
    loss, grad = run(functional.pkt, *hidden, 64.0, mask=mask)
    expected, expected_grad = TRUTH["pkt"](student[mask], teacher[mask])
    compute = torch.promote_types(dtype, torch.float32)
    assert error(loss, expected) <= PROMISED[compute]
    assert error(grad[mask], 64 * expected_grad) <= PROMISED[compute] + 8 * FLOOR[dtype]
    assert not grad[~mask].any()


@pytest.mark.parametrize("block", [1, 700, 2**21])
def test_weights(backend, monkeypatch, block):
    """Of rows: the pair (i, j) has that of i."""
    monkeypatch.setattr(pkt, "BLOCK", {"cpu": block, "cuda": block})
    weight = torch.rand(40, generator=torch.Generator().manual_seed(1))
    loss, grad = run(functional.pkt, S, T, weight=weight)
    expected, expected_grad = TRUTH["pkt"](S, T, weight)
    assert error(loss, expected) <= PROMISED[torch.float32]
    assert error(grad, expected_grad) <= PROMISED[torch.float32]
    mask = torch.arange(40) % 3 > 0
    loss, grad = run(functional.pkt, S, T, weight=weight.masked_fill(~mask, torch.nan), mask=mask)
    expected, expected_grad = TRUTH["pkt"](S[mask], T[mask], weight[mask])
    assert error(loss, expected) <= PROMISED[torch.float32]
    assert error(grad[mask], expected_grad) <= PROMISED[torch.float32]


def test_all_masked_and_none(backend):
    loss, grad = run(functional.pkt, S / 0, T, mask=torch.zeros(40, dtype=torch.bool))
    assert loss == 0
    assert not grad.any()
    loss, grad = run(functional.pkt, S[:0], T[:0])
    assert loss == 0
    assert grad.shape == (0, 6)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float64, 1e-7), (torch.float32, 1e-2)], ids=str)
def test_opposite_samples(backend, dtype, eps):
    """The lengths' eps leaves a little of a probability of 0."""
    student = torch.tensor([[2.0, 0], [-3, 0]], dtype=dtype)
    loss, grad = run(functional.pkt, student, torch.ones(2, 3, dtype=dtype), eps=eps)
    lengths = [length / (length + eps) for length in (2.0, 3.0)]
    other = (1 - math.prod(lengths)) / 2
    terms = []
    for length in lengths:
        itself = (1 + length**2) / 2
        terms += [0.5 * math.log((0.5 + eps) / (k / (itself + other) + eps)) for k in (itself, other)]
    assert loss.item() == pytest.approx(sum(terms) / 4, rel=1e-5)
    assert grad.isfinite().all()


def test_opposite_samples_whose_eps_rounding_hides(backend):
    """log(1/2 / eps) where their cosine is -1 to the last digit, log(1/2 / 2 eps) where it is next to it."""
    loss, grad = run(functional.pkt, torch.tensor([[2.0, 0], [-3, 0]]), torch.ones(2, 3))
    most, least = (0.25 * math.log(0.5 / eps) + 0.25 * math.log(0.5) for eps in (1e-7, 2e-7))
    assert least * (1 - 1e-5) <= loss <= most * (1 + 1e-5)
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
@pytest.mark.parametrize("eps", [1e-7, 1e-3, 0.3])
def test_eps_is_added_to_lengths_and_probabilities(backend, eps, dtype):
    """Of rows far below it, about as long, far above it, and of zeros."""
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([1e-30, 1e-9, 1e-7, 1e-4, 1e-3, 1.0, 1.0, 1e3, 1e25, 0.0])[:, None]
    student, teacher = ((x * torch.randn(10, 5, generator=generator)).to(dtype) for x in (sizes, sizes.flip(0)))
    loss, grad = run(functional.pkt, student, teacher, eps=eps)
    expected, expected_grad = TRUTH["pkt"](student, teacher, eps=eps)
    assert error(loss, expected) <= PROMISED[dtype]
    for row, expected_row in zip(grad, expected_grad, strict=True):
        assert error(row, expected_row) <= 10 * PROMISED[dtype]
    published_loss, published_grad = published("pkt", student[:9], teacher[:9], eps=eps)
    loss, grad = run(functional.pkt, student[:9], teacher[:9], eps=eps)
    assert error(loss, published_loss) <= PROMISED[dtype] + 1e-14 / abs(published_loss.item())
    for row, expected_row in zip(grad, published_grad, strict=True):
        assert error(row, expected_row) <= 10 * PROMISED[dtype] + 1e-9


def test_nearly_opposite_samples(backend):
    """What rounding leaves of a probability of 0 is of the size of eps: the logarithm stays that of a small number."""
    x = torch.randn(1, 7, generator=torch.Generator().manual_seed(3))
    loss, grad = run(functional.pkt, torch.cat([x, -x, -2 * x]), torch.ones(3, 3))
    assert loss.isfinite()
    assert loss > 1
    assert grad.isfinite().all()


def test_value_by_hand(backend):
    """Orthogonal samples against equal ones: probabilities 2/3 and 1/3 against 1/2."""
    loss = functional.pkt(torch.eye(2), torch.ones(2, 3))
    assert loss.item() == pytest.approx((math.log(3 / 4) + math.log(3 / 2)) / 4, rel=1e-5)


def test_gradcheck(backend):
    student, teacher = (x[:5].double() for x in (S, T))
    options = {"mask": torch.arange(5) < 4, "weight": torch.rand(5), "eps": 0.5}
    assert gradcheck(backend, lambda s: functional.pkt(s, teacher, **options), student.requires_grad_())


def test_module_takes_mask_weight_and_eps():
    options = {"mask": torch.rand(40) < 0.7, "weight": torch.rand(40)}
    assert torch.equal(fastkd.PKTLoss()(S, T, **options), functional.pkt(S, T, **options))
    assert torch.equal(fastkd.PKTLoss(eps=0.1)(S, T, **options), functional.pkt(S, T, eps=0.1, **options))
    assert "eps=0.1" in repr(fastkd.PKTLoss(eps=0.1))


@pytest.mark.parametrize(
    ("eps", "kind", "message"),
    [
        (0, ValueError, "eps: a positive finite number wanted, got 0"),
        (math.inf, ValueError, "eps: a positive finite number wanted, got inf"),
        (1e-40, ValueError, "eps: a number of at least 1e-37 wanted, got 1e-40"),
        ("1", TypeError, "eps: a number wanted, got str"),
    ],
)
def test_bad_eps(eps, kind, message):
    for call in (lambda: functional.pkt(S, T, eps=eps), lambda: fastkd.PKTLoss(eps=eps)):
        with pytest.raises(kind, match=f"^{message}"):
            call()


BAD = {
    "vector": ((S[0], T), {}, ValueError, r"student: embeddings of shape \[N, D\] wanted, got \[6\]"),
    "rows": ((S, T[:3]), {}, ValueError, "teacher: the student's 40 rows wanted, got 3"),
    "dtype": ((S, T.long()), {}, TypeError, "teacher: float16, .* embeddings wanted"),
    "nan": ((S / 0, T), {}, ValueError, "student: finite embeddings wanted"),
    "mask_shape": ((S, T), {"mask": torch.ones(3) > 0}, ValueError, r"mask: a shape that broadcasts to \[40\] wanted, one per row; got \[3\]"),
    "mask_dtype": ((S, T), {"mask": torch.ones(40)}, TypeError, "mask: torch.bool wanted"),
    "weight_shape": ((S, T), {"weight": torch.ones(40, 1)}, ValueError, r"weight: a shape that broadcasts to \[40\] wanted"),
    "weight_dtype": ((S, T), {"weight": torch.ones(40).int()}, TypeError, "weight: a floating dtype wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("loss", [functional.pkt, fastkd.PKTLoss()], ids=["function", "module"])
def test_bad_input(loss, name):
    given, options, kind, message = BAD[name]
    with pytest.raises(kind, match=f"^{message}"):
        loss(*given, **options)


def test_the_strips_op_checks_its_own_contract():
    rows = [torch.rand(9) for _ in range(5)]
    slopes = torch.zeros(9, dtype=torch.float64)
    right = [torch.randn(3, 7), torch.randn(3, 7), slopes, *rows, 1e-7, 2]
    for at, wrong in ((0, torch.randn(3, 7).bfloat16()), (1, torch.randn(7, 3).T), (1, torch.randn(2, 7)), (2, slopes.float()),
                      (4, rows[0][:8]), (8, 0.0), (8, math.nan), (9, 3), (9, -1)):  # fmt: skip
        with pytest.raises(RuntimeError, match="wanted"):
            torch.ops.fastkd.pkt_strip_(*right[:at], wrong, *right[at + 1 :])
    for eps in (0.0, -1.0, math.nan):
        with pytest.raises(RuntimeError, match="eps: "):
            torch.ops.fastkd.pkt_fwd(S, T, as_tensor(eps), None, None, "fastkd", True)
